//! `POST /v1/completions`: the answer, whole or as chunks.

use axum::response::Response;
use dormouse_engine::{FinishReason, TokenLogprob};
use dormouse_session::{Runtime, SessionError, Turn, TurnEventBody, TurnStatus, TurnStream};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::chat_answer::{failure, finite};
use super::chunks::{self, Head, Narrator, receipt};
use super::to_value;
use crate::error::ApiError;
use crate::sse;

/// What all parts of one answer have in common.
pub struct Answer {
    pub head: Head,
    pub runtime: Runtime,
    /// Alternatives to report with each token's log-probability.
    pub logprobs: Option<u8>,
    /// The answers begin with the prompt.
    pub echo: bool,
    pub include_usage: bool,
}

/// A prompt and its continuations.
pub struct Continued {
    pub text: String,
    pub tokens: Vec<u32>,
    pub streams: Vec<TurnStream>,
}

/// The legacy object: four lists of one length.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    /// None for a prompt's first token, which nothing comes before.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters of the answer's text before the token.
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn push(&mut self, answer: &Answer, token: u32, offset: usize, logprob: Option<&TokenLogprob>) {
        let name = |token: u32| token_name(&answer.runtime.token_bytes(Some(&answer.head.model), token));
        self.tokens.push(name(token));
        self.text_offset.push(offset);
        self.token_logprobs.push(logprob.map(|it| finite(it.logprob)));
        self.top_logprobs.push(logprob.filter(|it| !it.top.is_empty()).map(|it| {
            let mut top: Map<String, Value> =
                it.top.iter().map(|(token, logprob)| (name(*token), finite(*logprob).into())).collect();
            // The token itself is always among them.
            top.entry(name(token)).or_insert_with(|| finite(it.logprob).into());
            top
        }));
    }

    fn append(&mut self, mut other: Logprobs) {
        self.tokens.append(&mut other.tokens);
        self.token_logprobs.append(&mut other.token_logprobs);
        self.top_logprobs.append(&mut other.top_logprobs);
        self.text_offset.append(&mut other.text_offset);
    }
}

/// A token's text. Of a part of a character, its bytes: texts name the alternatives, so no two may look alike.
fn token_name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

/// Characters that begin in these bytes.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}

/// What one choice has said so far.
struct Choice {
    /// What is echoed: the prompt's text and tokens.
    prompt: Option<(String, Vec<u32>)>,
    text: String,
    /// Characters of the text so far.
    offset: usize,
    logprobs: Logprobs,
    /// Its turn, once it is over.
    turn: Option<Turn>,
}

/// What an event added to a choice.
type Added = (String, Logprobs);

impl Choice {
    fn new(answer: &Answer, text: &str, tokens: &[u32]) -> Choice {
        let prompt = answer.echo.then(|| (text.to_owned(), tokens.to_vec()));
        Choice { prompt, text: String::new(), offset: 0, logprobs: Logprobs::default(), turn: None }
    }

    /// Takes an event in and answers what it added.
    fn take(&mut self, answer: &Answer, event: TurnEventBody) -> Result<Added, ApiError> {
        let added = match event {
            TurnEventBody::Created { .. } => Added::default(),
            TurnEventBody::InProgress { prompt, .. } => self.echo(answer, &prompt),
            TurnEventBody::Delta { delta, token, logprob } => {
                let mut logprobs = Logprobs::default();
                if let Some(logprob) = logprob.filter(|_| answer.logprobs.is_some()) {
                    logprobs.push(answer, token, self.offset, Some(&logprob));
                }
                self.offset += delta.chars().count();
                (delta, logprobs)
            }
            TurnEventBody::Completed { turn }
            | TurnEventBody::Cancelled { turn }
            | TurnEventBody::Failed { turn } => {
                if turn.status == TurnStatus::Failed {
                    return Err(failure(&turn));
                }
                self.turn = Some(*turn);
                Added::default()
            }
        };
        Ok(added)
    }

    /// The prompt, as the beginning of the answer.
    fn echo(&mut self, answer: &Answer, scores: &[TokenLogprob]) -> Added {
        let Some((text, tokens)) = self.prompt.take() else { return Added::default() };
        let mut logprobs = Logprobs::default();
        if answer.logprobs.is_some() {
            let bytes =
                |token: &u32| characters(&answer.runtime.token_bytes(Some(&answer.head.model), *token));
            let lengths: Vec<usize> = tokens.iter().map(bytes).collect();
            // A token that the tokenizer put before the text has no place in it.
            let excess = lengths.iter().sum::<usize>().saturating_sub(text.chars().count());
            let mut end = 0;
            for (index, (token, length)) in tokens.iter().zip(lengths).enumerate() {
                let score = index.checked_sub(1).and_then(|index| scores.get(index));
                logprobs.push(answer, *token, usize::saturating_sub(end, excess), score);
                end += length;
            }
        }
        self.offset = text.chars().count();
        (text, logprobs)
    }
}

fn finish_reason(turn: &Turn) -> &'static str {
    match turn.finish_reason {
        Some(FinishReason::Length) => "length",
        // OpenAI has no word for a cancelled answer, and clients check against its list.
        Some(FinishReason::Stop | FinishReason::Cancelled) | None => "stop",
    }
}

