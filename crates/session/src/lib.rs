//! What an agent's state is: sessions, turns, items, events and branches, as durable objects over the engine.

pub mod api;
pub mod runtime;

pub use api::*;
pub use runtime::Runtime;
