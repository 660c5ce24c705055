//! The serving loop: `schedule → forward → sample → publish → persist`, on one thread per model.

#![forbid(unsafe_code)]

pub mod api;
mod condition;
mod faults;
mod handle;
mod histogram;
mod ngram;
mod outbox;
mod output_text;
mod pager;
mod persist;
mod sampler;
pub mod sampling;
mod speculation;
mod stats;
mod step_cost;
mod supervisor;
mod turn;
mod watchdog;
mod worker;

pub use api::{
    EngineError, Event, Finish, FinishReason, Listener, Miss, Priority, Receipt, Tier, TokenLogprob,
    TokenOutput, TurnSpec,
};
pub use dormouse_grammar::{Grammar, GrammarError, GrammarRequest};
pub use dormouse_kv::{Limits, Realm};
pub use faults::Faults;
pub use handle::{Claim, DEFAULT_STUCK_AFTER, Engine, EngineOptions};
pub use histogram::{Distributions, Histogram};
pub use output_text::OutputText;
pub use sampling::Sampling;
pub use speculation::{DraftSource, Guess, Speculation};
pub use stats::{EngineStats, TierCounts};
pub use supervisor::Reopen;
