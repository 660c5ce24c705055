//! `dormouse models`: what is known, what is here, and what is inside.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use dormouse_kernels::{KvDtype, PageLayout};
use dormouse_models::catalog::{self, Resolved};
use dormouse_models::pack::{PackFile, PackedWeights};
use dormouse_models::weights::WeightSource;
use dormouse_models::{ModelSource, hash_weights};
use serde_json::{Value, json};

use crate::assemble::pack_folders;
use crate::cli::ModelsCommand;
use crate::config::Config;
use crate::output::{outln, print_json, print_table, progress_bar};
use crate::sizes::Bytes;
use crate::weights;

pub async fn models(config: &Config, command: ModelsCommand, as_json: bool) -> Result<()> {
    match command {
        ModelsCommand::Ls => list(config, as_json),
        ModelsCommand::Pull { name } => pull(config, &name, as_json).await,
        ModelsCommand::Inspect { model } => inspect(config, &model, as_json),
        ModelsCommand::Pack { model } => pack(config, &model, as_json),
    }
}

fn list(config: &Config, as_json: bool) -> Result<()> {
    let mut rows = Vec::new();
    let mut objects = Vec::new();
    for entry in catalog::entries()? {
        let path = match catalog::resolve(&entry.name, &config.weights_dir())? {
            Resolved::Catalog { path, .. } => path,
            Resolved::File(path) => Some(path),
        };
        rows.push([
            entry.name.clone(),
            entry.parameters.clone(),
            Bytes(entry.size_bytes).to_string(),
            entry.context.to_string(),
            entry.licence.clone(),
            if path.is_some() { "yes".into() } else { "no".into() },
        ]);
        objects.push(json!({
            "name": entry.name,
            "aliases": entry.aliases,
            "description": entry.description,
            "parameters": entry.parameters,
            "context": entry.context,
            "licence": entry.licence,
            "size_bytes": entry.size_bytes,
            "sources": weights::source_names(entry),
            "path": path,
        }));
    }
    if as_json {
        return print_json(&objects);
    }
    print_table(["NAME", "PARAMETERS", "SIZE", "CONTEXT", "LICENCE", "HERE"], &rows)
}

async fn pull(config: &Config, name: &str, as_json: bool) -> Result<()> {
    let Some(entry) = catalog::find(name)? else {
        let known: Vec<&str> = catalog::entries()?.iter().map(|entry| entry.name.as_str()).collect();
        bail!("there is no known model '{name}'; known: {}", known.join(", "));
    };
    let path = weights::pull_with_bar(entry, config).await?;
    if as_json {
        return print_json(&json!({ "name": entry.name, "path": path, "sha256": entry.sha256 }));
    }
    outln!("{}", path.display());
    Ok(())
}

/// The file of a model that is here.
fn file_of(config: &Config, model: &str) -> Result<PathBuf> {
    match catalog::resolve(model, &config.weights_dir())? {
        Resolved::File(path) | Resolved::Catalog { path: Some(path), .. } => Ok(path),
        Resolved::Catalog { entry, path: None } => {
            bail!("the weights of '{}' are not here: dormouse models pull {}", entry.name, entry.name)
        }
    }
}

fn pack(config: &Config, model: &str, as_json: bool) -> Result<()> {
    let path = file_of(config, model)?;
    let source = ModelSource::open(&path)?;
    let mut bar = None;
    let file = PackFile {
        folders: &pack_folders(config, &path),
        weights_hash: hash_weights(&path)?,
        progress: &mut |done, total| {
            bar.get_or_insert_with(|| progress_bar("packing weights", total)).set_position(done);
        },
    };
    let packed = PackedWeights::open(&source, file)?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if as_json {
        return print_json(&json!({ "name": weights::name_of(model), "path": path, "pack": packed.file() }));
    }
    match packed.file() {
        Some(file) => outln!("{}", file.display()),
        None => {
            outln!("{}: nothing to pack, or no folder to keep it in (see the warnings above)", path.display())
        }
    }
    Ok(())
}

fn inspect(config: &Config, model: &str, as_json: bool) -> Result<()> {
    let path = file_of(config, model)?;
    let source = ModelSource::open(&path)?;
    let description = source.config()?;
    let tokenizer = source.tokenizer().context("the model's tokenizer")?;
    let template = source.chat_template(&tokenizer).context("the model's chat template")?;
    let (parameters, bytes, types) = count_tensors(&source);
    let kv_bytes_per_token = |dtype| {
        let (layers, kv_heads, head_dim) = (description.layers, description.kv_heads, description.head_dim);
        PageLayout { layers, kv_heads, head_dim, dtype }.token_bytes()
    };
    let facts = json!({
        "name": weights::name_of(model),
        "path": path,
        "architecture": description.architecture,
        "parameters": parameters,
        "weight_bytes": bytes,
        "tensor_types": types,
        "context": description.context,
        "layers": description.layers,
        "model_width": description.d_model,
        "heads": description.heads,
        "kv_heads": description.kv_heads,
        "head_dim": description.head_dim,
        "feed_forward_width": description.d_ff,
        "vocabulary": tokenizer.vocab_size(),
        "rope_theta": description.rope.theta,
        "chat_template": if template.is_default() { "none in the file, ChatML is used" } else { "from the file" },
        "kv_bytes_per_token": { "f16": kv_bytes_per_token(KvDtype::F16), "q8_0": kv_bytes_per_token(KvDtype::Q8_0) },
    });
    if as_json {
        return print_json(&facts);
    }
    for (name, value) in facts.as_object().into_iter().flatten() {
        outln!("{name:<20}{}", value.as_str().map_or_else(|| value.to_string(), String::from));
    }
    Ok(())
}

/// Parameters, bytes, and how many tensors there are of each type.
fn count_tensors(source: &ModelSource) -> (u64, u64, Value) {
    let mut types: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut parameters, mut bytes) = (0, 0);
    let names: Vec<&str> = match source {
        ModelSource::Gguf(file) => file.tensors().map(|(name, _)| name).collect(),
        ModelSource::Folder(folder) => folder.names(),
    };
    for name in names {
        let Some(tensor) = source.tensor(name) else { continue };
        *types.entry(tensor.ty.name()).or_default() += 1;
        parameters += tensor.rows as u64 * tensor.cols as u64;
        bytes += tensor.bytes().len() as u64;
    }
    (parameters, bytes, json!(types))
}