#[derive(Serialize)]
struct ChoiceObject<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<&'a Logprobs>,
    finish_reason: Option<&'static str>,
}

impl Answer {
    fn choice<'a>(
        &self,
        index: usize,
        text: &'a str,
        logprobs: &'a Logprobs,
        turn: Option<&Turn>,
    ) -> ChoiceObject<'a> {
        let logprobs = self.logprobs.is_some().then_some(logprobs);
        ChoiceObject { index, text, logprobs, finish_reason: turn.map(finish_reason) }
    }
}

/// Each prompt counts once, however many choices read it; every choice's output counts.
fn usage(turns: &[&Turn], each: usize) -> Value {
    let prompts = || turns.iter().step_by(each.max(1));
    let prompt: usize = prompts().map(|turn| turn.usage.prompt_tokens).sum();
    let cached: usize = prompts().map(|turn| turn.usage.cached_tokens).sum();
    let completion: usize = turns.iter().map(|turn| turn.usage.completion_tokens).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

/// Waits for all choices and answers the `text_completion` object.
pub async fn whole(answer: &Answer, continued: Vec<Continued>) -> Result<Value, ApiError> {
    let each = continued.first().map_or(1, |prompt| prompt.streams.len());
    let mut choices = Vec::new();
    for Continued { text, tokens, streams } in continued {
        for mut stream in streams {
            let mut choice = Choice::new(answer, &text, &tokens);
            while choice.turn.is_none() {
                let event = stream.events.recv().await.ok_or(SessionError::Stopping)?;
                let (text, logprobs) = choice.take(answer, event.body)?;
                choice.text.push_str(&text);
                choice.logprobs.append(logprobs);
            }
            choices.push(choice);
        }
    }
    let turns: Vec<&Turn> = choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
    let rendered = choices
        .iter()
        .zip(&turns)
        .enumerate()
        .map(|(index, (choice, turn))| answer.choice(index, &choice.text, &choice.logprobs, Some(turn)));
    let rendered: Vec<ChoiceObject<'_>> = rendered.collect();
    let mut object = answer.head.object(OBJECT, &rendered);
    object.usage = Some(usage(&turns, each));
    object.dormouse = Some(receipt(turns.first().copied())?);
    to_value(&object)
}

/// Answers with chunks as they come. Dropping the response drops the choices' streams.
pub fn stream(answer: Answer, continued: Vec<Continued>, permit: OwnedSemaphorePermit) -> Response {
    let each = continued.first().map_or(1, |prompt| prompt.streams.len());
    let (mut choices, mut streams) = (Vec::new(), Vec::new());
    for prompt in continued {
        for stream in prompt.streams {
            choices.push(Choice::new(&answer, &prompt.text, &prompt.tokens));
            streams.push(stream);
        }
    }
    chunks::stream(Chunks { answer, choices, each }, streams, permit)
}

const OBJECT: &str = "text_completion";

/// Turns events into frames.
struct Chunks {
    answer: Answer,
    choices: Vec<Choice>,
    /// Choices of each prompt.
    each: usize,
}

impl Narrator for Chunks {
    fn begin(&self) -> String {
        String::new()
    }

    fn take(&mut self, index: usize, event: TurnEventBody) -> Result<String, ApiError> {
        let (text, logprobs) = self.choices[index].take(&self.answer, event)?;
        let mut frames = String::new();
        if !text.is_empty() || !logprobs.tokens.is_empty() {
            frames += &self.chunk(index, &text, &logprobs, None)?;
        }
        if let Some(turn) = &self.choices[index].turn {
            frames += &self.chunk(index, "", &Logprobs::default(), Some(turn))?;
        }
        Ok(frames)
    }

    fn end(&self) -> Result<String, ApiError> {
        if !self.answer.include_usage {
            return Ok(String::new());
        }
        let turns: Vec<&Turn> = self.choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
        let mut chunk = self.answer.head.object::<Value>(OBJECT, &[]);
        chunk.usage = Some(usage(&turns, self.each));
        chunk.dormouse = Some(receipt(turns.first().copied())?);
        Ok(sse::data(&chunk))
    }

    fn interrupted(&self) -> ApiError {
        SessionError::Stopping.into()
    }
}

impl Chunks {
    /// The frame of a chunk of one choice; its last with its turn.
    fn chunk(
        &self,
        index: usize,
        text: &str,
        logprobs: &Logprobs,
        turn: Option<&Turn>,
    ) -> Result<String, ApiError> {
        let choices = [self.answer.choice(index, text, logprobs, turn)];
        let mut chunk = self.answer.head.object(OBJECT, &choices);
        chunk.usage = self.answer.include_usage.then_some(Value::Null);
        chunk.dormouse = turn.map(|turn| receipt(Some(turn))).transpose()?;
        Ok(sse::data(&chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_character_is_named_by_its_bytes() {
        assert_eq!(token_name("ü".as_bytes()), "ü");
        assert_eq!(token_name(&[0xe2, 0x80]), "bytes:\\xe2\\x80");
        assert_eq!(characters("aü€".as_bytes()), 3);
        assert_eq!(characters(&[0x82, 0xac]), 0);
    }
}
