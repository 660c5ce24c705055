//! The events of a response: what its turn's events say, in OpenAI's words.
//!
//! They are numbered from 0 without gaps, and are a function of the request and of the turn's tokens: whoever attaches
//! again, after a crash too, is told the same under the same numbers.

use dormouse_answer::{AnswerFormat, AnswerParser, Piece, call_id};
use dormouse_engine::{FinishReason, TokenLogprob};
use dormouse_session::{Turn, TurnEventBody, TurnStatus};
use serde_json::{Value, json};

use super::items::{call_object, message_object, part_id, reasoning_object, text_part};
use super::object::Envelope;

/// Reads a turn's events and says those of its response.
pub struct Narrator {
    envelope: Envelope,
    turn: String,
    parser: Option<AnswerParser>,
    /// How log-probabilities are written, where they are wanted.
    logprobs: Option<LogprobWriter>,
    /// Of tokens whose text has not been said.
    untold_logprobs: Vec<Value>,
    output: Vec<Value>,
    open: Option<Open>,
    next: u64,
    is_over: bool,
}

pub type LogprobWriter = Box<dyn Fn(u32, &TokenLogprob) -> Value + Send>;

/// The item that is being said.
enum Open {
    Reasoning { text: String },
    Message { text: String, logprobs: Vec<Value> },
    Call { call_id: String, name: String, arguments: String },
}

impl Narrator {
    pub fn new(
        envelope: Envelope,
        turn: &str,
        format: &AnswerFormat,
        logprobs: Option<LogprobWriter>,
    ) -> Narrator {
        Narrator {
            envelope,
            turn: turn.to_owned(),
            parser: Some(AnswerParser::new(format)),
            logprobs,
            untold_logprobs: Vec::new(),
            output: Vec::new(),
            open: None,
            next: 0,
            is_over: false,
        }
    }

    /// The last event was said.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// The number of the event that was said last.
    pub fn last_number(&self) -> u64 {
        self.next.saturating_sub(1)
    }

    /// The events that an event of the turn makes: none, one or several.
    pub fn take(&mut self, event: TurnEventBody) -> Vec<Value> {
        let mut said = Vec::new();
        match event {
            TurnEventBody::Created { .. } => {
                let background = self.envelope.is_background();
                let status = if background { "queued" } else { "in_progress" };
                let object = self.envelope.object(status, &[]);
                self.say(&mut said, "response.created", json!({ "response": object }));
                if background {
                    self.say(&mut said, "response.queued", json!({ "response": object }));
                }
            }
            TurnEventBody::InProgress { .. } => {
                let object = self.envelope.object("in_progress", &[]);
                self.say(&mut said, "response.in_progress", json!({ "response": object }));
            }
            TurnEventBody::Delta { delta, token, logprob } => {
                if let (Some(write), Some(logprob)) = (&self.logprobs, &logprob) {
                    self.untold_logprobs.push(write(token, logprob));
                }
                if !delta.is_empty()
                    && let Some(parser) = &mut self.parser
                {
                    let pieces = parser.push(&delta);
                    pieces.into_iter().for_each(|piece| self.piece(&mut said, piece));
                }
            }
            TurnEventBody::Completed { turn }
            | TurnEventBody::Cancelled { turn }
            | TurnEventBody::Failed { turn } => self.end(&mut said, &turn),
        }
        said
    }

    fn say(&mut self, said: &mut Vec<Value>, kind: &str, mut event: Value) {
        event["type"] = kind.into();
        event["sequence_number"] = self.next.into();
        self.next += 1;
        said.push(event);
    }

    fn piece(&mut self, said: &mut Vec<Value>, piece: Piece) {
        match piece {
            Piece::Reasoning(text) if text.is_empty() => {}
            Piece::Content(text) if text.is_empty() => {}
            Piece::Reasoning(delta) => {
                if !matches!(self.open, Some(Open::Reasoning { .. })) {
                    self.begin(said, Open::Reasoning { text: String::new() });
                }
                if let Some(Open::Reasoning { text }) = &mut self.open {
                    text.push_str(&delta);
                }
                self.untold_logprobs.clear();
                let event = self.of_part(json!({ "delta": delta }));
                self.say(said, "response.reasoning_text.delta", event);
            }
            Piece::Content(delta) => {
                if !matches!(self.open, Some(Open::Message { .. })) {
                    self.begin(said, Open::Message { text: String::new(), logprobs: Vec::new() });
                }
                let new = std::mem::take(&mut self.untold_logprobs);
                if let Some(Open::Message { text, logprobs }) = &mut self.open {
                    text.push_str(&delta);
                    logprobs.extend(new.iter().cloned());
                }
                let event = self.of_part(json!({ "delta": delta, "logprobs": new }));
                self.say(said, "response.output_text.delta", event);
            }
            Piece::CallBegin { index, name } => {
                let call_id = call_id(&self.turn, index);
                self.begin(said, Open::Call { call_id, name, arguments: String::new() });
            }
            Piece::CallArguments { fragment, .. } => {
                if let Some(Open::Call { arguments, .. }) = &mut self.open {
                    arguments.push_str(&fragment);
                }
                self.untold_logprobs.clear();
                let event = self.of_item(json!({ "delta": fragment }));
                self.say(said, "response.function_call_arguments.delta", event);
            }
            Piece::CallEnd { .. } => self.close(said, "completed"),
        }
    }

