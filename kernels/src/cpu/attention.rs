//! Attention straight over KV pages: nothing is gathered or copied out of the mapping.
//!
//! A query attends in fixed segments of [`SEGMENT`] positions: scores of the whole segment, their softmax, the weighted
//! sum of values; segments are merged in order. A score is one chain of multiply-adds along the head, a result one
//! chain along the positions. That recipe names positions only, so neither the other queries of a batch, nor the cut of
//! a prompt into chunks, nor the number of threads can change a bit, and all tiers that fuse multiply-adds give the same.
//!
//! The queries of a [`Tile`], rows times the heads that share a KV head, go through a page together: consecutive rows of
//! one sequence, and rows of all the sequences whose first pages are the same ones. Keys are stored turned, so that
//! lanes are positions, which makes of both halves one register-blocked product.

mod page_rows;
mod plan;
mod product;
mod softmax;
mod store;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use super::Cpu;
use super::disjoint::Disjoint;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use crate::page::{KEY_GROUP, PAGE_TOKENS, PageLayout, PagePtr};
use page_rows::{Keys, PageRows, Values};
use plan::{Plan, Task, Tile};
use product::{Left, multiply};
use softmax::{Partial, softmax};
pub use store::{store_kv, store_rows};

/// Positions of one segment: a multiple of the page. Segments of one query may be computed by different threads.
const SEGMENT: usize = 4 * PAGE_TOKENS;
/// Register blocks of queries that widen keys and values as they multiply them, rather than once for all. More would
/// gain where conversions have ports of their own (15 % measured on Zen 4), and lose where they share the multipliers'.
const FEW_BLOCKS: usize = 3;
/// From one query's scores to the next: a vector more than a segment, so that they do not all fall into one cache set.
const SCORES_STRIDE: usize = SEGMENT + LANES;

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
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

