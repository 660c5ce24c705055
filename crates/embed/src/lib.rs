//! Embeddings: texts to vectors, by BERT encoders as sentence-transformers keeps them in a folder.
//!
//! [`Encoder`] is the model: synchronous, one batch after the other, on Candle. [`Embedder`] puts it on threads of its
//! own behind a bounded queue, for a server whose cores belong to the decoder. Nothing here knows HTTP.

#![forbid(unsafe_code)]

mod encoder;
mod error;
mod folder;
mod pooling;
mod worker;

pub use encoder::Encoder;
pub use error::{EmbedError, LoadError};
pub use pooling::Pooling;
pub use worker::Embedder;

/// What one vector is to be made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    Text(String),
    /// Token ids of the model's own vocabulary, taken as they are: no special tokens are added.
    Tokens(Vec<u32>),
}

/// Vectors in the order of the inputs, and how many tokens they were made of, special tokens included.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    pub vectors: Vec<Vec<f32>>,
    pub tokens: usize,
}
