//! Matrix products of activations with weights in any GGML type.
//!
//! A task decodes four rows of weights to f32 in cache and multiplies them with every token's activations. An output
//! is one dot product in the fixed lane order of [`super::lanes`], so it does not depend on the other tokens.

use std::cell::RefCell;

use super::Cpu;
use super::decode::decode_row;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen};
use crate::GgmlType;

/// Rows decoded together; each task of a parallel region takes [`TASK_ROWS`] rows.
const TILE_ROWS: usize = 4;
const TASK_ROWS: usize = 32;

/// Weights `[rows, cols]`, row-major.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub ty: GgmlType,
    pub rows: usize,
    pub cols: usize,
    pub bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    pub fn new(ty: GgmlType, rows: usize, cols: usize, bytes: &'a [u8]) -> Matrix<'a> {
        assert_eq!(bytes.len(), rows * ty.row_bytes(cols), "weights of {rows} × {cols} {}", ty.name());
        Matrix { ty, rows, cols, bytes }
    }

    fn row(&self, row: usize) -> &'a [u8] {
        let row_bytes = self.ty.row_bytes(self.cols);
        &self.bytes[row * row_bytes..][..row_bytes]
    }
}

/// One product of a parallel region: `out[token, row] = Σ_k x[token, k] · weights[row, k]`.
pub struct Product<'a> {
    pub weights: Matrix<'a>,
    /// `[tokens, weights.rows]`.
    pub out: &'a mut [f32],
}

