//! What the engine takes and gives back.

use std::sync::Arc;

use dormouse_grammar::{ConstraintError, Grammar};
use dormouse_kv::Realm;
use dormouse_models::TokenId;
use tokio::sync::mpsc::UnboundedSender;

use crate::Sampling;

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Priority {
    Background,
    #[default]
    Interactive,
}

/// One turn to run: from the input that is already in the durable token log to a stop.
#[derive(Clone, Debug)]
pub struct TurnSpec {
    pub session: String,
    pub turn: String,
    /// Whose pages may be used, and who may use this turn's.
    pub realm: Realm,
    /// Fencing number of the session's lease, checked by every commit.
    pub fence: u64,
    /// The session's whole durable token log. On a resumed turn it already ends with the turn's first output tokens.
    pub log: Vec<TokenId>,
    /// Position in the log where the turn's output begins. `log[output_start..]` was generated before a crash: its
    /// tokens are published again, from index 0, and generation goes on after them.
    pub output_start: usize,
    /// Positions of the log whose KV an earlier turn committed (`sessions.kv_len`), and the page slot that the session
    /// claims (`sessions.leaf_slot`).
    pub covered: usize,
    pub claim: Option<u32>,
    /// The session's pages are the last to be evicted.
    pub pinned: bool,
    pub sampling: Sampling,
    /// Report the log-probability of every prompt token and this many alternatives: then nothing is restored, and every
    /// prompt token is computed.
    pub prompt_logprobs: Option<u8>,
    /// Most output tokens, counted from `output_start`.
    pub max_tokens: usize,
    /// Output ends before the first occurrence of any of these in its text.
    pub stop: Vec<String>,
    /// Control tokens that the output's text shows, because they mean something to its reader.
    pub shown: Vec<TokenId>,
    /// What the output may be; None: anything. Made from what the turn's record holds, so that it is the same after a crash.
    pub grammar: Option<Arc<Grammar>>,
    /// Do not end at the model's end-of-generation tokens (but where a grammar is satisfied).
    pub ignore_eos: bool,
    pub priority: Priority,
}

impl TurnSpec {
    /// Tokens whose KV an earlier turn had computed, but for the last one of the log, which is computed in any case.
    pub(crate) fn known(&self) -> usize {
        self.covered.min(self.log.len() - 1)
    }
}

/// What a running turn says. Token events have consecutive indices from 0, also after a crash.
#[derive(Clone, Debug)]
pub enum Event {
    /// The turn left the queue; the receipt of what its resume found.
    Started(Receipt),
    /// Comes before the first token where `prompt_logprobs` asked for it: of the prompt's tokens from the second on.
    Prompt(Vec<TokenLogprob>),
    Token(TokenOutput),
    /// The last event.
    Finished(Finish),
    /// The last event. The token log holds what was generated.
    Failed(EngineError),
}

/// Who hears what a turn says, one event at a time and in order, on the engine's task that tells all listeners: so it must not
/// take long.
pub trait Listener: Send + Sync {
    fn hear(&self, event: Event);
}

/// Nobody receiving is no error: the turn goes on in the background.
impl Listener for UnboundedSender<Event> {
    fn hear(&self, event: Event) {
        let _ = self.send(event);
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct TokenOutput {
    /// Index among the turn's output tokens.
    pub index: usize,
    pub token: TokenId,
    /// Text that became certain with this token: whole UTF-8 characters, never part of a stop string. May be empty.
    pub text: String,
    pub logprob: Option<TokenLogprob>,
}

/// Log-probabilities under the model's own distribution, before temperature and truncation.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TokenLogprob {
    pub logprob: f32,
    /// The likeliest tokens with their log-probabilities, best first.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    Cancelled,
}

#[derive(Clone, Debug)]
pub struct Finish {
    pub reason: FinishReason,
    /// Text held back until the end (an incomplete stop string, an incomplete character as U+FFFD). May be empty.
    pub text: String,
    /// Output tokens in the log, counted from `output_start`, the end-of-generation token included.
    pub output_tokens: usize,
    /// The durable length of the token log.
    pub log_len: usize,
    pub receipt: Receipt,
}

/// Where restored KV came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    #[default]
    None,
    Ram,
    Disk,
    Device,
}

/// Why restored tokens end where they end, when they end before the known history does.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Miss {
    /// `new_session`, `page_damaged`, `page_evicted`, `model_changed`, `prefix_differs`.
    pub reason: String,
    pub at_token: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_message: Option<usize>,
}

impl Miss {
    pub(crate) fn new(reason: &str, at_token: usize) -> Miss {
        Miss { reason: reason.into(), at_token, at_message: None }
    }
}

/// What a resume really did.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Receipt {
    pub session: String,
    /// Prompt tokens whose KV was found and mapped.
    pub restored_tokens: usize,
    /// Tokens that an earlier computation had covered and that had to be computed again.
    pub recomputed_tokens: usize,
    pub tier: Tier,
    pub restore_ms: f64,
    /// Bytes that had to come from disk (not resident in the page cache when asked for).
    pub bytes_read: u64,
    pub queue_ms: f64,
    /// How long the turn stood still because other turns needed its pages.
    #[serde(default)]
    pub paused_ms: f64,
    pub ttft_ms: f64,
    /// Guessed tokens that were computed ahead (speculation), and those of them that became output.
    #[serde(default)]
    pub drafted_tokens: usize,
    #[serde(default)]
    pub accepted_tokens: usize,
    /// The continuation equals the uninterrupted run bit for bit (same numerics tag).
    pub exact: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub miss: Option<Miss>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the prompt has {tokens} tokens, the context holds {context}")]
    ContextOverflow { tokens: usize, context: usize },
    #[error("{0}")]
    OutOfSpace(String),
    #[error("another writer took the session (its lease moved on)")]
    LeaseLost,
    #[error("{0}")]
    Storage(String),
    /// What computes failed; the session holds its input and what was durable of its answer.
    #[error("{0}")]
    Device(String),
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// As every turn that it had.
    #[error(
        "the engine met a state that should not exist and was restarted; the turn ended there, and the session holds its \
         input and what was durable of its answer"
    )]
    Restarted,
    #[error("the engine has stopped")]
    Stopped,
}
