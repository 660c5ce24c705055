//! Readiness and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::{App, Shared};

/// 200 when requests can be served, 503 with the reason when not.
pub async fn health(State(shared): State<Arc<Shared>>) -> Response {
    match shared.runtime.unhealthy() {
        None => Json(json!({ "status": "ok" })).into_response(),
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "unhealthy", "reason": reason })))
                .into_response()
        }
    }
}

pub async fn metrics(app: App) -> Response {
    let text = app.runtime.metrics().await + &app.counts.text();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