/// Multiplies `x`, `[tokens, cols]`, with every product's weights, in one parallel region.
pub fn matmul<const N: usize>(cpu: &Cpu, x: &[f32], products: [Product<'_>; N]) {
    let cols = products[0].weights.cols;
    let tokens = x.len() / cols;
    assert_eq!(x.len(), tokens * cols, "activations are whole rows");
    if tokens == 0 {
        return;
    }
    let mut tasks = [0; N];
    let jobs = products.map(|product| {
        assert_eq!(product.weights.cols, cols, "products of one region share their input");
        assert_eq!(product.out.len(), tokens * product.weights.rows, "output is [tokens, rows]");
        (product.weights, Columns { to: product.out.as_mut_ptr(), len: product.out.len() })
    });
    for (count, (weights, _)) in tasks.iter_mut().zip(&jobs) {
        *count = weights.rows.div_ceil(TASK_ROWS);
    }
    let isa = cpu.isa;
    cpu.pool.run(tasks.iter().sum(), &|mut task| {
        let mut job = 0;
        while task >= tasks[job] {
            task -= tasks[job];
            job += 1;
        }
        let (weights, out) = &jobs[job];
        let rows = (task * TASK_ROWS, weights.rows.min((task + 1) * TASK_ROWS));
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(TILE_ROWS * cols, 0.0);
            dispatch!(isa, product_rows(weights: &Matrix<'_>, rows: (usize, usize), x: &[f32], out: &Columns, scratch: &mut [f32]));
        });
    });
}

thread_local! {
    /// Decoded rows, `[TILE_ROWS, cols]`; grows to the widest matrix once.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// An output matrix that several tasks write, each its own columns.
struct Columns {
    to: *mut f32,
    len: usize,
}

// SAFETY: tasks write disjoint elements (each row of weights belongs to one task) and nobody reads before they end.
unsafe impl Sync for Columns {}

impl Columns {
    #[inline(always)]
    fn set(&self, index: usize, value: f32) {
        assert!(index < self.len);
        // SAFETY: in bounds, and no other task writes this element.
        unsafe { self.to.add(index).write(value) }
    }
}

#[inline(always)]
fn product_rows<L: Lanes>(
    weights: &Matrix<'_>,
    (first, end): (usize, usize),
    x: &[f32],
    out: &Columns,
    scratch: &mut [f32],
) {
    let cols = weights.cols;
    for tile in (first..end).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(end - tile);
        for (i, decoded) in scratch.chunks_exact_mut(cols).take(rows).enumerate() {
            decode_row_or_copy::<L>(weights.ty, weights.row(tile + i), decoded);
        }
        let mut put =
            |row: usize, token: usize, value: f32| out.set(token * weights.rows + tile + row, value);
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

#[inline(always)]
fn decode_row_or_copy<L: Lanes>(ty: GgmlType, src: &[u8], dst: &mut [f32]) {
    if ty == GgmlType::F32 {
        for (bytes, value) in src.as_chunks::<4>().0.iter().zip(dst) {
            *value = f32::from_le_bytes(*bytes);
        }
    } else {
        decode_row::<L>(ty, src, dst);
    }
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

#[cfg(test)]
mod tests {
    use super::super::{Isa, Pool};
    use super::*;

    /// A small deterministic generator: tests need spread-out bits, not randomness.
    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Random blocks with sane scales: every f16 field is overwritten with a small number.
    fn weights(ty: GgmlType, rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            values(rows * ty.row_bytes(cols), 7).iter().map(|v| ((v + 1.0) * 127.9) as u8).collect();
        for block in bytes.chunks_mut(ty.block_bytes()) {
            let scale = half::f16::from_f32(0.031).to_le_bytes();
            let halves: &[usize] = match ty {
                GgmlType::F32 => &[],
                GgmlType::F16 | GgmlType::BF16 => {
                    block.copy_from_slice(&if ty == GgmlType::F16 { scale } else { [0x12, 0x3d] });
                    &[]
                }
                GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::Iq4Nl | GgmlType::Iq4Xs => &[0],
                GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
                GgmlType::Q2K => &[80, 82],
                GgmlType::Q3K => &[108],
                GgmlType::Q6K => &[208],
                GgmlType::Mxfp4 => {
                    block[0] = 120;
                    &[]
                }
            };
            for at in halves {
                block[*at..at + 2].copy_from_slice(&scale);
            }
            if ty == GgmlType::F32 {
                block.copy_from_slice(&0.37f32.to_le_bytes());
            }
        }
        bytes
    }

    fn tiers() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }

    #[test]
    fn every_tier_decodes_every_type_exactly_as_the_scalar_reference() {
        for ty in GgmlType::ALL {
            let cols = 512;
            let bytes = weights(ty, 1, cols);
            let mut expected = vec![0.0; cols];
            crate::quant::dequantize(ty, &bytes, &mut expected);
            for isa in tiers() {
                let mut got = vec![0.0; cols];
                let (src, dst) = (&bytes[..], &mut got[..]);
                dispatch!(isa, decode_row_or_copy(ty: GgmlType, src: &[u8], dst: &mut [f32]));
                let same = got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{} on {}", ty.name(), isa.name());
            }
        }
    }

    #[test]
    fn products_agree_with_an_f64_reference_for_every_type_and_tier() {
        let (rows, cols, tokens) = (37, 512, 9);
        let x = values(tokens * cols, 3);
        for ty in GgmlType::ALL {
            let bytes = weights(ty, rows, cols);
            let mut w = vec![0.0; rows * cols];
            crate::quant::dequantize(ty, &bytes, &mut w);
            for isa in tiers() {
                let cpu = Cpu { isa, pool: Pool::new(2) };
                let mut out = vec![0.0; tokens * rows];
                matmul(&cpu, &x, [Product { weights: Matrix::new(ty, rows, cols, &bytes), out: &mut out }]);
                for t in 0..tokens {
                    for r in 0..rows {
                        let terms =
                            || (0..cols).map(|k| f64::from(x[t * cols + k]) * f64::from(w[r * cols + k]));
                        let (exact, scale) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        let got = f64::from(out[t * rows + r]);
                        assert!(
                            (got - exact).abs() <= scale * 1e-6 + 1e-30,
                            "{} {}: {got} for {exact}",
                            ty.name(),
                            isa.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_rows_bits_do_not_depend_on_the_batch_or_on_the_threads() {
        let (rows, tokens) = (70, 13);
        for (ty, cols) in GgmlType::ALL.map(|ty| (ty, 512)).into_iter().chain([(GgmlType::F32, 41)]) {
            let bytes = weights(ty, rows, cols);
            let x = values(tokens * cols, 5);
            for isa in tiers() {
                let product = |threads: usize, x: &[f32]| {
                    let mut out = vec![0.0; x.len() / cols * rows];
                    let cpu = Cpu { isa, pool: Pool::new(threads) };
                    matmul(
                        &cpu,
                        x,
                        [Product { weights: Matrix::new(ty, rows, cols, &bytes), out: &mut out }],
                    );
                    out.iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
                };
                let together = product(3, &x);
                for t in 0..tokens {
                    let alone = product(1, &x[t * cols..][..cols]);
                    assert_eq!(alone, together[t * rows..][..rows], "{} on {}", ty.name(), isa.name());
                }
            }
        }
    }
}
