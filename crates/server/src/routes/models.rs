//! `/v1/models`: what answers now, and after it what could.

use std::path::PathBuf;

use axum::Json;
use axum::extract::Path;
use dormouse_embed::Embedder;
use dormouse_session::{ModelCard, SessionError};
use serde_json::{Value, json};

use crate::App;
use crate::error::ApiError;

/// A model of the catalogue, which a start with `--model` would serve.
#[derive(Clone, Debug)]
pub struct KnownModel {
    pub id: String,
    /// `chat` or `embedding`.
    pub kind: &'static str,
    /// Where its weights lie once they are downloaded.
    pub path: PathBuf,
    /// Size of the weights.
    pub size_bytes: u64,
    /// Tokens.
    pub context: usize,
    pub licence: String,
}

pub async fn list(app: App) -> Json<Value> {
    Json(json!({ "object": "list", "data": all_objects(&app) }))
}

pub async fn show(app: App, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut objects = all_objects(&app);
    match objects.iter().position(|object| object["id"] == model.as_str()) {
        Some(index) => Ok(Json(objects.swap_remove(index))),
        None => {
            let cards = app.runtime.models();
            let loaded: Vec<&str> = cards.iter().map(|card| card.id.as_str()).collect();
            Err(SessionError::ModelNotFound(model, loaded.join(", ")).into())
        }
    }
}

fn all_objects(app: &App) -> Vec<Value> {
    objects(&app.runtime.models(), app.embedder.as_ref(), &app.known_models)
}

/// Loaded models come first, and of them those that talk: many clients take the first that they see.
fn objects(loaded: &[ModelCard], embedder: Option<&Embedder>, known: &[KnownModel]) -> Vec<Value> {
    let created = loaded.first().map_or(0, |card| card.created);
    let mut objects: Vec<Value> = loaded.iter().map(loaded_object).collect();
    objects.extend(embedder.map(|embedder| embedder_object(embedder, created)));
    let others: Vec<Value> = known
        .iter()
        .filter(|model| objects.iter().all(|object| object["id"] != model.id.as_str()))
        .map(|model| known_object(model, created))
        .collect();
    objects.extend(others);
    objects
}

fn model_object(id: &str, created: u64, dormouse: Value) -> Value {
    json!({ "id": id, "object": "model", "created": created, "owned_by": "dormouse", "dormouse": dormouse })
}

fn loaded_object(card: &ModelCard) -> Value {
    let details = json!({
        "state": "loaded",
        "loaded": card.loaded,
        "kind": "chat",
        "context": card.context,
        "kv_bytes_per_token": card.kv_bytes_per_token,
        "numerics": card.numerics,
    });
    model_object(&card.id, card.created, details)
}

fn embedder_object(embedder: &Embedder, created: u64) -> Value {
    let details = json!({
        "state": "loaded",
        "loaded": true,
        "kind": "embedding",
        "context": embedder.max_tokens(),
        "dimensions": embedder.dimensions(),
    });
    model_object(embedder.name(), created, details)
}

fn known_object(model: &KnownModel, created: u64) -> Value {
    // Asked each time: `dormouse models pull` may run beside the server.
    let is_whole = model.path.metadata().is_ok_and(|file| file.len() == model.size_bytes);
    let details = json!({
        "state": if is_whole { "downloaded" } else { "known" },
        "loaded": false,
        "kind": model.kind,
        "context": model.context,
        "size_bytes": model.size_bytes,
        "licence": model.licence,
    });
    model_object(&model.id, created, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaded_models_come_first_and_known_ones_say_whether_they_are_here() {
        let folder = tempfile::tempdir().unwrap();
        let known = |id: &str| KnownModel {
            id: id.into(),
            kind: "chat",
            path: folder.path().join(id),
            size_bytes: 4,
            context: 2048,
            licence: "MIT".into(),
        };
        let card = ModelCard {
            id: "second".into(),
            context: 4096,
            created: 7,
            loaded: true,
            kv_bytes_per_token: 10,
            numerics: "cpu".into(),
        };
        std::fs::write(folder.path().join("third"), b"four").unwrap();
        std::fs::write(folder.path().join("first"), b"two").unwrap();
        let objects = objects(&[card], None, &["first", "second", "third"].map(known));
        let said: Vec<(&str, &str)> = objects
            .iter()
            .map(|object| (object["id"].as_str().unwrap(), object["dormouse"]["state"].as_str().unwrap()))
            .collect();
        assert_eq!(said, [("second", "loaded"), ("first", "known"), ("third", "downloaded")]);
        assert!(objects.iter().all(|object| object["created"] == 7 && object["object"] == "model"));
    }
}
