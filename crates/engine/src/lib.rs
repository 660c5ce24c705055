//! The serving loop: `schedule → forward → sample → publish → persist`, on one thread per model.

pub mod api;
mod output_text;
pub mod sampling;

pub use api::{
    EngineError, Event, Finish, FinishReason, Miss, Priority, Receipt, Tier, TokenLogprob, TokenOutput, TurnSpec,
};
pub use output_text::OutputText;
pub use sampling::Sampling;
