//! The table of routes.

mod branches;
mod chat;
mod chat_answer;
mod chunks;
mod completion_answer;
mod completions;
mod conversations;
mod embeddings;
mod events;
mod health;
mod keys;
mod models;
mod responses;
mod sessions;
mod turns;

pub use models::KnownModel;

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::Shared;
use crate::body::Params;
use crate::error::ApiError;
use crate::openapi;

pub fn all() -> Router<Arc<Shared>> {
    Router::new()
        .route("/health", get(health::health))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::show))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::show))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route("/v1/responses/{response}", get(responses::show).delete(responses::delete))
        .route("/v1/responses/{response}/cancel", post(responses::cancel))
        .route("/v1/responses/{response}/input_items", get(responses::input_items))
        .route("/v1/conversations", post(conversations::create))
        .route(
            "/v1/conversations/{conversation}",
            get(conversations::show).post(conversations::update).delete(conversations::delete),
        )
        .route(
            "/v1/conversations/{conversation}/items",
            get(conversations::list_items).post(conversations::create_items),
        )
        .route(
            "/v1/conversations/{conversation}/items/{item}",
            get(conversations::show_item).delete(conversations::delete_item),
        )
        .route("/v1/keys", get(keys::list).post(keys::create))
        .route("/v1/keys/{key}", get(keys::show).delete(keys::revoke))
        .route("/v1/sessions", get(sessions::list).post(sessions::create))
        .route("/v1/sessions/{session}", get(sessions::show).patch(sessions::update).delete(sessions::delete))
        .route("/v1/sessions/{session}/items", get(sessions::items))
        .route("/v1/sessions/{session}/events", get(events::events))
        .route("/v1/sessions/{session}/fork", post(branches::fork))
        .route("/v1/sessions/{session}/rewind", post(branches::rewind))
        .route("/v1/sessions/{session}/park", post(branches::park))
        .route("/v1/sessions/{session}/resume", post(branches::resume))
        .route("/v1/sessions/{session}/turns", get(turns::list).post(turns::create))
        .route("/v1/sessions/{session}/turns/{turn}", get(turns::show))
        .route("/v1/sessions/{session}/turns/{turn}/cancel", post(turns::cancel))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
}

async fn no_route(request: Request) -> ApiError {
    let message = format!("there is no {} {} here", request.method(), request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, Some("route_not_found"), message)
}

async fn no_method(request: Request) -> ApiError {
    let message = format!("{} does not take the method {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
}

/// A broken invariant ends one request, not the server.
pub fn panicked(cause: Box<dyn Any + Send>) -> Response {
    // What it says may quote the request; where it happened is logged already.
    drop(cause);
    tracing::error!("a request handler panicked");
    let message = "the server met a state that should not exist, and logged it; please report this as a bug";
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message).into_response()
}

/// OpenAI's list object.
fn list_object(data: Vec<Value>, has_more: bool) -> Value {
    let id = |value: Option<&Value>| value.and_then(|value| value.get("id")).cloned().unwrap_or(Value::Null);
    let (first, last) = (id(data.first()), id(data.last()));
    json!({ "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more })
}

/// The page of `all` that `after` and `limit` ask for.
fn page(all: Vec<Value>, params: &Params) -> Result<Value, ApiError> {
    let limit = params.limit(100, 1000)?;
    let start = match params.text("after") {
        None => 0,
        Some(after) => match all.iter().position(|value| value.get("id").is_some_and(|id| id == after)) {
            Some(index) => index + 1,
            None => {
                return Err(ApiError::invalid("after", format!("after: there is no '{after}' in this list")));
            }
        },
    };
    let has_more = all.len() > start + limit;
    Ok(list_object(all.into_iter().skip(start).take(limit).collect(), has_more))
}

/// A value of ours as JSON.
fn to_value(value: &impl serde::Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(value).map_err(|error| {
        let message = format!("an answer could not be written as JSON: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_routes_conflict() {
        assert!(all().has_routes());
    }

    #[test]
    fn a_list_says_where_it_begins_and_ends() {
        let list = list_object(vec![json!({"id": "a"}), json!({"id": "b"})], true);
        assert_eq!((list["first_id"].as_str(), list["last_id"].as_str()), (Some("a"), Some("b")));
        assert!(list_object(Vec::new(), false)["first_id"].is_null());
    }

    #[test]
    fn a_panic_is_answered_in_openais_shape() {
        let response = panicked(Box::new("broken"));
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()["content-type"], "application/json");
    }
}
