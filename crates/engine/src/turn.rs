//! One turn while the engine holds it.

use std::time::{Duration, Instant};

use dormouse_kv::{BlockTable, Ticket};
use dormouse_models::{Model, TokenId};
use tokio::sync::mpsc::UnboundedSender;

use crate::sampling::History;
use crate::speculation::{DraftSource, Drafter};
use crate::{
    EngineError, Event, Finish, FinishReason, OutputText, Receipt, TokenLogprob, TokenOutput, TurnSpec,
};

/// How long a token waits for a commit at the most. All running turns' gains become durable in one transaction; a turn that
/// ends does not wait.
pub const COMMIT_INTERVAL: Duration = Duration::from_millis(200);

/// A turn that was submitted and has no pages yet.
pub struct Waiting {
    pub spec: TurnSpec,
    pub events: UnboundedSender<Event>,
    pub since: Instant,
}

/// A turn with pages: it computes, or it waits for its last commit.
pub struct Turn {
    pub spec: TurnSpec,
    events: UnboundedSender<Event>,
    since: Instant,
    pub table: BlockTable,
    /// The token log; the tokens from `durable` on are not committed yet.
    pub log: Vec<TokenId>,
    pub durable: usize,
    /// Positions of the table that a commit has named.
    pub named: usize,
    /// The last commit left no open page to be synced later.
    pub tail_is_synced: bool,
    pub in_flight: Option<Ticket>,
    history: History,
    text: OutputText,
    pub drafter: Drafter,
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
        let Waiting { spec, events, since } = waiting;
        let (prompt, output) = spec.log.split_at(spec.output_start);
        let history =
            if spec.sampling.uses_history() { History::new(prompt, output) } else { History::default() };
        let mut turn = Turn {
            log: prompt.to_vec(),
            durable: spec.log.len(),
            named: table.len(),
            tail_is_synced: true,
            in_flight: None,
            history,
            text: OutputText::new(model.tokenizer(), &spec.stop),
            drafter: Drafter::new(
                drafts,
                spec.output_start.saturating_add(spec.max_tokens).min(model.context()),
            ),
            ending: None,
            commits_failed: false,
            table,
            receipt,
            since,
            events,
            spec,
        };
        turn.say(Event::Started(turn.receipt.clone()));
        for at in turn.spec.output_start..turn.spec.log.len() {
            turn.publish(model, turn.spec.log[at], None);
        }
        if turn.spec.max_tokens == 0 {
            turn.end(Ending::Finish(FinishReason::Length));
        }
        turn
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

    /// Chooses the next token from its logits and publishes it.
    pub fn sample(&mut self, model: &Model, logits: &mut [f32]) -> TokenId {
        let sampling = &self.spec.sampling;
        let raw = sampling.logprobs.map(|top| (logits.to_vec(), usize::from(top)));
        let token = sampling.choose(logits, &self.history, self.log.len());
        if sampling.uses_history() {
            self.history.push(token);
        }
        if self.log.len() == self.spec.output_start {
            self.receipt.ttft_ms = self.since.elapsed().as_secs_f64() * 1e3;
        }
        let logprob = raw.map(|(raw, top)| crate::sampling::logprobs(&raw, token, top));
        self.publish(model, token, logprob);
        token
    }

    /// Appends an output token to the log, says what text it made certain, and sees whether the turn is over.
    fn publish(&mut self, model: &Model, token: TokenId, logprob: Option<TokenLogprob>) {
        let index = self.log.len() - self.spec.output_start;
        self.log.push(token);
        let (text, stopped) = self.text.push(token);
        self.say(Event::Token(TokenOutput { index, token, text, logprob }));
        let ended = !self.spec.ignore_eos && model.tokenizer().eog_tokens().contains(&token);
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
        let unsynced = self.ending.is_some() && !self.tail_is_synced;
        self.log.len() > self.durable || self.table.len() > self.named || unsynced
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
    pub fn close(mut self) -> BlockTable {
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
        // As in `say`: nobody listening is no error.
        let _ = self.events.send(last);
        self.table
    }

    /// Nobody listening is no error: a background turn goes on, and who left has cancelled by other means.
    fn say(&self, event: Event) {
        let _ = self.events.send(event);
    }
}
