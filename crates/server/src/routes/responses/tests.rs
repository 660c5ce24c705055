use dormouse_answer::{AnswerFormat, CallSyntax, Reasoning};
use dormouse_engine::{FinishReason, Receipt};
use dormouse_session::{Turn, TurnStatus, Usage};
use serde_json::Map;

use super::*;

pub fn turn(text: &str, format: &AnswerFormat, status: TurnStatus) -> Turn {
    Turn {
        id: "turn_0a".into(),
        object: "session.turn".into(),
        session: "sess_1".into(),
        status,
        background: false,
        created_at: 1,
        completed_at: Some(2),
        finish_reason: (status == TurnStatus::Completed).then_some(FinishReason::Stop),
        error: None,
        error_code: None,
        output_text: text.into(),
        message: Map::new(),
        answer_format: format.clone(),
        usage: Usage {
            prompt_tokens: 10,
            completion_tokens: 3,
            total_tokens: 13,
            cached_tokens: 5,
            ..Usage::default()
        },
        dormouse: Some(Receipt { restored_tokens: 5, ..Receipt::default() }),
    }
}

pub fn response(background: bool) -> Response {
    let record = json!({ "object": { "background": background, "previous_response_id": "resp_0" } });
    Response {
        id: "resp_1".into(),
        created_at: 1,
        record: record.as_object().unwrap().clone(),
        model: "m".into(),
    }
}

fn delta(text: &str) -> TurnEventBody {
    TurnEventBody::Delta { delta: text.into(), token: 1, logprob: None }
}

/// What is said of an answer that comes in these pieces.
fn said(pieces: &[&str], turn: &Turn) -> Vec<Value> {
    let envelope = Envelope::new(&response(false));
    let mut narrator = Narrator::new(envelope, &turn.id, &turn.answer_format, None);
    let (session, id) = (String::new(), String::new());
    let mut events = narrator.take(TurnEventBody::Created { session: session.clone(), turn: id.clone() });
    events.extend(narrator.take(TurnEventBody::InProgress { session, turn: id, prompt: Vec::new() }));
    for piece in pieces {
        events.extend(narrator.take(delta(piece)));
    }
    let end = Box::new(turn.clone());
    events.extend(narrator.take(match turn.status {
        TurnStatus::Cancelled => TurnEventBody::Cancelled { turn: end },
        TurnStatus::Failed => TurnEventBody::Failed { turn: end },
        TurnStatus::Completed | TurnStatus::InProgress => TurnEventBody::Completed { turn: end },
    }));
    assert!(narrator.is_over());
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

/// The deltas of each item, joined, and what the item's last event says of it.
fn joined(events: &[Value]) -> Vec<(String, Value)> {
    let mut items: Vec<(String, Value)> = Vec::new();
    for event in events {
        let index = event["output_index"].as_u64().unwrap_or(0) as usize;
        match event["type"].as_str().unwrap() {
            "response.output_item.added" => {
                assert_eq!(index, items.len());
                items.push((String::new(), Value::Null));
            }
            "response.output_item.done" => items[index].1 = event["item"].clone(),
            kind if kind.ends_with(".delta") => items[index].0 += event["delta"].as_str().unwrap(),
            _ => {}
        }
    }
    items
}

fn full_format() -> AnswerFormat {
    AnswerFormat {
        calls: Some(CallSyntax::Hermes),
        reasoning: Some(Reasoning { open: "<think>".into(), close: "</think>".into(), starts_open: false }),
    }
}

const FULL: &str = "<think>Let me see.</think>I will look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"é\"]}}\n\
                    </tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

#[test]
fn a_text_is_told_in_openais_order() {
    let turn = turn("Hi you", &AnswerFormat::default(), TurnStatus::Completed);
    let events = said(&["Hi", "", " you"], &turn);
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds(&events), expected);
    let last = &events.last().unwrap()["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], "Hi you");
    assert_eq!((&last["status"], &last["completed_at"]), (&json!("completed"), &json!(2)));
    assert_eq!(last["usage"]["total_tokens"], 13);
    assert_eq!(last["prompt_cache_diagnostics"]["type"], "cache_hit");
}

#[test]
fn numbers_have_no_gaps_and_pieces_join_to_the_finished_items_however_the_text_is_cut() {
    let texts = [
        FULL,
        "no marks",
        "",
        "<think>cut off",
        "a <tool_call> that is none",
        "<tool_call>{\"name\": \"f\", \"argu",
    ];
    for text in texts {
        let turn = turn(text, &full_format(), TurnStatus::Completed);
        let whole = said(&[text], &turn);
        let object = object_of(Envelope::new(&response(false)), &turn);
        for size in 1..9 {
            let characters: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = characters.chunks(size).map(|piece| piece.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let events = said(&pieces, &turn);
            for (number, event) in events.iter().enumerate() {
                assert_eq!(event["sequence_number"], number);
            }
            let items = joined(&events);
            for (text, item) in &items {
                let says = match item["type"].as_str().unwrap() {
                    "function_call" => &item["arguments"],
                    _ => &item["content"][0]["text"],
                };
                assert_eq!(says, text);
            }
            let output: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
            let last = &events.last().unwrap()["response"];
            assert_eq!(last["output"], json!(output));
            assert_eq!(last, &whole.last().unwrap()["response"]);
            assert_eq!(last, &object);
        }
    }
}

#[test]
fn reasoning_text_and_calls_are_items_of_their_own() {
    let turn = turn(FULL, &full_format(), TurnStatus::Completed);
    let object = object_of(Envelope::new(&response(false)), &turn);
    let output = object["output"].as_array().unwrap();
    let types: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["reasoning", "message", "function_call", "function_call"]);
    assert_eq!(output[0]["content"][0]["text"], "Let me see.");
    assert_eq!(output[1]["content"][0]["text"], "I will look.");
    assert_eq!((&output[2]["name"], &output[3]["name"]), (&json!("f"), &json!("g")));
    let arguments: Value = serde_json::from_str(output[2]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"x": [1, "é"]}));
    assert_ne!(output[2]["call_id"], output[3]["call_id"]);
}

