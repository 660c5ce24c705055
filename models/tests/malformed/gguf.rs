//! Small GGUF files of several families, and what mutations make of them.

use dormouse_models::config::{NameScheme, Role};

use crate::mutations::{Dice, mutate};
use crate::{hold_to_account, mutations, seed};

pub enum Setting {
    Bool(bool),
    Float(f32),
    Floats(Vec<f32>),
    Int(u32),
    Ints(Vec<u32>),
    Long(u64),
    Text(String),
    Texts(Vec<String>),
}

/// A file to be: whatever is put in, right or wrong.
#[derive(Default)]
pub struct Gguf {
    pub settings: Vec<(String, Setting)>,
    /// Name, type number, sizes with the fastest first.
    pub tensors: Vec<(String, u32, Vec<u64>)>,
}

pub const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
const Q8_0: u32 = 8;

impl Gguf {
    /// Replaces a setting or adds it.
    pub fn set(mut self, key: &str, value: Setting) -> Gguf {
        self.settings.retain(|(other, _)| other != key);
        self.settings.push((key.to_owned(), value));
        self
    }

    /// The file, and how much of it is before the tensors' data.
    pub fn bytes(&self) -> (Vec<u8>, usize) {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.settings.len() as u64).to_le_bytes());
        for (key, value) in &self.settings {
            string(&mut out, key);
            setting(&mut out, value);
        }
        let mut offset = 0u64;
        for (name, ty, sizes) in &self.tensors {
            string(&mut out, name);
            out.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(ty.to_le_bytes());
            out.extend(offset.to_le_bytes());
            let (block, bytes) = match *ty {
                F16 => (1, 2),
                Q4_0 => (32, 18),
                Q8_0 => (32, 34),
                _ => (1, 4),
            };
            let values = sizes.iter().fold(1, |product: u64, size| product.saturating_mul(*size));
            offset = (offset + (values / block).saturating_mul(bytes).min(1 << 20)).next_multiple_of(32);
        }
        let head = out.len();
        out.resize(head.next_multiple_of(32), 0);
        // Numbers near 0.01 as F32, near 1 as F16.
        out.resize(out.len() + offset as usize, 0x3c);
        (out, head)
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn setting(out: &mut Vec<u8>, value: &Setting) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, element: u32, count: usize| {
        kind(out, 9);
        kind(out, element);
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Setting::Bool(value) => {
            kind(out, 7);
            out.push(u8::from(*value));
        }
        Setting::Float(value) => {
            kind(out, 6);
            out.extend(value.to_le_bytes());
        }
        Setting::Floats(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Setting::Int(value) => {
            kind(out, 4);
            out.extend(value.to_le_bytes());
        }
        Setting::Ints(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Setting::Long(value) => {
            kind(out, 10);
            out.extend(value.to_le_bytes());
        }
        Setting::Text(text) => {
            kind(out, 8);
            string(out, text);
        }
        Setting::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| string(out, text));
        }
    }
}

const WIDTH: u64 = 32;
const HEADS: u64 = 2;
const FEED_FORWARD: u64 = 64;

/// A whole model of two layers in a family's own shape.
pub fn model(family: &str) -> Gguf {
    let sentence_piece = matches!(family, "gemma3" | "phi3");
    let gguf = if sentence_piece { sentence_piece_tokenizer() } else { byte_level_tokenizer() };
    let vocabulary = gguf.settings.iter().find_map(|(_, value)| match value {
        Setting::Texts(texts) => Some(texts.len() as u64),
        _ => None,
    });
    let mut gguf = gguf
        .set("general.architecture", Setting::Text(family.into()))
        .set("tokenizer.chat_template", Setting::Text("{{ bos_token }}{{ messages[0].content }}".into()));
    for (name, value) in [
        ("context_length", 256),
        ("embedding_length", WIDTH),
        ("block_count", 2),
        ("feed_forward_length", FEED_FORWARD),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", 1),
    ] {
        gguf = gguf.set(&format!("{family}.{name}"), Setting::Int(value as u32));
    }
    gguf = gguf.set(&format!("{family}.attention.layer_norm_rms_epsilon"), Setting::Float(1e-5));
    let mut own: Vec<(&str, Setting)> = Vec::new();
    match family {
        "llama" => own.extend([
            ("rope.scaling.type", Setting::Text("yarn".into())),
            ("rope.scaling.factor", Setting::Float(4.0)),
            ("rope.scaling.original_context_length", Setting::Int(64)),
        ]),
        "gemma3" => own.extend([
            ("attention.sliding_window", Setting::Int(16)),
            ("attention.key_length", Setting::Int(16)),
            ("attention.value_length", Setting::Int(16)),
            ("rope.freq_base", Setting::Float(1e6)),
        ]),
        "qwen3moe" => own.extend([
            ("expert_count", Setting::Int(4)),
            ("expert_used_count", Setting::Int(2)),
            ("expert_feed_forward_length", Setting::Int(FEED_FORWARD as u32)),
        ]),
        _ => own.push(("rope.dimension_count", Setting::Int(16))),
    }
    for (name, value) in own {
        gguf = gguf.set(&format!("{family}.{name}"), value);
    }
    gguf.tensors = tensors(family, vocabulary.unwrap());
    gguf
}

