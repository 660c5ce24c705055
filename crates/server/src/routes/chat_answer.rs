//! `POST /v1/chat/completions`: the answer, whole or as chunks.

use axum::http::StatusCode;
use axum::response::Response;
use dormouse_answer::{AnswerParser, Piece, call_id};
use dormouse_engine::{FinishReason, TokenLogprob};
use dormouse_session::{FailureCode, Runtime, SessionError, Turn, TurnEventBody, TurnStatus, TurnStream};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::chunks::{self, Head, Narrator, receipt};
use super::to_value;
use crate::error::ApiError;
use crate::sse;

/// What all parts of one answer have in common.
pub struct Answer {
    pub head: Head,
    pub runtime: Runtime,
    pub logprobs: bool,
    pub include_usage: bool,
    /// The session and turn that go on when the server is stopped; None where the answer ends with its request.
    pub goes_on: Option<(String, String)>,
}

/// What one choice has said so far.
struct Choice {
    /// Id of its turn.
    id: String,
    /// None once the turn is over.
    parser: Option<AnswerParser>,
    said: dormouse_answer::Answer,
    logprobs: Vec<Value>,
    /// Its turn, once it is over.
    turn: Option<Turn>,
}

/// What an event added to a choice.
type Added = (Vec<Piece>, Vec<Value>);

impl Choice {
    fn new(stream: &TurnStream) -> Choice {
        Choice {
            id: stream.turn.clone(),
            parser: Some(AnswerParser::new(&stream.answer_format)),
            said: dormouse_answer::Answer::default(),
            logprobs: Vec::new(),
            turn: None,
        }
    }

    /// Takes an event in and answers what it added.
    fn take(&mut self, answer: &Answer, event: TurnEventBody) -> Result<Added, ApiError> {
        match event {
            TurnEventBody::Created { .. } | TurnEventBody::InProgress { .. } => Ok(Added::default()),
            TurnEventBody::Delta { delta, token, logprob } => {
                let pieces = self.parser.as_mut().map_or_else(Vec::new, |parser| parser.push(&delta));
                self.said.extend(pieces.iter().cloned());
                let logprob = logprob.filter(|_| answer.logprobs);
                let logprobs: Vec<Value> = logprob.iter().map(|it| answer.logprob(token, it)).collect();
                self.logprobs.extend(logprobs.iter().cloned());
                Ok((pieces, logprobs))
            }
            TurnEventBody::Completed { turn }
            | TurnEventBody::Cancelled { turn }
            | TurnEventBody::Failed { turn } => {
                if turn.status == TurnStatus::Failed {
                    return Err(failure(&turn));
                }
                self.turn = Some(*turn);
                let rest = self.parser.take().map_or_else(Vec::new, AnswerParser::finish);
                self.said.extend(rest.iter().cloned());
                Ok((rest, Vec::new()))
            }
        }
    }

