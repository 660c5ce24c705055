//! A loaded model: weights, tokenizer, chat template, and what identifies them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_kernels::{KEY_GROUP, KvDtype, PAGE_TOKENS, PageLayout};

use crate::backend::Weights;
use crate::chat_template::ChatTemplate;
use crate::config::ModelConfig;
use crate::pack::PackFile;
use crate::source::ModelSource;
use crate::tokenizer::Tokenizer;
use crate::{Device, ModelError};

/// How a model is to be loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// What clients call it.
    pub name: String,
    /// Positions a session may have; None: as many as the model was trained for.
    pub context: Option<usize>,
    pub kv_dtype: KvDtype,
    /// [`hash_weights`] of the path.
    pub weights_hash: [u8; 32],
    /// The device's numerics tag ([`Device::numerics`]).
    pub device_numerics: String,
    /// Folders for the packed weights ([`PackFile`]); with none, they are packed into memory.
    pub pack_folders: Vec<PathBuf>,
}

pub struct Model {
    pub name: String,
    path: PathBuf,
    context: usize,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    weights: Arc<Weights>,
    layout: PageLayout,
    numerics: String,
    fingerprint: [u8; 32],
}

impl Model {
    /// Maps the GGUF file, or the safetensors folder, at `path`, for the CPU.
    ///
    /// Where its weights are not packed yet, they are, and `progress` is told (bytes done, bytes in all).
    pub fn load(
        path: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model, ModelError> {
        Model::load_on(&Device::Cpu, path, options, progress)
    }

    /// The same for any device.
    pub fn load_on(
        device: &Device,
        path: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model, ModelError> {
        let source = ModelSource::open(path)?;
        let config = source.config()?;
        let context = options.context.unwrap_or(config.context);
        if context == 0 || context > config.context {
            return Err(ModelError::Malformed {
                path: path.to_owned(),
                what: format!(
                    "a context of {context} tokens was asked for; the model was trained for 1 to {}",
                    config.context
                ),
            });
        }
        let config = config.for_context(context);
        let (folders, weights_hash) = (&options.pack_folders[..], options.weights_hash);
        let weights = Weights::load(device, &source, &config, PackFile { folders, weights_hash, progress })?;
        let tokenizer = source.tokenizer()?.limited_to(config.vocab)?;
        let template = source.chat_template(&tokenizer)?;
        let layout = config.page_layout(options.kv_dtype);
        let numerics = format!("{}-kv_{}", options.device_numerics, options.kv_dtype.name());
        Ok(Model {
            name: options.name,
            path: path.to_owned(),
            context,
            fingerprint: fingerprint(&options.weights_hash, &config, &numerics),
            tokenizer: Arc::new(tokenizer),
            template,
            weights: Arc::new(weights),
            layout,
            numerics,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Positions that one session may have.
    pub fn context(&self) -> usize {
        self.context
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The weights, where they are computed with.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    pub fn kv_token_bytes(&self) -> usize {
        self.layout.token_bytes()
    }

    /// Identity of the bits that this model on this device produces.
    pub fn numerics(&self) -> &str {
        &self.numerics
    }

    /// Identity that KV pages depend on: weights, settings, page layout and numerics. Pages of another fingerprint
    /// are never used, so what is restored is exact.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

fn fingerprint(weights: &[u8; 32], config: &ModelConfig, numerics: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("dormouse model fingerprint v1");
    hasher.update(weights);
    // `Debug` of the description is stable within a build; a change of it only costs a recomputation.
    for part in [format!("{config:?}"), numerics.to_owned(), format!("page {PAGE_TOKENS} keys {KEY_GROUP}")] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// BLAKE3 over everything that defines the weights at `path`: the file, or the files of a folder in order of name.
pub fn hash_weights(path: &Path) -> Result<[u8; 32], ModelError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelError::Io { path, source }
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(io(path))?;
        files =
            entries.map(|entry| Ok(entry.map_err(io(path))?.path())).collect::<Result<_, ModelError>>()?;
        files.retain(|file| file.extension().is_some_and(|kind| kind == "safetensors" || kind == "json"));
        files.sort();
    }
    let mut hasher = blake3::Hasher::new_derive_key("dormouse weights v1");
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A single file's name says nothing about its contents; a folder's names say which file is which.
        if path.is_dir() {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        }
        hasher.update_mmap_rayon(&file).map_err(io(&file))?;
    }
    Ok(*hasher.finalize().as_bytes())
}
