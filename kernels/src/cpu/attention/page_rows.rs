//! One head's keys and values of one page, in the shapes that products take: lanes are positions of keys, and numbers
//! along the head of values. Few queries widen them as they multiply; for many, widening once is cheaper.

use super::super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use super::product::{Blocks, KeyBlocks, Rows, Strided};
use crate::page::{KEY_GROUP, KvDtype, PAGE_TOKENS, PageLayout};

const _: () = assert!(KEY_GROUP == LANES, "a group of keys is a vector");

/// Scratch for one page, kept from one to the next.
#[derive(Default)]
pub struct PageRows {
    /// What is widened: `[groups, head_dim, 16]` of keys, `[positions, stride]` of values.
    wide: Vec<f32>,
}

/// Keys to multiply with, a row for each number along the head, a vector for each group of positions.
pub enum Keys<'a> {
    Singles(Strided<'a, f32>),
    Halves(Strided<'a, u16>),
    Blocks(KeyBlocks<'a>),
}

/// Values to multiply with, `[positions, head_dim]`.
pub enum Values<'a> {
    Singles(Strided<'a, f32>),
    Halves(Strided<'a, u16>),
    Blocks(Blocks<'a>),
}

impl PageRows {
    /// Room for a page of heads as wide as this.
    fn prepare(&mut self, head_dim: usize) {
        let numbers = head_dim.next_multiple_of(LANES) * PAGE_TOKENS;
        if self.wide.len() < numbers {
            self.wide.resize(numbers, 0.0);
        }
    }

    /// The keys of `run`, whole groups as stored. Positions that are not written have keys of no meaning.
    #[inline(always)]
    pub fn keys<'a, L: Lanes>(&'a mut self, layout: &PageLayout, run: &'a [u8], few: bool) -> Keys<'a> {
        let head_dim = layout.head_dim;
        let shape = (head_dim, run.len() / (KEY_GROUP * layout.row_bytes()));
        let strides = (LANES, head_dim * LANES);
        match layout.dtype {
            KvDtype::F16 if few => return Keys::Halves(Strided::new(halves(run), shape, strides)),
            KvDtype::Q8_0 if few => return Keys::Blocks(KeyBlocks::new(run, head_dim)),
            _ => {}
        }
        self.prepare(head_dim);
        let wide = self.wide.as_chunks_mut::<LANES>().0;
        match layout.dtype {
            KvDtype::F16 => {
                for (halves, singles) in halves(run).as_chunks::<LANES>().0.iter().zip(wide) {
                    L::load_f16(halves).store(singles);
                }
            }
            KvDtype::Q8_0 => {
                let keys = KeyBlocks::new(run, head_dim);
                for (group, wide) in wide.chunks_mut(head_dim).enumerate().take(shape.1) {
                    for (value, singles) in wide.iter_mut().enumerate() {
                        // SAFETY: inside the shape.
                        unsafe { keys.vector::<L>(value, group) }.store(singles);
                    }
                }
            }
        }
        Keys::Singles(Strided::new(&self.wide, shape, strides))
    }

    /// The values of `run`, `[positions, head_dim]` as stored, one row for each position.
    #[inline(always)]
    pub fn values<'a, L: Lanes>(&'a mut self, layout: &PageLayout, run: &'a [u8], few: bool) -> Values<'a> {
        let head_dim = layout.head_dim;
        let stride = head_dim.next_multiple_of(LANES);
        let positions = run.len() / layout.row_bytes();
        let shape = (positions, stride / LANES);
        match layout.dtype {
            KvDtype::F16 if few && stride == head_dim => {
                return Values::Halves(Strided::new(halves(run), shape, (stride, LANES)));
            }
            KvDtype::Q8_0 if few => {
                let (blocks, stride) = (run.as_chunks().0, head_dim.div_ceil(32));
                return Values::Blocks(Blocks { blocks, stride, vectors: shape.1 });
            }
            _ => {}
        }
        self.prepare(head_dim);
        for position in 0..positions {
            let row = &run[position * layout.row_bytes()..][..layout.row_bytes()];
            let out = &mut self.wide[position * stride..][..stride];
            match layout.dtype {
                KvDtype::F16 => {
                    let row = halves(row);
                    let whole = head_dim - head_dim % LANES;
                    for at in (0..whole).step_by(LANES) {
                        L::load_f16(sixteen(row, at)).store(sixteen_mut(out, at));
                    }
                    if whole < head_dim {
                        let mut last = [0; LANES];
                        last[..head_dim - whole].copy_from_slice(&row[whole..]);
                        L::load_f16(&last).store(sixteen_mut(out, whole));
                    }
                }
                KvDtype::Q8_0 => {
                    // A head's last block is padded with zeros.
                    for (block, out) in row.as_chunks::<34>().0.iter().zip(out.chunks_mut(32)) {
                        let scale = L::splat_f16([block[0], block[1]]);
                        for (quants, out) in
                            block[2..].as_chunks::<LANES>().0.iter().zip(out.as_chunks_mut().0)
                        {
                            L::load_i8(quants).mul(scale).store(out);
                        }
                    }
                }
            }
        }
        Values::Singles(Strided::new(&self.wide, shape, (stride, LANES)))
    }
}

/// The 16-bit numbers of a run of a page.
#[inline(always)]
fn halves(run: &[u8]) -> &[u16] {
    // A run begins at an even offset of an aligned page.
    assert!(run.as_ptr().cast::<u16>().is_aligned());
    // SAFETY: aligned, inside the slice, and every bit pattern is a number.
    unsafe { std::slice::from_raw_parts(run.as_ptr().cast(), run.len() / 2) }
}