    /// The message of a whole answer.
    fn message(&self) -> Value {
        let said = &self.said;
        let mut message = json!({ "role": "assistant", "content": said.content, "refusal": null });
        if !said.reasoning.is_empty() {
            // Clients read the one or the other name.
            message["reasoning_content"] = said.reasoning.as_str().into();
            message["reasoning"] = said.reasoning.as_str().into();
        }
        if !said.calls.is_empty() {
            let call = |(index, call): (usize, &dormouse_answer::Call)| {
                json!({
                    "id": call_id(&self.id, index), "type": "function",
                    "function": { "name": call.name, "arguments": call.arguments },
                })
            };
            message["tool_calls"] = said.calls.iter().enumerate().map(call).collect();
            if said.content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        message
    }

    /// The delta of a chunk; None where a piece says nothing to clients of chat completions.
    fn delta<'a>(&self, piece: &'a Piece) -> Option<Delta<'a>> {
        let call = |index: usize, begun: Option<&'a str>, arguments: &'a str| CallDelta {
            index,
            id: begun.map(|_| call_id(&self.id, index)),
            kind: begun.map(|_| "function"),
            function: FunctionDelta { name: begun, arguments },
        };
        match piece {
            Piece::Content(text) => Some(Delta::content(text)),
            Piece::Reasoning(text) => {
                Some(Delta { reasoning_content: Some(text), reasoning: Some(text), ..Delta::default() })
            }
            Piece::CallBegin { index, name } => Some(Delta::call(call(*index, Some(name), ""))),
            Piece::CallArguments { index, fragment } => Some(Delta::call(call(*index, None, fragment))),
            Piece::CallEnd { .. } => None,
        }
    }

    fn finish_reason(&self, turn: &Turn) -> &'static str {
        match turn.finish_reason {
            Some(FinishReason::Length) => "length",
            Some(FinishReason::Stop) if !self.said.calls.is_empty() => "tool_calls",
            // OpenAI has no word for a cancelled answer, and clients check against its list.
            Some(FinishReason::Stop | FinishReason::Cancelled) | None => "stop",
        }
    }
}

impl Answer {
    /// What a client is told whose answer does not end because the server does.
    fn interrupted(&self) -> ApiError {
        match &self.goes_on {
            Some((session, turn)) => ApiError::interrupted(session, turn),
            None => SessionError::Stopping.into(),
        }
    }

    /// One entry of `logprobs.content`. A token may be a part of a character, hence `bytes`.
    fn logprob(&self, token: u32, it: &TokenLogprob) -> Value {
        let entry = |token: u32, logprob: f32| {
            let bytes = self.runtime.token_bytes(Some(&self.head.model), token);
            json!({ "token": String::from_utf8_lossy(&bytes), "logprob": finite(logprob), "bytes": bytes })
        };
        let mut value = entry(token, it.logprob);
        value["top_logprobs"] = it.top.iter().map(|(token, logprob)| entry(*token, *logprob)).collect();
        value
    }

    fn logprobs_object(&self, content: &[Value]) -> Value {
        if self.logprobs { json!({ "content": content, "refusal": null }) } else { Value::Null }
    }

    /// The frame of a chunk of one choice.
    fn chunk(
        &self,
        index: usize,
        delta: Delta<'_>,
        logprobs: &[Value],
        turn: Option<Finished<'_>>,
    ) -> String {
        let logprobs = (!logprobs.is_empty()).then(|| self.logprobs_object(logprobs));
        let finish_reason = turn.as_ref().map(|turn| turn.reason);
        let choices = [ChunkChoice { index, delta, logprobs, finish_reason }];
        let mut chunk = self.head.object(CHUNK, &choices);
        chunk.usage = self.include_usage.then_some(Value::Null);
        chunk.dormouse = turn.map(|turn| turn.receipt.clone());
        sse::data(&chunk)
    }
}

const CHUNK: &str = "chat.completion.chunk";

/// What a choice's last chunk tells.
struct Finished<'a> {
    reason: &'static str,
    receipt: &'a Value,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

/// What a chunk adds to the message.
#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    /// Clients read the one or the other name.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> Delta<'a> {
    fn content(text: &'a str) -> Delta<'a> {
        Delta { content: Some(text), ..Delta::default() }
    }

    fn call(call: CallDelta<'a>) -> Delta<'a> {
        Delta { tool_calls: Some([call]), ..Delta::default() }
    }
}

/// What a client that waits for a turn's answer is told when the turn failed.
pub(super) fn failure(turn: &Turn) -> ApiError {
    let text = turn.error.as_deref().unwrap_or("the answer failed, and no reason is known");
    let (status, code) = match turn.error_code {
        Some(FailureCode::OutOfSpace) => (StatusCode::INSUFFICIENT_STORAGE, "out_of_space"),
        Some(FailureCode::TurnFailed) | None => (StatusCode::INTERNAL_SERVER_ERROR, "turn_failed"),
    };
    ApiError { is_taken_in: true, ..ApiError::new(status, Some(code), text) }
}

/// JSON has no infinity; -9999 is how OpenAI writes "impossible".
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Prompt tokens count once, however many choices read them; every choice's output counts.
fn usage(turns: &[&Turn]) -> Value {
    let prompt = turns.first().map_or(0, |turn| turn.usage.prompt_tokens);
    let cached = turns.first().map_or(0, |turn| turn.usage.cached_tokens);
    let completion: usize = turns.iter().map(|turn| turn.usage.completion_tokens).sum();
    let reasoning: usize = turns.iter().map(|turn| turn.usage.reasoning_tokens).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
        "completion_tokens_details": { "reasoning_tokens": reasoning },
    })
}

