//! One turn while the engine holds it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse_grammar::Constraint;
use dormouse_kv::{BlockTable, Ticket};
use dormouse_models::{Model, Specials, TokenId};

use crate::histogram::Distributions;
use crate::outbox::Outbox;
use crate::sampler::Sampler;
use crate::sampling::History;
use crate::speculation::{DraftSource, Drafter};
use crate::{
    EngineError, Event, Finish, FinishReason, Listener, OutputText, Receipt, TokenLogprob, TokenOutput,
    TurnSpec,
};

/// How long a token waits for a commit at the most. All running turns' gains become durable in one transaction; a turn that
/// ends does not wait. A turn that has said `COMMIT_TOKENS` since the last one waits for a quarter of that: what a crash takes has to be
/// said again before the answer goes on.
pub const COMMIT_TOKENS: usize = 16;
pub const COMMIT_INTERVAL: Duration = Duration::from_millis(200);

/// A turn that was submitted and has no pages yet.
pub struct Waiting {
    pub spec: TurnSpec,
    pub listener: Arc<dyn Listener>,
    pub since: Instant,
}

impl Waiting {
    /// The tokens whose KV may be restored. The last one is always computed: its logits are what the turn begins with.
    pub fn restorable(&self) -> &[TokenId] {
        let scores = self.spec.prompt_logprobs.is_some();
        &self.spec.log[..if scores { 0 } else { self.spec.log.len() - 1 }]
    }
}

/// A turn with pages: it computes, or it waits for its last commit.
pub struct Turn {
    pub spec: TurnSpec,
    listener: Arc<dyn Listener>,
    /// What it has said that is not yet on its way.
    said: Vec<Event>,
    since: Instant,
    /// When the last step told tokens.
    told: Option<Instant>,
    pub table: BlockTable,
    /// The token log; the tokens from `durable` on are not committed yet.
    pub log: Vec<TokenId>,
    pub durable: usize,
    /// Positions of the table that a commit has named.
    pub named: usize,
    /// The last commit left no open page to be synced later.
    pub tail_is_synced: bool,
    pub in_flight: Option<Ticket>,
    /// Its pages are to be given to others as soon as it is durable.
    pub is_pausing: bool,
    history: History,
    /// The prompt's log-probabilities so far, if they are wanted.
    scores: Vec<TokenLogprob>,
    text: OutputText,
    pub drafter: Drafter,
    /// Where the output stands in its grammar.
    constraint: Option<Constraint>,
    pub receipt: Receipt,
    /// Set when nothing more is to be computed.
    pub ending: Option<Ending>,
    /// A commit failed; no other is tried, and the turn ends with the log as it is on disk.
    pub commits_failed: bool,
}

/// How a turn ends.
#[derive(Clone, Debug)]
pub enum Ending {
    Finish(FinishReason),
    Fail(EngineError),
}

impl Turn {
    /// Begins with what was restored. Output tokens that the log already holds are published again, so that a turn
    /// which was interrupted says the same from its first event on; they may show that it had already ended.
    pub fn new(
        model: &Model,
        drafts: &DraftSource,
        waiting: Waiting,
        table: BlockTable,
        receipt: Receipt,
    ) -> Turn {
        let Waiting { spec, listener, since } = waiting;
        let (prompt, output) = spec.log.split_at(spec.output_start);
        let history =
            if spec.sampling.uses_history() { History::new(prompt, output) } else { History::default() };
        let mut turn = Turn {
            log: prompt.to_vec(),
            durable: spec.log.len(),
            named: table.len(),
            tail_is_synced: true,
            in_flight: None,
            is_pausing: false,
            history,
            scores: Vec::new(),
            text: OutputText::new(model.tokenizer(), &spec.stop, &spec.shown),
            drafter: Drafter::new(
                drafts,
                spec.output_start.saturating_add(spec.max_tokens).min(model.context()),
            ),
            constraint: spec.grammar.as_ref().map(|grammar| grammar.begin()),
            ending: None,
            commits_failed: false,
            table,
            receipt,
            since,
            told: None,
            listener,
            said: Vec::new(),
            spec,
        };
        turn.say(Event::Started(turn.receipt.clone()));
        for at in turn.spec.output_start..turn.spec.log.len() {
            turn.publish(model, turn.spec.log[at], None);
        }
        if turn.unscored() == 0 {
            turn.end_prompt();
        }
        turn
    }

