//! Matrix products: on tensor cores, but for f32 weights.

use std::sync::Arc;

use super::driver::CudaError;
use super::gpu::{Gpu, Grid, Kernel};
use super::memory::{DeviceBuffer, Span};
use crate::GgmlType;

/// Activations and weights are taken in runs of so many consecutive columns.
const RUN: usize = 32;
/// Weights that are decoded come in slabs of so many columns (`SLAB` of `matmul.cuh`).
const SLAB: usize = 256;

/// The kernel for a number of tokens. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Width {
    One,
    Eight,
    Sixteen,
    Some,
    Many,
}

impl Width {
    /// Those that there are for a type.
    pub fn of(ty: GgmlType) -> &'static [Width] {
        match ty {
            GgmlType::F32 => &[Width::One, Width::Eight, Width::Many],
            _ => &[Width::Eight, Width::Sixteen, Width::Some, Width::Many],
        }
    }

    fn for_tokens(ty: GgmlType, tokens: usize) -> Width {
        match (ty, tokens) {
            (GgmlType::F32, 1) => Width::One,
            (GgmlType::F32, ..=16) | (_, ..=8) => Width::Eight,
            (GgmlType::F32, _) => Width::Many,
            (_, ..=32) => Width::Sixteen,
            (_, ..=64) => Width::Some,
            (_, _) => Width::Many,
        }
    }

    pub fn kernel_name(self, ty: GgmlType) -> String {
        let width = match self {
            Width::One => "one",
            Width::Eight => "eight",
            Width::Sixteen => "sixteen",
            Width::Some => "some",
            Width::Many => "many",
        };
        match ty {
            GgmlType::F32 => format!("matmul_f32_{width}"),
            _ => format!("matmul_{width}_{}", ty.name()),
        }
    }

    /// Rows and tokens of a block.
    fn tile(self, ty: GgmlType) -> (usize, usize) {
        match (ty, self) {
            (GgmlType::F32, Width::One) => (8, 1),
            (GgmlType::F32, Width::Eight) => (32, 8),
            (GgmlType::F32, _) => (64, 64),
            (_, Width::One | Width::Eight) => (16, 8),
            (_, Width::Sixteen) => (16, 16),
            (_, Width::Some) => (64, 64),
            (_, Width::Many) => (128, 128),
        }
    }

    /// Dynamic shared memory of a block: two tiles of weights, two of activations, and the bytes of a slab of quantised rows
    /// (`Stage` of `matmul.cuh`).
    pub fn shared_bytes(self, ty: GgmlType) -> usize {
        let (rows, tokens) = self.tile(ty);
        match (Rounding::of(ty), self) {
            (Some(rounding), Width::Some | Width::Many) => {
                let run_bytes = RUN * size_of::<u16>();
                let stage = match ty {
                    GgmlType::F16 | GgmlType::BF16 => 0,
                    _ => {
                        let alignment = 1 << ty.block_bytes().trailing_zeros().min(4);
                        let pieces = (ty.row_bytes(SLAB) + 16 - alignment).div_ceil(16);
                        (pieces | 1) * 16
                    }
                };
                2 * (rows + tokens * rounding.parts()) * run_bytes + rows * stage
            }
            _ => 0,
        }
    }

    /// Blocks of 256 threads. Of many tokens, those that run together read the same weights.
    fn grid(self, ty: GgmlType, rows: usize, tokens: usize) -> Grid {
        let (rows_of_a_block, tokens_of_a_block) = self.tile(ty);
        let (rows, tokens) = (rows.div_ceil(rows_of_a_block), tokens.div_ceil(tokens_of_a_block));
        let shared_bytes = self.shared_bytes(ty);
        match shared_bytes {
            0 => Grid::of(rows, tokens, 1),
            _ => Grid { shared_bytes, ..Grid::of(tokens, rows, 1) },
        }
    }
}

/// How activations are rounded for products with a type (`PARTS` of `matmul.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rounding {
    /// Beside quantised weights: to f16.
    Half,
    /// To the sum of two f16.
    HalfPair,
    /// To the sum of two bf16.
    BrainPair,
}

impl Rounding {
    const ALL: [Rounding; 3] = [Rounding::Half, Rounding::HalfPair, Rounding::BrainPair];
    const MOST_PARTS: usize = 2;

    /// None: not at all.
    fn of(ty: GgmlType) -> Option<Rounding> {
        match ty {
            GgmlType::F32 => None,
            GgmlType::F16 => Some(Rounding::HalfPair),
            GgmlType::BF16 => Some(Rounding::BrainPair),
            _ => Some(Rounding::Half),
        }
    }

    fn parts(self) -> usize {
        match self {
            Rounding::Half => 1,
            Rounding::HalfPair | Rounding::BrainPair => Rounding::MOST_PARTS,
        }
    }
}

/// Room for activations as tensor cores take them.
pub struct Activations {
    values: DeviceBuffer<u16>,
    factors: DeviceBuffer<f32>,
}

impl Activations {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Activations, CudaError> {
        let values = DeviceBuffer::new(gpu, 0, "activations")?;
        Ok(Activations { values, factors: DeviceBuffer::new(gpu, 0, "activations")? })
    }

