//! The one register-blocked product of attention: scores are queries times keys, results are weights times values.

use std::ops::Range;

use super::super::lanes::{LANES, Lanes, sixteen};
use super::super::prefetch::prefetch;
use crate::page::{KEY_BLOCK_BYTES, KEY_GROUP};

/// A right-hand side: rows of whole vectors of lanes.
pub trait Rows {
    /// Rows, and vectors of a row.
    fn shape(&self) -> (usize, usize);

    /// # Safety
    /// `row` and `vector` lie inside `shape`.
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L;
}

/// Rows of numbers, `strides.0` from one row to the next and `strides.1` from one vector of a row to the next.
pub struct Strided<'a, T> {
    values: &'a [T],
    strides: (usize, usize),
    shape: (usize, usize),
}

impl<'a, T> Strided<'a, T> {
    pub fn new(values: &'a [T], shape: (usize, usize), strides: (usize, usize)) -> Strided<'a, T> {
        let (rows, vectors) = shape;
        let last = rows.saturating_sub(1) * strides.0 + vectors.saturating_sub(1) * strides.1;
        assert!(rows * vectors == 0 || last + LANES <= values.len(), "{shape:?} lie inside");
        Strided { values, strides, shape }
    }

    /// # Safety
    /// `row` and `vector` lie inside the shape.
    #[inline(always)]
    unsafe fn sixteen(&self, row: usize, vector: usize) -> &'a [T; LANES] {
        // SAFETY: `new` has checked the last one of the shape.
        unsafe { &*self.values.as_ptr().add(row * self.strides.0 + vector * self.strides.1).cast() }
    }
}

impl Rows for Strided<'_, f32> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        // SAFETY: the caller's promise.
        L::load(unsafe { self.sixteen(row, vector) })
    }
}

/// Half precision, widened as it is read.
impl Rows for Strided<'_, u16> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        // SAFETY: the caller's promise.
        L::load_f16(unsafe { self.sixteen(row, vector) })
    }
}

/// Turned groups of Q8_0 keys, as a page holds them: a vector for each group, a row for each value of the head.
pub struct KeyBlocks<'a> {
    bytes: &'a [u8],
    head_dim: usize,
    group_bytes: usize,
}

impl<'a> KeyBlocks<'a> {
    /// Whole groups, at an even address.
    pub fn new(bytes: &'a [u8], head_dim: usize) -> KeyBlocks<'a> {
        assert!(bytes.as_ptr().cast::<u16>().is_aligned());
        KeyBlocks { bytes, head_dim, group_bytes: head_dim.div_ceil(32) * KEY_BLOCK_BYTES }
    }
}

impl Rows for KeyBlocks<'_> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        (self.head_dim, self.bytes.len() / self.group_bytes)
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        let block = vector * self.group_bytes + row / 32 * KEY_BLOCK_BYTES;
        // SAFETY: inside `shape`, hence inside the bytes; groups and blocks have even sizes, so the scales are aligned.
        let (scales, quants) = unsafe {
            let block = self.bytes.as_ptr().add(block);
            (&*block.cast(), &*block.add((row % 32 + 2) * KEY_GROUP).cast())
        };
        L::load_i8(quants).mul(L::load_f16(scales))
    }
}

/// Rows of Q8_0 blocks, as a page holds values.
pub struct Blocks<'a> {
    pub blocks: &'a [[u8; 34]],
    /// Blocks of a row.
    pub stride: usize,
    /// Of a row: as many as are wanted, at most two a block.
    pub vectors: usize,
}

impl Rows for Blocks<'_> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        (self.blocks.len() / self.stride, self.vectors.min(2 * self.stride))
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        // SAFETY: inside `shape`, hence inside the slice.
        let block = unsafe { &*self.blocks.as_ptr().add(row * self.stride + vector / 2) };
        let quants = L::load_i8(sixteen(block, 2 + vector % 2 * LANES));
        quants.mul(L::splat_f16([block[0], block[1]]))
    }
}

