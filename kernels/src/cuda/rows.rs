//! What is done row by row or value by value.

use super::driver::CudaError;
use super::gpu::{Gpu, Grid, Kernel};
use super::memory::Span;
use crate::cpu::rope::RopeKind;

const BLOCK_THREADS: usize = 256;

/// `NormArgs` of `pointwise.cu`.
#[repr(C)]
struct NormArguments {
    x: u64,
    weight: u64,
    out: u64,
    width: u32,
    eps: f32,
}

/// `PointwiseArgs`
#[repr(C)]
struct PointwiseArguments {
    x: u64,
    other: u64,
    count: u64,
    width: u32,
    factor: f32,
}

/// `GatherArgs`
#[repr(C)]
struct GatherArguments {
    from: u64,
    rows: u64,
    to: u64,
    width: u32,
}

/// `ScatterArgs`
#[repr(C)]
struct ScatterArguments {
    from: u64,
    rows: u64,
    factors: u64,
    to: u64,
    width: u32,
}

/// `LikeliestArgs`
#[repr(C)]
struct LikeliestArguments {
    logits: u64,
    out: u64,
    width: u32,
}

/// `RopeArgs`
#[repr(C)]
struct RopeArguments {
    x: u64,
    cos: u64,
    sin: u64,
    heads: u32,
    head_dim: u32,
    pairs: u32,
    interleaved: u32,
    count: u64,
}

/// How rows are rotated: `cos` and `sin` are `[rows, pairs]`.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub kind: RopeKind,
    pub head_dim: usize,
    pub pairs: usize,
    pub cos: Span<'a, f32>,
    pub sin: Span<'a, f32>,
}

