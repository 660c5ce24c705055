//! `/v1/sessions`: create, list, show, change, delete, and the items inside.

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use dormouse_session::{CreateSession, ListSessions, SessionStatus, UpdateSession};
use serde_json::{Map, Value, json};

use super::{list_object, page, to_value};
use crate::App;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::tools;

pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<(StatusCode, Json<Value>), ApiError> {
    let request = parse_create(&Fields::new(&body))?;
    let session = app.runtime.create(&app.caller.tenant, request).await?;
    Ok((StatusCode::CREATED, Json(to_value(&session)?)))
}

pub async fn list(app: App, params: Params) -> Result<Json<Value>, ApiError> {
    let query = ListSessions {
        after: params.text("after").map(String::from),
        limit: params.limit(20, 100)?,
        status: params.text("status").map(parse_status).transpose()?,
        implicit: params.flag("implicit")?,
    };
    let found = app.runtime.list(&app.caller.tenant, query).await?;
    let data = found.data.iter().map(to_value).collect::<Result<_, _>>()?;
    Ok(Json(list_object(data, found.has_more)))
}

pub async fn show(app: App, Path(session): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(to_value(&app.runtime.get(&app.caller.tenant, &session).await?)?))
}

pub async fn update(
    app: App,
    Path(session): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let change = parse_update(&Fields::new(&body))?;
    Ok(Json(to_value(&app.runtime.update(&app.caller.tenant, &session, change).await?)?))
}

pub async fn delete(app: App, Path(session): Path<String>) -> Result<Json<Value>, ApiError> {
    // The name may be used again at once; the answer tells which session it was.
    let id = app.runtime.get(&app.caller.tenant, &session).await?.id;
    app.runtime.delete(&app.caller.tenant, &id).await?;
    Ok(Json(json!({ "id": id, "object": "session.deleted", "deleted": true })))
}

pub async fn items(app: App, Path(session): Path<String>, params: Params) -> Result<Json<Value>, ApiError> {
    let items = app.runtime.items(&app.caller.tenant, &session).await?;
    Ok(Json(page(items.iter().map(to_value).collect::<Result<_, _>>()?, &params)?))
}

fn parse_create(fields: &Fields<'_>) -> Result<CreateSession, ApiError> {
    Ok(CreateSession {
        model: fields.string("model")?.map(String::from),
        name: parse_name(fields)?,
        instructions: fields.string("instructions")?.map(String::from),
        tools: tools::parse(fields)?.unwrap_or_default(),
        metadata: parse_metadata(fields)?.unwrap_or_default(),
        seed: fields.seed("seed")?,
        kv_dtype: fields.string("kv_dtype")?.map(String::from),
        ttl_seconds: parse_ttl(fields)?,
        pinned: fields.boolean("pinned")?.unwrap_or(false),
        cache_salt: parse_cache_salt(fields)?,
    })
}

fn parse_update(fields: &Fields<'_>) -> Result<UpdateSession, ApiError> {
    for name in ["model", "instructions", "tools", "seed", "kv_dtype"] {
        if fields.mentions(name) {
            let text =
                format!("{name}: cannot be changed, the session's tokens depend on it; create a new session");
            return Err(ApiError::unsupported(name, text));
        }
    }
    let name = parse_name(fields)?;
    let ttl_seconds = parse_ttl(fields)?;
    Ok(UpdateSession {
        name: fields.mentions("name").then_some(name),
        metadata: parse_metadata(fields)?,
        ttl_seconds: fields.mentions("ttl_seconds").then_some(ttl_seconds),
        pinned: fields.boolean("pinned")?,
    })
}

/// Names are labels that people type: short, printable, and never mistaken for an id or a piece of a path.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let length = name.chars().count();
    let is_clean = !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\' | '?' | '#'));
    if (1..=100).contains(&length) && is_clean && !name.starts_with("sess_") && name.trim() == name {
        return Ok(());
    }
    let text = format!(
        "{field}: expected 1 to 100 characters without slashes, '?', '#', control characters or spaces around, \
         and not beginning with 'sess_', found {name:?}"
    );
    Err(ApiError::invalid(field, text))
}

