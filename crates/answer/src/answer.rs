//! An answer taken apart.

use crate::{AnswerFormat, AnswerParser, Piece};

/// One tool call of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// JSON as the model wrote it; not whole where the answer was cut off in it.
    pub arguments: String,
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<Call>,
}

impl Answer {
    /// Takes a whole text apart.
    pub fn parse(format: &AnswerFormat, text: &str) -> Answer {
        let mut parser = AnswerParser::new(format);
        let mut answer = Answer::default();
        answer.extend(parser.push(text));
        answer.extend(parser.finish());
        answer
    }

    /// Adds pieces as a parser gives them.
    pub fn extend(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning += &text,
                Piece::Content(text) => self.content += &text,
                Piece::CallBegin { name, .. } => self.calls.push(Call { name, arguments: String::new() }),
                Piece::CallArguments { fragment, .. } => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments += &fragment;
                    }
                }
                Piece::CallEnd { .. } => {}
            }
        }
    }
}

/// The id of a turn's call with this index. It is a function of the turn, so that a stream that is resumed after a crash
/// says the same ids.
pub fn call_id(turn: &str, index: usize) -> String {
    format!("call_{}_{index}", turn.strip_prefix("turn_").unwrap_or(turn))
}
