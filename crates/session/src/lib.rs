//! What an agent's state is: sessions, turns, items, events and branches, as durable objects over the engine.

#![forbid(unsafe_code)]

// The tests beside the code open a runtime as those in `tests/` do.
#[cfg(test)]
extern crate self as dormouse_session;

pub mod api;
mod branches;
mod chain;
mod chat;
mod cut;
mod drive;
mod events;
mod hub;
mod ids;
mod metrics;
mod records;
mod recovery;
mod rendering;
mod residency;
pub mod runtime;
mod sessions;
mod turns;

pub use api::*;
pub use runtime::{Runtime, RuntimeOptions};
