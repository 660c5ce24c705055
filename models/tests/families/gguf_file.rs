//! Writes a tiny model as a GGUF file, the way converters do.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::Path;

use crate::case::Case;
use crate::quantise::{BLOCK, Weights};

const ALIGNMENT: usize = 32;

/// What the file says, by `generate.py`: names are those of the `gguf` package.
#[derive(serde::Deserialize)]
pub struct GgufDescription {
    pub architecture: String,
    settings: BTreeMap<String, serde_json::Value>,
    /// The GGUF name of every safetensors one; experts of a layer share one.
    names: BTreeMap<String, String>,
    /// Vectors that are settings in `config.json`.
    extra: BTreeMap<String, Vec<f32>>,
    /// The rows of Q and K are reordered so that neighbours are rotated together.
    permuted: bool,
}

struct Tensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl GgufDescription {
    /// The same model with other settings.
    pub fn set(&mut self, name: &str, value: serde_json::Value) {
        self.settings.insert(name.to_owned(), value);
    }

    /// Writes every tensor as F32.
    pub fn write(&self, case: &Case, path: &Path) {
        self.write_as(case, path, Weights::Floats);
    }

    /// Writes matrices whose rows are whole blocks as `weights` says, all other tensors as F32.
    pub fn write_as(&self, case: &Case, path: &Path, weights: Weights) {
        let tensors = self.tensors(case);
        let encoded: Vec<(u32, Vec<u8>)> = tensors
            .iter()
            .map(|(name, tensor)| match tensor.shape.as_slice() {
                // Converters leave routers as they are.
                [_, .., cols] if cols.is_multiple_of(BLOCK) && !name.contains("ffn_gate_inp") => {
                    weights.encode(&tensor.values)
                }
                _ => Weights::Floats.encode(&tensor.values),
            })
            .collect();
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend((1 + self.settings.len() as u64).to_le_bytes());
        string(&mut file, "general.architecture");
        file.extend(8u32.to_le_bytes());
        string(&mut file, &self.architecture);
        for (name, value) in &self.settings {
            string(&mut file, &format!("{}.{name}", self.architecture));
            if let Some(text) = value.as_str() {
                file.extend(8u32.to_le_bytes());
                string(&mut file, text);
            } else if let Some(number) = value.as_u64() {
                file.extend(4u32.to_le_bytes());
                file.extend((number as u32).to_le_bytes());
            } else {
                file.extend(6u32.to_le_bytes());
                file.extend((value.as_f64().unwrap() as f32).to_le_bytes());
            }
        }
        let mut offset = 0usize;
        for ((name, tensor), (ty, bytes)) in tensors.iter().zip(&encoded) {
            string(&mut file, name);
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|size| file.extend((*size as u64).to_le_bytes()));
            file.extend(ty.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(ALIGNMENT);
        }
        for (_, bytes) in &encoded {
            file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
            file.extend(bytes);
        }
        std::fs::write(path, file).unwrap();
    }

    fn tensors(&self, case: &Case) -> BTreeMap<String, Tensor> {
        let size = |name: &str| case.config[name].as_u64().unwrap() as usize;
        let vector = |values: &Vec<f32>| Tensor { shape: vec![values.len()], values: values.clone() };
        let mut tensors: BTreeMap<String, Tensor> =
            self.extra.iter().map(|(name, values)| (name.clone(), vector(values))).collect();
        for (name, gguf_name) in &self.names {
            let (mut shape, mut values) = (case.tensors[name].clone(), case.values(name));
            if self.architecture.starts_with("gemma") && name.ends_with("norm.weight") {
                values.iter_mut().for_each(|value| *value += 1.0);
            }
            if self.permuted && name.contains("self_attn.q_proj") {
                values = permuted(&values, shape[0], size("num_attention_heads"));
            }
            if self.permuted && name.contains("self_attn.k_proj") {
                values = permuted(&values, shape[0], size("num_key_value_heads"));
            }
            if name.contains(".experts.") {
                // In the order of their numbers, which have one digit here.
                shape.insert(0, size("num_experts"));
                let stack = tensors.entry(gguf_name.clone()).or_insert(Tensor { shape, values: Vec::new() });
                stack.values.extend(values);
            } else {
                tensors.insert(gguf_name.clone(), Tensor { shape, values });
            }
        }
        tensors
    }
}

/// Of each head's rows, those of the two halves in turn.
fn permuted(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (cols, head) = (values.len() / rows, rows / heads);
    (0..rows)
        .flat_map(|row| {
            let (start, i) = (row / head * head, row % head);
            let from = start + i / 2 + i % 2 * (head / 2);
            values[from * cols..(from + 1) * cols].iter().copied()
        })
        .collect()
}

fn string(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}