/// Waits for all choices and answers the `chat.completion` object.
pub async fn whole(answer: &Answer, streams: Vec<TurnStream>) -> Result<Value, ApiError> {
    let mut choices = Vec::with_capacity(streams.len());
    for mut stream in streams {
        let mut choice = Choice::new(&stream);
        while choice.turn.is_none() {
            let Some(event) = stream.events.recv().await else { return Err(answer.interrupted()) };
            choice.take(answer, event.body)?;
        }
        choices.push(choice);
    }
    let turns: Vec<&Turn> = choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
    let rendered = choices.iter().zip(&turns).enumerate().map(|(index, (choice, turn))| {
        json!({
            "index": index,
            "message": choice.message(),
            "logprobs": answer.logprobs_object(&choice.logprobs),
            "finish_reason": choice.finish_reason(turn),
        })
    });
    let rendered: Vec<Value> = rendered.collect();
    let mut object = answer.head.object("chat.completion", &rendered);
    object.usage = Some(usage(&turns));
    object.dormouse = Some(receipt(turns.first().copied())?);
    to_value(&object)
}

/// Answers with chunks as they come. Dropping the response drops the choices' streams.
pub fn stream(answer: Answer, streams: Vec<TurnStream>, permit: OwnedSemaphorePermit) -> Response {
    let choices = streams.iter().map(Choice::new).collect();
    chunks::stream(Chunks { answer, choices }, streams, permit)
}

/// Turns events into frames.
struct Chunks {
    answer: Answer,
    choices: Vec<Choice>,
}

impl Narrator for Chunks {
    /// Says who speaks.
    fn begin(&self) -> String {
        let role = || Delta { role: Some("assistant"), ..Delta::content("") };
        (0..self.choices.len()).map(|index| self.answer.chunk(index, role(), &[], None)).collect()
    }

    fn take(&mut self, index: usize, event: TurnEventBody) -> Result<String, ApiError> {
        let (pieces, logprobs) = self.choices[index].take(&self.answer, event)?;
        let choice = &self.choices[index];
        let mut deltas: Vec<Delta<'_>> = pieces.iter().filter_map(|piece| choice.delta(piece)).collect();
        if deltas.is_empty() && !logprobs.is_empty() {
            deltas.push(Delta::content(""));
        }
        let mut frames = String::new();
        let mut logprobs = logprobs.as_slice();
        for delta in deltas {
            frames += &self.answer.chunk(index, delta, std::mem::take(&mut logprobs), None);
        }
        if let Some(turn) = &choice.turn {
            let receipt = receipt(Some(turn))?;
            let finished = Finished { reason: choice.finish_reason(turn), receipt: &receipt };
            frames += &self.answer.chunk(index, Delta::default(), &[], Some(finished));
        }
        Ok(frames)
    }

    fn end(&self) -> Result<String, ApiError> {
        if !self.answer.include_usage {
            return Ok(String::new());
        }
        let turns: Vec<&Turn> = self.choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
        let mut chunk = self.answer.head.object::<Value>(CHUNK, &[]);
        chunk.usage = Some(usage(&turns));
        chunk.dormouse = Some(receipt(turns.first().copied())?);
        Ok(sse::data(&chunk))
    }

