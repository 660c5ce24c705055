//! One step: which rows it computes, the forward pass, and the tokens that come of it.

use std::time::Duration;

use dormouse_kernels::PAGE_TOKENS;
use dormouse_kernels::PagePtr;
use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kv::KvError;
use dormouse_models::decoder::Batch;

use super::Worker;
use crate::EngineError;
use crate::speculation::DRAFT_MOST;
use crate::turn::{Ending, Turn};

/// A step should last about this long, so that cancelling, stopping and other turns do not wait for a long prompt.
const STEP_SECONDS: f64 = 0.2;
/// Where turns decode, prompts may take as long as they do: nobody's next word comes later than after twice the usual time.
const PROMPT_SHARE: f64 = 1.0;
/// Then a prompt gets at least so many rows: deep in a long one, a row takes milliseconds of attention.
const PROMPT_ROWS_LEAST: usize = 4;
/// How much of what it knew of a prompt's pace a new step replaces.
const PACE_RATE: f64 = 0.3;
const STEP_ROWS_LEAST: usize = 16;
const STEP_ROWS_MOST: usize = 256;
/// Prompt rows of a turn in a step where the logits of each are wanted: of large vocabularies each takes half a megabyte.
const SCORED_ROWS_MOST: usize = 32;

/// The rows of one turn in a step.
pub(super) struct Slice {
    turn: usize,
    /// Rows whose tokens are the log's next ones.
    rows: usize,
    /// Rows of guessed tokens after them.
    draft: usize,
    /// Of `rows`, the first ones: their logits tell the log-probability of the prompt tokens after them.
    scored: usize,
    /// The last of `rows` is the last token of the turn's log: its logits are wanted, and those of the guesses.
    samples: bool,
}

impl Slice {
    fn all_rows(&self) -> usize {
        self.rows + self.draft
    }

    /// The rows at the end whose logits choose tokens.
    fn sampled_rows(&self) -> usize {
        if self.samples { 1 + self.draft } else { 0 }
    }

    fn logit_rows(&self) -> usize {
        self.scored + self.sampled_rows()
    }
}

impl Worker {
    /// Chooses the rows of the next step and reserves room for them: one row of every turn that decodes, guesses at
    /// what follows, then pieces of prompts, in turn, up to the step's budget.
    pub(super) fn schedule(&mut self) -> Vec<Slice> {
        let count = self.state.running.len();
        let mut step = Vec::with_capacity(count);
        for index in 0..count {
            let turn = &self.state.running[index];
            if !turn.gives_up_pages() && turn.pending() == 1 && self.reserve(index, 1) {
                step.push(Slice { turn: index, rows: 1, draft: 0, scored: 0, samples: true });
            }
        }
        let budget = (self.state.rows_per_second * STEP_SECONDS) as usize;
        let budget = budget.clamp(STEP_ROWS_LEAST, STEP_ROWS_MOST);
        let most = budget.saturating_sub(step.len()) / 2;
        self.draft(&mut step, most);
        let decoding: usize = step.iter().map(Slice::logit_rows).sum();
        let mut left = budget.saturating_sub(decoding).max(STEP_ROWS_LEAST);
        if decoding > 0 {
            let usual = self.state.cost.of(decoding as f64);
            let share = (self.state.rows_per_second * PROMPT_SHARE * usual) as usize;
            left = left.min(share.max(PROMPT_ROWS_LEAST));
        }
        let first = self.state.next_prefill;
        for index in (0..count).map(|index| (first + index) % count) {
            let turn = &self.state.running[index];
            let pending = turn.pending();
            if turn.gives_up_pages() || pending == 1 || left == 0 {
                continue;
            }
            let unscored = turn.unscored();
            let answers = turn.spec.max_tokens > 0;
            let rows = pending.min(left).min(if unscored > 0 { SCORED_ROWS_MOST } else { usize::MAX });
            if !self.reserve(index, rows) {
                continue;
            }
            left -= rows;
            self.state.next_prefill = index + 1;
            let samples = rows == pending && answers;
            step.push(Slice { turn: index, rows, draft: 0, scored: unscored.min(rows), samples });
        }
        step
    }

    /// Adds guessed rows, the likeliest first, while they speed the step up: at most `most`. They never take a page:
    /// they use what is left of the one that the known token is in.
    fn draft(&mut self, step: &mut [Slice], most: usize) {
        let state = &mut self.state;
        let room = |turn: &Turn, draft: usize| {
            let page = PAGE_TOKENS - 1 - turn.table.len() % PAGE_TOKENS;
            draft < DRAFT_MOST.min(page).min(turn.left(&self.model).saturating_sub(1))
        };
        // The chance that a turn's next guess is accepted: that it is right, and all before it.
        let mut chances = Vec::with_capacity(step.len());
        for slice in &*step {
            let turn = &mut state.running[slice.turn];
            turn.guess(&self.model);
            chances.push(turn.drafter.chance(0));
        }
        let (mut rows, mut tokens) = (step.len(), step.len() as f64);
        for _ in 0..most {
            let open = |(slice, chance): &(&mut Slice, &mut f64)| {
                **chance > 0.0 && room(&state.running[slice.turn], slice.draft)
            };
            let candidates = step.iter_mut().zip(&mut chances).filter(open);
            let Some((slice, chance)) = candidates.max_by(|(_, a), (_, b)| a.total_cmp(b)) else { break };
            if !self.drafts.is_given() && !state.cost.pays(rows, tokens, *chance) {
                break;
            }
            slice.draft += 1;
            rows += 1;
            tokens += *chance;
            *chance *= state.running[slice.turn].drafter.chance(slice.draft);
        }
    }

