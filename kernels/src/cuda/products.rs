//! Matrix products.

use std::sync::Arc;

use super::driver::CudaError;
use super::gpu::{Gpu, Grid, Kernel, Width};
use super::memory::{DeviceBuffer, Span};
use crate::GgmlType;

/// Tokens from which on a product is made tile by tile.
const MANY: usize = 17;
const TILE: usize = 64;
const BLOCK_THREADS: usize = 256;

/// Weights `[rows, cols]` on the device, as they lie in the model's file.
pub struct DeviceMatrix {
    pub ty: GgmlType,
    pub rows: usize,
    pub cols: usize,
    bytes: DeviceBuffer<u8>,
}

impl DeviceMatrix {
    /// Whether kernels can multiply rows of this length: whole blocks, and of floats whole eights.
    pub fn is_possible(ty: GgmlType, cols: usize) -> bool {
        cols.is_multiple_of(ty.block_len().max(8))
    }

    /// Copies `bytes`, which are `rows · ty.row_bytes(cols)`, to the device.
    pub fn new(
        gpu: &Arc<Gpu>,
        ty: GgmlType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<DeviceMatrix, CudaError> {
        assert!(DeviceMatrix::is_possible(ty, cols), "rows of {cols} {} values", ty.name());
        assert_eq!(bytes.len(), rows * ty.row_bytes(cols), "weights of {rows} × {cols} {}", ty.name());
        Ok(DeviceMatrix { ty, rows, cols, bytes: DeviceBuffer::of(gpu, bytes, "weights")? })
    }

    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// `MatmulArgs` of `matmul.cuh`.
#[repr(C)]
struct Arguments {
    weights: u64,
    x: u64,
    out: u64,
    row_bytes: u64,
    rows: u32,
    cols: u32,
    tokens: u32,
}

impl Gpu {
    /// `out[token, row] = Σ_k x[token, k] · weights[row, k]`
    pub fn matmul(
        &self,
        weights: &DeviceMatrix,
        x: Span<'_, f32>,
        out: Span<'_, f32>,
    ) -> Result<(), CudaError> {
        let (rows, cols) = (weights.rows, weights.cols);
        let tokens = x.len() / cols;
        assert_eq!(x.len(), tokens * cols, "activations are whole rows");
        assert_eq!(out.len(), tokens * rows, "output is [tokens, rows]");
        let (width, rows_of_a_block, tokens_of_a_block) = match tokens {
            0 => return Ok(()),
            1 => (Width::One, BLOCK_THREADS / 32, 1),
            2..=4 => (Width::Four, BLOCK_THREADS / 16, 4),
            5..MANY => (Width::Eight, BLOCK_THREADS / 8, 8),
            _ => (Width::Many, TILE, TILE),
        };
        let arguments = Arguments {
            weights: weights.bytes.span().address(),
            x: x.address(),
            out: out.address(),
            row_bytes: weights.ty.row_bytes(cols) as u64,
            rows: rows as u32,
            cols: cols as u32,
            tokens: tokens as u32,
        };
        let grid = Grid::of(rows.div_ceil(rows_of_a_block), tokens.div_ceil(tokens_of_a_block), 1);
        // SAFETY: the spans hold what the kernel reads and writes; rows are possible, by the matrix's making.
        unsafe { self.launch(Kernel::Matmul(width, weights.ty), grid, &arguments) }
    }
}