    fn interrupted(&self) -> ApiError {
        self.answer.interrupted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dormouse_answer::{AnswerFormat, CallSyntax, Reasoning};
    use dormouse_engine::Receipt;
    use dormouse_session::Usage;

    fn turn(text: &str, reason: FinishReason) -> Turn {
        Turn {
            id: "turn_1".into(),
            object: "session.turn".into(),
            session: "sess_1".into(),
            status: TurnStatus::Completed,
            background: false,
            created_at: 0,
            completed_at: Some(1),
            finish_reason: Some(reason),
            error: None,
            error_code: None,
            output_text: text.into(),
            message: Default::default(),
            answer_format: Default::default(),
            usage: Usage {
                prompt_tokens: 10,
                completion_tokens: 3,
                total_tokens: 13,
                cached_tokens: 8,
                ..Usage::default()
            },
            dormouse: Some(Receipt { restored_tokens: 8, ..Receipt::default() }),
        }
    }

    #[test]
    fn usage_counts_the_prompt_once_and_every_choices_output() {
        let (one, other) = (turn("a", FinishReason::Stop), turn("b", FinishReason::Length));
        let usage = usage(&[&one, &other]);
        assert_eq!(
            (usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64()),
            (Some(10), Some(6))
        );
        assert_eq!(usage["total_tokens"], 16);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 8);
    }

    /// A choice that has said this.
    fn said(text: &str) -> Choice {
        let (_, events) = tokio::sync::mpsc::unbounded_channel();
        let answer_format = AnswerFormat {
            calls: Some(CallSyntax::Hermes),
            reasoning: Some(Reasoning {
                open: "<think>".into(),
                close: "</think>".into(),
                starts_open: false,
            }),
        };
        let stream = TurnStream { session: "sess_1".into(), turn: "turn_1".into(), answer_format, events };
        let mut choice = Choice::new(&stream);
        choice.said = dormouse_answer::Answer::parse(&stream.answer_format, text);
        choice
    }

    const CALL: &str = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";

    #[test]
    fn finish_reasons_are_from_openais_list() {
        for (text, reason, expected) in [
            ("hi", FinishReason::Stop, "stop"),
            ("hi", FinishReason::Length, "length"),
            ("hi", FinishReason::Cancelled, "stop"),
            (CALL, FinishReason::Stop, "tool_calls"),
            (CALL, FinishReason::Length, "length"),
        ] {
            assert_eq!(said(text).finish_reason(&turn(text, reason)), expected);
        }
    }

    #[test]
    fn reasoning_calls_and_content_have_their_places_in_the_message() {
        let message = said(&format!("<think>hm</think>{CALL}")).message();
        assert_eq!((&message["reasoning_content"], &message["reasoning"]), (&json!("hm"), &json!("hm")));
        let call = json!([{"id": "call_1_0", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]);
        assert_eq!((&message["content"], &message["tool_calls"]), (&Value::Null, &call));
        let plain = json!({"role": "assistant", "content": "hi", "refusal": null});
        assert_eq!(said("hi").message(), plain);
    }

    #[test]
    fn a_turn_without_room_is_told_apart_from_one_that_broke() {
        let failed =
            |code| Turn { error_code: Some(code), error: Some("why".into()), ..turn("", FinishReason::Stop) };
        let full = failure(&failed(FailureCode::OutOfSpace));
        assert_eq!(
            (full.status.as_u16(), full.code, full.message.as_str()),
            (507, Some("out_of_space"), "why")
        );
        let broken = failure(&failed(FailureCode::TurnFailed));
        assert_eq!((broken.status.as_u16(), broken.code), (500, Some("turn_failed")));
    }

    #[test]
    fn an_impossible_token_still_has_a_number() {
        assert_eq!(finite(f32::NEG_INFINITY), -9999.0);
        assert_eq!(finite(-0.5), -0.5);
    }
}