/// A matrix of rows, `stride` apart.
pub struct Left<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// `c[i] = c₀[i] + Σ a[i][at + r] · b[r]` for rows `i` of `states` and `r` over `depth`, ascending: one chain of
/// multiply-adds for each value of `c`, whatever the blocking. `c₀` is what `c` holds, or zero where it is `fresh`. Rows
/// of `c` are `c_stride` apart. Meanwhile the processor is asked for `ahead`, which will be read next.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // They are the formula's.
pub fn multiply<L: Lanes, B: Rows>(
    a: &Left<'_>,
    states: Range<usize>,
    at: usize,
    b: &B,
    depth: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    fresh: bool,
    ahead: &[u8],
) {
    let (rows, vectors) = b.shape();
    // Checked once for all the unchecked reads and writes of the blocks.
    assert!(depth.start <= depth.end && depth.end <= rows && vectors * LANES <= c_stride);
    assert!(states.is_empty() || (states.end - 1) * a.stride + at + depth.end <= a.values.len());
    assert!(states.is_empty() || (states.end - 1) * c_stride + vectors * LANES <= c.len());
    let mut state = states.start;
    while state < states.end {
        let queries = L::QUERIES.min(states.end - state);
        let mut vector = 0;
        while vector < vectors {
            let left = vectors - vector;
            let first = state == states.start && vector == 0;
            let ahead = if first { ahead } else { &[] };
            let block = Block { state, at, vector, depth: depth.clone(), fresh, ahead };
            vector += if L::VECTORS >= 4 && left >= 4 {
                block.of::<L, B, 4>(queries, a, b, c, c_stride)
            } else if L::VECTORS >= 2 && left >= 2 {
                block.of::<L, B, 2>(queries, a, b, c, c_stride)
            } else {
                block.of::<L, B, 1>(queries, a, b, c, c_stride)
            };
        }
        state += queries;
    }
}

/// Where a register block lies: first row of `a` and `c`, first column of `a`, first vector of `b` and `c`.
struct Block<'a> {
    state: usize,
    at: usize,
    vector: usize,
    depth: Range<usize>,
    fresh: bool,
    ahead: &'a [u8],
}

impl Block<'_> {
    /// Picks the body for the number of queries; returns `N`.
    #[inline(always)]
    fn of<L: Lanes, B: Rows, const N: usize>(
        &self,
        queries: usize,
        a: &Left<'_>,
        b: &B,
        c: &mut [f32],
        c_stride: usize,
    ) -> usize {
        macro_rules! pick {
            ($($q:literal)*) => {
                match queries {
                    // SAFETY: `multiply` has checked the shapes, and cuts its blocks out of them.
                    $($q if L::QUERIES >= $q => unsafe { self.multiply::<L, B, $q, N>(a, b, c, c_stride) },)*
                    _ => unreachable!("a block has 1 to {} queries", L::QUERIES),
                }
            };
        }
        pick!(6 5 4 3 2 1);
        N
    }

    /// # Safety
    /// The block's `Q` rows and columns `at + depth` of `a`, `N` vectors of `b` and of `c` exist.
    #[inline(always)]
    unsafe fn multiply<L: Lanes, B: Rows, const Q: usize, const N: usize>(
        &self,
        a: &Left<'_>,
        b: &B,
        c: &mut [f32],
        c_stride: usize,
    ) {
        let mut sums = [[L::zero(); N]; Q];
        // SAFETY: promised by the caller; nothing else is read or written.
        unsafe {
            let a_rows = a.values.as_ptr().add(self.state * a.stride + self.at);
            let c_rows = c.as_mut_ptr().add(self.state * c_stride + self.vector * LANES);
            for q in 0..if self.fresh { 0 } else { Q } {
                for n in 0..N {
                    sums[q][n] = L::load(&*c_rows.add(q * c_stride + n * LANES).cast());
                }
            }
            let ahead_a_row = self.ahead.len().div_ceil(64 * self.depth.len().max(1)) * 64;
            let mut ahead = self.ahead.as_ptr();
            for r in self.depth.clone() {
                prefetch(ahead, ahead_a_row);
                ahead = ahead.wrapping_add(ahead_a_row);
                let mut right = [L::zero(); N];
                for n in 0..N {
                    right[n] = b.vector(r, self.vector + n);
                }
                for q in 0..Q {
                    let left = L::splat(*a_rows.add(q * a.stride + r));
                    for n in 0..N {
                        sums[q][n] = left.mul_add(right[n], sums[q][n]);
                    }
                }
            }
            for q in 0..Q {
                for n in 0..N {
                    sums[q][n].store(&mut *c_rows.add(q * c_stride + n * LANES).cast());
                }
            }
        }
    }
}
