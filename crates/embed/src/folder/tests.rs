use super::*;

const CONFIG: &str = r#"{"model_type": "bert", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64, "type_vocab_size": 2}"#;
const MODULES: &str = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;

/// A folder of these files; every name may lead into a folder of its own.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

fn read(files: &[(&str, &str)]) -> Result<Description, LoadError> {
    Description::read(folder(files).path())
}

fn refusal(files: &[(&str, &str)]) -> String {
    read(files).err().unwrap().to_string()
}

#[test]
fn a_bare_encoder_is_pooled_by_the_mean_up_to_its_last_position() {
    let description = read(&[("config.json", CONFIG)]).unwrap();
    assert_eq!(description.pooling, [Pooling::Mean]);
    assert_eq!((description.max_tokens, description.dimensions()), (64, 8));
    assert!(!description.normalise && !description.lowercase && description.prompt.is_empty());
}

#[test]
fn modules_name_poolings_limits_prompts_and_folders() {
    let modules = r#"[{"path": "0_BERT", "type": "sentence_transformers.models.BERT.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
    let description = read(&[
        ("modules.json", modules),
        ("0_BERT/config.json", CONFIG),
        ("0_BERT/sentence_bert_config.json", r#"{"max_seq_length": 32, "do_lower_case": true}"#),
        ("1_Pooling/config.json", r#"{"pooling_mode_max_tokens": true, "pooling_mode_cls_token": true}"#),
        ("config_sentence_transformers.json", r#"{"prompts": {"q": "query: "}, "default_prompt_name": "q"}"#),
    ])
    .unwrap();
    assert_eq!(description.pooling, [Pooling::Cls, Pooling::Max]);
    assert_eq!((description.max_tokens, description.dimensions()), (32, 16));
    assert!(description.normalise && description.lowercase);
    assert_eq!(description.prompt, "query: ");
    assert!(description.transformer.ends_with("0_BERT"));
}

#[test]
fn newer_folders_name_their_pooling_and_the_tokenizer_may_know_the_limit() {
    for (pooling, expected) in [
        (r#"{"pooling_mode": "lasttoken"}"#, vec![Pooling::LastToken]),
        (r#"{"pooling_mode": ["mean", "cls"]}"#, vec![Pooling::Mean, Pooling::Cls]),
        ("{}", vec![Pooling::Mean]),
    ] {
        for (limit, tokens) in [("48", 48), ("1e30", 64)] {
            let tokenizer = format!(r#"{{"model_max_length": {limit}}}"#);
            let description = read(&[
                ("modules.json", MODULES),
                ("config.json", CONFIG),
                ("1_Pooling/config.json", pooling),
                ("tokenizer_config.json", &tokenizer),
            ])
            .unwrap();
            assert_eq!((description.pooling, description.max_tokens), (expected.clone(), tokens));
        }
    }
}

#[test]
fn other_architectures_are_named_with_what_is_supported() {
    for kind in ["xlm-roberta", "modernbert", "nomic_bert"] {
        let said = refusal(&[("config.json", &format!(r#"{{"model_type": "{kind}"}}"#))]);
        assert!(said.contains(kind) && said.contains("supported: bert"), "{said}");
    }
    for (key, value) in [
        ("position_embedding_type", r#""relative_key""#),
        ("hidden_act", r#""silu""#),
        ("is_decoder", "true"),
    ] {
        let said =
            refusal(&[("config.json", &format!("{}, \"{key}\": {value}}}", &CONFIG[..CONFIG.len() - 1]))]);
        assert!(
            said.contains("not supported") && said.contains(value.trim_matches('"')) || key == "is_decoder"
        );
    }
}

#[test]
fn values_that_no_encoder_has_are_named_and_not_computed_with() {
    for (from, to, expected) in [
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 0", "num_attention_heads is 0"),
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 3", "among 3 heads"),
        ("\"hidden_size\": 8", "\"hidden_size\": 99999999999", "hidden_size is 99999999999"),
        ("\"vocab_size\": 100, ", "", "vocab_size"),
    ] {
        let said = refusal(&[("config.json", &CONFIG.replace(from, to))]);
        assert!(said.contains(expected) && said.contains("config.json"), "{said}");
    }
    let said = refusal(&[("config.json", CONFIG), ("sentence_bert_config.json", r#"{"max_seq_length": 0}"#)]);
    assert!(said.contains("max_seq_length"), "{said}");
}

#[test]
fn modules_that_cannot_be_followed_are_named() {
    let with = |modules: &str| refusal(&[("config.json", CONFIG), ("modules.json", modules)]);
    let transformer = r#"{"path": "", "type": "x.Transformer"}"#;
    assert!(with(&format!(r#"[{transformer}, {{"path": "2_Dense", "type": "x.Dense"}}]"#)).contains("Dense"));
    assert!(with(r#"[{"path": "../elsewhere", "type": "x.Transformer"}]"#).contains("leads out"));
    assert!(with(&format!("[{transformer}]")).contains("no Pooling"));
    let pooling = r#"{"pooling_mode": "attention"}"#;
    let said =
        refusal(&[("config.json", CONFIG), ("modules.json", MODULES), ("1_Pooling/config.json", pooling)]);
    assert!(said.contains("\"attention\"") && said.contains("weightedmean"), "{said}");
    let said = refusal(&[
        ("config.json", CONFIG),
        ("config_sentence_transformers.json", r#"{"prompts": {}, "default_prompt_name": "query"}"#),
    ]);
    assert!(said.contains("'query'"), "{said}");
}

#[test]
fn a_place_without_a_model_says_what_belongs_there() {
    let empty = tempfile::tempdir().unwrap();
    assert!(Description::read(empty.path()).err().unwrap().to_string().contains("config.json"));
    let file = empty.path().join("model.gguf");
    std::fs::write(&file, "GGUF").unwrap();
    assert!(
        Description::read(&file).err().unwrap().to_string().contains("a folder as sentence-transformers")
    );
}
