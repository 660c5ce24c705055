//! What chat completions and completions have in common: the object around their choices, and how it is streamed.

use std::future::poll_fn;
use std::task::Poll;

use axum::response::Response;
use dormouse_session::{Turn, TurnEvent, TurnEventBody, TurnStream};
use futures::stream;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;

use super::to_value;
use crate::error::ApiError;
use crate::{App, now_seconds, sse};

/// The fields that all objects of one answer begin with.
pub struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
}

/// An answer, or a chunk of one.
#[derive(Serialize)]
pub struct Object<'a, C> {
    id: &'a str,
    object: &'a str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    /// None: not even the field. Chunks before the last have a null where usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dormouse: Option<Value>,
}

impl Head {
    /// Of an answer that begins now. Its id is the first turn's with another beginning.
    pub fn new(app: &App, prefix: &str, turn: &str, model: Option<String>) -> Head {
        let card = app.card(model.as_deref());
        Head {
            id: format!("{prefix}-{}", turn.trim_start_matches("turn_")),
            created: now_seconds(),
            model: card.as_ref().map(|card| card.id.clone()).or(model).unwrap_or_default(),
            fingerprint: card.map(|card| card.numerics).unwrap_or_default(),
        }
    }

    pub fn object<'a, C>(&'a self, object: &'a str, choices: &'a [C]) -> Object<'a, C> {
        Object {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage: None,
            dormouse: None,
        }
    }
}

/// The receipt of a turn; null where it has none.
pub fn receipt(turn: Option<&Turn>) -> Result<Value, ApiError> {
    turn.and_then(|turn| turn.dormouse.as_ref()).map_or(Ok(Value::Null), to_value)
}

/// Says as frames what happens to an answer's choices.
pub trait Narrator: Send + 'static {
    /// The frames before any event.
    fn begin(&self) -> String;
    /// The frames that an event of a choice makes: none or several.
    fn take(&mut self, index: usize, event: TurnEventBody) -> Result<String, ApiError>;
    /// The frames after the last event of the last choice.
    fn end(&self) -> Result<String, ApiError>;
    /// Why the answer does not go on here, when the server stops.
    fn interrupted(&self) -> ApiError;
}

/// Answers with chunks as they come. Dropping the response drops the choices' streams.
pub fn stream(narrator: impl Narrator, streams: Vec<TurnStream>, permit: OwnedSemaphorePermit) -> Response {
    let choices = streams.into_iter().map(|stream| Some(stream.events)).collect();
    let told = Told { narrator, choices: Choices(choices) };
    let begun = told.narrator.begin();
    let first = (!begun.is_empty()).then_some(begun);
    sse::respond(stream::unfold((first, Some((told, permit))), async |(first, state)| {
        if let Some(first) = first {
            return Some((first, (None, state)));
        }
        let (mut told, permit) = state?;
        let mut frames = String::new();
        let goes_on = loop {
            let goes_on = told.next(&mut frames).await;
            if !goes_on || !frames.is_empty() {
                break goes_on;
            }
        };
        Some((frames, (None, goes_on.then_some((told, permit)))))
    }))
}

struct Told<N> {
    narrator: N,
    choices: Choices,
}

impl<N: Narrator> Told<N> {
    /// Adds the frames of the next event, and of those that are there already. Whether more may follow.
    async fn next(&mut self, frames: &mut String) -> bool {
        let mut next = Some(self.choices.next().await);
        while let Some((index, event)) = next {
            let said = match event {
                Some(event) => self.narrator.take(index, event.body),
                None => Err(self.narrator.interrupted()),
            };
            let said = match said {
                Ok(said) if !self.choices.are_over() => said,
                Ok(said) => match self.narrator.end() {
                    Ok(end) => said + &end,
                    Err(error) => said + &sse::data(&error.body()),
                },
                Err(error) => {
                    self.choices.0.clear();
                    sse::data(&error.body())
                }
            };
            frames.push_str(&said);
            if self.choices.are_over() {
                frames.push_str(sse::DONE);
                return false;
            }
            next = self.choices.try_next();
        }
        true
    }
}

/// The events of each choice; None once its last was taken.
struct Choices(Vec<Option<UnboundedReceiver<TurnEvent>>>);

impl Choices {
    fn are_over(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The next event of a choice; None, of one whose turn ended without a last one.
    async fn next(&mut self) -> (usize, Option<TurnEvent>) {
        let (index, event) = poll_fn(|context| {
            for (index, events) in self.0.iter_mut().enumerate() {
                if let Some(Poll::Ready(event)) = events.as_mut().map(|events| events.poll_recv(context)) {
                    return Poll::Ready((index, event));
                }
            }
            Poll::Pending
        })
        .await;
        (index, self.took(index, event))
    }

    fn try_next(&mut self) -> Option<(usize, Option<TurnEvent>)> {
        let ready = |events: &mut Option<UnboundedReceiver<TurnEvent>>| events.as_mut()?.try_recv().ok();
        let (index, event) =
            self.0.iter_mut().enumerate().find_map(|(index, events)| Some((index, ready(events)?)))?;
        Some((index, self.took(index, Some(event))))
    }

    fn took(&mut self, index: usize, event: Option<TurnEvent>) -> Option<TurnEvent> {
        if event.as_ref().is_none_or(|event| event.body.is_last()) {
            self.0[index] = None;
        }
        event
    }
}
