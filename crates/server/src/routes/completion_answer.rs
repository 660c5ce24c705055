//! `POST /v1/completions`: the answer, whole or as chunks.

use axum::response::Response;
use dormouse_engine::{FinishReason, TokenLogprob};
use dormouse_session::{Runtime, SessionError, Turn, TurnEvent, TurnEventBody, TurnStatus, TurnStream};
use futures::{StreamExt, stream};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::chat_answer::{failure, finite};
use super::to_value;
use crate::error::ApiError;
use crate::sse;

/// What all parts of one answer have in common.
pub struct Answer {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
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
        let name = |token: u32| token_name(&answer.runtime.token_bytes(Some(&answer.model), token));
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

    /// Takes an event in and answers what it added; None ends the stream early.
    fn take(&mut self, answer: &Answer, event: Option<TurnEvent>) -> Result<Added, ApiError> {
        let added = match event.map(|event| event.body) {
            None => return Err(SessionError::Stopping.into()),
            Some(TurnEventBody::Created { .. }) => Added::default(),
            Some(TurnEventBody::InProgress { prompt, .. }) => self.echo(answer, &prompt),
            Some(TurnEventBody::Delta { delta, token, logprob }) => {
                let mut logprobs = Logprobs::default();
                if let Some(logprob) = logprob.filter(|_| answer.logprobs.is_some()) {
                    logprobs.push(answer, token, self.offset, Some(&logprob));
                }
                self.offset += delta.chars().count();
                (delta, logprobs)
            }
            Some(
                TurnEventBody::Completed { turn }
                | TurnEventBody::Cancelled { turn }
                | TurnEventBody::Failed { turn },
            ) => {
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
            let bytes = |token: &u32| characters(&answer.runtime.token_bytes(Some(&answer.model), *token));
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

impl Answer {
    fn envelope(&self, choices: Vec<Value>) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), self.id.as_str().into());
        map.insert("object".into(), "text_completion".into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.as_str().into());
        map.insert("system_fingerprint".into(), self.fingerprint.as_str().into());
        map.insert("choices".into(), choices.into());
        map
    }

    fn choice(
        &self,
        index: usize,
        text: &str,
        logprobs: &Logprobs,
        finish: Option<&str>,
    ) -> Result<Value, ApiError> {
        let logprobs = if self.logprobs.is_some() { to_value(logprobs)? } else { Value::Null };
        Ok(json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish }))
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

/// The receipt of the first choice.
fn receipt(turns: &[&Turn]) -> Result<Value, ApiError> {
    turns.first().and_then(|turn| turn.dormouse.as_ref()).map_or(Ok(Value::Null), to_value)
}

/// Waits for all choices and answers the `text_completion` object.
pub async fn whole(answer: &Answer, continued: Vec<Continued>) -> Result<Value, ApiError> {
    let each = continued.first().map_or(1, |prompt| prompt.streams.len());
    let mut choices = Vec::new();
    for Continued { text, tokens, streams } in continued {
        for mut stream in streams {
            let mut choice = Choice::new(answer, &text, &tokens);
            while choice.turn.is_none() {
                let (text, logprobs) = choice.take(answer, stream.events.recv().await)?;
                choice.text.push_str(&text);
                choice.logprobs.append(logprobs);
            }
            choices.push(choice);
        }
    }
    let turns: Vec<&Turn> = choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
    let rendered = choices.iter().zip(&turns).enumerate().map(|(index, (choice, turn))| {
        answer.choice(index, &choice.text, &choice.logprobs, Some(finish_reason(turn)))
    });
    let mut object = answer.envelope(rendered.collect::<Result<_, _>>()?);
    object.insert("usage".into(), usage(&turns, each));
    object.insert("dormouse".into(), receipt(&turns)?);
    Ok(Value::Object(object))
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
    let events = stream::select_all(streams.into_iter().enumerate().map(|(index, stream)| {
        let events =
            UnboundedReceiverStream::new(stream.events).map(Some).chain(stream::once(async { None }));
        Box::pin(events.map(move |event| (index, event)))
    }));
    let chunks = Chunks { answer, choices, each, ended: false };
    let frames = stream::unfold(Some((events, chunks, permit)), async |state| {
        let (mut events, mut chunks, permit) = state?;
        let (index, event) = events.next().await?;
        let frames = chunks.take(index, event);
        let next = (!chunks.ended).then_some((events, chunks, permit));
        Some((frames, next))
    });
    sse::respond(frames.filter(|frames| {
        let has_something = !frames.is_empty();
        async move { has_something }
    }))
}

/// Turns events into frames.
struct Chunks {
    answer: Answer,
    choices: Vec<Choice>,
    /// Choices of each prompt.
    each: usize,
    ended: bool,
}

impl Chunks {
    /// The frames that an event of a choice makes: none or several.
    fn take(&mut self, index: usize, event: Option<TurnEvent>) -> String {
        if event.is_none() && self.choices[index].turn.is_some() {
            return String::new();
        }
        self.try_take(index, event).unwrap_or_else(|error| {
            self.ended = true;
            sse::data(&error.body()) + sse::DONE
        })
    }

    fn chunk(
        &self,
        index: usize,
        text: &str,
        logprobs: &Logprobs,
        finish: Option<&str>,
    ) -> Result<Map<String, Value>, ApiError> {
        let mut chunk = self.answer.envelope(vec![self.answer.choice(index, text, logprobs, finish)?]);
        if self.answer.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        Ok(chunk)
    }

    fn try_take(&mut self, index: usize, event: Option<TurnEvent>) -> Result<String, ApiError> {
        let (text, logprobs) = self.choices[index].take(&self.answer, event)?;
        let mut frames = String::new();
        if !text.is_empty() || !logprobs.tokens.is_empty() {
            frames += &sse::data(&self.chunk(index, &text, &logprobs, None)?);
        }
        let Some(turn) = &self.choices[index].turn else { return Ok(frames) };
        let mut last = self.chunk(index, "", &Logprobs::default(), Some(finish_reason(turn)))?;
        last.insert("dormouse".into(), receipt(&[turn])?);
        frames += &sse::data(&last);
        let turns: Vec<&Turn> = self.choices.iter().filter_map(|choice| choice.turn.as_ref()).collect();
        if turns.len() == self.choices.len() {
            if self.answer.include_usage {
                let mut chunk = self.answer.envelope(Vec::new());
                chunk.insert("usage".into(), usage(&turns, self.each));
                chunk.insert("dormouse".into(), receipt(&turns)?);
                frames += &sse::data(&chunk);
            }
            frames += sse::DONE;
            self.ended = true;
        }
        Ok(frames)
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
