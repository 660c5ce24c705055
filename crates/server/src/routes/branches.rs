//! Moving through a session's history, and in and out of memory: fork, rewind, park, resume.

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use dormouse_session::Place;
use serde_json::Value;

use super::{sessions::check_name, to_value};
use crate::App;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;

/// 201 with the new session, and beside its fields the receipt as `dormouse`.
pub async fn fork(
    app: App,
    Path(session): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let fields = Fields::new(&body);
    let at = parse_place(&fields, "at")?;
    let name = fields.string("name")?;
    name.map_or(Ok(()), |name| check_name("name", name))?;
    let (fork, receipt) = app.runtime.fork(&app.caller.tenant, &session, at, name.map(String::from)).await?;
    let mut answer = to_value(&fork)?;
    answer["dormouse"] = to_value(&receipt)?;
    Ok((StatusCode::CREATED, Json(answer)))
}

pub async fn rewind(
    app: App,
    Path(session): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let fields = Fields::new(&body);
    let to = parse_place(&fields, "to")?.ok_or_else(|| fields.expected("to", PLACE))?;
    Ok(Json(to_value(&app.runtime.rewind(&app.caller.tenant, &session, to).await?)?))
}

pub async fn park(app: App, Path(session): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(to_value(&app.runtime.park(&app.caller.tenant, &session).await?)?))
}

pub async fn resume(app: App, Path(session): Path<String>, params: Params) -> Result<Json<Value>, ApiError> {
    let dry_run = params.flag("dry_run")?;
    Ok(Json(to_value(&app.runtime.resume(&app.caller.tenant, &session, dry_run).await?)?))
}

const PLACE: &str = "the id of a turn (the place after it) or a token position";

fn parse_place(fields: &Fields<'_>, field: &str) -> Result<Option<Place>, ApiError> {
    match fields.get(field) {
        None => Ok(None),
        Some(Value::String(turn)) if turn.starts_with("turn_") => Ok(Some(Place::Turn(turn.clone()))),
        Some(Value::Number(number)) => {
            match number.as_u64().and_then(|position| usize::try_from(position).ok()) {
                Some(position) => Ok(Some(Place::Token(position))),
                None => Err(fields.expected(field, PLACE)),
            }
        }
        Some(_) => Err(fields.expected(field, PLACE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn place(value: Value) -> Result<Option<Place>, ApiError> {
        let map = json!({ "at": value });
        parse_place(&Fields::new(map.as_object().unwrap()), "at")
    }

    #[test]
    fn a_place_is_a_turn_or_a_token_position() {
        assert_eq!(place(json!("turn_1")).unwrap(), Some(Place::Turn("turn_1".into())));
        assert_eq!(place(json!(64)).unwrap(), Some(Place::Token(64)));
        assert_eq!(place(json!(null)).unwrap(), None);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for value in [json!(-1), json!(1.5), json!("message 3"), json!([]), json!(true)] {
            assert_eq!(place(value).unwrap_err().param.as_deref(), Some("at"));
        }
    }
}
