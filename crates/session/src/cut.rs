//! Places in a session's history: what remains of it before a place.

use std::collections::HashMap;
use std::sync::Arc;

use dormouse_answer::AnswerFormat;
use dormouse_engine::OutputText;
use dormouse_models::{TokenId, Tokenizer};
use dormouse_store::{Cut, History, TurnRow};
use serde_json::Value;

use crate::answers::{answer_message, shown};
use crate::api::{Place, SessionError};
use crate::records::{self, KnownItem, TurnRecord};

/// The cut of `history` at `place`, which the request's field `param` names; None is the end, of a busy session the place where its running turn's input begins.
pub(crate) fn at(
    history: &History,
    log: &[TokenId],
    tokenizer: &Arc<Tokenizer>,
    place: Option<&Place>,
    param: &str,
) -> Result<Cut, SessionError> {
    match place {
        None => before_active_turn(history),
        Some(Place::Turn(turn)) => after_turn(history, turn),
        Some(Place::Token(position)) => at_token(history, log, tokenizer, *position, param),
    }
}

fn before_active_turn(history: &History) -> Result<Cut, SessionError> {
    let session = &history.session;
    let Some(active) = &session.active_turn else {
        return Ok(Cut {
            tokens: session.log_len,
            items: session.items,
            partial_item: None,
            turns: session.turns,
        });
    };
    let row = find(history, active)?.1;
    let record: TurnRecord = records::decode(&row.record)?;
    let items = history.items.iter().filter(|item| item.turn.as_ref() != Some(active)).count();
    Ok(Cut { tokens: record.input_start, items, partial_item: None, turns: session.turns.saturating_sub(1) })
}

fn after_turn(history: &History, turn: &str) -> Result<Cut, SessionError> {
    let (position, row) = find(history, turn)?;
    if history.session.active_turn.as_deref() == Some(turn) {
        return Err(SessionError::Busy { session: history.session.id.clone(), turn: turn.to_owned() });
    }
    let last = history.items.iter().rposition(|item| item.turn.as_deref() == Some(turn));
    let items = last.map_or(0, |last| last + 1);
    let tokens = output_end(row, &item_ends(history)).unwrap_or(0);
    Ok(Cut { tokens: tokens.min(history.session.log_len), items, partial_item: None, turns: position + 1 })
}

/// Where the last item of each turn ends.
fn item_ends(history: &History) -> HashMap<&str, usize> {
    let ends = history.items.iter().filter_map(|item| Some((item.turn.as_deref()?, item.token_end)));
    // Of the items of one turn the last one stays.
    ends.filter(|(turn, _)| history.session.active_turn.as_deref() != Some(turn)).collect()
}

/// Where a finished turn's output ends. A log that was tokenised anew has lost the turn's own range, but not its
/// items'.
fn output_end(row: &TurnRow, item_ends: &HashMap<&str, usize>) -> Option<usize> {
    row.output_end.or_else(|| item_ends.get(row.id.as_str()).copied())
}

fn find<'a>(history: &'a History, turn: &str) -> Result<(usize, &'a TurnRow), SessionError> {
    history
        .turns
        .iter()
        .enumerate()
        .find(|(_, row)| row.id == turn)
        .ok_or_else(|| SessionError::TurnNotFound(turn.to_owned()))
}

fn at_token(
    history: &History,
    log: &[TokenId],
    tokenizer: &Arc<Tokenizer>,
    position: usize,
    param: &str,
) -> Result<Cut, SessionError> {
    if position > log.len() {
        return Err(SessionError::Invalid {
            param: param.to_owned(),
            message: format!("token position {position} is beyond the session's {} tokens", log.len()),
        });
    }
    let items = history.items.iter().take_while(|item| item.token_end <= position).count();
    let partial_item = match history.items.get(items) {
        Some(row) if row.token_start < position => {
            let item = KnownItem::from_row(row.clone())?;
            let turn = item.turn.as_deref().and_then(|turn| find(history, turn).ok());
            let format = turn.map(|(_, row)| records::decode::<TurnRecord>(&row.record)).transpose()?;
            let format = format.map(|record| record.answer_format).unwrap_or_default();
            partial(item, &format, &log[row.token_start..position], tokenizer, position)
        }
        _ => None,
    };
    let ends = item_ends(history);
    let finished = |row: &&TurnRow| output_end(row, &ends).is_some_and(|end| end <= position);
    let turns = history.turns.iter().take_while(finished).count();
    Ok(Cut {
        tokens: position,
        items,
        partial_item: partial_item.map(|item| item.to_row()).transpose()?,
        turns,
    })
}

/// What the tokens before the cut hold of the item's text; None when that is nothing.
fn partial(
    mut item: KnownItem,
    format: &AnswerFormat,
    tokens: &[TokenId],
    tokenizer: &Arc<Tokenizer>,
    position: usize,
) -> Option<KnownItem> {
    let text = text_of(tokens, tokenizer, &shown(tokenizer, format));
    item.token_end = position;
    if item.generated {
        item.message = answer_message(item.turn.as_deref().unwrap_or_default(), format, &text);
        return (!text.is_empty()).then_some(item);
    }
    // The template's own words come before the content's.
    let content = item.content();
    // Behind an answer that a stop string ended come tokens of the stop string.
    let whole = text.starts_with(content).then_some(content.len());
    let ends = content.char_indices().map(|(at, _)| at).chain([content.len()]);
    let kept = whole.or_else(|| ends.rev().find(|end| text.ends_with(&content[..*end]))).unwrap_or(0);
    let kept = content[..kept].to_owned();
    if kept.is_empty() {
        return None;
    }
    item.message.insert("content".into(), Value::from(kept));
    // They come after the content.
    item.message.shift_remove("tool_calls");
    Some(item)
}

/// The text of generated tokens, whole.
pub(crate) fn text_of(tokens: &[TokenId], tokenizer: &Arc<Tokenizer>, shown: &[TokenId]) -> String {
    let mut output = OutputText::new(tokenizer, &[], shown);
    let mut text = String::new();
    for token in tokens {
        text.push_str(&output.push(*token).0);
    }
    text + &output.finish()
}
