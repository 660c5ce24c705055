//! CPU kernels: GGML block formats, matrix multiplication, normalisation, rotary embedding and attention over KV pages.
//!
//! Everything here is stateless arithmetic on slices and raw pages. The one rule that shapes all of it is
//! **batch invariance**: the bits of an output row depend on that row's inputs alone, never on how many rows
//! are computed together, how a prompt was cut into chunks, or how many threads ran.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod packed;
pub mod page;
pub mod quant;
#[cfg(test)]
mod testing;

pub use cpu::{Cpu, Isa, Precision};
pub use page::{KEY_GROUP, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};
pub use quant::GgmlType;
