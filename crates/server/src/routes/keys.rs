//! `/v1/keys`: make, list and revoke API keys. For administrators.

use axum::Json;
use axum::extract::Path;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dormouse_session::{KnownKey, NewKey, Scope, SessionError, Tenant};
use serde_json::Value;

use super::{page, to_value};
use crate::App;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;

const MOST_REQUESTS_PER_MINUTE: i64 = 1_000_000;
const MOST_CONCURRENCY: i64 = 10_000;

/// 201 with the key, and beside its fields the `secret`, which is shown this once.
pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let new = parse_new(&Fields::new(&body))?;
    let runtime = app.runtime.clone();
    let create = async move { runtime.create_key(new).await };
    let (key, secret) = app.keyring.change(&app.runtime, create).await?;
    let mut answer = to_value(&key)?;
    answer["secret"] = secret.into();
    let mut response = (StatusCode::CREATED, Json(answer)).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

pub async fn list(app: App, params: Params) -> Result<Json<Value>, ApiError> {
    let keys = app.runtime.keys().await?;
    Ok(Json(page(keys.iter().map(|known| to_value(&known.key)).collect::<Result<_, _>>()?, &params)?))
}

pub async fn show(app: App, Path(key): Path<String>) -> Result<Json<Value>, ApiError> {
    let keys = app.runtime.keys().await?;
    let by_name = |known: &&KnownKey| known.key.name == key && known.key.revoked_at.is_none();
    match keys.iter().find(|known| known.key.id == key).or_else(|| keys.iter().find(by_name)) {
        Some(KnownKey { key: found, .. }) => Ok(Json(to_value(found)?)),
        None => Err(SessionError::KeyNotFound(key).into()),
    }
}

/// The key stays in the list, with the time when it was revoked.
pub async fn revoke(app: App, Path(key): Path<String>) -> Result<Json<Value>, ApiError> {
    let runtime = app.runtime.clone();
    let revoke = async move { runtime.revoke_key(&key).await };
    Ok(Json(to_value(&app.keyring.change(&app.runtime, revoke).await?)?))
}

fn parse_new(fields: &Fields<'_>) -> Result<NewKey, ApiError> {
    let limit = |field: &str, most: i64| {
        let limit = fields.integer(field, 1..=most)?;
        Ok::<_, ApiError>(limit.and_then(|limit| u32::try_from(limit).ok()))
    };
    Ok(NewKey {
        name: fields.string("name")?.ok_or_else(|| fields.expected("name", "a string"))?.to_owned(),
        tenant: fields.string("tenant")?.map_or_else(Tenant::default, |tenant| Tenant(tenant.to_owned())),
        scopes: parse_scopes(fields)?,
        requests_per_minute: limit("requests_per_minute", MOST_REQUESTS_PER_MINUTE)?,
        concurrency: limit("concurrency", MOST_CONCURRENCY)?,
    })
}

fn parse_scopes(fields: &Fields<'_>) -> Result<Vec<Scope>, ApiError> {
    let Some(list) = fields.list("scopes")? else { return Ok(vec![Scope::Inference, Scope::Sessions]) };
    let parse = |value: &Value| value.as_str().and_then(Scope::parse);
    let scopes: Option<Vec<Scope>> = list.iter().map(parse).collect();
    let expected =
        || format!("an array of {}", Scope::ALL.map(|scope| format!("\"{}\"", scope.name())).join(", "));
    scopes.ok_or_else(|| fields.expected("scopes", &expected()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<NewKey, ApiError> {
        parse_new(&Fields::new(value.as_object().unwrap()))
    }

    #[test]
    fn a_key_needs_a_name_and_may_then_ask_and_keep_sessions() {
        let key = parse(json!({"name": "ci"})).unwrap();
        assert_eq!((key.tenant, key.scopes), (Tenant::default(), vec![Scope::Inference, Scope::Sessions]));
        assert_eq!((key.requests_per_minute, key.concurrency), (None, None));
    }

    #[test]
    fn wrong_fields_are_refused_by_name() {
        for (field, value) in [
            ("name", json!(null)),
            ("tenant", json!(5)),
            ("scopes", json!(["root"])),
            ("scopes", json!("admin")),
            ("requests_per_minute", json!(0)),
            ("concurrency", json!(20_000)),
        ] {
            let mut request = json!({"name": "ci"});
            request[field] = value;
            assert_eq!(parse(request).unwrap_err().param.as_deref(), Some(field));
        }
    }
}
