//! A model on disk, whichever way it is packed: its tensors, its description, its tokenizer, its template.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::chat_template::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFolder;
use crate::tokenizer::Tokenizer;
use crate::weights::{Tensor, WeightSource};

/// An open model: a GGUF file, or a folder with safetensors.
pub enum ModelSource {
    Gguf(GgufFile),
    Folder(SafetensorsFolder),
}

impl ModelSource {
    /// Opens a `.gguf` file, or a folder that holds `config.json`.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelSource, ModelError> {
        let path = path.as_ref();
        if path.is_dir() {
            if !path.join("config.json").exists() {
                let what = "the folder has no config.json; name a GGUF file or a Hugging Face model folder";
                return Err(ModelError::malformed(path, what));
            }
            return SafetensorsFolder::open(path).map(ModelSource::Folder);
        }
        GgufFile::open(path).map(ModelSource::Gguf)
    }

    /// What the model is.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        match self {
            ModelSource::Gguf(file) => ModelConfig::from_gguf(file),
            ModelSource::Folder(folder) => ModelConfig::from_folder(folder),
        }
    }

    /// The GGUF file's own vocabulary, or the folder's `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        match self {
            ModelSource::Gguf(file) => Tokenizer::from_gguf(file),
            // The library that reads tokenizer.json trusts what parts of it say about each other, and panics where they
            // are wrong.
            ModelSource::Folder(folder) => catch_unwind(AssertUnwindSafe(|| Tokenizer::from_folder(folder)))
                .unwrap_or_else(|_| {
                    let what =
                        "tokenizer.json cannot be used: its parts contradict each other; fetch it again";
                    Err(ModelError::Tokenizer(what.to_owned()))
                }),
        }
    }

    /// The model's chat template, or ChatML where it brings none.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        match self {
            ModelSource::Gguf(file) => ChatTemplate::from_gguf(file, tokenizer),
            ModelSource::Folder(folder) => ChatTemplate::from_folder(folder, tokenizer),
        }
    }
}

impl WeightSource for ModelSource {
    fn path(&self) -> &Path {
        match self {
            ModelSource::Gguf(file) => file.path(),
            ModelSource::Folder(folder) => folder.path(),
        }
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        match self {
            ModelSource::Gguf(file) => file.tensor(name),
            ModelSource::Folder(folder) => folder.tensor(name),
        }
    }

    fn names(&self) -> Vec<&str> {
        match self {
            ModelSource::Gguf(file) => file.names(),
            ModelSource::Folder(folder) => folder.names(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_model_opens_as_a_whole() {
        let source = ModelSource::open(crate::test_model()).unwrap();
        let tokenizer = source.tokenizer().unwrap();
        assert_eq!(tokenizer.vocab_size(), source.config().unwrap().vocab);
        assert!(!source.chat_template(&tokenizer).unwrap().is_default());
    }

    #[test]
    fn a_folder_without_a_model_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let error = ModelSource::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("config.json"), "{error}");
        let error = ModelSource::open(folder.path().join("none.gguf")).err().unwrap().to_string();
        assert!(error.contains("cannot read"), "{error}");
    }
}
