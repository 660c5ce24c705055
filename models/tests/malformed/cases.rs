//! Lies that a file could tell on purpose, one by one.

use serde_json::{Value, json};

use crate::folder::{self, bytes, files};
use crate::gguf::{self, F32, Gguf, Setting, model};

fn refused(gguf: &Gguf) -> String {
    gguf::outcome(&gguf.bytes().0, "a file that lies").expect_err("the file lies")
}

/// The header of a file that claims these counts.
fn counts(tensors: u64, settings: u64) -> Vec<u8> {
    [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &settings.to_le_bytes()].concat()
}

#[test]
fn counts_beyond_the_file_cost_no_memory() {
    for count in [u64::MAX, 1 << 60, 1 << 32, 1 << 20] {
        for mut header in [counts(count, 0), counts(0, count)] {
            let error = gguf::outcome(&header, "a count").unwrap_err();
            assert!(error.contains(&count.to_string()), "{error}");
            // As many as such a file could hold, were its bytes what it says.
            header.resize(1 << 22, 0);
            assert!(gguf::outcome(&header, "a count").is_err());
        }
    }
    let most = (1u64 << 22) / 33;
    for mut header in [counts(most, 0), counts(0, most)] {
        header.resize(24 + (1 << 22), 0);
        assert!(gguf::outcome(&header, "as many as fit").is_err());
    }
}

#[test]
fn strings_and_arrays_beyond_the_file_are_refused() {
    for length in [1u64 << 60, u64::MAX, 1 << 31] {
        let mut name = counts(0, 1);
        name.extend(length.to_le_bytes());
        name.resize(4096, b'a');
        assert!(gguf::outcome(&name, "a name").unwrap_err().contains("needs"), "{length}");
        for element in [0u32, 4, 8, 9, 12] {
            let mut array = counts(0, 1);
            array.extend(1u64.to_le_bytes());
            array.push(b'k');
            array.extend([9u32, element].iter().flat_map(|number| number.to_le_bytes()));
            array.extend(length.to_le_bytes());
            array.resize(4096, 0);
            assert!(gguf::outcome(&array, "an array").unwrap_err().contains(&length.to_string()));
        }
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    let with = |sizes: &[u64]| {
        let mut gguf = model("llama");
        gguf.tensors.push(("more".into(), F32, sizes.to_vec()));
        gguf
    };
    for sizes in [&[1 << 63, 2][..], &[1 << 32, 1 << 32], &[u64::MAX], &[0, 4], &[1 << 62, 4, 4, 4]] {
        assert!(refused(&with(sizes)).contains("impossible shape"), "{sizes:?}");
    }
    assert!(refused(&with(&[1; 5])).contains("5 dimensions"));
    assert!(refused(&with(&[1 << 40])).contains("file has only"));
    let (mut file, _) = with(&[4]).bytes();
    let name = file.windows(4).position(|bytes| bytes == b"more").unwrap();
    file[name + 4..name + 8].copy_from_slice(&(1u32 << 31).to_le_bytes());
    assert!(gguf::outcome(&file, "dimensions").unwrap_err().contains("2147483648 dimensions"));
}

#[test]
fn alignments_that_are_none_are_refused() {
    for alignment in [0, 3, 33, u32::MAX, 1 << 31] {
        let gguf = model("llama").set("general.alignment", Setting::Int(alignment));
        assert!(refused(&gguf).contains("alignment"), "{alignment}");
    }
    assert!(
        refused(&model("llama").set("general.alignment", Setting::Text("32".into()))).contains("alignment")
    );
}

#[test]
fn a_setting_or_tensor_that_is_there_twice_is_named() {
    let mut twice = model("llama");
    twice.settings.push(("llama.block_count".into(), Setting::Int(2)));
    assert!(refused(&twice).contains("'llama.block_count' occurs twice"));
    let mut twice = model("llama");
    twice.tensors.push(("output_norm.weight".into(), F32, vec![32]));
    assert!(refused(&twice).contains("'output_norm.weight' occurs twice"));
}

#[test]
fn sizes_that_no_model_has_are_refused_by_name() {
    for (key, value, words) in [
        ("attention.head_count", 0, "head count"),
        ("attention.head_count", u32::MAX, "head count"),
        ("attention.head_count_kv", 0, "key-value head count"),
        ("attention.head_count_kv", 3, "cannot share"),
        ("embedding_length", 0, "model width"),
        ("embedding_length", u32::MAX, "model width"),
        ("block_count", 0, "layer count"),
        ("block_count", u32::MAX, "layer count"),
        ("block_count", 4096, "is missing"),
        ("context_length", 0, "context"),
        ("context_length", u32::MAX, "context"),
        ("feed_forward_length", 0, "feed-forward width"),
        ("rope.dimension_count", 0, "rotation"),
        ("rope.dimension_count", 15, "rotation"),
        ("rope.dimension_count", u32::MAX, "rotation"),
        ("rope.scaling.original_context_length", 0, "original context"),
    ] {
        let error = refused(&model("llama").set(&format!("llama.{key}"), Setting::Int(value)));
        assert!(error.contains(words), "{key} = {value}: {error}");
    }
    let both = |length| {
        let gguf = model("llama").set("llama.attention.key_length", Setting::Int(length));
        refused(&gguf.set("llama.attention.value_length", Setting::Int(length)))
    };
    assert!(both(1_000_000_000).contains("head width") && both(0).contains("head width"));
    // Of 64 bits, and so no size at all.
    let long = model("llama").set("llama.block_count", Setting::Long(1 << 40));
    assert!(refused(&long).contains("llama.block_count"));
    for (key, value, words) in [
        ("expert_count", 0, "experts"),
        ("expert_count", u32::MAX, "experts"),
        ("expert_used_count", 5, "experts"),
        ("expert_used_count", 0, "experts"),
        ("expert_feed_forward_length", 0, "experts"),
    ] {
        let error = refused(&model("qwen3moe").set(&format!("qwen3moe.{key}"), Setting::Int(value)));
        assert!(error.contains(words), "{key} = {value}: {error}");
    }
}

#[test]
fn factors_that_are_no_numbers_are_refused() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        for key in
            ["rope.scaling.factor", "rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.scale"]
        {
            let error = refused(&model("llama").set(&format!("llama.{key}"), Setting::Float(value)));
            assert!(error.contains("rope") || error.contains("cannot be right"), "{key} = {value}: {error}");
        }
    }
}

