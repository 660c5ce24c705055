//! Reading request bodies and query strings, with limits on size and patience.

use std::collections::HashMap;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use futures::StreamExt;
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout_at};

use crate::error::ApiError;
use crate::fields::describe;

/// Largest request body that is read.
pub const BODY_LIMIT_BYTES: usize = 10 << 20;
/// How much of a larger body is taken in and thrown away, so that its sender gets to read the answer.
const DRAIN_LIMIT_BYTES: usize = 128 << 20;
/// A client has this long to send its whole body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// The request's JSON object, whatever its Content-Type says. An empty body is an empty object.
pub struct JsonObject(pub Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<JsonObject, ApiError> {
        check_encoding(request.headers())?;
        let declared = request.headers().get(header::CONTENT_LENGTH);
        let declared = declared.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        let bytes = read(request.into_body(), declared).await?;
        parse_object(&bytes).map(JsonObject)
    }
}

/// Bodies of some kilobytes on the way to one's own machine are sent as they are: none is unpacked here.
fn check_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let is_plain = |encoding: &HeaderValue| encoding.as_bytes().eq_ignore_ascii_case(b"identity");
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if !is_plain(encoding) => {
            let message =
                format!("the request body is compressed ({encoding:?}); send it without Content-Encoding");
            Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("body_compressed"), message))
        }
        _ => Ok(()),
    }
}

async fn read(body: Body, declared: Option<usize>) -> Result<Vec<u8>, ApiError> {
    let deadline = Instant::now() + BODY_TIMEOUT;
    let mut frames = body.into_data_stream();
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0).min(BODY_LIMIT_BYTES));
    let mut seen = 0;
    while seen <= DRAIN_LIMIT_BYTES {
        let frame = timeout_at(deadline, frames.next()).await.map_err(|_| {
            let seconds = BODY_TIMEOUT.as_secs();
            let message = format!("the request body did not arrive within {seconds} s ({seen} bytes did)");
            ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), message)
        })?;
        match frame {
            None => break,
            Some(Ok(frame)) => {
                seen += frame.len();
                if seen <= BODY_LIMIT_BYTES {
                    bytes.extend_from_slice(&frame);
                }
            }
            Some(Err(error)) => {
                let message = format!("the request body broke off after {seen} bytes: {error}");
                return Err(ApiError::new(StatusCode::BAD_REQUEST, Some("body_incomplete"), message));
            }
        }
    }
    if seen > BODY_LIMIT_BYTES {
        let size = declared.unwrap_or(seen);
        let message =
            format!("the request body has {size} bytes or more, the limit is {BODY_LIMIT_BYTES} (10 MiB)");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message));
    }
    Ok(bytes)
}

fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let malformed = |message: String| ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_json"), message);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        malformed(format!("the request body is not UTF-8: byte {} begins no character", error.valid_up_to()))
    })?;
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            Err(malformed(format!("the request body must be a JSON object, found {}", describe(&other))))
        }
        Err(error) => Err(malformed(format!("the request body is not valid JSON: {error}"))),
    }
}

/// The query string, read by name.
pub struct Params(HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Params, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(params)) => Ok(Params(params)),
            Err(error) => {
                Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_query"), error.body_text()))
            }
        }
    }
}

impl Params {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: &str| {
            text.parse().map_err(|_| {
                ApiError::invalid(name, format!("{name}: expected a whole number, found the string {text:?}"))
            })
        };
        self.text(name).map(parse).transpose()
    }

    /// A page size from 1 to `most`.
    pub fn limit(&self, default: usize, most: usize) -> Result<usize, ApiError> {
        match self.number("limit")? {
            None => Ok(default),
            Some(limit) if (1..=most as u64).contains(&limit) => Ok(limit as usize),
            Some(limit) => {
                Err(ApiError::invalid("limit", format!("limit: expected 1 to {most}, found {limit}")))
            }
        }
    }

    /// `name=true`, `name=1` or `name` alone; false when absent.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.0.get(name).map(String::as_str) {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1" | "") => Ok(true),
            Some(other) => Err(ApiError::invalid(
                name,
                format!("{name}: expected true or false, found the string {other:?}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_json_is_answered_with_line_and_column() {
        let error = parse_object(b"{\"model\": \"x\",\n  oops}").unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        assert!(error.message.contains("line 2 column 3"), "{}", error.message);
    }

    #[test]
    fn invalid_utf8_is_answered_with_its_place() {
        let error = parse_object(b"{\"a\": \"\xff\"}").unwrap_err();
        assert!(error.message.contains("byte 7"), "{}", error.message);
    }

    #[test]
    fn an_array_is_not_a_request() {
        assert!(parse_object(b"[1, 2]").unwrap_err().message.contains("an array of 2"));
        assert!(parse_object(b" \n").unwrap().is_empty());
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(parse_object(deep.as_bytes()).is_err());
    }

    #[tokio::test]
    async fn a_compressed_body_is_refused_as_what_it_is() {
        let ask = async |encoding: &str| {
            let request =
                Request::builder().header("content-encoding", encoding).body(Body::from("{}")).unwrap();
            JsonObject::from_request(request, &()).await.map(|object| object.0)
        };
        let error = ask("gzip").await.unwrap_err();
        assert_eq!(error.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert!(error.message.contains("gzip"), "{}", error.message);
        assert!(ask("Identity").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_with_the_limit() {
        let body = Body::from(vec![b' '; BODY_LIMIT_BYTES + 1]);
        let error = read(body, None).await.unwrap_err();
        assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(error.message.contains("10485760"));
    }

    #[tokio::test]
    async fn a_body_at_the_limit_is_read() {
        assert_eq!(
            read(Body::from(vec![b' '; BODY_LIMIT_BYTES]), None).await.unwrap().len(),
            BODY_LIMIT_BYTES
        );
    }
}
