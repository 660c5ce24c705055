//! Attention straight over KV pages: nothing is gathered or copied out of the mapping.
//!
//! One (query, head) walks its positions in fixed segments of [`SEGMENT`] positions; inside a segment it keeps an
//! online softmax over pages (Milakov and Gimelshein, 2018), and segments are merged in order. That recipe names
//! positions only, so neither the other queries of a batch, nor the cut of a prompt into chunks, nor the number of
//! threads can change a bit. A page's keys and values are widened to f32 once for all queries of a task.

use std::cell::RefCell;

use half::f16;

use super::Cpu;
use super::decode::decode_row;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use crate::GgmlType;
use crate::page::{KvDtype, PAGE_TOKENS, PageLayout, PagePtr};

/// Positions of one segment. A multiple of the page; segments of one query may be computed by different threads.
const SEGMENT: usize = 8 * PAGE_TOKENS;
/// Consecutive query rows that one task takes.
const TILE_ROWS: usize = 16;

/// Consecutive tokens of one sequence whose keys and values are already in its pages.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    /// The block table: page `i` holds positions `i · PAGE_TOKENS ..`.
    pub pages: &'a [PagePtr],
    /// First of the sequence's rows in the batch, and how many.
    pub first_row: usize,
    pub rows: usize,
    /// Position of the first row.
    pub start: usize,
}

/// What one call computes; shapes and scale are the same for all sequences.
#[derive(Clone, Copy)]
pub struct Attention {
    pub layout: PageLayout,
    pub layer: usize,
    /// Query heads; a multiple of `layout.kv_heads` (grouped-query attention).
    pub heads: usize,
    pub scale: f32,
    /// A query sees only the last `window` positions, its own counted in.
    pub window: Option<usize>,
}

/// Writes one token's keys and values, `[kv_heads, head_dim]` each, to position `at` of a page.
pub fn store_kv(layout: &PageLayout, page: PagePtr, layer: usize, at: usize, k: &[f32], v: &[f32]) {
    assert!(at < PAGE_TOKENS);
    let mut row = [0u8; 2 * 512];
    let row = &mut row[..layout.row_bytes()];
    for head in 0..layout.kv_heads {
        for (values, run) in [(k, layout.k_offset(layer, head)), (v, layout.v_offset(layer, head))] {
            encode_row(layout.dtype, &values[head * layout.head_dim..][..layout.head_dim], row);
            page.write(layout, run + at * row.len(), row);
        }
    }
}