    /// Room for `tokens` rows of `cols` values, whatever they are multiplied with.
    pub fn grow(&mut self, tokens: usize, cols: usize) -> Result<(), CudaError> {
        self.values.grow(tokens * cols.next_multiple_of(RUN) * Rounding::MOST_PARTS, "activations")?;
        self.factors.grow(tokens, "activations")
    }
}

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

/// `FloatMatmulArgs` of `matmul_f32.cu`.
#[repr(C)]
struct FloatArguments {
    weights: u64,
    x: u64,
    out: u64,
    rows: u32,
    cols: u32,
    tokens: u32,
}

/// `MatmulArgs` of `matmul.cuh`.
#[repr(C)]
struct Arguments {
    weights: u64,
    x: u64,
    factors: u64,
    out: u64,
    row_bytes: u64,
    rows: u32,
    cols: u32,
    tokens: u32,
}

/// `RoundArgs` of `activations.cu`.
#[repr(C)]
struct RoundArguments {
    x: u64,
    values: u64,
    factors: u64,
    cols: u32,
    tokens: u32,
    parts: u32,
    is_brain: u32,
}

impl Gpu {
    /// `out[token, row] = Σ_k x[token, k] · weights[row, k]`, for every pair of weights and output: all have `x`'s columns, and
    /// `x` is rounded once for those of a kind, in `room`.
    pub fn matmul(
        &self,
        x: Span<'_, f32>,
        room: &Activations,
        products: &[(&DeviceMatrix, Span<'_, f32>)],
    ) -> Result<(), CudaError> {
        let Some(cols) = products.first().map(|(weights, _)| weights.cols) else { return Ok(()) };
        let tokens = x.len() / cols;
        assert_eq!(x.len(), tokens * cols, "activations are whole rows");
        for (weights, out) in products {
            assert_eq!(weights.cols, cols, "all weights have the activations' columns");
            assert_eq!(out.len(), tokens * weights.rows, "output is [tokens, rows]");
        }
        let of = |rounding| {
            products.iter().filter(move |(weights, _)| Rounding::of(weights.ty) == rounding).peekable()
        };
        for (weights, out) in of(None) {
            self.float_product(weights, x, *out, tokens)?;
        }
        for rounding in Rounding::ALL {
            let mut products = of(Some(rounding));
            if products.peek().is_none() {
                continue;
            }
            let rounded = self.round(x, cols, rounding, room)?;
            for (weights, out) in products {
                self.tensor_product(weights, rounded, *out, tokens)?;
            }
        }
        Ok(())
    }

    /// The activations' parts, and each token's factor.
    fn round<'a>(
        &self,
        x: Span<'_, f32>,
        cols: usize,
        rounding: Rounding,
        room: &'a Activations,
    ) -> Result<(Span<'a, u16>, Span<'a, f32>), CudaError> {
        let (tokens, parts) = (x.len() / cols, rounding.parts());
        let values = room.values.first(tokens * cols.next_multiple_of(RUN) * parts);
        let factors = room.factors.first(tokens);
        let arguments = RoundArguments {
            x: x.address(),
            values: values.address(),
            factors: factors.address(),
            cols: cols as u32,
            tokens: tokens as u32,
            parts: parts as u32,
            is_brain: u32::from(rounding == Rounding::BrainPair),
        };
        // SAFETY: the spans hold what blocks, one a token, read and write.
        unsafe { self.launch(Kernel::RoundActivations, Grid::of(tokens, 1, 1), &arguments)? };
        Ok((values, factors))
    }

    fn tensor_product(
        &self,
        weights: &DeviceMatrix,
        (x, factors): (Span<'_, u16>, Span<'_, f32>),
        out: Span<'_, f32>,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let DeviceMatrix { ty, rows, cols, .. } = *weights;
        let arguments = Arguments {
            weights: weights.bytes.span().address(),
            x: x.address(),
            factors: factors.address(),
            out: out.address(),
            row_bytes: ty.row_bytes(cols) as u64,
            rows: rows as u32,
            cols: cols as u32,
            tokens: tokens as u32,
        };
        let width = Width::for_tokens(ty, tokens);
        // SAFETY: the spans hold what the kernel reads and writes; rows are possible, by the matrix's making.
        unsafe { self.launch(Kernel::Matmul(width, ty), width.grid(ty, rows, tokens), &arguments) }
    }

    fn float_product(
        &self,
        weights: &DeviceMatrix,
        x: Span<'_, f32>,
        out: Span<'_, f32>,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let DeviceMatrix { ty, rows, cols, .. } = *weights;
        let arguments = FloatArguments {
            weights: weights.bytes.span().address(),
            x: x.address(),
            out: out.address(),
            rows: rows as u32,
            cols: cols as u32,
            tokens: tokens as u32,
        };
        let width = Width::for_tokens(ty, tokens);
        // SAFETY: as above.
        unsafe { self.launch(Kernel::Matmul(width, ty), width.grid(ty, rows, tokens), &arguments) }
    }
}
