//! Matrix products of activations with weights in any GGML type.
//!
//! Float weights are multiplied in f32 (see [`super::floats`]); quantised ones, packed into tiles, with activations quantised to
//! bytes (see [`super::tiles`]). Either way an output's bits depend on its row of weights and its token's activations alone.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{Block, Precision, quantise};
use super::disjoint::Disjoint;
use super::dots::Dots;
use super::floats::float_rows;
use super::isa::{dispatch, dispatch_dots};
use super::lanes::{LANES, Lanes};
use super::tiles::tile_product;
use super::{Cpu, Isa};
use crate::GgmlType;
use crate::packed::{BLOCK, Form, TILE_ROWS};

/// Activations that a thread goes over again and again, in bytes: a part of its L2 cache.
const CHUNK_BYTES: usize = 256 << 10;
/// Tiles of one task, at most.
const TASK_TILES: usize = 32;

/// Weights `[rows, cols]`: row-major floats, or a quantised type's tiles ([`crate::packed`]).
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub ty: GgmlType,
    pub rows: usize,
    pub cols: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// `bytes` are `rows · ty.row_bytes(cols)` for a float type, else `ty.packed_bytes(rows, cols)`.
    pub fn new(ty: GgmlType, rows: usize, cols: usize, bytes: &'a [u8]) -> Matrix<'a> {
        let wanted = if ty.is_packed() { ty.packed_bytes(rows, cols) } else { rows * ty.row_bytes(cols) };
        assert_eq!(bytes.len(), wanted, "weights of {rows} × {cols} {}", ty.name());
        Matrix { ty, rows, cols, bytes }
    }

    /// A row of float weights.
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
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
    let jobs = products.map(|product| {
        assert_eq!(product.weights.cols, cols, "products of one region share their input");
        assert_eq!(product.out.len(), tokens * product.weights.rows, "output is [tokens, rows]");
        (product.weights, Disjoint::new(product.out))
    });
    // Tasks take whole tiles, neighbours together, and enough of them are left to even out the threads' pace.
    let tiles = jobs.each_ref().map(|(weights, _)| weights.rows.div_ceil(TILE_ROWS));
    let task_tiles = (tiles.iter().sum::<usize>() / (8 * cpu.pool.threads())).clamp(1, TASK_TILES);
    let tasks = tiles.map(|tiles| tiles.div_ceil(task_tiles));
    let packed = jobs.iter().any(|(weights, _)| weights.ty.is_packed());
    let run = |x: Activations<'_>| {
        cpu.pool.run(tasks.iter().sum(), &|mut task| {
            let mut job = 0;
            while task >= tasks[job] {
                task -= tasks[job];
                job += 1;
            }
            let (weights, out) = &jobs[job];
            run_tiles(cpu, weights, task * task_tiles..tiles[job].min((task + 1) * task_tiles), &x, out);
        });
    };
    match (packed, cpu.precision) {
        (false, _) => run(Activations { floats: x, quantised: Quantised::None }),
        (true, Precision::Int8) => BYTES.with_borrow_mut(|blocks| {
            quantise_all(cpu, x, cols, blocks);
            run(Activations { floats: x, quantised: Quantised::Int8(blocks) });
        }),
        (true, Precision::Int16) => WORDS.with_borrow_mut(|blocks| {
            quantise_all(cpu, x, cols, blocks);
            run(Activations { floats: x, quantised: Quantised::Int16(blocks) });
        }),
    }
}

thread_local! {
    /// The calling thread's quantised activations; grow to the largest batch once.
    static BYTES: RefCell<Vec<Block<1>>> = const { RefCell::new(Vec::new()) };
    static WORDS: RefCell<Vec<Block<2>>> = const { RefCell::new(Vec::new()) };
}

/// A region's input, `[tokens, cols]`.
#[derive(Clone, Copy)]
struct Activations<'a> {
    floats: &'a [f32],
    quantised: Quantised<'a>,
}

