//! Keys and values written where they will live.

use half::f16;

use super::super::Cpu;
use super::super::isa::dispatch;
use super::super::lanes::{LANES, Lanes};
use super::super::rows::each_range;
use super::Sequence;
use crate::page::{KvDtype, PAGE_TOKENS, PageLayout};

/// The widest row of one head: 512 values.
const LARGEST_ROW: usize = 2 * 512;
/// The largest half-precision number. A key or value beyond it is stored as it, since an infinity would make every
/// later score of its head undefined.
const LARGEST_HALF: f32 = 65504.0;

/// What storing a value takes, in those that only pass through registers: a turned key's go to a cache line each, and the
/// first ones of a page meet memory that the system must yet give.
const STORE_COST: usize = 8;

/// Writes the keys and values of every row of the batch, `[rows, kv_heads, head_dim]` each, to its position in its
/// sequence's pages.
pub fn store_kv(
    cpu: &Cpu,
    layout: &PageLayout,
    layer: usize,
    sequences: &[Sequence<'_>],
    k: &[f32],
    v: &[f32],
) {
    assert_eq!(k.len(), v.len());
    assert!(layout.row_bytes() <= LARGEST_ROW, "heads of at most 512 values");
    let (isa, width) = (cpu.isa, layout.kv_heads * layout.head_dim);
    let rows = sequences.iter().map(|sequence| sequence.rows).sum();
    each_range(cpu, rows, STORE_COST * 2 * width, &|range| {
        let mut first = 0;
        for sequence in sequences {
            let own = range.start.max(first)..range.end.min(first + sequence.rows);
            for row in own.map(|row| row - first) {
                let position = sequence.start + row;
                let at = (sequence.first_row + row) * width;
                let (k, v) = (&k[at..at + width], &v[at..at + width]);
                dispatch!(isa, store_row(layout: &PageLayout, sequence: &Sequence<'_>, layer: usize, position: usize, k: &[f32], v: &[f32]));
            }
            first += sequence.rows;
        }
    });
}

/// Writes the keys and values of one layer, as a device stored them, `[rows, {K, V}, kv_heads, row_bytes]`, to the pages of
/// their sequences.
pub fn store_rows(layout: &PageLayout, layer: usize, sequences: &[Sequence<'_>], down: &[u8]) {
    let (row_bytes, heads) = (layout.row_bytes(), layout.kv_heads);
    for sequence in sequences {
        for row in 0..sequence.rows {
            let (position, at) = (sequence.start + row, (sequence.first_row + row) * 2 * heads);
            let (page, place) = (sequence.pages[position / PAGE_TOKENS], position % PAGE_TOKENS);
            let stored = |head: usize| &down[(at + head) * row_bytes..][..row_bytes];
            for head in 0..heads {
                page.write_key(layout, layout.k_offset(layer, head), place, stored(head));
                page.write(layout, layout.v_offset(layer, head) + place * row_bytes, stored(heads + head));
            }
        }
    }
}

#[inline(always)]
fn store_row<L: Lanes>(
    layout: &PageLayout,
    sequence: &Sequence<'_>,
    layer: usize,
    position: usize,
    k: &[f32],
    v: &[f32],
) {
    let page = sequence.pages[position / PAGE_TOKENS];
    let mut bytes = [0u8; LARGEST_ROW];
    let bytes = &mut bytes[..layout.row_bytes()];
    for head in 0..layout.kv_heads {
        let row = head * layout.head_dim..(head + 1) * layout.head_dim;
        encode::<L>(layout.dtype, &k[row.clone()], bytes);
        page.write_key(layout, layout.k_offset(layer, head), position % PAGE_TOKENS, bytes);
        encode::<L>(layout.dtype, &v[row], bytes);
        page.write(layout, layout.v_offset(layer, head) + position % PAGE_TOKENS * bytes.len(), bytes);
    }
}

#[inline(always)]
fn encode<L: Lanes>(dtype: KvDtype, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        KvDtype::F16 => encode_f16::<L>(values, bytes),
        KvDtype::Q8_0 => encode_q8_0(values, bytes),
    }
}

#[inline(always)]
fn encode_f16<L: Lanes>(values: &[f32], bytes: &mut [u8]) {
    for (values, bytes) in values.chunks(LANES).zip(bytes.chunks_mut(2 * LANES)) {
        let mut lanes = [0.0; LANES];
        lanes[..values.len()].copy_from_slice(values);
        // In this order what is not a number stays so, and is seen.
        let limited = L::splat(-LARGEST_HALF).max(L::load(&lanes));
        let limited = L::zero().sub(L::splat(-LARGEST_HALF).max(L::zero().sub(limited)));
        let mut halves = [0; LANES];
        limited.store_f16(&mut halves);
        for (half, bytes) in halves.iter().zip(bytes.as_chunks_mut::<2>().0) {
            *bytes = half.to_le_bytes();
        }
    }
}

#[inline(always)]
fn encode_q8_0(values: &[f32], bytes: &mut [u8]) {
    for (values, block) in values.chunks(32).zip(bytes.as_chunks_mut::<34>().0) {
        let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let scale = f16::from_f32((largest / 127.0).min(LARGEST_HALF));
        let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        block.fill(0);
        block[..2].copy_from_slice(&scale.to_le_bytes());
        for (value, byte) in values.iter().zip(&mut block[2..]) {
            *byte = (value * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
        }
    }
}
