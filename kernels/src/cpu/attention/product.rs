//! The one register-blocked product of attention: scores are queries times keys, results are weights times values.

use std::ops::Range;

use super::super::lanes::{LANES, Lanes, sixteen};

/// A right-hand side: rows of whole vectors of lanes.
pub trait Rows {
    /// Rows, and vectors of a row.
    fn shape(&self) -> (usize, usize);

    /// # Safety
    /// `row` and `vector` lie inside `shape`.
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L;
}

/// Rows of single precision.
pub struct Singles<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    /// Of a row: as many as are wanted, at most those of the stride.
    pub vectors: usize,
}

/// Rows of half precision, widened as they are read.
pub struct Halves<'a> {
    pub values: &'a [u16],
    pub stride: usize,
    /// Of a row: as many as are wanted, at most those of the stride.
    pub vectors: usize,
}

impl Rows for Singles<'_> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        (self.values.len() / self.stride, self.vectors.min(self.stride / LANES))
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        // SAFETY: inside `shape`, hence inside the slice.
        L::load(unsafe { &*self.values.as_ptr().add(row * self.stride + vector * LANES).cast() })
    }
}

impl Rows for Halves<'_> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        (self.values.len() / self.stride, self.vectors.min(self.stride / LANES))
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        // SAFETY: inside `shape`, hence inside the slice.
        L::load_f16(unsafe { &*self.values.as_ptr().add(row * self.stride + vector * LANES).cast() })
    }
}

/// Rows of quants in half precision, a scale for each vector of 32 rows.
pub struct TurnedQuants<'a> {
    pub values: &'a [u16],
    /// `[rows / 32, stride]`
    pub scales: &'a [f32],
    /// A multiple of [`LANES`].
    pub stride: usize,
    /// Of a row: as many as are wanted, at most those of the stride.
    pub vectors: usize,
}

impl Rows for TurnedQuants<'_> {
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        let rows = (self.values.len() / self.stride).min(self.scales.len() / self.stride * 32);
        (rows, self.vectors.min(self.stride / LANES))
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, vector: usize) -> L {
        let (at, scale) = (row * self.stride + vector * LANES, row / 32 * self.stride + vector * LANES);
        // SAFETY: inside `shape`, hence inside both slices.
        let (quants, scales) =
            unsafe { (&*self.values.as_ptr().add(at).cast(), &*self.scales.as_ptr().add(scale).cast()) };
        L::load_f16(quants).mul(L::load(scales))
    }
}

/// Rows of Q8_0 blocks.
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
/// of `c` are `c_stride` apart.
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
            let block = Block { state, at, vector, depth: depth.clone(), fresh };
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
struct Block {
    state: usize,
    at: usize,
    vector: usize,
    depth: Range<usize>,
    fresh: bool,
}

impl Block {
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
            for r in self.depth.clone() {
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
