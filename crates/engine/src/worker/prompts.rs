//! Which pieces of prompts a step reads: all that the step's time allows, and beside turns that decode no more than they bear.

use std::ops::Range;

use dormouse_kv::TableId;
use dormouse_models::ModelConfig;

use super::Worker;
use super::step::Slice;
use crate::turn::Turn;

/// A step should last about this long, so that cancelling, stopping and other turns do not wait for a long prompt.
const STEP_SECONDS: f64 = 0.2;
const STEP_ROWS_LEAST: usize = 16;
const STEP_ROWS_MOST: usize = 256;
/// Where turns decode, a long prompt may take this part of what they do: reading goes on for many steps, and each of them
/// is somebody's wait for the next word.
const LONG_SHARE: f64 = 0.5;
/// As much as they do, where it is soon over: a prompt that would take no more than a step of its own.
const SHORT_SHARE: f64 = 1.0;
/// Prompt rows that go through the layers together, if they must take several steps for it: enough that they share what
/// each of them would read and widen, keys and values above all.
const CHUNK_ROWS: usize = 16;
/// Prompt rows of a turn in a step where the logits of each are wanted: of large vocabularies each takes half a megabyte.
const SCORED_ROWS_MOST: usize = 32;
/// One step in so many is without prompts while turns decode, so that it stays known what decoding alone takes.
const DECODE_ALONE_EVERY: u64 = 16;
/// Short prompts come first, but one step in so many belongs to who has waited longest. (Under twice the load that there is room
/// for, going by time waited ÷ tokens wanted shortened the longest waits by a third, and made the median six times as long.)
const OLDEST_FIRST_EVERY: u64 = 4;

/// A piece of a prompt that went through the first layers, and waits for a step that takes it on.
pub(super) struct Chunk {
    /// Names the pages that hold what its layers wrote.
    table: TableId,
    /// Position of its first row, and how many rows.
    start: usize,
    rows: usize,
    /// Layers that it went through.
    layers: usize,
    /// What they left.
    pub hidden: Vec<f32>,
}

impl Chunk {
    pub fn belongs_to(&self, turn: &Turn) -> bool {
        self.table == turn.table.id() && self.start == turn.table.len()
    }
}

/// What a step may still spend on prompts.
struct Budget {
    short: f64,
    long: f64,
    spent: f64,
    rows: usize,
}

impl Worker {
    /// Adds pieces of prompts to a step in which so many rows of turns that decode are already.
    pub(super) fn take_prompts(&mut self, step: &mut Vec<Slice>, decoding: usize) {
        let running = &self.state.running;
        self.state
            .chunk
            .take_if(|chunk| !running.iter().any(|turn| chunk.belongs_to(turn) && !turn.gives_up_pages()));
        let reads = |turn: &Turn| !turn.gives_up_pages() && turn.pending() > 1;
        let mut prompts: Vec<usize> = (0..running.len()).filter(|index| reads(&running[*index])).collect();
        if prompts.is_empty() {
            return;
        }
        let steps = self.state.stats.steps;
        let Some(mut budget) = self.budget(decoding, steps) else { return };
        if !steps.is_multiple_of(OLDEST_FIRST_EVERY) {
            prompts.sort_by_key(|index| running[*index].pending());
        }
        let mut chunk = None;
        let mut unspent = 0.0;
        for index in prompts {
            let Some(slice) = self.prompt_slice(index, decoding > 0, &budget, chunk.is_some()) else {
                continue;
            };
            if !self.reserve(index, slice.rows) {
                continue;
            }
            budget.spent += slice.work;
            budget.rows = budget.rows.saturating_sub(slice.rows);
            if slice.is_chunk(self.model.config().layers) {
                if decoding > 0 && !self.is_short(&self.state.running[index]) {
                    // It goes through whole layers: the next step makes up for what that left of the budget, or took beyond it.
                    let layer = slice.work / slice.layers.len() as f64;
                    unspent = (budget.long - budget.spent).clamp(-layer, layer);
                }
                chunk = Some(slice);
            } else {
                step.push(slice);
            }
        }
        self.state.unspent = unspent;
        // The decoder wants it last.
        step.extend(chunk);
    }

    /// None: this step is for decoding alone.
    fn budget(&self, decoding: usize, steps: u64) -> Option<Budget> {
        let pace = self.state.pace.per_second();
        if decoding == 0 {
            let work = pace * STEP_SECONDS;
            return Some(Budget { short: work, long: work, spent: 0.0, rows: STEP_ROWS_MOST });
        }
        let usual = self.state.cost.of(decoding as f64);
        if usual == 0.0 || steps.is_multiple_of(DECODE_ALONE_EVERY) {
            return None;
        }
        // Before any prompt was seen: as fast as decoding, which is slower.
        let config = self.model.config();
        let as_decoded = decoding as f64 * work(config, 0, 1, 0..config.layers) / usual;
        let bearable = usual * if pace == 0.0 { as_decoded } else { pace };
        let (short, long) = (SHORT_SHARE * bearable, LONG_SHARE * bearable + self.state.unspent);
        Some(Budget { short, long, spent: 0.0, rows: STEP_ROWS_MOST - decoding.min(STEP_ROWS_MOST / 2) })
    }