#[test]
fn tokens_that_do_not_fit_together_are_refused() {
    let more = |values| model("llama").set("tokenizer.ggml.token_type", Setting::Ints(values));
    assert!(refused(&more(vec![1; 3])).contains("3 values"));
    let merges = |merges: &[&str]| {
        let texts = merges.iter().map(|merge| (*merge).to_owned()).collect();
        refused(&model("llama").set("tokenizer.ggml.merges", Setting::Texts(texts)))
    };
    assert!(merges(&["a b", "nonsense"]).contains("'nonsense'"));
    assert!(merges(&["a zz"]).contains("'a zz'") && merges(&[""]).contains("merge"));
    assert!(
        refused(&model("gemma3").set("tokenizer.ggml.scores", Setting::Floats(vec![0.0; 2])))
            .contains("2 values")
    );
    // Ids that are no tokens are as good as none.
    for key in ["bos", "eos", "eot", "unknown"] {
        let gguf = model("llama").set(&format!("tokenizer.ggml.{key}_token_id"), Setting::Int(u32::MAX));
        gguf::outcome(&gguf.bytes().0, key).unwrap();
        let gguf = model("gemma3").set(&format!("tokenizer.ggml.{key}_token_id"), Setting::Int(1 << 30));
        gguf::outcome(&gguf.bytes().0, key).unwrap();
    }
    // A ring: each of these makes another's part.
    let mut ring = model("llama");
    ring = ring.set(
        "tokenizer.ggml.merges",
        Setting::Texts(["a b", "ab c", "a b", "ab c"].map(String::from).to_vec()),
    );
    let _ = gguf::outcome(&ring.bytes().0, "merges in a ring");
}

#[test]
fn an_index_leads_nowhere_but_to_the_files_beside_it() {
    let index =
        |map: Value| folder::outcome_with("model.safetensors.index.json", bytes(&json!({"weight_map": map})));
    for file in [
        "../one.safetensors",
        "/etc/passwd",
        "sub/one.safetensors",
        "..",
        ".",
        "",
        "\\\\x",
        "./one.safetensors",
    ] {
        let error = index(json!({"a": file})).unwrap_err();
        assert!(error.contains("plain file name") || error.contains("cannot read"), "'{file}': {error}");
    }
    assert!(index(json!({"a": "three.safetensors"})).unwrap_err().contains("three.safetensors"));
    assert!(index(json!({"a": "one.safetensors"})).unwrap_err().contains("'a' is missing"));
    assert!(index(json!({"a": 1})).unwrap_err().contains("JSON"));
    assert!(index(json!({"a": "config.json"})).unwrap_err().contains("config.json"));
    assert!(index(json!({})).unwrap_err().contains("is missing"));
}

