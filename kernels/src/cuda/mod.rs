//! Kernels for NVIDIA devices: the driver, found when the program runs; device memory; and the launches of `kernels/cuda/*.cu`.
//!
//! The same rule as on the CPU: the bits of an output row depend on that row's inputs alone.

mod attention;
mod driver;
mod gpu;
mod graph;
mod memory;
mod products;
mod rows;
mod uploads;

pub use attention::{Append, Attend, Tile, tiles};
pub use driver::{CudaError, DeviceFacts, devices, driver_version};
pub use gpu::Gpu;
pub use graph::Graph;
pub use memory::{CopyRates, DeviceBuffer, Pinned, Plain, Span};
pub use products::{Activations, DeviceMatrix};
pub use rows::Rotation;
pub use uploads::{Mark, Uploads};

/// Version of the arithmetic: raised whenever a change can alter bits. Part of the numerics tag.
pub const KERNELS_VERSION: u32 = 2;
