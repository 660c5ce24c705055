//! How a call is shared out: which queries go through which pages together, and in which pieces.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use super::softmax::Partial;
use super::{Attention, SEGMENT, Sequence};
use crate::page::PAGE_TOKENS;

/// Queries (rows times heads) of a tile: enough that widening a page is a few per cent of the work, few
/// enough that their scores of a segment stay in the second-level cache (128 KiB).
const TILE_STATES: usize = 120;
/// Pages of a segment.
const SEGMENT_PAGES: usize = SEGMENT / PAGE_TOKENS;

/// Rows and one KV head: the queries that go through some pages together. Either consecutive rows of a sequence, in the
/// segments that they see; or rows of several sequences, in the first segments of them all, whose pages are the same.
pub struct Tile {
    /// Whose pages are read.
    pub sequence: usize,
    /// Where the plan lists its rows.
    pub rows: Range<usize>,
    /// Position of the first row; of several sequences' rows, the first behind what they share.
    pub start: usize,
    pub kv_head: usize,
    segments: Range<usize>,
    /// Tiles that go on from what this one finds.
    pub members: Range<usize>,
    /// Where its partial results begin, and how many there are; in a member, the first is what it is given.
    pub partial: usize,
    pub partials: usize,
    /// Tasks that have not finished; for a member, what it goes on from is one.
    pub pending: AtomicUsize,
}

/// A run of segments of a tile.
pub struct Task {
    pub tile: usize,
    pub segments: Range<usize>,
    /// Where its partial results begin.
    pub partial: usize,
    /// Whether it has all of the tile's segments, and so can merge as it goes into one partial result.
    pub whole: bool,
}

/// Kept by the calling thread from one call to the next.
#[derive(Default)]
pub struct Plan {
    pub tiles: Vec<Tile>,
    pub tasks: Vec<Task>,
    /// `[rows of tiles]`: rows of the batch.
    pub rows: Vec<usize>,
    pub partials: Vec<f32>,
    /// The sequences, those with the same first pages together.
    order: Vec<usize>,
}

