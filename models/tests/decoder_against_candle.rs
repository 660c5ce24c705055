//! The decoder against an independent one: candle-transformers' Llama in f32 on the same weights, and against itself
//! in every cut of the work.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor as Candle};
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaEosToks};
use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PagePtr};
use dormouse_models::config::{ModelConfig, NameScheme, Role};
use dormouse_models::decoder::{Activations, Batch, Decoder};
use dormouse_models::gguf::GgufFile;
use dormouse_models::weights::WeightSource;

fn test_model() -> GgufFile {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || concat!(env!("CARGO_MANIFEST_DIR"), "/weights/SmolLM2-135M-Instruct.Q4_1.gguf").into(),
        std::path::PathBuf::from,
    );
    GgufFile::open(&path).unwrap_or_else(|error| panic!("{error}: run scripts/fetch_weights"))
}

/// One sequence with pages in plain memory.
struct Rig {
    decoder: Decoder,
    dtype: KvDtype,
    _memory: Vec<Vec<u32>>,
    pages: Vec<PagePtr>,
    len: usize,
    work: Activations,
}

impl Rig {
    fn new(dtype: KvDtype, positions: usize) -> Rig {
        let file = test_model();
        let decoder = Decoder::new(&file, ModelConfig::from_gguf(&file).unwrap()).unwrap();
        let bytes = decoder.page_layout(dtype).page_bytes();
        let mut memory = vec![vec![0u32; bytes / 4]; positions.div_ceil(PAGE_TOKENS)];
        // SAFETY: the vectors hold a page each and live as long as the rig.
        let pages = memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
        Rig { decoder, dtype, _memory: memory, pages, len: 0, work: Activations::default() }
    }

    /// Appends `tokens` and returns the logits of each.
    fn append(&mut self, cpu: &Cpu, tokens: &[u32]) -> Vec<Vec<f32>> {
        let sequence = Sequence { pages: &self.pages, first_row: 0, rows: tokens.len(), start: self.len };
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch { tokens, sequences: &[sequence], logit_rows: &rows };
        self.decoder.forward(cpu, &self.decoder.page_layout(self.dtype), &batch, &mut self.work);
        self.len += tokens.len();
        let vocab = self.decoder.config().vocab;
        self.work.logits_mut().chunks(vocab).map(<[f32]>::to_vec).collect()
    }
}

/// Token ids that are real words of the vocabulary, without asking the tokenizer.
fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 300 + i.wrapping_mul(2_654_435_761) % 40_000).collect()
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
                NameScheme::HuggingFace.name(layer, role),
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
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let llama = Llama::load(builder, &candle_config).unwrap();
    let tokens = prompt(150);
    let mut cache = Cache::new(false, DType::F32, &candle_config, &Device::Cpu).unwrap();
    let input = Candle::new(tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let expected: Vec<f32> =
        llama.forward(&input, 0, &mut cache).unwrap().squeeze(0).unwrap().to_vec1().unwrap();

    let cpu = Cpu::new(2).unwrap();
    let mut rig = Rig::new(KvDtype::F16, 192);
    let got = rig.append(&cpu, &tokens).pop().unwrap();
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    // What remains is the rounding of keys and values to f16, 2⁻¹¹ of each.
    assert!(worst < 4e-3 * scale, "largest difference {worst} on logits up to {scale}");
    let best = |v: &[f32]| (0..v.len()).max_by(|a, b| v[*a].total_cmp(&v[*b]));
    assert_eq!(best(&got), best(&expected));
}

#[test]
fn logits_are_the_same_bits_in_one_prefill_in_chunks_and_token_by_token() {
    let tokens = prompt(140);
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let whole = Rig::new(dtype, 192).append(&Cpu::new(2).unwrap(), &tokens);
        let cpu = Cpu::new(1).unwrap();
        let mut rig = Rig::new(dtype, 192);
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
