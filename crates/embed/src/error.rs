//! What can go wrong while an encoder is loaded, and while it computes.

use std::path::{Path, PathBuf};

/// Why a folder cannot be served as an embedding model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// `what` names the place and, where there is one, the mend.
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error(
        "{path}: the architecture '{found}' is not supported as an embedding model (supported: bert, with absolute \
         positions)"
    )]
    UnsupportedArchitecture { path: PathBuf, found: String },
    #[error("{path}: {what} is not supported (supported: {supported})")]
    Unsupported { path: PathBuf, what: String, supported: String },
    #[error("{path}: the weights do not fit config.json: {source}")]
    Weights { path: PathBuf, source: candle_core::Error },
    #[error("cannot start the threads for embeddings: {0}")]
    Threads(String),
}

impl LoadError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> LoadError {
        LoadError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> LoadError {
        LoadError::Malformed { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>, supported: &str) -> LoadError {
        LoadError::Unsupported { path: path.to_owned(), what: what.into(), supported: supported.to_owned() }
    }
}

/// Why inputs have no vectors. `index` is the input's place in the request.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    #[error("{tokens} tokens, special tokens included, but the model takes at most {limit}")]
    TooLong { index: usize, tokens: usize, limit: usize },
    #[error("no tokens, so there is nothing to make a vector of")]
    NoTokens { index: usize },
    #[error("{token} is not one of the model's token ids, which end at {last}")]
    UnknownToken { index: usize, position: usize, token: u32, last: u32 },
    #[error("{tokens} tokens in all, but one request takes at most {limit}")]
    TooManyTokens { tokens: usize, limit: usize },
    #[error("cannot be tokenised: {reason}")]
    Tokenizer { index: usize, reason: String },
    #[error("{waiting} requests for embeddings are waiting already; try again shortly")]
    Busy { waiting: usize },
    #[error("whoever asked has left")]
    Cancelled,
    #[error("the model's weights give numbers that are not finite; fetch them again")]
    NotFinite,
    #[error("the encoder failed: {0}")]
    Compute(#[from] candle_core::Error),
    #[error("the encoder met a state that should not exist, and ended this request")]
    Broken,
}
