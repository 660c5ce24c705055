//! Open-weight models: files, tokenizer, chat template, and one generic decoder with a description per family.

pub mod config;
pub mod error;
pub mod gguf;
pub mod safetensors;
pub mod weights;

pub use config::ModelConfig;
pub use error::ModelError;

/// A token's number in the model's vocabulary.
pub type TokenId = u32;

/// The small real model that tests run on.
#[cfg(test)]
pub(crate) fn test_model() -> std::path::PathBuf {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || {
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        std::path::PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    path
}