    /// Room for `rows` more positions of a turn. False when it must wait, or has failed.
    fn reserve(&mut self, index: usize, rows: usize) -> bool {
        let error = match self.pool.reserve(&mut self.state.running[index].table, rows) {
            Ok(()) => return true,
            Err(error) => error,
        };
        let failure = match error {
            KvError::AwaitingRemovals { .. } => match self.state.removals_failed.take() {
                Some(error) => error,
                None => match self.commit_removals() {
                    Ok(()) => return false,
                    Err(error) => error,
                },
            },
            KvError::Full { .. } | KvError::NoSpace { .. } => {
                // Turns that end give their pages back, and the oldest turn goes first: when it lacks room, and nobody
                // is about to give any, the youngest pauses. Who is alone and lacks room will never have any.
                let going_on = |turn: &Turn| !turn.gives_up_pages();
                let running = &mut self.state.running;
                let oldest = running.iter().position(going_on);
                if running.iter().any(|turn| !going_on(turn)) || oldest != Some(index) {
                    return false;
                }
                match running.iter().rposition(going_on) {
                    Some(youngest) if youngest != index => running[youngest].is_pausing = true,
                    _ => running[index].end(Ending::Fail(EngineError::OutOfSpace(error.to_string()))),
                }
                return false;
            }
            other => self.in_trouble(other.to_string()),
        };
        self.state.running[index].end(Ending::Fail(failure));
        false
    }

    /// Computes the step's rows in one pass over the weights.
    pub(super) fn forward(&mut self, step: &[Slice]) {
        let state = &mut self.state;
        let mut tokens = Vec::new();
        let mut pages: Vec<PagePtr> = Vec::new();
        let mut tables = Vec::with_capacity(step.len());
        let mut logit_rows = Vec::new();
        for slice in step {
            let turn = &state.running[slice.turn];
            let (start, first_page, first_row) = (turn.table.len(), pages.len(), tokens.len());
            self.pool.page_ptrs(&turn.table, &mut pages);
            tokens.extend_from_slice(&turn.log[start..start + slice.rows]);
            tokens.extend_from_slice(&turn.drafter.guesses()[..slice.draft]);
            tables.push((first_page..pages.len(), first_row..tokens.len(), start));
            logit_rows.extend(first_row..first_row + slice.scored);
            logit_rows.extend(tokens.len() - slice.sampled_rows()..tokens.len());
        }
        let sequences: Vec<Sequence<'_>> = tables
            .into_iter()
            .map(|(table, rows, start)| Sequence {
                pages: &pages[table],
                first_row: rows.start,
                rows: rows.len(),
                start,
            })
            .collect();
        let batch = Batch { tokens: &tokens, sequences: &sequences, logit_rows: &logit_rows };
        self.model.decoder().forward(&self.cpu, self.model.layout(), &batch, &mut state.work);
        state.stats.steps += 1;
        let sampled: usize = step.iter().map(Slice::sampled_rows).sum();
        state.stats.prompt_tokens_computed += (tokens.len() - sampled) as u64;
    }

    /// Chooses and publishes the next token of every turn whose last token was computed, and as many more as it had
    /// guessed right. Only then the rows that hold what the log says become part of the turn's pages.
    pub(super) fn sample(&mut self, step: &[Slice]) {
        let state = &mut self.state;
        let vocab = self.model.decoder().config().vocab;
        let mut logits = state.work.logits_mut();
        for slice in step {
            let turn = &mut state.running[slice.turn];
            let (own, others) = logits.split_at_mut(slice.logit_rows() * vocab);
            logits = others;
            let (scored, own) = own.split_at_mut(slice.scored * vocab);
            turn.score(scored.chunks_exact(vocab));
            let mut rows = slice.rows;
            for (at, logits) in own.chunks_exact_mut(vocab).enumerate() {
                let Some(token) = turn.sample(&self.model, logits) else { break };
                let right = turn.drafter.judge(at, token);
                state.stats.output_tokens += 1;
                if !right || at == slice.draft {
                    break;
                }
                turn.receipt.accepted_tokens += 1;
                state.stats.accepted_tokens += 1;
                if turn.ending.is_some() {
                    break;
                }
                rows += 1;
            }
            turn.receipt.drafted_tokens += slice.draft;
            state.stats.drafted_tokens += slice.draft as u64;
            let start = turn.table.len();
            self.pool.advance(&mut turn.table, &turn.log[start..start + rows]);
        }
    }

    /// Remembers what the step took: how many rows the next ones may have, and whether guesses pay, follow from it.
    pub(super) fn learn(&mut self, step: &[Slice], took: Duration) {
        if step.iter().any(|slice| slice.scored > 0) {
            // Neither a prompt nor an answer, as others go.
            return;
        }
        let rows: usize = step.iter().map(Slice::all_rows).sum();
        let wanted: usize = step.iter().map(Slice::logit_rows).sum();
        if wanted == rows {
            self.state.cost.observe(rows, took.as_secs_f64());
        } else if rows - wanted >= PROMPT_ROWS_LEAST {
            // Without what the decoding rows among them take, which can be no more than a part of it.
            let took = took.as_secs_f64();
            let usual = if wanted > 0 { self.state.cost.of(wanted as f64) } else { 0.0 };
            let pace = (rows - wanted) as f64 / (took - usual).max(took / 4.0);
            let known = &mut self.state.rows_per_second;
            *known += if *known == 0.0 { pace } else { PACE_RATE * (pace - *known) };
        }
    }
}
