//! The serving loop: `schedule → forward → sample → publish → persist`, on one thread per model.

#![forbid(unsafe_code)]

pub mod api;
mod handle;
mod ngram;
mod output_text;
mod persist;
pub mod sampling;
mod speculation;
mod stats;
mod step_cost;
mod turn;
mod worker;

pub use api::{
    EngineError, Event, Finish, FinishReason, Miss, Priority, Receipt, Tier, TokenLogprob, TokenOutput,
    TurnSpec,
};
pub use dormouse_grammar::{Grammar, GrammarError, GrammarRequest};
pub use dormouse_kv::Realm;
pub use handle::{Claim, Engine};
pub use output_text::OutputText;
pub use sampling::Sampling;
pub use speculation::{DraftSource, Guess, Speculation};
pub use stats::EngineStats;
