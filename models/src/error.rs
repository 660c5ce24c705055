use std::path::{Path, PathBuf};

/// What can go wrong while a model is found, read or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// The file is not what its header or its name says. `what` names the place and the mend.
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error(
        "{path}: tensor '{tensor}' has type {found}, which Dormouse does not compute with (supported: {supported})"
    )]
    UnsupportedType { path: PathBuf, tensor: String, found: String, supported: String },
    #[error("architecture '{found}' is not supported (supported: {supported})")]
    UnsupportedArchitecture { found: String, supported: String },
    #[error("{path}: tensor '{tensor}' is missing")]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{path}: {key} is missing or has the wrong type")]
    MissingMetadata { path: PathBuf, key: String },
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    Template(String),
    #[error("{0}")]
    Catalog(String),
    /// A device is not there, or failed.
    #[error("device {device}: {what}")]
    Device { device: String, what: String },
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> ModelError {
        ModelError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> ModelError {
        ModelError::Malformed { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn missing_metadata(path: &Path, key: impl Into<String>) -> ModelError {
        ModelError::MissingMetadata { path: path.to_owned(), key: key.into() }
    }

    /// An error for a tensor whose type has no decoder; `found` is the type as the file names it.
    pub(crate) fn unsupported_type(path: &Path, tensor: &str, found: String) -> ModelError {
        let supported: Vec<&str> = dormouse_kernels::GgmlType::ALL.into_iter().map(|ty| ty.name()).collect();
        ModelError::UnsupportedType {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            found,
            supported: supported.join(", "),
        }
    }
}
