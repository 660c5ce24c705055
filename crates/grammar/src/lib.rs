//! What an answer may be.
//!
//! A request can ask for a JSON object, for JSON that satisfies a schema, or for tool calls ([`GrammarRequest`]). A
//! [`Compiler`] makes of that a [`Grammar`] over a model's tokens, and each turn has a [`Constraint`] that says at every
//! token which may come next. Where an answer stands in its grammar is a function of its tokens alone: a turn that was
//! interrupted is constrained anew by giving the constraint the tokens it already has.
//!
//! The automata are those of `llguidance`. What they are given is written here (`schema.rs`, `lark.rs`), so that
//! everything which is accepted can be promised.

#![forbid(unsafe_code)]

mod compiler;
mod constraint;
mod error;
mod lark;
mod request;
mod schema;
mod vocabulary;

pub use compiler::{Compiler, Grammar};
pub use constraint::Constraint;
pub use error::{ConstraintError, GrammarError};
pub use request::GrammarRequest;
