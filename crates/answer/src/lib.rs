//! What the text of an answer means.
//!
//! Models write their tool calls and their reasoning as text, each family in its own syntax. This crate knows the
//! syntaxes ([`CallSyntax`]), takes an answer apart while it arrives ([`AnswerParser`]) or whole ([`Answer::parse`]), and
//! holds the words in which a request says what an answer may be ([`ToolChoice`], [`OutputFormat`]). It knows no model,
//! no session and no HTTP.

#![forbid(unsafe_code)]

mod answer;
mod candidate;
mod format;
mod object;
mod options;
mod parser;

pub use answer::{Answer, Call, call_id};
pub use format::{AnswerFormat, CallShape, CallSyntax, Reasoning};
pub use options::{OutputFormat, ToolChoice};
pub use parser::{AnswerParser, Piece};