    /// The rows of a turn's prompt that the budget allows, and the layers they go through. A step takes one chunk at most.
    fn prompt_slice(&self, turn: usize, beside: bool, budget: &Budget, has_chunk: bool) -> Option<Slice> {
        let (state, config) = (&self.state, self.model.config());
        let (index, turn, layers) = (turn, &state.running[turn], config.layers);
        let (start, pending, unscored) = (turn.table.len(), turn.pending(), turn.unscored());
        let left = if self.is_short(turn) { budget.short } else { budget.long } - budget.spent;
        if budget.rows == 0 || left <= 0.0 && beside {
            return None;
        }
        let most = if unscored > 0 { SCORED_ROWS_MOST } else { usize::MAX }.min(pending).min(budget.rows);
        let fit = (left / work(config, start, 1, 0..layers)) as usize;
        let (rows, layers) = match &state.chunk {
            Some(chunk) if chunk.belongs_to(turn) => {
                let end = if beside { layers_within(config, chunk, left) } else { layers };
                (chunk.rows, chunk.layers..end)
            }
            _ if !beside && budget.spent == 0.0 => (fit.max(STEP_ROWS_LEAST).min(most), 0..layers),
            _ if fit >= most.min(CHUNK_ROWS) || fit > 0 && unscored > 0 => (fit.min(most), 0..layers),
            _ if unscored > 0 => (1, 0..layers),
            _ if beside && !self.backend.takes_chunks() => (STEP_ROWS_LEAST.min(most), 0..layers),
            _ if !beside || has_chunk || state.chunk.is_some() => return None,
            _ => {
                let rows = (left / work(config, start, 1, 0..1)) as usize;
                let rows = rows.clamp(1, most.min(CHUNK_ROWS));
                let begun = Chunk { table: turn.table.id(), start, rows, layers: 0, hidden: Vec::new() };
                (rows, 0..layers_within(config, &begun, left))
            }
        };
        let samples = rows == pending && layers.end == config.layers && turn.spec.max_tokens > 0;
        let work = work(config, start, rows, layers.clone());
        Some(Slice { turn: index, rows, draft: 0, scored: unscored.min(rows), samples, layers, work })
    }

    /// A prompt that would take no more than a step of its own.
    fn is_short(&self, turn: &Turn) -> bool {
        let (config, restored) = (self.model.config(), turn.receipt.restored_tokens.min(turn.table.len()));
        let whole = work(config, restored, turn.log.len() - restored, 0..config.layers);
        whole <= self.state.pace.per_second() * STEP_SECONDS
    }

    /// The rows that a step without end would have: those that guesses may take are a part of it.
    pub(super) fn rows_of_a_step(&self) -> usize {
        let config = self.model.config();
        let row = work(config, 0, 1, 0..config.layers);
        ((self.state.pace.per_second() * STEP_SECONDS / row) as usize).clamp(STEP_ROWS_LEAST, STEP_ROWS_MOST)
    }

    /// Keeps what a chunk's layers left for the next ones.
    pub(super) fn keep_chunk(&mut self, slice: &Slice, hidden: Vec<f32>) {
        let turn = &self.state.running[slice.turn];
        let (table, start) = (turn.table.id(), turn.table.len());
        let is_open = slice.layers.end < self.model.config().layers;
        let chunk = Chunk { table, start, rows: slice.rows, layers: slice.layers.end, hidden };
        self.state.chunk = is_open.then_some(chunk);
    }
}

/// What rows from `start` on cost in some layers.
pub(super) fn work(config: &ModelConfig, start: usize, rows: usize, layers: Range<usize>) -> f64 {
    layers.map(|layer| config.row_work(layer, start + rows / 2)).sum::<f64>() * rows as f64
}

/// The position at which a token costs twice what the first one does, if its cost grew from there to the context's end evenly: with
/// windows it grows at first and then no more.
pub(super) fn cost_doubles_at(config: &ModelConfig, context: usize) -> f64 {
    let layers = 0..config.layers;
    let cost = |position: usize| work(config, position, 1, layers.clone());
    let (first, last) = (cost(0), cost(context - 1));
    first * context as f64 / (last - first)
}

/// Where a chunk is after the layers that the budget allows: at least one.
fn layers_within(config: &ModelConfig, chunk: &Chunk, budget: f64) -> usize {
    let (first, mut spent) = (chunk.layers, 0.0);
    let fits = |layer: &usize| {
        spent += work(config, chunk.start, chunk.rows, *layer..*layer + 1);
        *layer == first || spent <= budget
    };
    first + (first..config.layers).take_while(fits).count()
}