/// The input as blocks, `[tokens, cols / 32]`, where a product needs it.
#[derive(Clone, Copy)]
enum Quantised<'a> {
    None,
    Int8(&'a [Block<1>]),
    Int16(&'a [Block<2>]),
}

/// Values that one task quantises at the least: some microseconds.
const QUANTISE_LEAST: usize = 4096;

/// Quantises rows of `cols` values, in parallel where there are many.
fn quantise_all<const P: usize>(cpu: &Cpu, x: &[f32], cols: usize, blocks: &mut Vec<Block<P>>) {
    assert_eq!(cols % BLOCK, 0, "quantised weights have whole blocks");
    blocks.resize(x.len() / BLOCK, Block::ZERO);
    let isa = cpu.isa;
    // Even shares, each of which outweighs handing it out.
    let (rows, most) = (x.len() / cols, x.len() / QUANTISE_LEAST);
    let task = rows.div_ceil(most.clamp(1, rows.max(1))) * cols;
    let blocks = Disjoint::new(blocks);
    cpu.pool.run(x.len().div_ceil(task), &|index| {
        let range = index * task..x.len().min((index + 1) * task);
        let (values, blocks) = (&x[range.clone()], blocks.part(range.start / BLOCK..range.end / BLOCK));
        dispatch_dots!(isa, P, quantise(values: &[f32], blocks: &mut [Block<P>]));
    });
}

/// The products of some of a matrix's tiles with all tokens.
fn run_tiles(
    cpu: &Cpu,
    weights: &Matrix<'_>,
    tiles: Range<usize>,
    x: &Activations<'_>,
    out: &Disjoint<'_, f32>,
) {
    match x.quantised {
        Quantised::Int8(blocks) if weights.ty.is_packed() => packed(cpu.isa, weights, tiles, blocks, out),
        Quantised::Int16(blocks) if weights.ty.is_packed() => packed(cpu.isa, weights, tiles, blocks, out),
        _ => {
            let rows = tiles.start * TILE_ROWS..weights.rows.min(tiles.end * TILE_ROWS);
            let x = x.floats;
            dispatch!(cpu.isa, float_rows(weights: &Matrix<'_>, rows: Range<usize>, x: &[f32], out: &Disjoint<'_, f32>))
        }
    }
}

fn packed<const P: usize>(
    isa: Isa,
    weights: &Matrix<'_>,
    tiles: Range<usize>,
    x: &[Block<P>],
    out: &Disjoint<'_, f32>,
) {
    macro_rules! of {
        ($ty:expr) => {
            dispatch_dots!(isa, P, packed_tiles[const { Form::of($ty).unwrap() }](weights: &Matrix<'_>, tiles: Range<usize>, x: &[Block<P>], out: &Disjoint<'_, f32>))
        };
    }
    match weights.ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => unreachable!("floats are not packed"),
        GgmlType::Q4_0 => of!(GgmlType::Q4_0),
        GgmlType::Q4_1 => of!(GgmlType::Q4_1),
        GgmlType::Q5_0 => of!(GgmlType::Q5_0),
        GgmlType::Q5_1 => of!(GgmlType::Q5_1),
        GgmlType::Q8_0 => of!(GgmlType::Q8_0),
        GgmlType::Q2K => of!(GgmlType::Q2K),
        GgmlType::Q3K => of!(GgmlType::Q3K),
        GgmlType::Q4K => of!(GgmlType::Q4K),
        GgmlType::Q5K => of!(GgmlType::Q5K),
        GgmlType::Q6K => of!(GgmlType::Q6K),
        GgmlType::Iq4Nl => of!(GgmlType::Iq4Nl),
        GgmlType::Iq4Xs => of!(GgmlType::Iq4Xs),
        GgmlType::Mxfp4 => of!(GgmlType::Mxfp4),
    }
}

