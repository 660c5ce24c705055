//! The decoder against an independent one: candle-transformers' Llama in f32 on the same weights, and against itself
//! in every cut of the work.

#![allow(clippy::unwrap_used)]

mod rig;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor as Candle};
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaEosToks};
use dormouse_kernels::{Cpu, KvDtype, Precision};
use dormouse_models::config::{ModelConfig, NameScheme, Role};
use dormouse_models::decoder::Decoder;
use dormouse_models::gguf::GgufFile;
use dormouse_models::pack::PackedWeights;
use dormouse_models::source::ModelSource;
use dormouse_models::weights::WeightSource;
use rig::Rig;

fn test_model() -> GgufFile {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || concat!(env!("CARGO_MANIFEST_DIR"), "/weights/SmolLM2-135M-Instruct.Q4_1.gguf").into(),
        std::path::PathBuf::from,
    );
    GgufFile::open(&path).unwrap_or_else(|error| panic!("{error}: run scripts/fetch_weights"))
}

/// The rig's logits of the last of `tokens` against candle's of the same weights.
fn assert_close(got: &[f32], expected: &[f32]) {
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    // What remains is the rounding of keys and values to f16, 2⁻¹¹ of each.
    assert!(worst < 4e-3 * scale, "largest difference {worst} on logits up to {scale}");
    let best = |v: &[f32]| (0..v.len()).max_by(|a, b| v[*a].total_cmp(&v[*b]));
    assert_eq!(best(got), best(expected));
}

fn candle_logits(config: &Config, tensors: HashMap<String, Candle>, tokens: &[u32]) -> Vec<f32> {
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let llama = Llama::load(builder, config).unwrap();
    let mut cache = Cache::new(false, DType::F32, config, &Device::Cpu).unwrap();
    let input = Candle::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    llama.forward(&input, 0, &mut cache).unwrap().squeeze(0).unwrap().to_vec1().unwrap()
}

fn decoder(source: &dyn WeightSource, config: ModelConfig) -> Decoder {
    Decoder::new(source, &PackedWeights::in_memory(source).unwrap(), config).unwrap()
}

fn test_decoder() -> Decoder {
    let file = test_model();
    decoder(&file, ModelConfig::from_gguf(&file).unwrap())
}

/// Token ids that are real words of the vocabulary, without asking the tokenizer.
fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 300 + i.wrapping_mul(2_654_435_761) % 40_000).collect()
}

/// Fine enough to be held against f32 arithmetic.
fn cpu(threads: usize) -> Cpu {
    Cpu::new(threads).unwrap().with_precision(Precision::Int16)
}

#[test]
fn logits_equal_those_of_candle_in_f32_on_the_same_weights() {
    let file = test_model();
    let config = ModelConfig::from_gguf(&file).unwrap();
    let tensors: HashMap<String, Candle> = (0..config.layers)
        .flat_map(|layer| {
            use Role::*;
            [AttnNorm, AttnQ, AttnK, AttnV, AttnOutput, FfnNorm, FfnGate, FfnUp, FfnDown]
                .map(|role| (layer, role))
        })
        .chain([(0, Role::TokenEmbedding), (0, Role::OutputNorm)])
        .map(|(layer, role)| {
            let tensor = file.tensor(&NameScheme::Gguf.name(layer, role)).unwrap();
            let mut values = tensor.to_f32();
            let (rows, cols, hd) = (tensor.rows, tensor.cols, config.head_dim);
            if matches!(role, Role::AttnQ | Role::AttnK) {
                // GGUF permutes these rows for interleaved rotation; candle rotates halves.
                let from = values.clone();
                for row in 0..rows {
                    let (head, i) = (row / hd * hd, row % hd);
                    let source = head + 2 * (i % (hd / 2)) + i / (hd / 2);
                    values[row * cols..][..cols].copy_from_slice(&from[source * cols..][..cols]);
                }
            }
            let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            (
                NameScheme::HuggingFace { post_norms: false }.name(layer, role),
                Candle::from_vec(values, shape, &Device::Cpu).unwrap(),
            )
        })
        .collect();
    let candle_config = Config {
        hidden_size: config.d_model,
        intermediate_size: config.d_ff,
        vocab_size: config.vocab,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.kv_heads,
        use_flash_attn: false,
        rms_norm_eps: f64::from(config.norm_eps),
        rope_theta: config.rope.theta,
        bos_token_id: None,
        eos_token_id: None::<LlamaEosToks>,
        rope_scaling: None,
        max_position_embeddings: config.context,
        tie_word_embeddings: true,
    };
    let tokens = prompt(150);
    let expected = candle_logits(&candle_config, tensors, &tokens);
    let got = Rig::new(&test_decoder(), KvDtype::F16, 192).append(&cpu(2), &tokens).pop().unwrap();
    assert_close(&got, &expected);
}

