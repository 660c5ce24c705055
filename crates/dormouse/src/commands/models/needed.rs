//! What a model needs of this machine: memory, and disk for its packed weights.

use std::path::Path;

use anyhow::{Result, anyhow};
use dormouse_kernels::{Isa, KvDtype, PAGE_TOKENS, PageLayout};
use dormouse_models::decoder::Activations;
use dormouse_models::machine::Memory;
use dormouse_models::pack::HeldBytes;
use dormouse_models::{ModelConfig, ModelSource};
use serde_json::{Map, Value, json};

use super::pack_folder::PackFolder;
use super::report::Report;
use crate::assemble::pack_folders;
use crate::config::Config;
use crate::sizes::Bytes;

/// Rows of the largest piece of a prompt that is computed at once, and rows whose logits are wanted at once: what scratch
/// memory is estimated for.
const STEP_ROWS: usize = 256;
const LOGIT_ROWS: usize = 16;
const KV_DTYPES: [KvDtype; 2] = [KvDtype::F16, KvDtype::Q8_0];

/// What the model takes, in bytes.
pub struct Needed {
    held: HeldBytes,
    scratch: u64,
    context: u64,
    /// KV bytes of one position, by type.
    kv: Vec<(KvDtype, u64)>,
    kv_dtype: KvDtype,
}

impl Needed {
    pub fn of(
        config: &Config,
        description: &ModelConfig,
        source: &ModelSource,
        report: &mut Report,
    ) -> Needed {
        let held = HeldBytes::of(source);
        let token_bytes = |dtype| {
            let ModelConfig { layers, kv_heads, head_dim, .. } = *description;
            PageLayout { layers, kv_heads, head_dim, dtype }.token_bytes() as u64
        };
        let needed = Needed {
            held,
            scratch: Activations::bytes(description, STEP_ROWS, LOGIT_ROWS) as u64,
            context: config.context.unwrap_or(description.context) as u64,
            kv: KV_DTYPES.map(|dtype| (dtype, token_bytes(dtype))).to_vec(),
            kv_dtype: config.kv_dtype,
        };
        let by_type = |of: &dyn Fn(u64) -> u64| -> (Map<String, Value>, String) {
            let words =
                needed.kv.iter().map(|(dtype, bytes)| format!("{} {}", dtype.name(), Bytes(of(*bytes))));
            let words = words.collect::<Vec<_>>().join(", ");
            (
                needed.kv.iter().map(|(dtype, bytes)| (dtype.name().to_owned(), of(*bytes).into())).collect(),
                words,
            )
        };
        let (object, words) = by_type(&|bytes| bytes);
        report.told("kv_bytes_per_token", object, words);
        let (object, words) = by_type(&|bytes| bytes.saturating_mul(needed.context));
        report.told("kv_full_context", object, format!("{words} (one session of {} tokens)", needed.context));
        let words = format!(
            "{} packed, {} of floats in the file, {} looked up in the file",
            Bytes(held.packed),
            Bytes(held.floats),
            Bytes(held.looked_up)
        );
        report.told("weights_in_memory", json!(held), words);
        report.bytes("scratch_memory", needed.scratch);
        report.told(
            "memory_needed",
            needed.at_least(),
            format!("{} and the KV of what is said", Bytes(needed.at_least())),
        );
        needed
    }

    /// Without any session: weights and scratch.
    fn at_least(&self) -> u64 {
        self.held.packed + self.held.floats + self.held.looked_up + self.scratch
    }

    fn kv_token_bytes(&self) -> u64 {
        self.kv.iter().find(|(dtype, _)| *dtype == self.kv_dtype).map_or(0, |(_, bytes)| *bytes)
    }

    /// Refuses a model that memory cannot hold, and notes what is tight.
    pub fn compare(&self, memory: Memory, report: &mut Report) -> Result<()> {
        let least = self.at_least() + self.kv_token_bytes() * PAGE_TOKENS as u64;
        if least > memory.total {
            return Err(anyhow!(
                "too little memory: it needs {}, this machine has {}; every token would wait for the disk. Take a file of \
                 the model with fewer bits, or a smaller model",
                Bytes(least),
                Bytes(memory.total)
            ));
        }
        if least > memory.available {
            report.note(format!(
                "it needs {} of memory and {} are free: end other programs first, or it will be slow",
                Bytes(least),
                Bytes(memory.available)
            ));
        }
        let fitting = (memory.total - self.at_least()) / self.kv_token_bytes().max(1);
        if fitting < self.context {
            report.note(format!(
                "the KV of a session of {} tokens does not fit in memory beside the weights: beyond about {fitting} tokens \
                 it is read from disk as it is used{}",
                self.context,
                if self.kv_dtype == KvDtype::F16 { "; --kv-dtype q8_0 takes half" } else { "" }
            ));
        }
        Ok(())
    }
}

/// The machine's side, and where packed weights would go.
pub fn look_at_machine(
    config: &Config,
    path: &Path,
    needed: Option<&Needed>,
    report: &mut Report,
) -> Result<()> {
    let memory = Memory::here();
    report.bytes("memory_total", memory.total);
    report.bytes("memory_available", memory.available);
    report.fact("isa_tier", Isa::from_environment().map_err(anyhow::Error::msg)?.name());
    let pack_bytes = needed.map_or(0, |needed| needed.held.pack_file);
    if pack_bytes == 0 {
        return Ok(());
    }
    report.bytes("pack_file_size", pack_bytes);
    let folders: Vec<PackFolder> =
        pack_folders(config, path).iter().map(|folder| PackFolder::look_at(folder)).collect();
    if let Some(pack) = folders.iter().find_map(|folder| folder.pack_of(path)) {
        report.fact("pack_file", pack.display().to_string());
        return Ok(());
    }
    let takes = |folder: &&PackFolder| folder.writable && folder.free_bytes >= pack_bytes;
    match folders.iter().find(takes) {
        Some(folder) => {
            let place = folder.path.display().to_string();
            let words = format!("not made yet; will lie in {place} ({} free)", Bytes(folder.free_bytes));
            report.told("pack_file", Value::Null, words);
            report.facts.insert("pack_folder".into(), place.into());
            report.facts.insert("disk_free".into(), folder.free_bytes.into());
        }
        None => {
            report.told("pack_file", Value::Null, "no folder takes it".to_owned());
            let folders: Vec<String> = folders
                .iter()
                .map(|folder| {
                    let why = if folder.writable { "free" } else { "free, but it cannot be written" };
                    format!("{} ({} {why})", folder.path.display(), Bytes(folder.free_bytes))
                })
                .collect();
            report.note(format!(
                "packed weights of {} fit in none of {}: they will be made in memory at every start; free some disk",
                Bytes(pack_bytes),
                folders.join(" and ")
            ));
        }
    }
    Ok(())
}
