//! The events of a turn that is over, told again.

use dormouse_engine::{Engine, OutputText};

use crate::answers::shown;
use crate::api::*;

/// The events of a finished turn, as they were when it ran.
pub(crate) fn replay(turn: Turn, output: &[u32], engine: &Engine, stop: &[String]) -> Vec<TurnEvent> {
    let tokenizer = engine.model().tokenizer();
    let mut text = OutputText::new(tokenizer, stop, &shown(tokenizer, &turn.answer_format));
    let mut deltas = Vec::new();
    for (index, token) in output.iter().enumerate() {
        let (delta, stopped) = text.push(*token);
        if !delta.is_empty() {
            deltas.push((2 + index as u64, delta, *token));
        }
        if stopped {
            break;
        }
    }
    let rest = text.finish();
    if let Some(token) = output.last().filter(|_| !rest.is_empty()) {
        deltas.push((2 + output.len() as u64, rest, *token));
    }
    framed(turn, deltas)
}

/// The same where the tokens are no more: the text in one piece.
pub(crate) fn replay_text(turn: Turn) -> Vec<TurnEvent> {
    let text = turn.output_text.clone();
    let deltas = if text.is_empty() { Vec::new() } else { vec![(2, text, 0)] };
    framed(turn, deltas)
}

fn framed(turn: Turn, deltas: Vec<(u64, String, u32)>) -> Vec<TurnEvent> {
    let (session, id) = (turn.session.clone(), turn.id.clone());
    let last = turn.last_number();
    let started = TurnEventBody::Created { session: session.clone(), turn: id.clone() };
    let running = TurnEventBody::InProgress { session, turn: id, prompt: Vec::new() };
    let mut events = vec![
        TurnEvent { sequence_number: 0, body: started },
        TurnEvent { sequence_number: 1, body: running },
    ];
    for (sequence_number, delta, token) in deltas {
        events
            .push(TurnEvent { sequence_number, body: TurnEventBody::Delta { delta, token, logprob: None } });
    }
    let turn = Box::new(turn);
    let body = match turn.status {
        TurnStatus::Cancelled => TurnEventBody::Cancelled { turn },
        TurnStatus::Failed => TurnEventBody::Failed { turn },
        TurnStatus::Completed | TurnStatus::InProgress => TurnEventBody::Completed { turn },
    };
    events.push(TurnEvent { sequence_number: last, body });
    events
}