#[test]
fn a_safetensors_header_that_lies_is_refused() {
    let whole = files()["one.safetensors"].clone();
    for length in [0u64, 1, 7, 1 << 20, 1 << 40, u64::MAX] {
        let mut file = whole.clone();
        file[..8].copy_from_slice(&length.to_le_bytes());
        let error = folder::outcome_with("one.safetensors", file).unwrap_err();
        assert!(error.contains("one.safetensors"), "{error}");
    }
    let header = |entry: Value| {
        let text = bytes(&json!({"model.norm.weight": entry}));
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text);
        file.resize(file.len() + 128, 0);
        folder::outcome_with("two.safetensors", file).unwrap_err()
    };
    for (shape, offsets) in [
        (json!([32]), json!([0, 4096])),
        (json!([32]), json!([128, 0])),
        (json!([32]), json!([0, u64::MAX])),
        (json!([u64::MAX, u64::MAX]), json!([0, 128])),
        (json!([0, 1u64 << 63, 1u64 << 63]), json!([0, 0])),
        (json!([0, u64::MAX]), json!([0, 0])),
        (json!([-1]), json!([0, 128])),
        (json!([1.5]), json!([0, 128])),
        (json!("x"), json!([0, 128])),
    ] {
        let error = header(json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
        assert!(error.contains("safetensors"), "{shape} {offsets}: {error}");
    }
}

#[test]
fn a_description_beyond_reason_is_refused() {
    let with = |key: &str, value: Value| {
        let mut config: Value = serde_json::from_slice(&files()["config.json"]).unwrap();
        config[key] = value;
        folder::outcome_with("config.json", bytes(&config))
    };
    for key in
        ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
    {
        for value in [json!(0), json!(-1), json!(u64::MAX), json!(1e300), json!("9"), json!(null), json!([])]
        {
            assert!(with(key, value.clone()).is_err(), "{key} = {value}");
        }
    }
    let scaling = |scaling: Value| with("rope_scaling", scaling);
    for kind in ["linear", "dynamic", "yarn", "llama3", "longrope"] {
        for factor in [json!(0), json!(-4.0), json!(1e300), json!(null)] {
            // What makes no rotation is refused; what is left out may have a meaning.
            let _ =
                scaling(json!({"rope_type": kind, "factor": factor, "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0, "high_freq_factor": 1.0, "long_factor": [0.0], "short_factor": []}));
        }
    }
    let huge = json!({"rope_type": "yarn", "factor": 3e38, "original_max_position_embeddings": 1u64 << 60});
    assert!(scaling(huge).unwrap_err().contains("context"));
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(folder::outcome_with("config.json", deep.into_bytes()).unwrap_err().contains("JSON"));
}

#[test]
fn a_tokenizer_beyond_reason_is_refused() {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer: Value = serde_json::from_slice(&files()["tokenizer.json"]).unwrap();
        change(&mut tokenizer);
        folder::outcome_with("tokenizer.json", bytes(&tokenizer))
    };
    for id in [u64::from(u32::MAX), 1 << 31, 1 << 24, 1 << 40] {
        assert!(with(&|tokenizer| tokenizer["model"]["vocab"]["a"] = json!(id)).is_err(), "{id}");
        // The library numbers added tokens itself.
        let _ = with(&|tokenizer| tokenizer["added_tokens"][0]["id"] = json!(id));
    }
    assert!(with(&|tokenizer| tokenizer["model"]["merges"] = json!([["a", "nothing"]])).is_err());
    assert!(with(&|tokenizer| tokenizer["model"] = json!({"type": "WordPiece"})).is_err());
    // Found by mutation: each made the library panic.
    assert!(
        with(&|tokenizer| tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = json!("<none>"))
            .is_err()
    );
    assert!(with(&|tokenizer| tokenizer["model"]["continuing_subword_prefix"] = json!("####")).is_err());
    let nested = (0..90).fold(json!(1), |inner, _| json!([inner]));
    assert!(with(&|tokenizer| tokenizer["decoder"]["trim_offsets"] = nested.clone()).is_err());
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(folder::outcome_with("tokenizer.json", deep.into_bytes()).is_err());
    assert!(folder::outcome_with("tokenizer.json", b"{}".to_vec()).is_err());
}
