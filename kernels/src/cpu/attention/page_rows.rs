//! One head's keys and values of one page, in the shapes that products take: keys turned so that lanes are positions,
//! values as they lie, with lanes along the head.

use super::super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use super::product::{Blocks, Halves, Singles, TurnedQuants};
use crate::page::{KvDtype, PAGE_TOKENS, PageLayout};

/// Scratch for one page, kept from one to the next.
#[derive(Default)]
pub struct PageRows {
    /// `[LANES, head_dim]`: rows of keys that cannot be read as they lie.
    rows: Vec<u16>,
    /// `[head_dim, PAGE_TOKENS]`: the keys turned, in half precision; of Q8_0 the quants, which it holds exactly.
    turned: Vec<u16>,
    /// `[blocks, PAGE_TOKENS]`: the scales of Q8_0.
    scales: Vec<f32>,
    /// `[head_dim, PAGE_TOKENS]`, or `[PAGE_TOKENS, stride]`: widened.
    wide: Vec<f32>,
}

/// Keys to multiply with, `[head_dim, PAGE_TOKENS]`.
pub enum Keys<'a> {
    Singles(Singles<'a>),
    Halves(Halves<'a>),
    Quants(TurnedQuants<'a>),
}

/// Values to multiply with, `[positions, head_dim]`.
pub enum Values<'a> {
    Singles(Singles<'a>),
    Halves(Halves<'a>),
    Blocks(Blocks<'a>),
}

impl PageRows {
    /// Room for heads as wide as this.
    fn prepare(&mut self, head_dim: usize) {
        let padded = head_dim.next_multiple_of(32);
        if self.wide.len() < padded * PAGE_TOKENS {
            self.rows.resize(padded * LANES, 0);
            self.turned.resize(padded * PAGE_TOKENS, 0);
            self.scales.resize(padded / 32 * PAGE_TOKENS, 0.0);
            self.wide.resize(padded * PAGE_TOKENS, 0.0);
        }
    }

    /// The keys of `run`, `[positions, head_dim]` as stored, one row for each value of the head. Positions that the run
    /// lacks have keys of no meaning. For few queries they are widened as they are multiplied; for many, widening once
    /// is cheaper.
    #[inline(always)]
    pub fn keys<L: Lanes>(&mut self, layout: &PageLayout, run: &[u8], few: bool) -> Keys<'_> {
        let head_dim = layout.head_dim;
        self.prepare(head_dim);
        let len = head_dim * PAGE_TOKENS;
        let vectors = (run.len() / layout.row_bytes()).div_ceil(LANES);
        let (turned, wide) = (&mut self.turned[..len], &mut self.wide[..len]);
        match layout.dtype {
            KvDtype::F16 => {
                turn_halves::<L>(head_dim, halves(run), &mut self.rows, turned);
                if few {
                    return Keys::Halves(Halves { values: turned, stride: PAGE_TOKENS, vectors });
                }
                for (half, single) in turned.as_chunks::<LANES>().0.iter().zip(wide.as_chunks_mut().0) {
                    L::load_f16(half).store(single);
                }
            }
            KvDtype::Q8_0 => {
                turn_quants::<L>(head_dim, run, &mut self.rows, turned, &mut self.scales);
                if few {
                    let scales = &self.scales[..head_dim.div_ceil(32) * PAGE_TOKENS];
                    return Keys::Quants(TurnedQuants {
                        values: turned,
                        scales,
                        stride: PAGE_TOKENS,
                        vectors,
                    });
                }
                let blocks = turned.chunks(32 * PAGE_TOKENS).zip(wide.chunks_mut(32 * PAGE_TOKENS));
                for ((quants, singles), scales) in blocks.zip(self.scales.chunks(PAGE_TOKENS)) {
                    for at in (0..PAGE_TOKENS).step_by(LANES) {
                        let scale = L::load(sixteen(scales, at));
                        for at in (at..quants.len()).step_by(PAGE_TOKENS) {
                            L::load_f16(sixteen(quants, at)).mul(scale).store(sixteen_mut(singles, at));
                        }
                    }
                }
            }
        }
        Keys::Singles(Singles { values: wide, stride: PAGE_TOKENS, vectors })
    }

    /// The values of `run`, `[positions, head_dim]` as stored, one row for each position.
    #[inline(always)]
    pub fn values<'a, L: Lanes>(&'a mut self, layout: &PageLayout, run: &'a [u8], few: bool) -> Values<'a> {
        let head_dim = layout.head_dim;
        let stride = head_dim.next_multiple_of(LANES);
        let vectors = stride / LANES;
        match layout.dtype {
            KvDtype::F16 if few && stride == head_dim => {
                return Values::Halves(Halves { values: halves(run), stride, vectors });
            }
            KvDtype::Q8_0 if few => {
                let (blocks, stride) = (run.as_chunks().0, head_dim.div_ceil(32));
                return Values::Blocks(Blocks { blocks, stride, vectors });
            }
            _ => {}
        }
        let positions = run.len() / layout.row_bytes();
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
        Values::Singles(Singles { values: &self.wide[..positions * stride], stride, vectors })
    }
}

/// `turned[value][position] = run[position][value]`
#[inline(always)]
fn turn_halves<L: Lanes>(head_dim: usize, run: &[u16], rows: &mut [u16], turned: &mut [u16]) {
    for (index, sixteen_rows) in run.chunks(LANES * head_dim).enumerate() {
        let from = if sixteen_rows.len() == LANES * head_dim {
            sixteen_rows
        } else {
            rows[..sixteen_rows.len()].copy_from_slice(sixteen_rows);
            &rows[..LANES * head_dim]
        };
        turn_sixteen::<L>(head_dim, from, head_dim, &mut turned[index * LANES..]);
    }
}

/// The same of quants, and `scales[block][position]`.
#[inline(always)]
fn turn_quants<L: Lanes>(
    head_dim: usize,
    run: &[u8],
    rows: &mut [u16],
    turned: &mut [u16],
    scales: &mut [f32],
) {
    let blocks = head_dim.div_ceil(32);
    for (index, sixteen_rows) in run.as_chunks::<34>().0.chunks(LANES * blocks).enumerate() {
        for (block, row) in sixteen_rows.iter().zip(rows.as_chunks_mut::<32>().0) {
            for at in [0, LANES] {
                L::load_i8(sixteen(block, 2 + at)).store_f16(sixteen_mut(row, at));
            }
        }
        for block in 0..blocks {
            let mut bits = [0; LANES];
            for (bits, row) in bits.iter_mut().zip(sixteen_rows.chunks(blocks)) {
                *bits = u16::from_le_bytes([row[block][0], row[block][1]]);
            }
            L::load_f16(&bits).store(sixteen_mut(scales, block * PAGE_TOKENS + index * LANES));
        }
        turn_sixteen::<L>(head_dim, rows, blocks * 32, &mut turned[index * LANES..]);
    }
}

/// Sixteen positions of [`turn_halves`]; rows are `stride` apart.
#[inline(always)]
fn turn_sixteen<L: Lanes>(head_dim: usize, rows: &[u16], stride: usize, turned: &mut [u16]) {
    let whole = head_dim - head_dim % LANES;
    for value in (0..whole).step_by(LANES) {
        L::transpose(&rows[value..], stride, &mut turned[value * PAGE_TOKENS..], PAGE_TOKENS);
    }
    for value in whole..head_dim {
        for position in 0..LANES {
            turned[value * PAGE_TOKENS + position] = rows[position * stride + value];
        }
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
