//! [`ApiError`]: every failure a client can see, in the shape that OpenAI's clients map to their exceptions.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dormouse_session::SessionError;
use serde_json::{Value, json};

/// What OpenAI's clients look at before they send a request again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// `{"error":{message,type,param,code}}` with a status.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field of the request that is to blame.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// The request's input is in its session: sent again, it would be there twice.
    pub is_taken_in: bool,
}

impl ApiError {
    pub fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code, is_taken_in: false }
    }

    /// 400: the value of `param` cannot be used as it is.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::new(StatusCode::BAD_REQUEST, None, message) }
    }

    /// 400: `param` has a meaning that Dormouse does not offer, so ignoring it would mislead.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("unsupported_parameter"), ..ApiError::invalid(param, message) }
    }

    /// 503: the server stops in the middle of a turn, which does not end with it.
    pub fn interrupted(session: &str, turn: &str) -> ApiError {
        let message = format!(
            "the server is stopping; this turn goes on after its next start: GET /v1/sessions/{session}/turns/{turn}"
        );
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some("turn_interrupted"), message);
        ApiError { is_taken_in: true, ..error }
    }

    /// The object that goes out, also as a frame in the middle of a stream.
    pub fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": error_type(self.status),
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// OpenAI's name for a family of statuses.
fn error_type(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> ApiError {
        use StatusCode as S;
        let message = error.to_string();
        let (status, code, param) = match error {
            SessionError::SessionNotFound(_) => {
                (S::NOT_FOUND, Some("session_not_found"), Some("session".into()))
            }
            SessionError::TurnNotFound(_) => (S::NOT_FOUND, Some("turn_not_found"), Some("turn".into())),
            SessionError::ResponseNotFound(_) => {
                (S::NOT_FOUND, Some("response_not_found"), Some("response_id".into()))
            }
            SessionError::ItemNotFound(_) => (S::NOT_FOUND, Some("item_not_found"), Some("item_id".into())),
            SessionError::ModelNotFound(..) => (S::NOT_FOUND, Some("model_not_found"), Some("model".into())),
            SessionError::KeyNotFound(_) => (S::NOT_FOUND, Some("key_not_found"), Some("key".into())),
            SessionError::KeyNameTaken(_) => (S::CONFLICT, Some("name_taken"), Some("name".into())),
            SessionError::Busy { .. } => (S::CONFLICT, Some("session_busy"), None),
            SessionError::NameTaken(_) => (S::CONFLICT, Some("name_taken"), Some("name".into())),
            SessionError::ContextLengthExceeded { .. } => {
                (S::BAD_REQUEST, Some("context_length_exceeded"), Some("messages".into()))
            }
            SessionError::Invalid { param, .. } => (S::BAD_REQUEST, None, Some(param)),
            SessionError::OutOfSpace(_) => (S::INSUFFICIENT_STORAGE, Some("out_of_space"), None),
            SessionError::Stopping => (S::SERVICE_UNAVAILABLE, Some("stopping"), None),
            SessionError::Internal(_) => (S::INTERNAL_SERVER_ERROR, Some("internal_error"), None),
        };
        ApiError { status, message, param, code, is_taken_in: false }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), message = %self.message, "request failed");
        }
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if self.is_taken_in {
            // OpenAI's clients repeat requests that ended with such a status, unless they are told not to.
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        } else if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_session_is_a_conflict_that_names_the_turn() {
        let error: ApiError = SessionError::Busy { session: "sess_1".into(), turn: "turn_2".into() }.into();
        assert_eq!(error.status, StatusCode::CONFLICT);
        let body = error.body();
        assert_eq!(body["error"]["code"], "session_busy");
        assert!(body["error"]["message"].as_str().unwrap().contains("turn_2"));
        assert!(body["error"]["param"].is_null());
    }

    #[test]
    fn a_context_overflow_carries_both_numbers_and_openais_code() {
        let error: ApiError =
            SessionError::ContextLengthExceeded { context: 2048, tokens: 3000, or_more: false }.into();
        let body = error.body();
        assert_eq!(body["error"]["code"], "context_length_exceeded");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("2048") && message.contains("3000"));
    }

    #[test]
    fn clients_send_again_what_was_not_taken_in_and_nothing_else() {
        let refused = ApiError::from(SessionError::Stopping).into_response();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()[header::RETRY_AFTER]),
            (503, &"1".parse().unwrap())
        );
        let interrupted = ApiError::interrupted("sess_1", "turn_2");
        assert!(interrupted.message.contains("/v1/sessions/sess_1/turns/turn_2"));
        let interrupted = interrupted.into_response();
        assert!(!interrupted.headers().contains_key(header::RETRY_AFTER));
        assert_eq!(interrupted.headers()[SHOULD_RETRY], "false");
    }

    #[test]
    fn a_full_disk_is_a_server_error_with_status_507() {
        let error: ApiError = SessionError::OutOfSpace("the quota is used up".into()).into();
        assert_eq!(
            (error.status.as_u16(), error.body()["error"]["type"].clone()),
            (507, json!("server_error"))
        );
    }
}
