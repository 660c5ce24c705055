//! Server-sent events: frames, and a response that stays alive while nothing happens.

use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use serde::Serialize;
use tokio::time::Instant;

use crate::error::ApiError;

/// Proxies and clients give up on connections that are silent for longer (30 s and up are common).
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A frame without an event name, as chat completions have them. JSON text holds no raw line break.
pub fn data(value: &impl Serialize) -> String {
    format!("data: {}\n\n", to_json(value))
}

/// A frame with its event name. `event` holds no line break.
pub fn named(event: &str, value: &impl Serialize) -> String {
    format!("event: {event}\ndata: {}\n\n", to_json(value))
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| {
        let message = format!("an event could not be written as JSON: {error}");
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, None, message).body().to_string()
    })
}

/// The last frame of an OpenAI stream.
pub const DONE: &str = "data: [DONE]\n\n";

/// Answers with the frames as they come and a comment whenever none came for [`KEEP_ALIVE`].
pub fn respond(frames: impl Stream<Item = String> + Send + 'static) -> Response {
    let mut frames = Box::pin(frames);
    let mut silence = Box::pin(tokio::time::sleep(KEEP_ALIVE));
    // Setting the timer back at every frame would cost more than the frame: it looks at the time when it fires.
    let mut last = Instant::now();
    let kept_alive = stream::poll_fn(move |context| {
        if let Poll::Ready(frame) = frames.as_mut().poll_next(context) {
            last = Instant::now();
            return Poll::Ready(frame.map(Ok::<_, std::convert::Infallible>));
        }
        while silence.as_mut().poll(context).is_ready() {
            let is_silent = last.elapsed() >= KEEP_ALIVE;
            if is_silent {
                last = Instant::now();
            }
            silence.as_mut().reset(last + KEEP_ALIVE);
            if is_silent {
                return Poll::Ready(Some(Ok(":\n\n".to_string())));
            }
        }
        Poll::Pending
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Reverse proxies that buffer would hold tokens back.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(kept_alive)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// A client that follows the standard: lines end with CR, LF or both, a blank line ends an event, names and data are told.
    fn read(text: &str) -> Vec<(String, String)> {
        let (mut events, mut name, mut data) = (Vec::new(), String::new(), Vec::new());
        for line in text.replace("\r\n", "\n").replace('\r', "\n").split('\n') {
            match line.split_once(": ") {
                Some(("event", value)) => name = value.to_string(),
                Some(("data", value)) => data.push(value.to_string()),
                _ if line.is_empty() && !data.is_empty() => {
                    events.push((std::mem::take(&mut name), data.join("\n")));
                    data.clear();
                }
                _ => assert!(line.is_empty() || line.starts_with(':'), "not a line of events: {line:?}"),
            }
        }
        events
    }

    proptest! {
        #[test]
        fn frames_are_read_back_as_they_were_written_in_whatever_pieces_they_come(
            texts in prop::collection::vec(any::<String>(), 0..8), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let values: Vec<Value> = texts.iter().map(|text| json!({ "delta": text })).collect();
            let mut sent = String::new();
            for (number, value) in values.iter().enumerate() {
                sent += &if number % 2 == 0 { data(value) } else { named("response.delta", value) };
                sent += ":\n\n";
            }
            // As a network would cut them; a client joins bytes, not characters.
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(sent.len() + 1)).chain([0, sent.len()]).collect();
            places.sort_unstable();
            let pieces = places.windows(2).map(|pair| &sent.as_bytes()[pair[0]..pair[1]]);
            let received = String::from_utf8(pieces.collect::<Vec<&[u8]>>().concat()).unwrap();
            let events = read(&received);
            prop_assert_eq!(events.len(), values.len());
            for (number, ((name, data), value)) in events.iter().zip(&values).enumerate() {
                prop_assert_eq!(name, if number % 2 == 0 { "" } else { "response.delta" });
                prop_assert_eq!(&serde_json::from_str::<Value>(data).unwrap(), value);
            }
        }
    }

    #[test]
    fn a_frame_is_one_data_line_whatever_the_text_holds() {
        assert_eq!(data(&json!({"delta": "a\r\nb"})), "data: {\"delta\":\"a\\r\\nb\"}\n\n");
        assert_eq!(named("x", &1), "event: x\ndata: 1\n\n");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments() {
        let slow = stream::once(async {
            tokio::time::sleep(KEEP_ALIVE * 2 + KEEP_ALIVE / 2).await;
            data(&1)
        });
        let body = axum::body::to_bytes(respond(slow).into_body(), 1000).await.unwrap();
        assert_eq!(body, ":\n\n:\n\ndata: 1\n\n");
    }
}