#[test]
fn an_answer_that_was_cut_is_incomplete_and_says_why() {
    let mut turn = turn("Hi", &AnswerFormat::default(), TurnStatus::Completed);
    turn.finish_reason = Some(FinishReason::Length);
    let events = said(&["Hi"], &turn);
    assert_eq!(kinds(&events).last(), Some(&"response.incomplete"));
    let object = &events.last().unwrap()["response"];
    assert_eq!(object["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(object["output"][0]["status"], "incomplete");
}

#[test]
fn ends_that_are_none_are_told_with_their_status() {
    let mut failed = turn("Hi", &AnswerFormat::default(), TurnStatus::Failed);
    failed.error = Some("the disk is full".into());
    let events = said(&["Hi"], &failed);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"]["message"], "the disk is full");
    let cancelled = turn("", &AnswerFormat::default(), TurnStatus::Cancelled);
    let events = said(&[], &cancelled);
    assert_eq!(kinds(&events).last(), Some(&"response.incomplete"));
    assert_eq!(events.last().unwrap()["response"]["status"], "cancelled");
}

#[test]
fn a_background_response_is_queued_first() {
    let turn = turn("", &AnswerFormat::default(), TurnStatus::InProgress);
    let mut narrator = Narrator::new(Envelope::new(&response(true)), &turn.id, &turn.answer_format, None);
    let created = TurnEventBody::Created { session: String::new(), turn: String::new() };
    let events = narrator.take(created);
    assert_eq!(kinds(&events), ["response.created", "response.queued"]);
    assert_eq!(events[0]["response"]["status"], "queued");
}

#[test]
fn log_probabilities_come_with_the_text_that_their_tokens_made() {
    let turn = turn("é!", &AnswerFormat::default(), TurnStatus::Completed);
    let writer: LogprobWriter = Box::new(|token, _| json!({ "token": token }));
    let envelope = Envelope::new(&response(false));
    let mut narrator = Narrator::new(envelope, &turn.id, &turn.answer_format, Some(writer));
    let logprob = || Some(TokenLogprob { logprob: -1.0, top: Vec::new() });
    let mut events = Vec::new();
    for (token, text) in [(1, ""), (2, "é"), (3, "!")] {
        events.extend(narrator.take(TurnEventBody::Delta { delta: text.into(), token, logprob: logprob() }));
    }
    let deltas: Vec<&Value> = events.iter().filter(|event| event["delta"].is_string()).collect();
    assert_eq!(deltas[0]["logprobs"], json!([{ "token": 1 }, { "token": 2 }]));
    assert_eq!(deltas[1]["logprobs"], json!([{ "token": 3 }]));
    let events = narrator.take(TurnEventBody::Completed { turn: Box::new(turn) });
    let logprobs = &events.last().unwrap()["response"]["output"][0]["content"][0]["logprobs"];
    assert_eq!(logprobs.as_array().unwrap().len(), 3);
}

#[test]
fn an_unfinished_response_shows_what_it_has() {
    let turn = turn("Hi", &AnswerFormat::default(), TurnStatus::InProgress);
    let object = object_of(Envelope::new(&response(true)), &turn);
    assert_eq!(object["status"], "in_progress");
    assert_eq!(object["output"][0]["status"], "in_progress");
    assert!(object["usage"].is_null());
}

#[test]
fn what_is_missing_is_blamed_by_the_requests_own_names() {
    let error = blame(SessionError::ResponseNotFound("resp_1".into()), false);
    assert_eq!((error.status.as_u16(), error.param.as_deref()), (404, Some("previous_response_id")));
    let error = blame(SessionError::SessionNotFound("sess_1".into()), true);
    assert_eq!((error.status.as_u16(), error.code), (404, Some("conversation_not_found")));
    let full = SessionError::ContextLengthExceeded { context: 10, tokens: 20, or_more: false };
    assert_eq!(blame(full, false).param.as_deref(), Some("input"));
}
