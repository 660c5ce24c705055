//! Kernels for the CPU: one body of arithmetic, instantiated per instruction-set tier.
//!
//! Each kernel is written once over [`lanes::Lanes`], sixteen f32 lanes with a fixed order of reduction, and
//! compiled for every tier; [`Cpu`] holds the tier chosen at start and the thread pool.

// Register blocks are indexed by row and token, as the formulas are; iterator adapters take closures, which `lanes`
// explains away.
#![allow(clippy::needless_range_loop)]

mod activations;
pub mod attention;
#[cfg(test)]
mod bits;
pub(crate) mod disjoint;
mod dots;
mod floats;
mod isa;
mod lanes;
pub mod logits;
pub mod matmul;
pub mod norm;
mod pool;
mod prefetch;
pub mod rope;
mod rows;
mod tiles;

pub use activations::Precision;
pub use isa::Isa;
pub use pool::Pool;

/// Version of the arithmetic: raised whenever a change can alter bits. Part of the numerics tag.
pub const KERNELS_VERSION: u32 = 2;

/// Sines of positions and weights of experts come from the system's mathematics library. Apple's has not been held against glibc's,
/// so its bits are taken for others.
const SYSTEM: &str = if cfg!(target_vendor = "apple") { "-apple" } else { "" };

/// Where CPU kernels run: an instruction-set tier and a pool of threads.
pub struct Cpu {
    pub isa: Isa,
    pub precision: Precision,
    pub pool: Pool,
}

impl Cpu {
    /// `threads` counts the calling thread. Fails when `DORMOUSE_ISA` names no tier of this machine.
    pub fn new(threads: usize) -> Result<Cpu, String> {
        Ok(Cpu { isa: Isa::from_environment()?, precision: Precision::default(), pool: Pool::new(threads) })
    }

    /// The same with another precision of activations.
    pub fn with_precision(self, precision: Precision) -> Cpu {
        Cpu { precision, ..self }
    }

    /// Identity of the bits these kernels produce: version, arithmetic and precision. Neither threads nor the tier matter beyond
    /// that.
    pub fn numerics(&self) -> String {
        format!("cpu{KERNELS_VERSION}-{}-{}{SYSTEM}", self.isa.arithmetic(), self.precision.name())
    }
}
