//! Open-weight models: files, tokenizer, chat template, and one generic decoder with a description per family.

pub mod backend;
pub mod catalog;
pub mod chat_template;
pub mod config;
#[cfg(feature = "cuda")]
mod cuda;
pub mod decoder;
pub mod detokenize;
pub mod device;
pub mod error;
pub mod gguf;
pub mod likelihood;
pub mod machine;
#[cfg(feature = "metal")]
pub mod metal;
pub mod model;
pub mod pack;
#[cfg(any(feature = "cuda", feature = "metal"))]
mod places;
pub mod pull;
pub mod safetensors;
pub mod source;
pub mod tokenizer;
pub mod weights;

pub use backend::Backend;
pub use chat_template::ChatTemplate;
pub use config::ModelConfig;
pub use detokenize::TextStream;
pub use device::{Device, DeviceChoice};
pub use error::ModelError;
pub use model::{LoadOptions, Model, hash_weights};
pub use source::ModelSource;
pub use tokenizer::{Specials, Tokenizer};

/// A token's number in the model's vocabulary.
pub type TokenId = u32;

/// The small real model that tests run on.
#[cfg(test)]
pub(crate) fn test_model() -> std::path::PathBuf {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/SmolLM2-135M-Instruct.Q4_1.gguf"),
        std::path::PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    path
}
