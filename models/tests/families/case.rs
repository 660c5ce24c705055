//! The tiny models: their made-up weights, and the logits that `transformers` computed for them.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dormouse_models::decoder::Decoder;
use dormouse_models::pack::PackedWeights;
use dormouse_models::source::ModelSource;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::gguf_file::GgufDescription;

/// Of the largest logit at a position. What remains is the rounding of f32 sums taken in another order, and of the keys
/// and values that those carry over an edge between two f16 numbers.
const TOLERANCE: f32 = 1e-4;

/// One tiny model.
#[derive(serde::Deserialize)]
pub struct Case {
    pub config: serde_json::Value,
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// Length of the prompt.
    pub positions: usize,
    /// The same model in a GGUF file, where one can describe it.
    pub gguf: Option<GgufDescription>,
    #[serde(skip)]
    pub name: String,
    /// `[..][vocab]`, of the last positions of a long prompt, of all of a short one.
    #[serde(skip)]
    expected: Vec<Vec<f32>>,
}

/// Elsewhere where the tests run on another machine than they were built on.
fn folder() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families/expected");
    std::env::var_os("DORMOUSE_TEST_FAMILIES").map_or_else(here, PathBuf::from)
}

pub fn case(name: &str) -> Case {
    let mut case: Case =
        serde_json::from_slice(&std::fs::read(folder().join(format!("{name}.json"))).unwrap()).unwrap();
    let bytes = std::fs::read(folder().join(format!("{name}.logits"))).unwrap();
    let logits: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    case.expected = logits.chunks(case.vocab()).map(<[f32]>::to_vec).collect();
    case.name = name.to_owned();
    case
}

pub fn cases() -> Vec<Case> {
    let mut names: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .filter_map(|entry| Some(entry.unwrap().file_name().to_str()?.strip_suffix(".json")?.to_owned()))
        .collect();
    names.sort();
    names.iter().map(|name| case(name)).collect()
}

/// The numbers from -128 to 127 that belong to a name, as in `generate.py`: splitmix64 seeded with FNV-1a.
fn numbers(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    (1..=count as u64).map(move |i| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 56) as f32 - 128.0
    })
}

impl Case {
    fn vocab(&self) -> usize {
        self.config["vocab_size"].as_u64().unwrap() as usize
    }

    pub fn prompt(&self) -> Vec<u32> {
        numbers("prompt", self.positions)
            .map(|number| (number as i32 + 128) as u32 % self.vocab() as u32)
            .collect()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        let gemma = self.config["model_type"].as_str().unwrap().starts_with("gemma");
        let value = |drawn: f32| {
            if name.ends_with("norm.weight") {
                f32::from(u8::from(!gemma)) + (drawn / 4.0).floor() / 128.0
            } else if name.ends_with(".bias") {
                drawn / 1024.0
            } else if name.contains("embed") {
                drawn / 128.0
            } else if name.contains("o_proj") {
                drawn / 4096.0
            } else if name.contains("down_proj") {
                drawn / 2048.0
            } else {
                drawn / 512.0
            }
        };
        numbers(name, self.tensors[name].iter().product()).map(value).collect()
    }

    /// Writes the model as a folder of `files` safetensors files.
    pub fn write_folder(&self, folder: &Path, dtype: Dtype, files: usize) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let tensors: Vec<(&String, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, shape)| (name, shape, bytes(dtype, &self.values(name))))
            .collect();
        let mut weight_map = BTreeMap::new();
        for (number, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
            let file = if files == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("part-{number}.safetensors")
            };
            let views = part.iter().map(|(name, shape, bytes)| {
                (*name, TensorView::new(dtype, (*shape).clone(), bytes).unwrap())
            });
            safetensors::serialize_to_file(views, None, &folder.join(&file)).unwrap();
            weight_map.extend(part.iter().map(|(name, ..)| ((*name).clone(), file.clone())));
        }
        if files > 1 {
            let index = serde_json::json!({ "weight_map": weight_map });
            std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }

    pub fn decoder(&self, dtype: Dtype, files: usize) -> Decoder {
        let folder = tempfile::tempdir().unwrap();
        self.write_folder(folder.path(), dtype, files);
        load(folder.path())
    }

    /// The largest difference of logits, those of the whole prompt, from the expected ones at any position, as a part of
    /// the largest logit there.
    pub fn error(&self, got: &[Vec<f32>]) -> f32 {
        let largest =
            |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, value| most.max(value.abs()));
        let first = self.positions - self.expected.len();
        let mut worst = 0.0f32;
        for (number, (got, expected)) in got[first..].iter().zip(&self.expected).enumerate() {
            let difference = largest(&mut got.iter().zip(expected).map(|(a, b)| a - b));
            let error = difference / largest(&mut expected.iter().copied());
            let position = first + number;
            assert!(error.is_finite() && error < TOLERANCE, "{}: {error} at position {position}", self.name);
            worst = worst.max(error);
        }
        worst
    }
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

pub fn load(path: &Path) -> Decoder {
    let source = ModelSource::open(path).unwrap();
    let packed = PackedWeights::in_memory(&source).unwrap();
    Decoder::new(&source, &packed, source.config().unwrap()).unwrap()
}
