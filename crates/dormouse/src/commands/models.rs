//! `dormouse models`: what is known, what is here, and what is inside.

mod inspect;
mod needed;
mod pack_folder;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use dormouse_models::catalog::{self, Resolved};
use dormouse_models::pack::{PackFile, PackedWeights};
use dormouse_models::{ModelSource, hash_weights};
use serde_json::json;

use crate::assemble::pack_folders;
use crate::cli::ModelsCommand;
use crate::config::Config;
use crate::output::{outln, print_json, print_table, progress_bar};
use crate::sizes::Bytes;
use crate::weights;

pub async fn models(config: &Config, command: ModelsCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        ModelsCommand::Ls => list(config, as_json)?,
        ModelsCommand::Pull { name } => pull(config, &name, as_json).await?,
        ModelsCommand::Inspect { model } => {
            return inspect::inspect(config, &weights::name_of(&model), &file_of(config, &model)?, as_json);
        }
        ModelsCommand::Pack { model } => pack(config, &model, as_json)?,
    }
    Ok(ExitCode::SUCCESS)
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
