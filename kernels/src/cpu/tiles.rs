//! Products of quantised activations with packed weights.
//!
//! One tile against up to eight tokens. For each row and token, over the groups of columns in order:
//!
//! ```text
//! sum = sum + (Σ (code − offset) · quant) · (weight scale · activation scale)     fused
//! sum = sum + weight minimum · (activation scale · Σ quant)                       fused, where there are minimums
//! ```
//!
//! With one plane of quants the inner sum is an exact integer; with two, each plane's is, and 256 · high + low is rounded once
//! to f32. So an output's bits depend on its row and its token alone, and are the same on every
//! tier with fused multiply-adds.

use super::activations::Block;
use super::dots::Dots;
use super::lanes::{LANES, Lanes, sixteen};
use super::prefetch::prefetch;
use crate::packed::{BLOCK, BLOCKS_PER_SUPER, Form, Scales, main_bits};

/// How far before the codes that are multiplied memory is asked for more: what comes in while a core computes with two pages.
const AHEAD: usize = 8 << 10;

/// The products of a tile's sixteen rows with `T` tokens, given as their blocks. Where the tile is `fresh` from memory, that
/// which follows it is asked for on the way.
///
/// `form` is a constant at every call: the body is compiled once for each type.
#[inline(always)]
pub fn tile_product<D: Dots, const P: usize, const T: usize>(
    form: Form,
    tile: &[u8],
    tokens: &[&[Block<P>]; T],
    fresh: bool,
) -> [D::F; T] {
    let blocks = tokens[0].len();
    let (scales, codes) = tile.split_at(form.codes_offset(blocks * BLOCK));
    let offset = D::F::splat(-(form.offset as f32));
    let mut sums = [D::F::zero(); T];
    let mut header = (D::F::zero(), D::F::zero());
    for (block, lines) in codes.chunks_exact(form.code_bytes()).enumerate() {
        if form.is_super() && block % BLOCKS_PER_SUPER == 0 {
            header = header_of::<D>(form, scales, block);
        }
        if fresh {
            prefetch(lines.as_ptr().wrapping_add(AHEAD), lines.len());
        }
        let codes = unpack::<D>(form, lines);
        for group in 0..form.groups {
            let (scale, minimum) = scales_of::<D>(form, header, scales, block, group);
            for t in 0..T {
                let x = &tokens[t][block];
                let (columns, sum) = match (form.groups, group) {
                    (1, _) => (0, x.sum),
                    (_, 0) => (0, x.sum - x.upper_sum),
                    _ => (16, x.upper_sum),
                };
                let mut dot = group_dot::<D>(form, &codes[columns / 4..], &x.planes[0][columns..]);
                if P == 2 {
                    let low = group_dot::<D>(form, &codes[columns / 4..], &x.planes[1][columns..]);
                    dot = dot.mul_add(D::F::splat(256.0), low);
                }
                if form.offset != 0 {
                    dot = D::F::splat(sum).mul_add(offset, dot);
                }
                sums[t] = dot.mul_add(scale.mul(D::F::splat(x.scale)), sums[t]);
                if form.has_minimum() {
                    let scaled_sum = if form.groups == 1 { x.scaled_sum } else { x.scale * sum };
                    sums[t] = minimum.mul_add(D::F::splat(scaled_sum), sums[t]);
                }
            }
        }
    }
    sums
}

/// The exact dot products of a group of columns with one plane.
#[inline(always)]
fn group_dot<D: Dots>(form: Form, codes: &[D::Bytes], plane: &[i8]) -> D::F {
    let bits = if form.levels.is_some() { 8 } else { form.bits };
    if form.groups == 1 { D::dot::<8>(codes, plane, bits) } else { D::dot::<4>(codes, plane, bits) }
}

/// A block's codes, four columns of sixteen rows each.
#[inline(always)]
fn unpack<D: Dots>(form: Form, lines: &[u8]) -> [D::Bytes; 8] {
    let main = main_bits(form.bits);
    let mut codes = [D::load(line(lines, 0)); 8];
    for four in 0..8 {
        codes[four] = match main {
            8 => D::load(line(lines, four)),
            4 => D::field(D::load(line(lines, four % 4)), 4 * (four as u32 / 4), 15),
            _ => D::field(D::load(line(lines, four / 4)), 2 * (four as u32 % 4), 3),
        };
        codes[four] = match form.bits - main {
            0 => codes[four],
            1 => {
                let bit = D::field(D::load(line(lines, main)), four as u32, 1);
                D::raise(bit, main as u32, 1, codes[four])
            }
            _ => {
                let pair = D::field(D::load(line(lines, main + four / 4)), 2 * (four as u32 % 4), 3);
                D::raise(pair, main as u32, 3, codes[four])
            }
        };
        if let Some(levels) = &form.levels {
            codes[four] = D::look_up(levels, codes[four]);
        }
    }
    codes
}

#[inline(always)]
fn line(lines: &[u8], index: usize) -> &[u8; 64] {
    lines[64 * index..64 * index + 64].first_chunk().expect("64 bytes are 64 bytes")
}

/// What the blocks of a header share, one lane for each row: scales and minimums (zeros where there are none), or what their
/// factors are multiplied with.
#[inline(always)]
fn header_of<D: Dots>(form: Form, scales: &[u8], block: usize) -> (D::F, D::F) {
    let (_, at) = form.scale_offsets(block);
    let first = halves(scales, at);
    let scale = if form.scales == Scales::Brain { D::F::load_bf16(&first) } else { D::F::load_f16(&first) };
    match form.scales {
        Scales::Half | Scales::Brain | Scales::Super => (scale, D::F::zero()),
        Scales::HalfMin => (scale, D::F::load_f16(&halves(scales, at + 2 * LANES))),
        Scales::SuperMin => {
            let minimum = D::F::load_f16(&halves(scales, at + 2 * LANES));
            (scale, D::F::zero().sub(minimum))
        }
    }
}

/// The scales and the minimums of a group of columns.
#[inline(always)]
fn scales_of<D: Dots>(
    form: Form,
    header: (D::F, D::F),
    scales: &[u8],
    block: usize,
    group: usize,
) -> (D::F, D::F) {
    let (at, _) = form.scale_offsets(block);
    match form.scales {
        Scales::Half | Scales::Brain | Scales::HalfMin => header_of::<D>(form, scales, block),
        Scales::Super => (header.0.mul(D::F::load_i8(sixteen(scales, at + group * LANES))), header.1),
        Scales::SuperMin => {
            let factors = D::F::load_u8(sixteen(scales, at + 2 * group * LANES));
            let minimums = D::F::load_u8(sixteen(scales, at + (2 * group + 1) * LANES));
            (header.0.mul(factors), header.1.mul(minimums))
        }
    }
}

#[inline(always)]
fn halves(scales: &[u8], at: usize) -> [u16; LANES] {
    let bytes: &[u8; 2 * LANES] = scales[at..at + 2 * LANES].first_chunk().expect("32 bytes are 32 bytes");
    std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
}
