//! What an agent's state is: sessions, turns, items, events and branches, as durable objects over the engine.

#![forbid(unsafe_code)]

// The tests beside the code open a runtime as those in `tests/` do.
#[cfg(test)]
extern crate self as dormouse_session;

mod answers;
pub mod api;
mod branches;
mod chain;
mod chat;
mod completions;
mod cut;
mod draft;
mod dressing;
mod drive;
mod events;
mod grammar;
mod hub;
mod ids;
mod items;
pub mod keys;
mod metrics;
mod realms;
mod records;
mod recovery;
mod rendering;
mod replay;
mod request;
mod residency;
mod responses;
pub mod runtime;
mod sessions;
mod tenants;
mod truncation;
mod turns;

pub use api::*;
pub use completions::{Completion, CompletionRequest, RawPrompt};
pub use keys::{ApiKey, KnownKey, NewKey, Scope};
pub use metrics::Exposition;
pub use request::in_request;
pub use responses::{Response, ResponseRequest};
pub use runtime::{Runtime, RuntimeOptions};