#[test]
fn a_safetensors_folder_with_llama3_rope_scaling_equals_candle_in_f32() {
    let config_json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 2048, "num_hidden_layers": 3, "intermediate_size": 136,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64},
    });
    let (d, ff, kv, vocab) = (96, 136, 48, 320);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, d]),
        ("model.norm.weight".to_owned(), vec![d]),
        ("lm_head.weight".to_owned(), vec![vocab, d]),
    ];
    for layer in 0..3 {
        for (part, shape) in [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", vec![d, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, d]),
            ("post_attention_layernorm", vec![d]),
            ("mlp.gate_proj", vec![ff, d]),
            ("mlp.up_proj", vec![ff, d]),
            ("mlp.down_proj", vec![d, ff]),
        ] {
            shapes.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let tensors: HashMap<String, Candle> = shapes
        .into_iter()
        .map(|(name, shape)| {
            // Norm weights near one, the rest of a size that keeps activations of order one.
            let (centre, spread) = if shape.len() == 1 { (1.0, 0.3) } else { (0.0, 0.25) };
            let values: Vec<f32> = (0..shape.iter().product::<usize>())
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    centre + spread * ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
                })
                .collect();
            (name, Candle::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config_json.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();

    let candle_config: candle_transformers::models::llama::LlamaConfig =
        serde_json::from_value(config_json).unwrap();
    let tokens: Vec<u32> = (0..190).map(|i| i * 7919 % 320).collect();
    let expected = candle_logits(&candle_config.into_config(false), tensors, &tokens);

    let source = ModelSource::open(folder.path()).unwrap();
    let decoder = decoder(&source, source.config().unwrap());
    let got = Rig::new(&decoder, KvDtype::F16, 192).append(&cpu(2), &tokens).pop().unwrap();
    assert_close(&got, &expected);
}

#[test]
fn logits_are_the_same_bits_in_one_prefill_in_chunks_and_token_by_token() {
    let tokens = prompt(140);
    let decoder = test_decoder();
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let whole = Rig::new(&decoder, dtype, 192).append(&cpu(2), &tokens);
        let cpu = cpu(1);
        let mut rig = Rig::new(&decoder, dtype, 192);
        let mut pieces = Vec::new();
        for piece in [&tokens[..7], &tokens[7..100], &tokens[100..128]] {
            pieces.extend(rig.append(&cpu, piece));
        }
        for token in &tokens[128..] {
            pieces.extend(rig.append(&cpu, &[*token]));
        }
        for (position, (a, b)) in whole.iter().zip(&pieces).enumerate() {
            let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} position {position}", dtype.name());
        }
    }
}

#[test]
fn a_piece_of_a_prompt_that_takes_some_layers_at_a_time_beside_other_rows_has_the_same_bits() {
    let (tokens, talk) = (prompt(90), prompt(40)[20..].to_vec());
    let decoder = test_decoder();
    let layers = decoder.config().layers;
    let (cpu, rig) = (cpu(2), || Rig::new(&decoder, KvDtype::F16, 128));
    let whole = rig().append(&cpu, &tokens);
    let talked = rig().append(&cpu, &talk);
    // Cut anywhere; with rows beside the last layers, beside the first ones, or never any.
    for (ends, said) in
        [(vec![1, 2, 9, layers], 4), (vec![layers], 1), (vec![7, layers], 1), (vec![4, layers], 0)]
    {
        let (mut talker, mut reader) = (rig(), rig());
        talker.append(&cpu, &talk[..10]);
        let mut got = reader.append(&cpu, &tokens[..30]);
        let own = &talk[10..10 + said];
        let mut logits = talker.append_beside(&cpu, own, (&mut reader, &tokens[30..70]), &ends);
        got.extend(logits.split_off(said));
        got.extend(reader.append(&cpu, &tokens[70..]));
        let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        assert!(bits(&logits) == bits(&talked[10..10 + said]), "the talker's, {ends:?}");
        assert!(bits(&got) == bits(&whole), "the reader's, {ends:?}");
    }
}