fn parse_name(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    let name = fields.string("name")?;
    name.map(|name| check_name("name", name).map(|()| name.to_string())).transpose()
}

/// Pages computed under a salt are used by nobody without it.
pub(super) fn parse_cache_salt(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    const MOST_BYTES: usize = 1024;
    match fields.string("cache_salt")? {
        Some(salt) if !(1..=MOST_BYTES).contains(&salt.len()) => {
            let text = format!("cache_salt: expected 1 to {MOST_BYTES} bytes, found {}", salt.len());
            Err(ApiError::invalid("cache_salt", text))
        }
        salt => Ok(salt.map(String::from)),
    }
}

fn parse_ttl(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    // A hundred years, so that adding it to a time never overflows.
    Ok(fields.integer("ttl_seconds", 1..=3_155_760_000)?.map(i64::unsigned_abs))
}

/// OpenAI's bounds: 16 keys of 64 characters, values of 512.
pub(super) fn parse_metadata(fields: &Fields<'_>) -> Result<Option<Map<String, Value>>, ApiError> {
    let Some(map) = fields.object("metadata")? else { return Ok(None) };
    let is_small = |(key, value): (&String, &Value)| {
        key.chars().count() <= 64 && value.as_str().is_some_and(|text| text.chars().count() <= 512)
    };
    if map.len() > 16 || !map.iter().all(is_small) {
        let text =
            "metadata: expected at most 16 strings of at most 512 characters, under keys of at most 64";
        return Err(ApiError::invalid("metadata", text));
    }
    Ok(Some(map.clone()))
}

fn parse_status(text: &str) -> Result<SessionStatus, ApiError> {
    serde_json::from_value(Value::from(text)).map_err(|_| {
        let message =
            format!("status: expected idle, in_progress, requires_action or failed, found {text:?}");
        ApiError::invalid("status", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(value: Value) -> Result<CreateSession, ApiError> {
        parse_create(&Fields::new(value.as_object().unwrap()))
    }

    fn update(value: Value) -> Result<UpdateSession, ApiError> {
        parse_update(&Fields::new(value.as_object().unwrap()))
    }

    #[test]
    fn a_session_needs_nothing_to_be_created() {
        let request = create(json!({})).unwrap();
        assert!(request.model.is_none() && request.name.is_none() && !request.pinned);
    }

    #[test]
    fn names_cannot_be_mistaken_for_ids_or_paths() {
        for name in ["", "sess_1", "../up", "a/b", "a\nb", " a", &"x".repeat(101)] {
            assert_eq!(create(json!({"name": name})).unwrap_err().param.as_deref(), Some("name"), "{name:?}");
        }
        assert_eq!(create(json!({"name": "Größe 2.1"})).unwrap().name.as_deref(), Some("Größe 2.1"));
    }

    #[test]
    fn an_absent_field_stays_and_null_clears() {
        let change = update(json!({"name": null, "pinned": true})).unwrap();
        assert_eq!((change.name, change.ttl_seconds, change.pinned), (Some(None), None, Some(true)));
        let change = update(json!({"ttl_seconds": 60})).unwrap();
        assert_eq!((change.name, change.ttl_seconds), (None, Some(Some(60))));
    }

    #[test]
    fn what_the_tokens_depend_on_cannot_be_changed() {
        assert_eq!(update(json!({"model": "other"})).unwrap_err().param.as_deref(), Some("model"));
    }

    #[test]
    fn metadata_is_bounded() {
        assert!(create(json!({"metadata": {"k": "v"}})).is_ok());
        assert!(create(json!({"metadata": {"k": 5}})).is_err());
        assert!(create(json!({"metadata": {"k": "v".repeat(513)}})).is_err());
    }

    #[test]
    fn statuses_are_read_as_they_are_written() {
        assert_eq!(parse_status("in_progress").unwrap(), SessionStatus::InProgress);
        assert!(parse_status("busy").is_err());
    }
}
