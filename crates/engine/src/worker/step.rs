//! One step: which rows it computes, the forward pass, and the tokens that come of it.

use std::ops::Range;
use std::time::Duration;

use dormouse_kernels::PAGE_TOKENS;
use dormouse_kernels::PagePtr;
use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kv::KvError;
use dormouse_models::decoder::{Batch, Chunk};

use super::Worker;
use crate::EngineError;
use crate::speculation::DRAFT_MOST;
use crate::turn::{Ending, Turn};

/// The rows of one turn in a step.
pub(super) struct Slice {
    pub turn: usize,
    /// Rows whose tokens are the log's next ones.
    pub rows: usize,
    /// Rows of guessed tokens after them.
    pub draft: usize,
    /// Of `rows`, the first ones: their logits tell the log-probability of the prompt tokens after them.
    pub scored: usize,
    /// The last of `rows` is the last token of the turn's log: its logits are wanted, and those of the guesses.
    pub samples: bool,
    /// The layers that the rows go through: not all of them, for one piece of a prompt.
    pub layers: Range<usize>,
    /// What reading this piece of a prompt takes, in the decoder's measure; 0 where a turn decodes.
    pub work: f64,
}

impl Slice {
    pub(super) fn all_rows(&self) -> usize {
        self.rows + self.draft
    }

    /// A step goes through only some of the model's layers with it.
    pub fn is_chunk(&self, layers: usize) -> bool {
        self.layers != (0..layers)
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
    /// what follows, then pieces of prompts.
    pub(super) fn schedule(&mut self) -> Vec<Slice> {
        let count = self.state.running.len();
        let mut step = Vec::with_capacity(count);
        for index in 0..count {
            let turn = &self.state.running[index];
            if !turn.gives_up_pages() && turn.pending() == 1 && self.reserve(index, 1) {
                let layers = 0..self.model.config().layers;
                step.push(Slice {
                    turn: index,
                    rows: 1,
                    draft: 0,
                    scored: 0,
                    samples: true,
                    layers,
                    work: 0.0,
                });
            }
        }
        let most = self.rows_of_a_step().saturating_sub(step.len()) / 2;
        self.draft(&mut step, most);
        let decoding = step.iter().map(Slice::logit_rows).sum();
        self.take_prompts(&mut step, decoding);
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
    pub(super) fn reserve(&mut self, index: usize, rows: usize) -> bool {
        let pages = (self.state.running[index].table.len() + rows).div_ceil(PAGE_TOKENS);
        if let Err(error) = self.backend.check_room(pages) {
            self.state.running[index].end(Ending::Fail(EngineError::Device(error.to_string())));
            return false;
        }
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

    /// Computes the step's rows in one pass over the weights. False where that failed, and the step's turns with it.
    pub(super) fn forward(&mut self, step: &[Slice]) -> bool {
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
        let layers = self.model.config().layers;
        state.stats.steps += 1;
        let computed = step.iter().filter(|slice| slice.layers.end == layers);
        let prompt_rows: usize = computed.map(|slice| slice.all_rows() - slice.sampled_rows()).sum();
        state.stats.prompt_tokens_computed += prompt_rows as u64;
        let begun = step.last().filter(|slice| slice.is_chunk(layers));
        let mut hidden = state.chunk.take_if(|_| begun.is_some()).map_or_else(Vec::new, |chunk| chunk.hidden);
        let chunk = begun.map(|slice| Chunk { layers: slice.layers.clone(), hidden: &mut hidden });
        // Where it is far from the device to the host, logits that nobody needs stay there.
        let takes_likeliest = |slice: &Slice| {
            slice.scored == 0 && (!slice.samples || state.running[slice.turn].takes_likeliest())
        };
        let is_greedy = chunk.is_none() && self.backend.finds_likeliest() && step.iter().all(takes_likeliest);
        let computed = match is_greedy {
            true => self.backend.forward_to_likeliest(&batch),
            false => self.backend.forward(&batch, chunk),
        };
        if let Err(error) = computed {
            tracing::error!(%error, "a step could not be computed");
            state.has_failed |= self.condition.complain(&error.to_string());
            for slice in step {
                let failure = EngineError::Device(error.to_string());
                state.running[slice.turn].end(Ending::Fail(failure));
            }
            return false;
        }
        if std::mem::take(&mut state.has_failed) {
            self.condition.set_trouble(None);
        }
        if let Some(slice) = begun {
            self.keep_chunk(slice, hidden);
        }
        true
    }

    /// Chooses and publishes the next token of every turn whose last token was computed, and as many more as it had
    /// guessed right. Only then the rows that hold what the log says become part of the turn's pages.
    pub(super) fn sample(&mut self, step: &[Slice]) {
        let state = &mut self.state;
        let vocab = self.model.config().vocab;
        let layers = self.model.config().layers;
        let (logits, likeliest) = self.backend.results_mut();
        let mut row = 0;
        for slice in step.iter().filter(|slice| slice.layers.end == layers) {
            let turn = &mut state.running[slice.turn];
            if slice.scored > 0 {
                let rows = logits[row * vocab..(row + slice.scored) * vocab].chunks_exact(vocab);
                turn.score(&mut self.sampler, rows);
            }
            let sampled = row + slice.scored..row + slice.logit_rows();
            row = sampled.end;
            let (mut rows, mut said) = (slice.rows, 0);
            for (at, row) in sampled.enumerate() {
                let token = match likeliest.get(row) {
                    Some(token) => {
                        turn.take(&self.model, *token, None);
                        *token
                    }
                    None => {
                        let logits = &mut logits[row * vocab..(row + 1) * vocab];
                        match turn.sample(&self.model, &mut self.sampler, logits) {
                            Some(token) => token,
                            None => break,
                        }
                    }
                };
                said += 1;
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
            turn.measure(said, &mut state.stats.distributions);
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
        let took = took.as_secs_f64();
        let work: f64 = step.iter().map(|slice| slice.work).sum();
        let decoding: usize = step.iter().filter(|slice| slice.work == 0.0).map(Slice::all_rows).sum();
        if work == 0.0 {
            self.state.cost.observe(decoding, took);
        } else {
            let usual = if decoding > 0 { self.state.cost.of(decoding as f64) } else { 0.0 };
            self.state.pace.observe_beside(work, took, usual);
        }
    }
}