    /// Positions to be computed whose logits are wanted for the log-probability of the prompt token after them.
    pub fn unscored(&self) -> usize {
        match self.spec.prompt_logprobs {
            Some(_) => (self.spec.output_start - 1).saturating_sub(self.table.len()),
            None => 0,
        }
    }

    /// Takes the logits of the table's next positions, up to the last prompt token but one.
    pub fn score<'a>(&mut self, sampler: &mut Sampler, rows: impl Iterator<Item = &'a [f32]>) {
        let Some(top) = self.spec.prompt_logprobs else { return };
        let unscored = self.unscored();
        let before = self.scores.len();
        let next = self.table.len() + 1;
        let score = |(logits, token): (&[f32], &TokenId)| sampler.logprobs(logits, *token, usize::from(top));
        self.scores.extend(rows.zip(&self.log[next..]).map(score));
        if unscored > 0 && self.scores.len() - before == unscored {
            self.end_prompt();
        }
    }

    /// The prompt is scored, or need not be.
    fn end_prompt(&mut self) {
        if self.spec.prompt_logprobs.is_some() {
            let scores = std::mem::take(&mut self.scores);
            self.say(Event::Prompt(scores));
        }
        if self.spec.max_tokens == 0 {
            self.end(Ending::Finish(FinishReason::Length));
        }
    }

    /// Positions whose KV is still to be computed. At least one while the turn is alive: the last token's.
    pub fn pending(&self) -> usize {
        self.log.len() - self.table.len()
    }

    /// Output tokens that the turn may still have.
    pub fn left(&self, model: &Model) -> usize {
        let most = self.spec.output_start.saturating_add(self.spec.max_tokens).min(model.context());
        most.saturating_sub(self.log.len())
    }

    /// Chooses the next token from its logits and publishes it. None: the grammar failed, and with it the turn.
    pub fn sample(&mut self, model: &Model, sampler: &mut Sampler, logits: &mut [f32]) -> Option<TokenId> {
        let sampling = &self.spec.sampling;
        let raw = sampling.logprobs.map(|top| (logits.to_vec(), usize::from(top)));
        let position = self.log.len();
        let chosen = sampler.choose(sampling, logits, &self.history, self.constraint.as_mut(), position);
        let token = match chosen {
            Ok(token) => token,
            Err(error) => {
                self.end(Ending::Fail(error.into()));
                return None;
            }
        };
        let logprob = raw.map(|(raw, top)| sampler.logprobs(&raw, token, top));
        self.take(model, token, logprob);
        Some(token)
    }

    /// Whether the next token is the likeliest one, and nothing else of the logits is of use.
    pub fn takes_likeliest(&self) -> bool {
        self.constraint.is_none() && self.spec.sampling.takes_likeliest()
    }

    /// Publishes the next token, which was chosen.
    pub fn take(&mut self, model: &Model, token: TokenId, logprob: Option<TokenLogprob>) {
        if self.spec.sampling.uses_history() {
            self.history.push(token);
        }
        if self.log.len() == self.spec.output_start {
            self.receipt.ttft_ms = self.since.elapsed().as_secs_f64() * 1e3;
        }
        self.publish(model, token, logprob);
    }

    /// Counts the `said` tokens of a step: the time since the last ones is theirs together.
    pub fn measure(&mut self, said: u64, measured: &mut Distributions) {
        if said == 0 {
            return;
        }
        let now = Instant::now();
        match self.told.replace(now) {
            Some(before) => {
                let each = (now - before).as_secs_f64() / said as f64;
                measured.inter_token_seconds.observe_many(each, said);
            }
            None if self.log.len() as u64 == self.spec.output_start as u64 + said => {
                measured.time_to_first_token_seconds.observe(self.receipt.ttft_ms / 1e3);
            }
            // Taken up after a crash: its first token came in another life.
            None => {}
        }
    }

    /// Guesses at the tokens after the log's end: what the grammar leaves no choice about, else what the log suggests and the
    /// grammar allows.
    pub fn guess(&mut self, model: &Model) {
        let guided = self.constraint.as_mut().filter(|_| self.drafter.takes_hints());
        let Some(constraint) = guided else { return self.drafter.guess(&self.log) };
        let forced = constraint.forced();
        // Bytes in the middle of a character are no text; few are forced so.
        let forced = std::str::from_utf8(&forced).unwrap_or_default();
        if !forced.is_empty()
            && let Ok(tokens) = model.tokenizer().encode(forced, Specials::Literal, false)
        {
            return self.drafter.hint(tokens);
        }
        self.drafter.guess(&self.log);
        // An error will be met again when the token is chosen.
        let allowed = constraint.allowed(self.drafter.guesses()).unwrap_or(0);
        self.drafter.truncate(allowed);
    }

    /// Appends an output token to the log, says what text it made certain, and sees whether the turn is over.
    fn publish(&mut self, model: &Model, token: TokenId, logprob: Option<TokenLogprob>) {
        let index = self.log.len() - self.spec.output_start;
        self.log.push(token);
        let (text, stopped) = self.text.push(token);
        self.say(Event::Token(TokenOutput { index, token, text, logprob }));
        // Where a grammar is satisfied, nothing else could follow.
        let may_end = !self.spec.ignore_eos || self.constraint.is_some();
        let ended = may_end && model.tokenizer().eog_tokens().contains(&token);
        if let Some(Err(error)) = self.constraint.as_mut().map(|constraint| constraint.advance(token)) {
            self.end(Ending::Fail(error.into()));
        }
        if stopped || ended {
            self.end(Ending::Finish(FinishReason::Stop));
        } else if index + 1 >= self.spec.max_tokens || self.log.len() >= model.context() {
            self.end(Ending::Finish(FinishReason::Length));
        }
    }

    /// The first reason to end is the one that counts.
    pub fn end(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    /// Tokens or pages that no commit has named yet, or at the turn's end a page that none has synced.
    fn has_gained(&self) -> bool {
        let unsynced = self.gives_up_pages() && !self.tail_is_synced;
        self.uncommitted() > 0 || self.table.len() > self.named || unsynced
    }

    /// Tokens that a crash now would take.
    pub fn uncommitted(&self) -> usize {
        self.log.len().saturating_sub(self.durable)
    }

    /// It has ended, or is about to pause.
    pub fn gives_up_pages(&self) -> bool {
        self.ending.is_some() || self.is_pausing
    }

    /// It is to pause, and everything that it gained is durable.
    pub fn can_pause(&self) -> bool {
        self.is_pausing && self.ending.is_none() && self.in_flight.is_none() && !self.has_gained()
    }

    /// Its pages were taken.
    pub fn pause(&mut self) {
        (self.is_pausing, self.named, self.tail_is_synced) = (false, 0, true);
    }

    /// When it was submitted.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// There is something to commit, and the commit before it is done.
    pub fn can_commit(&self) -> bool {
        self.in_flight.is_none() && !self.commits_failed && self.has_gained()
    }

    /// It has ended, and everything that it gained is durable or cannot become so.
    pub fn is_over(&self) -> bool {
        self.ending.is_some() && self.in_flight.is_none() && (self.commits_failed || !self.has_gained())
    }

    /// What could not be written is not claimed: the turn fails, whatever it was about to say.
    pub fn fail_commit(&mut self, error: EngineError) {
        self.commits_failed = true;
        self.ending = Some(Ending::Fail(error));
    }

    /// Everything the turn gained is durable (or cannot become so): says how it ended and gives its pages back.
    pub fn close(mut self, outbox: &mut Outbox) -> BlockTable {
        self.tell(outbox);
        let last = match self.ending.take().unwrap_or(Ending::Fail(EngineError::Stopped)) {
            Ending::Fail(error) => Event::Failed(error),
            Ending::Finish(reason) => Event::Finished(Finish {
                reason,
                text: self.text.finish(),
                output_tokens: self.log.len() - self.spec.output_start,
                log_len: self.durable,
                receipt: self.receipt,
            }),
        };
        outbox.put(&self.listener, last);
        self.table
    }

    fn say(&mut self, event: Event) {
        self.said.push(event);
    }

    /// Hands over what was said.
    pub fn tell(&mut self, outbox: &mut Outbox) {
        self.said.drain(..).for_each(|event| outbox.put(&self.listener, event));
    }
}