impl Attention {
    /// First position that the query at `position` sees.
    fn first_position(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Query heads that share a KV head.
    fn group(&self) -> usize {
        self.heads / self.layout.kv_heads
    }

    /// Numbers from one query's result to the next: the head, padded to whole vectors.
    fn stride(&self) -> usize {
        self.layout.head_dim.next_multiple_of(LANES)
    }
}

/// Causal attention of every row of `q`, `[rows, heads, head_dim]`, into `out` of the same shape.
pub fn attend(cpu: &Cpu, attention: Attention, sequences: &[Sequence<'_>], q: &[f32], out: &mut [f32]) {
    assert_eq!(attention.heads % attention.layout.kv_heads, 0, "query heads are whole groups");
    assert_eq!(q.len(), out.len());
    PLAN.with_borrow_mut(|plan| {
        plan.lay_out(&attention, sequences, cpu.pool.threads());
        let Plan { tiles, tasks, rows, partials, .. } = plan;
        // A task writes its own partial results; whoever finishes a tile writes the tile's rows.
        let (partials, out) = (Disjoint::new(partials), Disjoint::new(out));
        let call = Call { attention: &attention, sequences, rows, q, out, partials };
        let isa = cpu.isa;
        cpu.pool.run(tasks.len(), &|index| {
            let (call, task) = (&call, &tasks[index]);
            let tile = &tiles[task.tile];
            WORKSPACE.with_borrow_mut(|work| {
                dispatch!(isa, run_task(call: &Call<'_>, tile: &Tile, task: &Task, work: &mut Workspace));
            });
            // Acquire and release: the last task of a tile sees what the others wrote.
            if tile.pending.fetch_sub(1, Ordering::AcqRel) > 1 {
                return;
            }
            dispatch!(isa, finish_tile(call: &Call<'_>, tile: &Tile));
            let mut state = 0;
            for member in &tiles[tile.members.clone()] {
                hand_on(call, tile, state, member);
                state += member.rows.len() * attention.group();
                if member.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
                    dispatch!(isa, finish_tile(call: &Call<'_>, member: &Tile));
                }
            }
        });
    });
}

struct Call<'a> {
    attention: &'a Attention,
    sequences: &'a [Sequence<'a>],
    /// Of all tiles: rows of the batch.
    rows: &'a [usize],
    q: &'a [f32],
    out: Disjoint<'a, f32>,
    partials: Disjoint<'a, f32>,
}

thread_local! {
    static PLAN: RefCell<Plan> = RefCell::default();
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// One thread's scratch.
#[derive(Default)]
struct Workspace {
    /// `[states, head_dim]`, scaled.
    queries: Vec<f32>,
    /// `[states, SCORES_STRIDE]`: a segment's scores, then its weights.
    scores: Vec<f32>,
    page: PageRows,
    partial: Vec<f32>,
}

#[inline(always)]
fn run_task<L: Lanes>(call: &Call<'_>, tile: &Tile, task: &Task, work: &mut Workspace) {
    let attention = call.attention;
    let (stride, states) = (attention.stride(), tile.rows.len() * attention.group());
    let partial_len = Partial::len(states, stride);
    load_queries(call, tile, &mut work.queries);
    if work.scores.len() < states * SCORES_STRIDE {
        work.scores.resize(states * SCORES_STRIDE, 0.0);
    }
    let mut own = std::mem::take(&mut work.partial);
    own.resize(partial_len.max(own.len()), 0.0);
    for (index, segment) in task.segments.clone().enumerate() {
        let last = segment + 1 == task.segments.end;
        let at = if task.whole { task.partial } else { task.partial + index * partial_len };
        let result = call.partials.part(at..at + partial_len);
        if task.whole && index > 0 {
            let mut next = Partial::over(&mut own[..partial_len], states);
            run_segment::<L>(call, tile, segment, last, work, &mut next);
            Partial::over(result, states).merge::<L>(&next, stride);
        } else {
            run_segment::<L>(call, tile, segment, last, work, &mut Partial::over(result, states));
        }
    }
    work.partial = own;
}

fn load_queries(call: &Call<'_>, tile: &Tile, queries: &mut Vec<f32>) {
    let attention = call.attention;
    let (head_dim, group) = (attention.layout.head_dim, attention.group());
    let scale = attention.soft_cap.map_or(attention.scale, |cap| attention.scale / cap);
    queries.clear();
    for row in 0..tile.rows.len() {
        let heads = call.heads_of(tile, row);
        queries.extend(call.q[heads * head_dim..][..group * head_dim].iter().map(|q| q * scale));
    }
}

/// One segment's softmax and weighted values, of every query of the tile; `last` of its task.
#[inline(always)]
fn run_segment<L: Lanes>(
    call: &Call<'_>,
    tile: &Tile,
    segment: usize,
    last: bool,
    work: &mut Workspace,
    result: &mut Partial<'_>,
) {
    let attention = call.attention;
    let layout = &attention.layout;
    let (head_dim, stride, group) = (layout.head_dim, attention.stride(), attention.group());
    let states = tile.rows.len() * group;
    let few = states <= FEW_BLOCKS * L::QUERIES;
    let first = segment * SEGMENT;
    let pages = first.max(attention.first_position(tile.start)) / PAGE_TOKENS
        ..(tile.last() + 1).min(first + SEGMENT).div_ceil(PAGE_TOKENS);
    let table = call.sequences[tile.sequence].pages;
    let (k_offset, v_offset) =
        (layout.k_offset(attention.layer, tile.kv_head), layout.v_offset(attention.layer, tile.kv_head));
    // What is held of a page's keys, whole groups, and of its values.
    let held = |page: usize| PAGE_TOKENS.min(tile.last() + 1 - page * PAGE_TOKENS);
    let row_bytes = layout.row_bytes();
    let keys_of =
        |page: usize| table[page].bytes(layout, k_offset, held(page).next_multiple_of(KEY_GROUP) * row_bytes);
    let values_of = |page: usize| table[page].bytes(layout, v_offset, held(page) * row_bytes);

    // Scores: queries times keys.
    let queries = Left { values: &work.queries, stride: head_dim };
    for page in pages.clone() {
        let positions = page * PAGE_TOKENS..(page + 1) * PAGE_TOKENS;
        let rows = tile.rows_that_see(attention, positions);
        let states = rows.start * group..rows.end * group;
        let ahead = if page + 1 < pages.end { keys_of(page + 1) } else { values_of(pages.start) };
        let keys = work.page.keys::<L>(layout, keys_of(page), few);
        let scores = &mut work.scores[page * PAGE_TOKENS - first..];
        macro_rules! scores {
            ($keys:expr) => {
                multiply::<L, _>(&queries, states, 0, $keys, 0..head_dim, scores, SCORES_STRIDE, true, ahead)
            };
        }
        match &keys {
            Keys::Singles(keys) => scores!(keys),
            Keys::Halves(keys) => scores!(keys),
            Keys::Blocks(keys) => scores!(keys),
        }
    }

    // Weights.
    let (begin, end) = (pages.start * PAGE_TOKENS - first, pages.end * PAGE_TOKENS - first);
    for row in 0..tile.rows.len() {
        let position = tile.start + row;
        let from = attention.first_position(position).saturating_sub(first).clamp(begin, end);
        let to = (position + 1).saturating_sub(first).clamp(from, end);
        for state in row * group..(row + 1) * group {
            let scores = &mut work.scores[state * SCORES_STRIDE..][begin..end];
            let peak = softmax::<L>(scores, from - begin..to - begin, attention.soft_cap);
            (result.maxima[state], result.sums[state]) = (peak.maximum, peak.sum);
        }
    }

    // Results: weights times values.
    result.values.fill(0.0);
    let weights = Left { values: &work.scores, stride: SCORES_STRIDE };
    for page in pages.clone() {
        let at = page * PAGE_TOKENS;
        let rows = tile.rows_that_see(attention, at..at + PAGE_TOKENS);
        if rows.is_empty() {
            continue;
        }
        let from = attention.first_position(tile.start + rows.start).saturating_sub(at);
        let to = (tile.start + rows.end - at).min(PAGE_TOKENS);
        let states = rows.start * group..rows.end * group;
        let ahead = match page + 1 < pages.end {
            true => values_of(page + 1),
            false if last => &[],
            false => keys_of(page + 1),
        };
        macro_rules! results {
            ($values:expr) => {
                multiply::<L, _>(
                    &weights,
                    states,
                    at - first,
                    $values,
                    from..to,
                    result.values,
                    stride,
                    false,
                    ahead,
                )
            };
        }
        match &work.page.values::<L>(layout, values_of(page), few) {
            Values::Singles(values) => results!(values),
            Values::Halves(values) => results!(values),
            Values::Blocks(values) => results!(values),
        }
    }
}

/// Gives a tile whose first positions were computed together with others' what came of them: the group's states from
/// `state` on are the tile's.
fn hand_on(call: &Call<'_>, group: &Tile, state: usize, tile: &Tile) {
    let (stride, heads) = (call.attention.stride(), call.attention.group());
    let (all, states) = (group.rows.len() * heads, tile.rows.len() * heads);
    let len = |states| Partial::len(states, stride);
    let from = Partial::over(call.partials.part(group.partial..group.partial + len(all)), all);
    let to = Partial::over(call.partials.part(tile.partial..tile.partial + len(states)), states);
    to.maxima[..states].copy_from_slice(&from.maxima[state..state + states]);
    to.sums[..states].copy_from_slice(&from.sums[state..state + states]);
    to.values.copy_from_slice(&from.values[state * stride..(state + states) * stride]);
}

/// Merges a tile's partial results, in order, and writes its rows, if these are all that they see.
#[inline(always)]
fn finish_tile<L: Lanes>(call: &Call<'_>, tile: &Tile) {
    let attention = call.attention;
    let (head_dim, stride, group) = (attention.layout.head_dim, attention.stride(), attention.group());
    let states = tile.rows.len() * group;
    let partial_len = Partial::len(states, stride);
    let memory = call.partials.part(tile.partial..tile.partial + tile.partials * partial_len);
    let (first, others) = memory.split_at_mut(partial_len);
    let mut total = Partial::over(first, states);
    for next in others.chunks_exact_mut(partial_len) {
        total.merge::<L>(&Partial::over(next, states), stride);
    }
    if !tile.members.is_empty() {
        return;
    }
    for row in 0..tile.rows.len() {
        let at = call.heads_of(tile, row) * head_dim;
        let out = call.out.part(at..at + group * head_dim);
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let state = row * group + head;
            let inverse = L::splat(1.0 / total.sums[state]);
            let values = &total.values[state * stride..][..stride];
            for at in (0..stride).step_by(LANES) {
                // Adding zero makes one of both zeros: which one it was may depend on what else the tile held.
                let result = L::load(sixteen(values, at)).mul_add(inverse, L::zero());
                match head_dim - at {
                    LANES.. => result.store(sixteen_mut(out, at)),
                    few => {
                        let mut last = [0.0; LANES];
                        result.store(&mut last);
                        out[at..].copy_from_slice(&last[..few]);
                    }
                }
            }
        }
    }
}

impl Call<'_> {
    /// The first query head of a tile's group in one of its rows, counted through the batch.
    fn heads_of(&self, tile: &Tile, row: usize) -> usize {
        self.rows[tile.rows.start + row] * self.attention.heads + tile.kv_head * self.attention.group()
    }
}
