//! Products with float weights: a task widens four rows of F32, F16 or BF16 weights to f32 in cache and multiplies them
//! with every token's activations, each output one dot product in the fixed lane order of [`super::lanes`].

use std::cell::RefCell;
use std::ops::Range;

use super::disjoint::Disjoint;
use super::lanes::{LANES, Lanes, sixteen};
use super::matmul::Matrix;
use crate::GgmlType;
use crate::quant::dequantize;

/// Rows widened together.
const WIDE_ROWS: usize = 4;

thread_local! {
    /// Widened rows, `[WIDE_ROWS, cols]`; grows to the widest matrix once.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The products of some rows of float weights with all tokens of `x`.
#[inline(always)]
pub(super) fn float_rows<L: Lanes>(
    weights: &Matrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    out: &Disjoint<'_, f32>,
) {
    // Taken out and put back, not borrowed: a closure would not be compiled for the tier.
    let mut scratch = SCRATCH.take();
    scratch.resize(WIDE_ROWS * weights.cols, 0.0);
    wide_rows::<L>(weights, rows, x, out, &mut scratch);
    SCRATCH.set(scratch);
}

#[inline(always)]
fn wide_rows<L: Lanes>(
    weights: &Matrix<'_>,
    range: Range<usize>,
    x: &[f32],
    out: &Disjoint<'_, f32>,
    scratch: &mut [f32],
) {
    let cols = weights.cols;
    for tile in range.clone().step_by(WIDE_ROWS) {
        let rows = WIDE_ROWS.min(range.end - tile);
        for (i, decoded) in scratch.chunks_exact_mut(cols).take(rows).enumerate() {
            widen_row::<L>(weights.ty, weights.row(tile + i), decoded);
        }
        let mut put =
            |row: usize, token: usize, value: f32| out.put(token * weights.rows + tile + row, &[value]);
        let mut row = 0;
        while row + L::BLOCK_ROWS <= rows {
            match L::BLOCK_ROWS {
                4 => tokens_of::<L, 4>(scratch, row, x, cols, &mut put),
                2 => tokens_of::<L, 2>(scratch, row, x, cols, &mut put),
                _ => tokens_of::<L, 1>(scratch, row, x, cols, &mut put),
            }
            row += L::BLOCK_ROWS;
        }
        for row in row..rows {
            tokens_of::<L, 1>(scratch, row, x, cols, &mut put);
        }
    }
}

/// One row of weights as f32.
#[inline(always)]
fn widen_row<L: Lanes>(ty: GgmlType, src: &[u8], dst: &mut [f32]) {
    let (vectors, rest) = dst.as_chunks_mut::<LANES>();
    let (halves, last_halves) = src.as_chunks::<{ 2 * LANES }>();
    match ty {
        GgmlType::F16 => {
            for (bytes, out) in halves.iter().zip(vectors) {
                L::load_f16(&words(bytes)).store(out);
            }
            dequantize(ty, last_halves, rest);
        }
        GgmlType::BF16 => {
            for (bytes, out) in halves.iter().zip(vectors) {
                L::load_bf16(&words(bytes)).store(out);
            }
            dequantize(ty, last_halves, rest);
        }
        _ => dequantize(ty, src, dst),
    }
}

#[inline(always)]
fn words(bytes: &[u8; 2 * LANES]) -> [u16; LANES] {
    std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
}

/// `R` rows of the tile against all tokens, in register blocks of as many tokens as the tier holds.
#[inline(always)]
fn tokens_of<L: Lanes, const R: usize>(
    tile: &[f32],
    row: usize,
    x: &[f32],
    cols: usize,
    put: &mut impl FnMut(usize, usize, f32),
) {
    let tokens = x.len() / cols;
    let w: [&[f32]; R] = std::array::from_fn(|r| &tile[(row + r) * cols..][..cols]);
    let mut token = 0;
    macro_rules! block {
        ($t:literal) => {
            while L::BLOCK_TOKENS >= $t && tokens - token >= $t {
                let a: [&[f32]; $t] = std::array::from_fn(|t| &x[(token + t) * cols..][..cols]);
                for (t, dots) in dot_block::<L, R, $t>(&w, &a, cols).into_iter().enumerate() {
                    for (r, dot) in dots.into_iter().enumerate() {
                        put(row + r, token + t, dot);
                    }
                }
                token += $t;
            }
        };
    }
    block!(6);
    block!(2);
    block!(1);
}

/// The `T × R` dot products of `T` rows of activations with `R` rows of weights.
#[inline(always)]
fn dot_block<L: Lanes, const R: usize, const T: usize>(
    w: &[&[f32]; R],
    x: &[&[f32]; T],
    cols: usize,
) -> [[f32; R]; T] {
    let mut sums = [[L::zero(); R]; T];
    let whole = cols - cols % LANES;
    let mut weights = [L::zero(); R];
    let mut at = 0;
    while at < whole {
        for r in 0..R {
            weights[r] = L::load(sixteen(w[r], at));
        }
        for t in 0..T {
            let a = L::load(sixteen(x[t], at));
            for r in 0..R {
                sums[t][r] = a.mul_add(weights[r], sums[t][r]);
            }
        }
        at += LANES;
    }
    if whole < cols {
        for t in 0..T {
            for r in 0..R {
                sums[t][r] = padded::<L>(&x[t][whole..cols]).mul_add(padded(&w[r][whole..cols]), sums[t][r]);
            }
        }
    }
    let mut dots = [[0.0; R]; T];
    for t in 0..T {
        for r in 0..R {
            dots[t][r] = sums[t][r].sum();
        }
    }
    dots
}

/// Fewer than sixteen values, and zeros.
#[inline(always)]
fn padded<L: Lanes>(values: &[f32]) -> L {
    let mut lanes = [0.0; LANES];
    lanes[..values.len()].copy_from_slice(values);
    L::load(&lanes)
}