fn encode_row(dtype: KvDtype, values: &[f32], row: &mut [u8]) {
    match dtype {
        KvDtype::F16 => {
            for (value, bytes) in values.iter().zip(row.as_chunks_mut::<2>().0) {
                *bytes = f16::from_f32(*value).to_le_bytes();
            }
        }
        KvDtype::Q8_0 => {
            for (values, block) in values.chunks(32).zip(row.as_chunks_mut::<34>().0) {
                let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let scale = f16::from_f32(largest / 127.0);
                let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
                block.fill(0);
                block[..2].copy_from_slice(&scale.to_le_bytes());
                for (value, byte) in values.iter().zip(&mut block[2..]) {
                    *byte = (value * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
                }
            }
        }
    }
}

/// Causal attention of every row of `q`, `[rows, heads, head_dim]`, into `out` of the same shape.
pub fn attend(cpu: &Cpu, attention: Attention, sequences: &[Sequence<'_>], q: &[f32], out: &mut [f32]) {
    let layout = attention.layout;
    assert_eq!(attention.heads % layout.kv_heads, 0, "query heads are whole groups");
    assert_eq!(q.len(), out.len());
    // Few tiles leave threads idle unless their segments are spread over them.
    let tiles: usize = sequences.iter().map(|sequence| sequence.rows.div_ceil(TILE_ROWS)).sum();
    let spread = tiles * layout.kv_heads < 4 * cpu.pool.threads();
    let mut tasks = Vec::with_capacity(tiles * layout.kv_heads);
    for sequence in sequences {
        for tile in (0..sequence.rows).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(sequence.rows - tile);
            let start = sequence.start + tile;
            let first_segment = attention.first_position(start) / SEGMENT;
            let segments = first_segment..(start + rows - 1) / SEGMENT + 1;
            for kv_head in 0..layout.kv_heads {
                let tile =
                    Tile { pages: sequence.pages, row: sequence.first_row + tile, rows, start, kv_head };
                if spread {
                    tasks.extend(segments.clone().map(|segment| (tile, segment..segment + 1)));
                } else {
                    tasks.push((tile, segments.clone()));
                }
            }
        }
    }
    let partials: Vec<std::sync::OnceLock<Partial>> =
        tasks.iter().map(|_| std::sync::OnceLock::new()).collect();
    let isa = cpu.isa;
    cpu.pool.run(tasks.len(), &|index| {
        let (tile, segments) = &tasks[index];
        let partial = WORKSPACE.with_borrow_mut(|work| {
            let attention = &attention;
            dispatch!(isa, run_tile(attention: &Attention, tile: &Tile<'_>, segments: &std::ops::Range<usize>, q: &[f32], work: &mut Workspace) -> Partial)
        });
        // Each task has a cell of its own, so the cell is empty here.
        let _ = partials[index].set(partial);
    });

    // Merge the segments of each tile, in order, and normalise.
    let group = attention.heads / layout.kv_heads;
    let head_dim = layout.head_dim;
    let mut partials =
        tasks.iter().zip(partials).filter_map(|((tile, _), cell)| Some((tile, cell.into_inner()?)));
    let mut current = partials.next();
    while let Some((tile, mut sum)) = current {
        current = partials.next();
        while let Some((_, partial)) =
            current.take_if(|(next, _)| next.row == tile.row && next.kv_head == tile.kv_head)
        {
            sum.merge(&partial);
            current = partials.next();
        }
        for row in 0..tile.rows {
            for head in 0..group {
                let state = row * group + head;
                let inverse = 1.0 / sum.sums[state];
                let at = ((tile.row + row) * attention.heads + tile.kv_head * group + head) * head_dim;
                let from = &sum.values[state * sum.stride..][..head_dim];
                out[at..at + head_dim].iter_mut().zip(from).for_each(|(out, value)| *out = value * inverse);
            }
        }
    }
}

impl Attention {
    /// First position that the query at `position` sees.
    fn first_position(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Query rows that share a task, with one KV head's group of query heads.
#[derive(Clone, Copy)]
struct Tile<'a> {
    pages: &'a [PagePtr],
    row: usize,
    rows: usize,
    /// Position of the first row.
    start: usize,
    kv_head: usize,
}

/// Softmax state of `rows × group` queries: maxima, sums of exponentials, and weighted values `[states, stride]`.
#[derive(Default)]
struct Partial {
    maxima: Vec<f32>,
    sums: Vec<f32>,
    values: Vec<f32>,
    stride: usize,
}

impl Partial {
    fn new(states: usize, stride: usize) -> Partial {
        Partial {
            maxima: vec![f32::NEG_INFINITY; states],
            sums: vec![0.0; states],
            values: vec![0.0; states * stride],
            stride,
        }
    }

    /// Adds the state of the next segment. Scalar on purpose: one order for every tier and every path.
    fn merge(&mut self, next: &Partial) {
        for state in 0..self.maxima.len() {
            let (a, b) = (self.maxima[state], next.maxima[state]);
            if b == f32::NEG_INFINITY {
                continue;
            }
            let maximum = a.max(b);
            let (keep, take) = ((a - maximum).exp(), (b - maximum).exp());
            self.maxima[state] = maximum;
            self.sums[state] = self.sums[state] * keep + next.sums[state] * take;
            let range = state * self.stride..(state + 1) * self.stride;
            for (value, other) in self.values[range.clone()].iter_mut().zip(&next.values[range]) {
                *value = *value * keep + other * take;
            }
        }
    }
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// One thread's widened page and padded queries.
#[derive(Default)]
struct Workspace {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
}

#[inline(always)]
fn run_tile<L: Lanes>(
    attention: &Attention,
    tile: &Tile<'_>,
    segments: &std::ops::Range<usize>,
    q: &[f32],
    work: &mut Workspace,
) -> Partial {
    let layout = &attention.layout;
    let (head_dim, group) = (layout.head_dim, attention.heads / layout.kv_heads);
    let stride = head_dim.next_multiple_of(LANES);
    let states = tile.rows * group;

    // Scaled queries, padded with zeros to whole lanes.
    work.queries.clear();
    work.queries.resize(states * stride, 0.0);
    for row in 0..tile.rows {
        for head in 0..group {
            let at = ((tile.row + row) * attention.heads + tile.kv_head * group + head) * head_dim;
            let to = &mut work.queries[(row * group + head) * stride..][..head_dim];
            to.iter_mut().zip(&q[at..at + head_dim]).for_each(|(to, q)| *to = q * attention.scale);
        }
    }
    work.keys.resize(PAGE_TOKENS * stride, 0.0);
    work.values.resize(PAGE_TOKENS * stride, 0.0);

    let last = tile.start + tile.rows - 1;
    let mut total = Partial::new(states, stride);
    for segment in segments.clone() {
        let mut partial = Partial::new(states, stride);
        for page in segment * (SEGMENT / PAGE_TOKENS)..(segment + 1) * (SEGMENT / PAGE_TOKENS) {
            let first = page * PAGE_TOKENS;
            if first > last || first + PAGE_TOKENS <= attention.first_position(tile.start) {
                continue;
            }
            let present = PAGE_TOKENS.min(last + 1 - first);
            let run = |offset| tile.pages[page].bytes(layout, offset, present * layout.row_bytes());
            widen::<L>(layout, run(layout.k_offset(attention.layer, tile.kv_head)), stride, &mut work.keys);
            widen::<L>(layout, run(layout.v_offset(attention.layer, tile.kv_head)), stride, &mut work.values);
            for row in 0..tile.rows {
                let position = tile.start + row;
                let from = attention.first_position(position).saturating_sub(first);
                let to = (position + 1).saturating_sub(first).min(PAGE_TOKENS);
                if from >= to {
                    continue;
                }
                for head in 0..group {
                    let state = row * group + head;
                    let query = &work.queries[state * stride..][..stride];
                    let slot = (&mut partial.maxima[state], &mut partial.sums[state]);
                    let sum = &mut partial.values[state * stride..][..stride];
                    page_softmax::<L>(query, &work.keys, &work.values, (from, to), slot, sum);
                }
            }
        }
        total.merge(&partial);
    }
    total
}

/// One query against positions `from..to` of one widened page.
#[inline(always)]
fn page_softmax<L: Lanes>(
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    (from, to): (usize, usize),
    (maximum, sum): (&mut f32, &mut f32),
    out: &mut [f32],
) {
    let stride = query.len();
    let mut scores = [f32::NEG_INFINITY; PAGE_TOKENS];
    let wanted = &mut scores[from..to];
    let keys = &keys[from * stride..to * stride];
    match stride / LANES {
        4 => dots::<L, 4>(query, keys, wanted),
        5 => dots::<L, 5>(query, keys, wanted),
        6 => dots::<L, 6>(query, keys, wanted),
        8 => dots::<L, 8>(query, keys, wanted),
        16 => dots::<L, 16>(query, keys, wanted),
        _ => {
            for (key, score) in keys.chunks_exact(stride).zip(wanted) {
                let mut dot = L::zero();
                for at in (0..stride).step_by(LANES) {
                    dot = L::load(sixteen(query, at)).mul_add(L::load(sixteen(key, at)), dot);
                }
                *score = dot.sum();
            }
        }
    }
    let mut largest = L::splat(*maximum);
    for at in (0..PAGE_TOKENS).step_by(LANES) {
        largest = largest.max(L::load(sixteen(&scores, at)));
    }
    let largest = largest.largest();

    let mut added = L::zero();
    for at in (0..PAGE_TOKENS).step_by(LANES) {
        let weights = L::load(sixteen(&scores, at)).sub(L::splat(largest)).exp();
        weights.store(sixteen_mut(&mut scores, at));
    }
    // exp clamps its argument, so positions outside the range are set to nothing by hand.
    scores[..from].fill(0.0);
    scores[to..].fill(0.0);
    for at in (0..PAGE_TOKENS).step_by(LANES) {
        added = added.add(L::load(sixteen(&scores, at)));
    }
    let keep = if *maximum == f32::NEG_INFINITY { 0.0 } else { (*maximum - largest).exp() };
    *maximum = largest;
    *sum = *sum * keep + added.sum();
    let weights = &scores[from..to];
    let values = &values[from * stride..to * stride];
    let mut at = 0;
    while at + 4 * LANES <= stride {
        weighted_sum::<L, 4>(weights, values, stride, at, keep, out);
        at += 4 * LANES;
    }
    while at < stride {
        weighted_sum::<L, 1>(weights, values, stride, at, keep, out);
        at += LANES;
    }
}

/// The query's dot product with every key, for heads of `N × 16` values: the general loop of [`page_softmax`] with
/// the query in registers and four sums taken at once.
#[inline(always)]
fn dots<L: Lanes, const N: usize>(query: &[f32], keys: &[f32], scores: &mut [f32]) {
    let stride = N * LANES;
    let mut q = [L::zero(); N];
    for n in 0..N {
        q[n] = L::load(sixteen(query, n * LANES));
    }
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let (key_fours, key_rest) = keys.split_at(fours.len() * 4 * stride);
    for (keys, scores) in key_fours.chunks_exact(4 * stride).zip(fours) {
        let mut dot = [L::zero(); 4];
        for n in 0..N {
            for i in 0..4 {
                dot[i] = q[n].mul_add(L::load(sixteen(keys, i * stride + n * LANES)), dot[i]);
            }
        }
        *scores = L::sum4(dot);
    }
    for (key, score) in key_rest.chunks_exact(stride).zip(rest) {
        let mut dot = L::zero();
        for n in 0..N {
            dot = q[n].mul_add(L::load(sixteen(key, n * LANES)), dot);
        }
        *score = dot.sum();
    }
}

/// `out = out · keep + Σ weights[p] · values[p]` on `N × 16` values from `at` on: as many independent chains of
/// additions as hide their latency.
#[inline(always)]
fn weighted_sum<L: Lanes, const N: usize>(
    weights: &[f32],
    values: &[f32],
    stride: usize,
    at: usize,
    keep: f32,
    out: &mut [f32],
) {
    let mut total = [L::zero(); N];
    for n in 0..N {
        total[n] = L::load(sixteen(out, at + n * LANES)).mul(L::splat(keep));
    }
    for (weight, row) in weights.iter().zip(values.chunks_exact(stride)) {
        let weight = L::splat(*weight);
        for n in 0..N {
            total[n] = weight.mul_add(L::load(sixteen(row, at + n * LANES)), total[n]);
        }
    }
    for n in 0..N {
        total[n].store(sixteen_mut(out, at + n * LANES));
    }
}

/// Widens rows of keys or values to f32, `[rows, stride]`; the padding stays zero.
#[inline(always)]
fn widen<L: Lanes>(layout: &PageLayout, bytes: &[u8], stride: usize, out: &mut [f32]) {
    for (row, out) in bytes.chunks_exact(layout.row_bytes()).zip(out.chunks_exact_mut(stride)) {
        let out = &mut out[..layout.head_dim];
        match layout.dtype {
            KvDtype::F16 => decode_row::<L>(GgmlType::F16, row, out),
            KvDtype::Q8_0 if layout.head_dim.is_multiple_of(32) => decode_row::<L>(GgmlType::Q8_0, row, out),
            KvDtype::Q8_0 => {
                for (block, out) in row.as_chunks::<34>().0.iter().zip(out.chunks_mut(32)) {
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    for (value, q) in out.iter_mut().zip(&block[2..]) {
                        *value = f32::from(*q as i8) * scale;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Pool};
    use super::*;

    const LAYOUT: PageLayout = PageLayout { layers: 2, kv_heads: 2, head_dim: 24, dtype: KvDtype::F16 };
    const HEADS: usize = 6;

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0) * 1.5).collect()
    }

    /// Pages in plain memory, filled with `tokens` positions in every layer.
    struct Pages {
        _memory: Vec<Vec<u32>>,
        table: Vec<PagePtr>,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    fn pages(layout: &PageLayout, tokens: usize) -> Pages {
        let mut memory = vec![vec![0u32; layout.page_bytes().div_ceil(4)]; tokens.div_ceil(PAGE_TOKENS)];
        // SAFETY: the vectors are as long as a page and live as long as the table.
        let table: Vec<PagePtr> =
            memory.iter_mut().map(|m| unsafe { PagePtr::new(m.as_mut_ptr().cast()) }).collect();
        let width = layout.kv_heads * layout.head_dim;
        let (k, v) = (noise(tokens * width, 1), noise(tokens * width, 2));
        for p in 0..tokens {
            for layer in 0..layout.layers {
                let row = p * width..(p + 1) * width;
                store_kv(layout, table[p / PAGE_TOKENS], layer, p % PAGE_TOKENS, &k[row.clone()], &v[row]);
            }
        }
        Pages { _memory: memory, table, k, v }
    }

    fn attention(layout: PageLayout, window: Option<usize>) -> Attention {
        Attention { layout, layer: 1, heads: HEADS, scale: 0.2, window }
    }

    fn exact(
        pages: &Pages,
        layout: &PageLayout,
        q: &[f32],
        position: usize,
        window: Option<usize>,
    ) -> Vec<f64> {
        let (hd, group, width) =
            (layout.head_dim, HEADS / layout.kv_heads, layout.kv_heads * layout.head_dim);
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        let round = |x: f32| f64::from(f16::from_f32(x).to_f32());
        (0..HEADS)
            .flat_map(|head| {
                let kv = head / group * hd;
                let scores: Vec<f64> = (first..=position)
                    .map(|p| {
                        let dot: f64 = (0..hd)
                            .map(|d| f64::from(q[head * hd + d]) * round(pages.k[p * width + kv + d]))
                            .sum();
                        dot * 0.2
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                (0..hd)
                    .map(|d| {
                        let sum: f64 = weights
                            .iter()
                            .enumerate()
                            .map(|(i, w)| w * round(pages.v[(first + i) * width + kv + d]))
                            .sum();
                        sum / total
                    })
                    .collect::<Vec<f64>>()
            })
            .collect()
    }

    fn cpus() -> impl Iterator<Item = Cpu> {
        Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu { isa, pool: Pool::new(2) })
    }

    #[test]
    fn attention_over_pages_matches_an_f64_reference_causal_and_windowed() {
        let tokens = 1200;
        let pages = pages(&LAYOUT, tokens);
        for cpu in cpus() {
            for (window, start, rows) in
                [(None, 0, 70), (None, 1199, 1), (Some(100), 600, 33), (Some(1), 64, 2)]
            {
                let q = noise(rows * HEADS * 24, 9);
                let mut out = vec![0.0; q.len()];
                let sequence = Sequence { pages: &pages.table, first_row: 0, rows, start };
                attend(&cpu, attention(LAYOUT, window), &[sequence], &q, &mut out);
                for row in 0..rows {
                    let width = HEADS * 24;
                    let expected = exact(&pages, &LAYOUT, &q[row * width..][..width], start + row, window);
                    for (got, want) in out[row * width..][..width].iter().zip(expected) {
                        assert!(
                            (f64::from(*got) - want).abs() < 2e-6,
                            "{got} for {want} on {}",
                            cpu.isa.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_querys_bits_do_not_depend_on_batch_chunk_or_threads() {
        for (dtype, head_dim) in
            [(KvDtype::F16, 24), (KvDtype::Q8_0, 24), (KvDtype::F16, 64), (KvDtype::Q8_0, 64)]
        {
            let layout = PageLayout { dtype, head_dim, ..LAYOUT };
            let tokens = 1100;
            let pages = pages(&layout, tokens);
            let width = HEADS * head_dim;
            let q = noise(tokens * width, 4);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for window in [None, Some(130)] {
                    let chunked =
                        |threads: usize, chunk: usize, positions: std::ops::Range<usize>| -> Vec<u32> {
                            let cpu = Cpu { isa, pool: Pool::new(threads) };
                            let mut bits = Vec::new();
                            for start in positions.clone().step_by(chunk) {
                                let rows = chunk.min(positions.end - start);
                                let mut out = vec![0.0; rows * width];
                                let sequence = Sequence { pages: &pages.table, first_row: 0, rows, start };
                                let q = &q[start * width..][..rows * width];
                                attend(&cpu, attention(layout, window), &[sequence], q, &mut out);
                                bits.extend(out.iter().map(|v| v.to_bits()));
                            }
                            bits
                        };
                    let whole = chunked(3, tokens, 0..tokens);
                    assert!(whole == chunked(1, 77, 0..tokens), "{} {window:?}", isa.name());
                    assert!(
                        whole[1000 * width..] == chunked(2, 1, 1000..tokens),
                        "{} {window:?}",
                        isa.name()
                    );
                }
            }
        }
    }
}
