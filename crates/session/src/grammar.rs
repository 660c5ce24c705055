//! What the answer to a turn may be.

use std::sync::Arc;

use dormouse_answer::AnswerFormat;
use dormouse_engine::{Engine, Grammar, GrammarError, GrammarRequest};
use serde_json::Value;

use crate::api::{Generation, SessionError};

/// The grammar of a turn's answer, a function of what its record and its session's settings hold: the same after a crash.
/// Takes milliseconds the first time: not for an async thread.
pub(crate) fn grammar(
    engine: &Engine,
    tools: &[Value],
    generation: &Generation,
    answer_format: &AnswerFormat,
) -> Result<Option<Arc<Grammar>>, SessionError> {
    let request = GrammarRequest {
        format: generation.format.clone(),
        tools: tools.to_vec(),
        choice: generation.tool_choice.clone(),
        parallel: generation.parallel_tool_calls,
        answer_format: answer_format.clone(),
    };
    Ok(engine.grammar(&request)?)
}

impl From<GrammarError> for SessionError {
    fn from(error: GrammarError) -> SessionError {
        SessionError::Invalid { param: error.param, message: error.message }
    }
}
