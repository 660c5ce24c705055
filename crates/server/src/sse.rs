//! Server-sent events: frames, and a response that stays alive while nothing happens.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use serde::Serialize;

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
    let kept_alive = stream::unfold(Box::pin(frames), async |mut frames| {
        match tokio::time::timeout(KEEP_ALIVE, frames.next()).await {
            Ok(None) => None,
            Ok(Some(frame)) => Some((Ok::<_, std::convert::Infallible>(frame), frames)),
            Err(_) => Some((Ok(":\n\n".to_string()), frames)),
        }
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
    use serde_json::json;

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