fn tensors(family: &str, vocabulary: u64) -> Vec<(String, u32, Vec<u64>)> {
    let name = |layer: usize, role: Role| NameScheme::Gguf.name(layer, role);
    let head = WIDTH / HEADS;
    let mut tensors = vec![
        (name(0, Role::TokenEmbedding), Q8_0, vec![WIDTH, vocabulary]),
        (name(0, Role::OutputNorm), F32, vec![WIDTH]),
    ];
    if family == "phi3" {
        tensors.push((name(0, Role::Output), F16, vec![WIDTH, vocabulary]));
        tensors.push(("rope_factors_long.weight".into(), F32, vec![head / 2]));
        tensors.push(("rope_factors_short.weight".into(), F32, vec![head / 2]));
    }
    for layer in 0..2 {
        let mut add = |role: Role, ty: u32, sizes: &[u64]| {
            tensors.push((name(layer, role), ty, sizes.to_vec()));
        };
        add(Role::AttnNorm, F32, &[WIDTH]);
        add(Role::FfnNorm, F32, &[WIDTH]);
        add(Role::AttnOutput, Q4_0, &[WIDTH, WIDTH]);
        match family {
            "phi3" => add(Role::AttnQkv, Q4_0, &[WIDTH, WIDTH + 2 * head]),
            _ => {
                add(Role::AttnQ, Q4_0, &[WIDTH, WIDTH]);
                add(Role::AttnK, Q8_0, &[WIDTH, head]);
                add(Role::AttnV, F16, &[WIDTH, head]);
            }
        }
        match family {
            "phi3" => {
                add(Role::FfnGateUp, Q8_0, &[WIDTH, 2 * FEED_FORWARD]);
                add(Role::FfnDown, Q4_0, &[FEED_FORWARD, WIDTH]);
            }
            "qwen3moe" => {
                add(Role::Router, F32, &[WIDTH, 4]);
                add(Role::ExpertGate(0), Q4_0, &[WIDTH, FEED_FORWARD, 4]);
                add(Role::ExpertUp(0), Q4_0, &[WIDTH, FEED_FORWARD, 4]);
                add(Role::ExpertDown(0), Q8_0, &[FEED_FORWARD, WIDTH, 4]);
            }
            _ => {
                add(Role::FfnGate, Q4_0, &[WIDTH, FEED_FORWARD]);
                add(Role::FfnUp, Q4_0, &[WIDTH, FEED_FORWARD]);
                add(Role::FfnDown, Q4_0, &[FEED_FORWARD, WIDTH]);
            }
        }
        if matches!(family, "gemma3" | "qwen3moe") {
            add(Role::AttnQNorm, F32, &[head]);
            add(Role::AttnKNorm, F32, &[head]);
        }
        if family == "gemma3" {
            add(Role::AttnPostNorm, F32, &[WIDTH]);
            add(Role::FfnPostNorm, F32, &[WIDTH]);
        }
    }
    tensors
}

fn byte_level_tokenizer() -> Gguf {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "ab", "abc", "<s>", "<|im_end|>", "<tool>"].map(String::from));
    let mut kinds = vec![1; tokens.len()];
    let last = kinds.len();
    kinds[last - 3..].copy_from_slice(&[3, 3, 4]);
    Gguf::default()
        .set("tokenizer.ggml.model", Setting::Text("gpt2".into()))
        .set("tokenizer.ggml.pre", Setting::Text("gpt-2".into()))
        .set("tokenizer.ggml.tokens", Setting::Texts(tokens))
        .set("tokenizer.ggml.token_type", Setting::Ints(kinds))
        .set("tokenizer.ggml.merges", Setting::Texts(vec!["a b".into(), "ab c".into()]))
        .set("tokenizer.ggml.bos_token_id", Setting::Int(last as u32 - 3))
        .set("tokenizer.ggml.eos_token_id", Setting::Int(last as u32 - 2))
        .set("tokenizer.ggml.add_bos_token", Setting::Bool(true))
}

fn sentence_piece_tokenizer() -> Gguf {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "▁", "▁a", "ab"].map(String::from).to_vec();
    let mut kinds = vec![2, 3, 3, 1, 1, 1];
    tokens.extend(('a'..='z').map(String::from));
    kinds.resize(tokens.len(), 1);
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), 6);
    let scores = (0..tokens.len()).map(|token| -(token as f32)).collect();
    Gguf::default()
        .set("tokenizer.ggml.model", Setting::Text("llama".into()))
        .set("tokenizer.ggml.tokens", Setting::Texts(tokens))
        .set("tokenizer.ggml.token_type", Setting::Ints(kinds))
        .set("tokenizer.ggml.scores", Setting::Floats(scores))
        .set("tokenizer.ggml.bos_token_id", Setting::Int(1))
        .set("tokenizer.ggml.eos_token_id", Setting::Int(2))
        .set("tokenizer.ggml.unknown_token_id", Setting::Int(0))
}

/// Opens a file of these bytes.
pub fn outcome(bytes: &[u8], what: &str) -> Result<(), String> {
    let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    hold_to_account(file.path(), bytes.len(), what)
}

fn mutations_end_well(family: &str) {
    let (bytes, head) = model(family).bytes();
    outcome(&bytes, family).unwrap();
    let mut opened = 0;
    for round in 0..mutations() {
        let mutated = mutate(&mut Dice::new(seed() << 32 | round), &bytes, head);
        opened += u64::from(outcome(&mutated, &format!("{family}, mutation {round}")).is_ok());
    }
    assert!(opened > 0 && opened < mutations(), "{opened} of {} mutations were opened", mutations());
}

#[test]
fn a_mutated_llama_file_is_read_or_refused() {
    mutations_end_well("llama");
}

#[test]
fn a_mutated_gemma_file_is_read_or_refused() {
    mutations_end_well("gemma3");
}

#[test]
fn a_mutated_file_of_experts_is_read_or_refused() {
    mutations_end_well("qwen3moe");
}

#[test]
fn a_mutated_file_of_fused_matrices_is_read_or_refused() {
    mutations_end_well("phi3");
}