impl Plan {
    pub fn lay_out(&mut self, attention: &Attention, sequences: &[Sequence<'_>], threads: usize) {
        self.tiles.clear();
        self.tasks.clear();
        self.rows.clear();
        self.order.clear();
        self.order.extend(0..sequences.len());
        if attention.window.is_none() {
            self.order.sort_unstable_by_key(|index| (sequences[*index].pages, *index));
        }
        let mut at = 0;
        while at < self.order.len() {
            let saved = |(count, segments): (usize, usize)| (count - 1) * segments;
            let group = self.alike(attention, sequences, at);
            // Those after it may have more in common with each other than with it.
            let is_best = saved(group) >= saved(self.alike(attention, sequences, at + 1));
            let (count, segments) = if is_best { group } else { (1, 0) };
            if count > 1 {
                self.add_group(attention, sequences, at..at + count, segments);
            } else {
                self.add_sequence(attention, sequences, self.order[at]);
            }
            at += count;
        }
        self.cut(attention, threads);
    }

    /// How many sequences, from the `at`th of the order on, are best taken together, and for how many segments.
    fn alike(&self, attention: &Attention, sequences: &[Sequence<'_>], at: usize) -> (usize, usize) {
        let mut best = (1, 0);
        let Some(first) = self.order.get(at).map(|index| &sequences[*index]) else { return best };
        if attention.window.is_some() {
            return best;
        }
        let (mut segments, mut rows) = (first.start / SEGMENT, first.rows);
        for (more, index) in self.order[at + 1..].iter().enumerate() {
            let next = &sequences[*index];
            rows += next.rows;
            let most = segments.min(next.start / SEGMENT) * SEGMENT_PAGES;
            let same = first.pages[..most].iter().zip(next.pages).take_while(|(a, b)| a == b).count();
            segments = same / SEGMENT_PAGES;
            if segments == 0 || rows * attention.group() > TILE_STATES {
                break;
            }
            // What need not be read again.
            if (more + 1) * segments >= (best.0 - 1) * best.1 {
                best = (more + 2, segments);
            }
        }
        best
    }

    /// Sequences that share their first segments: tiles of all their rows for those, and tiles of each for the others.
    fn add_group(
        &mut self,
        attention: &Attention,
        sequences: &[Sequence<'_>],
        group: Range<usize>,
        segments: usize,
    ) {
        let first = self.rows.len();
        for index in &self.order[group.clone()] {
            let Sequence { first_row, rows, .. } = sequences[*index];
            self.rows.extend(first_row..first_row + rows);
        }
        let all = first..self.rows.len();
        for kv_head in 0..attention.layout.kv_heads {
            let members = self.tiles.len() + 1..self.tiles.len() + 1 + group.len();
            let (sequence, start) = (self.order[group.start], segments * SEGMENT);
            self.tiles
                .push(Tile { members, ..Tile::new(sequence, all.clone(), start, kv_head, 0..segments) });
            let mut row = first;
            for index in &self.order[group.clone()] {
                let Sequence { rows, start, .. } = sequences[*index];
                let seen = segments..(start + rows - 1) / SEGMENT + 1;
                let mut tile = Tile::new(*index, row..row + rows, start, kv_head, seen);
                tile.partials = 1;
                self.tiles.push(tile);
                row += rows;
            }
        }
    }

    fn add_sequence(&mut self, attention: &Attention, sequences: &[Sequence<'_>], index: usize) {
        let sequence = &sequences[index];
        let row = self.rows.len();
        self.rows.extend(sequence.first_row..sequence.first_row + sequence.rows);
        // Rows in equal parts: a tile costs its pages' widening whatever it holds.
        let tiles = sequence.rows.div_ceil((TILE_STATES / attention.group()).max(1));
        for tile in 0..tiles {
            let (first, end) = (tile * sequence.rows / tiles, (tile + 1) * sequence.rows / tiles);
            let (start, last) = (sequence.start + first, sequence.start + end - 1);
            let segments = attention.first_position(start) / SEGMENT..last / SEGMENT + 1;
            for kv_head in 0..attention.layout.kv_heads {
                self.tiles.push(Tile::new(index, row + first..row + end, start, kv_head, segments.clone()));
            }
        }
    }

    /// Cuts the tiles into tasks and gives each its place for partial results.
    fn cut(&mut self, attention: &Attention, threads: usize) {
        let work: usize = self.tiles.iter().map(|tile| tile.rows.len() * tile.segments.len()).sum();
        // Eight tasks a thread even out what threads are given; more would only cost.
        let work_a_task = work.div_ceil(8 * threads).max(1);
        let mut numbers = 0;
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            let (segments, given) = (tile.segments.clone(), tile.partials);
            let tasks = (segments.len() * tile.rows.len()).div_ceil(work_a_task).min(segments.len());
            let partial_len = Partial::len(tile.rows.len() * attention.group(), attention.stride());
            // What others found for a member comes before its own in the order of merging.
            let whole = tasks == 1 && given == 0;
            tile.partial = numbers;
            tile.partials = given + if whole { 1 } else { segments.len() };
            tile.pending = AtomicUsize::new(tasks + given);
            for task in 0..tasks {
                let (first, end) = (task * segments.len() / tasks, (task + 1) * segments.len() / tasks);
                self.tasks.push(Task {
                    tile: index,
                    segments: segments.start + first..segments.start + end,
                    partial: tile.partial + (given + first) * partial_len,
                    whole,
                });
            }
            numbers += tile.partials * partial_len;
        }
        if self.partials.len() < numbers {
            self.partials.resize(numbers, 0.0);
        }
    }
}

impl Tile {
    fn new(
        sequence: usize,
        rows: Range<usize>,
        start: usize,
        kv_head: usize,
        segments: Range<usize>,
    ) -> Tile {
        let (members, pending) = (0..0, AtomicUsize::new(0));
        Tile { sequence, rows, start, kv_head, segments, members, partial: 0, partials: 0, pending }
    }

    /// Position of the last row; of several sequences' rows, no earlier one than that of each.
    pub fn last(&self) -> usize {
        self.start + self.rows.len() - 1
    }

    /// The rows that see any of `positions`.
    pub fn rows_that_see(&self, attention: &Attention, positions: Range<usize>) -> Range<usize> {
        let rows = self.rows.len();
        let first = positions.start.saturating_sub(self.start).min(rows);
        let end = match attention.window {
            None => rows,
            // The last query to see the last of the positions is `window − 1` further on.
            Some(window) => (positions.end - 1).saturating_add(window).saturating_sub(self.start).min(rows),
        };
        first..end.max(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{KvDtype, PageLayout, PagePtr};

    /// How often segments are read by all tiles of one KV head.
    fn segments_read(tables: &[(Vec<usize>, usize)], rows: usize) -> usize {
        // SAFETY: nothing is read or written through them.
        let page = |number: &usize| unsafe { PagePtr::new(std::ptr::without_provenance_mut(4 * number)) };
        let tables: Vec<(Vec<PagePtr>, usize)> =
            tables.iter().map(|(pages, start)| (pages.iter().map(page).collect(), *start)).collect();
        let sequences: Vec<Sequence<'_>> = tables
            .iter()
            .enumerate()
            .map(|(index, (pages, start))| Sequence { pages, first_row: index * rows, rows, start: *start })
            .collect();
        let layout = PageLayout { layers: 1, kv_heads: 1, head_dim: 64, dtype: KvDtype::F16 };
        let attention = Attention { layout, layer: 0, heads: 3, scale: 1.0, window: None, soft_cap: None };
        let mut plan = Plan::default();
        plan.lay_out(&attention, &sequences, 2);
        let planned: usize = plan.tiles.iter().map(|tile| tile.segments.len()).sum();
        assert_eq!(planned, plan.tasks.iter().map(|task| task.segments.len()).sum::<usize>());
        planned
    }

    /// Pages `0..shared` and then some of its own, up to `pages` in all; it computes the last positions.
    fn branch(name: usize, shared: usize, pages: usize) -> (Vec<usize>, usize) {
        (
            (1..=pages).map(|page| if page <= shared { page } else { name * 1000 + page }).collect(),
            pages * 64 - 2,
        )
    }

    #[test]
    fn branches_read_together_what_they_share() {
        let branches: Vec<_> = (1..=40).map(|name| branch(name, 62, 65)).collect();
        // Fifteen segments once, and two of each branch's own.
        assert_eq!(segments_read(&branches, 1), 15 + 40 * 2);
        // A tile has room for forty rows of three heads.
        let branches: Vec<_> = (1..=50).map(|name| branch(name, 62, 65)).collect();
        assert_eq!(segments_read(&branches, 1), 2 * 15 + 50 * 2);
        // One that has only the first segment in common stays alone rather than to cost the others fourteen.
        let one = [vec![branch(60, 4, 8)], branches[..40].to_vec()].concat();
        assert_eq!(segments_read(&one, 1), 2 + 15 + 40 * 2);
        let strangers: Vec<_> = (1..=8).map(|name| branch(name, 3, 20)).collect();
        assert_eq!(segments_read(&strangers, 1), 8 * 5);
    }

    #[test]
    fn a_page_that_one_of_them_still_writes_is_nobody_elses() {
        // The second computes positions of the shared segment: only what lies before counts.
        let two = [(vec![1, 2, 3, 4, 5], 300), (vec![1, 2, 3, 4], 200)];
        assert_eq!(segments_read(&two, 1), 2 + 1);
    }
}
