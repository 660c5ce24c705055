//! A small safetensors folder, and what mutations make of each of its files.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::mutations::{Dice, mutate, mutate_json};
use crate::{hold_to_account, mutations, seed};

/// File names and contents.
pub type Files = BTreeMap<&'static str, Vec<u8>>;

const WIDTH: usize = 32;
const FEED_FORWARD: usize = 48;

/// A whole model of one layer, its tensors in two files.
pub fn files() -> Files {
    let tokens = vocabulary();
    let layer = [
        ("self_attn.q_proj", vec![WIDTH, WIDTH]),
        ("self_attn.k_proj", vec![WIDTH / 2, WIDTH]),
        ("self_attn.v_proj", vec![WIDTH / 2, WIDTH]),
        ("self_attn.o_proj", vec![WIDTH, WIDTH]),
        ("mlp.gate_proj", vec![FEED_FORWARD, WIDTH]),
        ("mlp.up_proj", vec![FEED_FORWARD, WIDTH]),
        ("mlp.down_proj", vec![WIDTH, FEED_FORWARD]),
        ("input_layernorm", vec![WIDTH]),
        ("post_attention_layernorm", vec![WIDTH]),
    ];
    let layer = layer.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape));
    let outer = [
        ("model.embed_tokens.weight".to_owned(), vec![tokens.as_object().unwrap().len() + 2, WIDTH]),
        ("model.norm.weight".to_owned(), vec![WIDTH]),
    ];
    let mut weight_map = BTreeMap::new();
    weight_map.extend(layer.iter().map(|(name, _)| (name.clone(), "one.safetensors")));
    weight_map.extend(outer.iter().map(|(name, _)| (name.clone(), "two.safetensors")));
    let added = |id: usize, content: &str| {
        json!({"id": tokens.as_object().unwrap().len() + id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<s>"), added(1, "<|im_end|>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [tokens.as_object().unwrap().len()], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": tokens, "merges": [["a", "b"], ["ab", "c"]]},
    });
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": tokens.as_object().unwrap().len() + 2, "max_position_embeddings": 256, "num_hidden_layers": 1,
        "intermediate_size": FEED_FORWARD, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
        "rope_theta": 10000.0, "eos_token_id": [2], "head_dim": 16, "layer_types": ["full_attention"],
        "sliding_window": null, "attention_bias": false,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64},
    });
    let settings = json!({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"});
    BTreeMap::from([
        ("config.json", bytes(&config)),
        ("generation_config.json", bytes(&json!({"eos_token_id": 3}))),
        (
            "model.safetensors.index.json",
            bytes(&json!({"metadata": {"total_size": 1}, "weight_map": weight_map})),
        ),
        ("one.safetensors", safetensors(&layer)),
        ("tokenizer.json", bytes(&tokenizer)),
        ("tokenizer_config.json", bytes(&settings)),
        ("two.safetensors", safetensors(&outer)),
    ])
}

fn vocabulary() -> Value {
    let mut tokens: Vec<String> = ('!'..='~').chain(['Ġ', 'Ċ']).map(String::from).collect();
    tokens.extend(["ab", "abc"].map(String::from));
    tokens
        .into_iter()
        .zip(0..)
        .map(|(token, id)| (token, json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

pub fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn safetensors(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let data: Vec<Vec<u8>> =
        tensors.iter().map(|(_, shape)| vec![0x3c; 4 * shape.iter().product::<usize>()]).collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A folder of these files.
pub fn write(files: &Files) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, contents)| std::fs::write(folder.path().join(name), contents).unwrap());
    folder
}

pub fn outcome(folder: &Path, what: &str) -> Result<(), String> {
    let size = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().metadata().unwrap().len() as usize;
    hold_to_account(folder, std::fs::read_dir(folder).unwrap().map(size).sum(), what)
}

/// What comes of the good folder with one file changed.
pub fn outcome_with(name: &'static str, contents: Vec<u8>) -> Result<(), String> {
    let mut files = files();
    files.insert(name, contents);
    outcome(write(&files).path(), name)
}

fn mutations_end_well(names: &[&'static str]) {
    let files = files();
    let folder = write(&files);
    outcome(folder.path(), "the good folder").unwrap();
    let mut opened = 0;
    for round in 0..mutations() {
        let mut dice = Dice::new(seed() << 32 | round);
        let name = *dice.pick(names);
        let whole = &files[name];
        let mutated = if name.ends_with(".json") && dice.below(4) != 0 {
            mutate_json(&mut dice, whole)
        } else {
            let head = if name.ends_with(".json") {
                whole.len()
            } else {
                8 + whole[0] as usize + 256 * whole[1] as usize
            };
            mutate(&mut dice, whole, head)
        };
        let path = folder.path().join(name);
        std::fs::write(&path, mutated).unwrap();
        opened += u64::from(outcome(folder.path(), &format!("{name}, mutation {round}")).is_ok());
        std::fs::write(&path, whole).unwrap();
    }
    assert!(opened > 0 && opened < mutations(), "{opened} of {} mutations were opened", mutations());
}

#[test]
fn a_folder_with_a_mutated_description_is_read_or_refused() {
    mutations_end_well(&["config.json", "generation_config.json", "tokenizer_config.json"]);
}

#[test]
fn a_folder_with_mutated_weights_is_read_or_refused() {
    mutations_end_well(&["model.safetensors.index.json", "one.safetensors", "two.safetensors"]);
}

#[test]
fn a_folder_with_a_mutated_tokenizer_is_read_or_refused() {
    mutations_end_well(&["tokenizer.json"]);
}