impl Gpu {
    /// `out = x / sqrt(mean(x²) + eps) · weight`, for every row `[weight.len()]` of `x`; `out` may be `x`.
    pub fn rms_norm(
        &self,
        x: Span<'_, f32>,
        weight: Span<'_, f32>,
        eps: f32,
        out: Span<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(width), "rows of {width} values");
        let arguments = NormArguments {
            x: x.address(),
            weight: weight.address(),
            out: out.address(),
            width: width as u32,
            eps,
        };
        let grid = Grid { threads: 128, ..Grid::of(x.len() / width, 1, 1) };
        // SAFETY: the spans hold as many rows as there are blocks.
        unsafe { self.launch(Kernel::RmsNorm, grid, &arguments) }
    }

    /// `x += factor · delta`
    pub fn add_scaled(&self, x: Span<'_, f32>, delta: Span<'_, f32>, factor: f32) -> Result<(), CudaError> {
        assert_eq!(x.len(), delta.len());
        self.pointwise(Kernel::AddScaled, x, Some(delta), 1, factor)
    }

    /// `x += bias` on every row `[bias.len()]` of `x`.
    pub fn add_bias(&self, x: Span<'_, f32>, bias: Span<'_, f32>) -> Result<(), CudaError> {
        assert!(x.len().is_multiple_of(bias.len()));
        self.pointwise(Kernel::AddBias, x, Some(bias), bias.len(), 0.0)
    }

    /// Every row of `x` times its own factor.
    pub fn scale_rows(&self, x: Span<'_, f32>, factors: Span<'_, f32>) -> Result<(), CudaError> {
        assert!(x.len().is_multiple_of(factors.len()));
        self.pointwise(Kernel::ScaleRows, x, Some(factors), x.len() / factors.len(), 0.0)
    }

    /// `gate = silu(gate) · up`
    pub fn silu_gate(&self, gate: Span<'_, f32>, up: Span<'_, f32>) -> Result<(), CudaError> {
        assert_eq!(gate.len(), up.len());
        self.pointwise(Kernel::SiluGate, gate, Some(up), 1, 0.0)
    }

    /// `gate = gelu(gate) · up`, with the tanh form of GELU.
    pub fn gelu_gate(&self, gate: Span<'_, f32>, up: Span<'_, f32>) -> Result<(), CudaError> {
        assert_eq!(gate.len(), up.len());
        self.pointwise(Kernel::GeluGate, gate, Some(up), 1, 0.0)
    }

    /// `x *= factor`
    pub fn scale(&self, x: Span<'_, f32>, factor: f32) -> Result<(), CudaError> {
        self.pointwise(Kernel::Scale, x, None, 1, factor)
    }

    /// `x = cap · tanh(x / cap)`
    pub fn soft_cap(&self, x: Span<'_, f32>, cap: f32) -> Result<(), CudaError> {
        self.pointwise(Kernel::SoftCap, x, None, 1, cap)
    }

    fn pointwise(
        &self,
        kernel: Kernel,
        x: Span<'_, f32>,
        other: Option<Span<'_, f32>>,
        width: usize,
        factor: f32,
    ) -> Result<(), CudaError> {
        let arguments = PointwiseArguments {
            x: x.address(),
            other: other.map_or(0, |other| other.address()),
            count: x.len() as u64,
            width: width as u32,
            factor,
        };
        // SAFETY: the callers compared lengths, and kernels that have no other do not read it.
        unsafe { self.launch(kernel, Grid::of(x.len().div_ceil(BLOCK_THREADS), 1, 1), &arguments) }
    }

    /// Row `i` of `to` becomes row `rows[i]` of `from`, which has it; rows are `width` values.
    pub fn gather_rows(
        &self,
        from: Span<'_, f32>,
        rows: Span<'_, u32>,
        width: usize,
        to: Span<'_, f32>,
    ) -> Result<(), CudaError> {
        assert!(to.len() == rows.len() * width && from.len() >= width);
        let arguments = GatherArguments {
            from: from.address(),
            rows: rows.address(),
            to: to.address(),
            width: width as u32,
        };
        // SAFETY: `to` has a row for each block; that `from` has the rows named is the caller's doing.
        unsafe { self.launch(Kernel::GatherRows, Grid::of(rows.len(), 1, 1), &arguments) }
    }

    /// Row `rows[i]` of `to`, which has it and each at most once, gains `factors[i]` times row `i` of `from`.
    pub fn scatter_rows(
        &self,
        from: Span<'_, f32>,
        rows: Span<'_, u32>,
        factors: Span<'_, f32>,
        to: Span<'_, f32>,
    ) -> Result<(), CudaError> {
        assert!(factors.len() == rows.len() && from.len().is_multiple_of(rows.len().max(1)));
        let width = from.len() / rows.len().max(1);
        let arguments = ScatterArguments {
            from: from.address(),
            rows: rows.address(),
            factors: factors.address(),
            to: to.address(),
            width: width as u32,
        };
        // SAFETY: `from` has a row for each block; that `to` has the rows named is the caller's doing.
        unsafe { self.launch(Kernel::ScatterRows, Grid::of(rows.len(), 1, 1), &arguments) }
    }

    /// Of each row of `logits`, `[out.len(), any width]`: the place of the first of its largest values; 0 where none is larger
    /// than −∞.
    pub fn likeliest(&self, logits: Span<'_, f32>, out: Span<'_, u32>) -> Result<(), CudaError> {
        assert!(logits.len().is_multiple_of(out.len().max(1)), "rows of equal width");
        let width = logits.len() / out.len().max(1);
        let arguments =
            LikeliestArguments { logits: logits.address(), out: out.address(), width: width as u32 };
        // SAFETY: both have a row, or a place, for each block.
        unsafe { self.launch(Kernel::Likeliest, Grid::of(out.len(), 1, 1), &arguments) }
    }

    /// Rotates every head of every row of `x`, `[rows, heads, head_dim]`, by its row's angles.
    pub fn rotate(&self, x: Span<'_, f32>, rotation: Rotation<'_>) -> Result<(), CudaError> {
        let Rotation { kind, head_dim, pairs, cos, sin } = rotation;
        assert!(2 * pairs <= head_dim && cos.len() == sin.len() && x.len().is_multiple_of(head_dim));
        if pairs == 0 || cos.is_empty() {
            return Ok(());
        }
        let (all_heads, rows) = (x.len() / head_dim, cos.len() / pairs);
        assert_eq!(all_heads % rows, 0, "every row has as many heads");
        let count = all_heads * pairs;
        let arguments = RopeArguments {
            x: x.address(),
            cos: cos.address(),
            sin: sin.address(),
            heads: (all_heads / rows) as u32,
            head_dim: head_dim as u32,
            pairs: pairs as u32,
            interleaved: u32::from(kind == RopeKind::Interleaved),
            count: count as u64,
        };
        // SAFETY: every pair lies in `x`, and every row has its angles.
        unsafe { self.launch(Kernel::Rope, Grid::of(count.div_ceil(BLOCK_THREADS), 1, 1), &arguments) }
    }
}