#[inline(always)]
fn packed_tiles<D: Dots, const P: usize>(
    form: Form,
    weights: &Matrix<'_>,
    tiles: Range<usize>,
    x: &[Block<P>],
    out: &Disjoint<'_, f32>,
) {
    let blocks = weights.cols / BLOCK;
    let tile_bytes = form.tile_bytes(weights.cols);
    let tokens = x.len() / blocks;
    // A chunk of tokens stays in cache while the tiles go past it.
    let chunk = (CHUNK_BYTES / (blocks * size_of::<Block<P>>()) / D::TOKENS).max(1) * D::TOKENS;
    for first in (0..tokens).step_by(chunk) {
        let end = tokens.min(first + chunk);
        for tile in tiles.clone() {
            let bytes = &weights.bytes[tile * tile_bytes..][..tile_bytes];
            let rows = TILE_ROWS.min(weights.rows - tile * TILE_ROWS);
            let mut token = first;
            macro_rules! tokens {
                ($t:literal) => {
                    while const { D::TOKENS / P >= $t } && end - token >= $t {
                        let mut rows_of = [&x[..0]; $t];
                        for t in 0..$t {
                            rows_of[t] = &x[(token + t) * blocks..][..blocks];
                        }
                        let sums = tile_product::<D, P, $t>(form, bytes, &rows_of, token == 0);
                        for t in 0..$t {
                            let mut values = [0.0; LANES];
                            sums[t].store(&mut values);
                            let at = (token + t) * weights.rows + tile * TILE_ROWS;
                            // Of a length that is known: a move instead of a call.
                            if rows == TILE_ROWS {
                                out.put(at, &values)
                            } else {
                                out.put(at, &values[..rows])
                            }
                        }
                        token += $t;
                    }
                };
            }
            tokens!(8);
            tokens!(4);
            tokens!(2);
            tokens!(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Pool};
    use super::*;
    use crate::quant::dequantize;
    use crate::testing::{packed, values, weights};

    fn tiers() -> impl Iterator<Item = (Isa, Precision)> {
        let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
        isas.flat_map(|isa| Precision::ALL.map(|precision| (isa, precision)))
    }

    fn product(
        (isa, precision): (Isa, Precision),
        threads: usize,
        ty: GgmlType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        x: &[f32],
    ) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / cols * rows];
        let cpu = Cpu { isa, precision, pool: Pool::new(threads) };
        matmul(&cpu, x, [Product { weights: Matrix::new(ty, rows, cols, bytes), out: &mut out }]);
        out
    }

    /// What the product of a quantised type multiplies: the nearest multiples of a part of a block's largest activation.
    fn rounded(x: &[f32], precision: Precision) -> Vec<f64> {
        let steps = if precision == Precision::Int8 { 127.0 } else { 127.0 * 256.0 };
        let mut out = Vec::with_capacity(x.len());
        for block in x.chunks(32) {
            let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            if largest < 1e-30 {
                out.extend(block.iter().map(|_| 0.0));
                continue;
            }
            let (scale, inverse) = (largest / steps, steps / largest);
            out.extend(block.iter().map(|v| f64::from((v * inverse).round_ties_even()) * f64::from(scale)));
        }
        out
    }

    /// Rows of activations that try a kernel: spread, zero, tiny, huge, one outlier in a block.
    fn activations(tokens: usize, cols: usize) -> Vec<f32> {
        let mut x = values(tokens * cols, 3);
        for (token, row) in x.chunks_mut(cols).enumerate() {
            match token % 5 {
                1 => row.iter_mut().for_each(|v| *v *= 1e-36),
                2 => row.iter_mut().for_each(|v| *v *= 1e20),
                3 => row.iter_mut().step_by(33).for_each(|v| *v *= 1e4),
                4 => row[..cols / 2].fill(0.0),
                _ => {}
            }
        }
        x
    }

    #[test]
    fn products_agree_with_an_f64_reference_for_every_type_and_tier() {
        let (rows, cols, tokens) = (37, 512, 15);
        let x = activations(tokens, cols);
        for ty in GgmlType::ALL {
            let source = weights(ty, rows, cols, 7);
            let bytes = packed(ty, rows, cols, &source);
            let mut w = vec![0.0; rows * cols];
            dequantize(ty, &source, &mut w);
            for tier in tiers() {
                let x64 = match ty.is_packed() {
                    true => rounded(&x, tier.1),
                    false => x.iter().map(|v| f64::from(*v)).collect(),
                };
                let out = product(tier, 2, ty, rows, cols, &bytes, &x);
                for t in 0..tokens {
                    for r in 0..rows {
                        let terms = || (0..cols).map(|k| x64[t * cols + k] * f64::from(w[r * cols + k]));
                        let (exact, scale) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        let got = f64::from(out[t * rows + r]);
                        assert!(
                            (got - exact).abs() <= scale * 2e-6 + 1e-36,
                            "{} {tier:?} token {t}: {got} for {exact}",
                            ty.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_rows_bits_do_not_depend_on_the_batch_or_on_the_threads_or_on_the_tier() {
        let (rows, tokens) = (70, 13);
        for (ty, cols) in
            GgmlType::ALL.map(|ty| (ty, 512)).into_iter().chain([(GgmlType::F32, 41), (GgmlType::Q4_1, 96)])
        {
            let bytes = packed(ty, rows, cols, &weights(ty, rows, cols, 7));
            let x = values(tokens * cols, 5);
            let mut fused: [Option<Vec<u32>>; 2] = [None, None];
            for tier in tiers() {
                let product = |threads: usize, x: &[f32]| {
                    let out = product(tier, threads, ty, rows, cols, &bytes, x);
                    out.iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
                };
                let together = product(3, &x);
                for t in 0..tokens {
                    let alone = product(1, &x[t * cols..][..cols]);
                    assert_eq!(alone, together[t * rows..][..rows], "{} on {tier:?}", ty.name());
                }
                if tier.0.arithmetic() == "fused" {
                    let first = fused[tier.1 as usize].get_or_insert_with(|| together.clone());
                    assert_eq!(&together, first, "{} on {tier:?}", ty.name());
                }
            }
        }
    }

    #[test]
    fn the_widest_codes_and_quants_do_not_overflow() {
        for ty in GgmlType::ALL.into_iter().filter(|ty| ty.is_packed()) {
            let (rows, cols) = (16, 256);
            let mut source = weights(ty, rows, cols, 7);
            // All code bits set.
            for block in source.chunks_mut(ty.block_bytes()) {
                let codes = match ty {
                    GgmlType::Q2K => 16..80,
                    GgmlType::Q3K => 0..96,
                    GgmlType::Q4K => 16..144,
                    GgmlType::Q5K => 16..176,
                    GgmlType::Q6K => 0..192,
                    GgmlType::Mxfp4 => 1..17,
                    GgmlType::Q4_1 | GgmlType::Q5_1 => 4..block.len(),
                    GgmlType::Iq4Xs => 8..136,
                    _ => 2..block.len(),
                };
                block[codes].fill(if ty == GgmlType::Q8_0 { 0x80 } else { 0xff });
            }
            let bytes = packed(ty, rows, cols, &source);
            let mut w = vec![0.0; rows * cols];
            dequantize(ty, &source, &mut w);
            for sign in [1.0, -1.0] {
                let x = vec![sign; cols];
                for tier in tiers() {
                    let out = product(tier, 1, ty, rows, cols, &bytes, &x);
                    for r in 0..rows {
                        let exact: f64 = w[r * cols..][..cols].iter().map(|w| f64::from(*w * sign)).sum();
                        let got = f64::from(out[r]);
                        assert!(
                            (got - exact).abs() <= exact.abs() * 1e-4 + 1e-3,
                            "{} {tier:?}: {got} for {exact}",
                            ty.name()
                        );
                    }
                }
            }
        }
    }
}