    /// Adds where the open item is.
    fn of_item(&self, mut event: Value) -> Value {
        event["item_id"] = self.item_id().into();
        event["output_index"] = self.output.len().into();
        event
    }

    /// Adds where the only part of the open item is.
    fn of_part(&self, event: Value) -> Value {
        let mut event = self.of_item(event);
        event["content_index"] = 0.into();
        event
    }

    fn item_id(&self) -> String {
        let prefix = match &self.open {
            Some(Open::Reasoning { .. }) => "rs",
            Some(Open::Call { .. }) => "fc",
            Some(Open::Message { .. }) | None => "msg",
        };
        part_id(prefix, &self.turn, self.output.len())
    }

    fn begin(&mut self, said: &mut Vec<Value>, item: Open) {
        self.close(said, "completed");
        self.open = Some(item);
        let id = self.item_id();
        let (item, part) = match &self.open {
            Some(Open::Call { call_id, name, .. }) => {
                (call_object(&id, call_id, name, "", "in_progress"), None)
            }
            Some(Open::Reasoning { .. }) => (
                json!({ "id": id, "type": "reasoning", "summary": [], "content": [], "status": "in_progress" }),
                Some(json!({ "type": "reasoning_text", "text": "" })),
            ),
            Some(Open::Message { .. }) | None => (
                json!({ "id": id, "type": "message", "role": "assistant", "status": "in_progress", "content": [] }),
                Some(text_part("", Vec::new())),
            ),
        };
        let event = json!({ "output_index": self.output.len(), "item": item });
        self.say(said, "response.output_item.added", event);
        if let Some(part) = part {
            let event = self.of_part(json!({ "part": part }));
            self.say(said, "response.content_part.added", event);
        }
    }

    fn close(&mut self, said: &mut Vec<Value>, status: &str) {
        let Some(item) = self.finished_item(status) else { return };
        match &self.open {
            Some(Open::Reasoning { text }) => {
                let event = self.of_part(json!({ "text": text }));
                self.say(said, "response.reasoning_text.done", event);
            }
            Some(Open::Message { text, logprobs }) => {
                let event = self.of_part(json!({ "text": text, "logprobs": logprobs }));
                self.say(said, "response.output_text.done", event);
            }
            Some(Open::Call { name, arguments, .. }) => {
                let event = self.of_item(json!({ "name": name, "arguments": arguments }));
                self.say(said, "response.function_call_arguments.done", event);
            }
            None => {}
        }
        if let Some(part) = item["content"].get(0) {
            let event = self.of_part(json!({ "part": part }));
            self.say(said, "response.content_part.done", event);
        }
        let event = json!({ "output_index": self.output.len(), "item": item });
        self.say(said, "response.output_item.done", event);
        self.open = None;
        self.output.push(item);
    }

    /// The open item with what it says so far.
    fn finished_item(&self, status: &str) -> Option<Value> {
        let id = self.item_id();
        Some(match self.open.as_ref()? {
            Open::Reasoning { text } => reasoning_object(&id, text, status),
            Open::Message { text, logprobs } => message_object(&id, text, logprobs.clone(), status),
            Open::Call { call_id, name, arguments } => call_object(&id, call_id, name, arguments, status),
        })
    }

    fn end(&mut self, said: &mut Vec<Value>, turn: &Turn) {
        if let Some(parser) = self.parser.take() {
            parser.finish().into_iter().for_each(|piece| self.piece(said, piece));
        }
        let is_whole =
            turn.status == TurnStatus::Completed && turn.finish_reason != Some(FinishReason::Length);
        if turn.status == TurnStatus::Completed && self.output.is_empty() && self.open.is_none() {
            // An answer of no words is still an answer.
            self.begin(said, Open::Message { text: String::new(), logprobs: Vec::new() });
        }
        self.close(said, if is_whole { "completed" } else { "incomplete" });
        let object = self.envelope.finished(turn, &self.output);
        let kind = match (turn.status, is_whole) {
            (TurnStatus::Failed, _) => "response.failed",
            (_, true) => "response.completed",
            // Clients know no word for a cancelled end; the object's status says it.
            (_, false) => "response.incomplete",
        };
        self.say(said, kind, json!({ "response": object }));
        self.is_over = true;
    }

    /// The object as it is now.
    fn snapshot(&self, status: &str) -> Value {
        let open = self.finished_item("in_progress");
        let output: Vec<Value> = self.output.iter().cloned().chain(open).collect();
        self.envelope.object(status, &output)
    }
}

/// The object of a response, from its turn alone.
pub fn object_of(envelope: Envelope, turn: &Turn) -> Value {
    let mut narrator = Narrator::new(envelope, &turn.id, &turn.answer_format, None);
    let text = TurnEventBody::Delta { delta: turn.output_text.clone(), token: 0, logprob: None };
    narrator.take(text);
    if turn.status == TurnStatus::InProgress {
        return narrator.snapshot("in_progress");
    }
    let mut events = narrator.take(TurnEventBody::Completed { turn: Box::new(turn.clone()) });
    events.pop().map_or(Value::Null, |mut last| last["response"].take())
}
