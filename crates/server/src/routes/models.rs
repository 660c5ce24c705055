//! `/v1/models`.

use axum::Json;
use axum::extract::{Path, State};
use dormouse_session::{ModelCard, SessionError};
use serde_json::{Value, json};

use crate::App;
use crate::error::ApiError;

pub async fn list(State(app): State<App>) -> Json<Value> {
    let data: Vec<Value> = app.runtime.models().iter().map(model_object).collect();
    Json(json!({ "object": "list", "data": data }))
}

pub async fn show(State(app): State<App>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let cards = app.runtime.models();
    match cards.iter().find(|card| card.id == model) {
        Some(card) => Ok(Json(model_object(card))),
        None => {
            let known: Vec<&str> = cards.iter().map(|card| card.id.as_str()).collect();
            Err(SessionError::ModelNotFound(model, known.join(", ")).into())
        }
    }
}

fn model_object(card: &ModelCard) -> Value {
    json!({
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "dormouse",
        "dormouse": {
            "loaded": card.loaded,
            "context": card.context,
            "kv_bytes_per_token": card.kv_bytes_per_token,
            "numerics": card.numerics,
        },
    })
}
