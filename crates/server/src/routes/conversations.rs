//! `/v1/conversations`: sessions under OpenAI's name. `conv_X` is the session `sess_X`.

use axum::Json;
use axum::extract::Path;
use dormouse_session::{CreateSession, Item, Session, SessionError, UpdateSession};
use serde_json::{Value, json};

use super::list_object;
use super::responses::{items, page};
use super::sessions::parse_metadata;
use crate::App;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;

/// OpenAI's bound for one request.
const MOST_NEW_ITEMS: usize = 20;

/// The session that a conversation is. Names of sessions name no conversations.
pub fn session_id(conversation: &str) -> String {
    match conversation.strip_prefix("conv_") {
        Some(core) => format!("sess_{core}"),
        None if conversation.starts_with("sess_") => conversation.to_owned(),
        // No session has such an id or name.
        None => format!("sess_/{conversation}"),
    }
}

fn conversation_id(session: &str) -> String {
    format!("conv_{}", session.strip_prefix("sess_").unwrap_or(session))
}

/// The same error about a conversation.
pub fn not_found(error: ApiError) -> ApiError {
    let message = "there is no conversation of this id";
    ApiError {
        message: message.into(),
        code: Some("conversation_not_found"),
        param: Some("conversation".into()),
        ..error
    }
}

fn blame(error: SessionError) -> ApiError {
    let missing = matches!(error, SessionError::SessionNotFound(_));
    let error = ApiError::from(error);
    if missing { not_found(error) } else { error }
}

fn object(session: &Session) -> Value {
    json!({
        "id": conversation_id(&session.id),
        "object": "conversation",
        "created_at": session.created_at,
        "metadata": session.metadata,
    })
}

pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<Json<Value>, ApiError> {
    let fields = Fields::new(&body);
    let messages = match fields.list("items")? {
        Some(values) => items::to_messages(checked(values)?, "items")?,
        None => Vec::new(),
    };
    let request =
        CreateSession { metadata: parse_metadata(&fields)?.unwrap_or_default(), ..CreateSession::default() };
    let session = app.runtime.create(&app.caller.tenant, request).await?;
    if !messages.is_empty() {
        app.runtime.add_items(&app.caller.tenant, &session.id, messages).await?;
    }
    Ok(Json(object(&session)))
}

fn checked(values: &[Value]) -> Result<&[Value], ApiError> {
    match values.len() <= MOST_NEW_ITEMS {
        true => Ok(values),
        false => {
            let text = format!("items: at most {MOST_NEW_ITEMS} at once, found {}", values.len());
            Err(ApiError::invalid("items", text))
        }
    }
}

pub async fn show(app: App, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(object(&app.runtime.get(&app.caller.tenant, &session_id(&id)).await.map_err(blame)?)))
}

pub async fn update(
    app: App,
    Path(id): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let fields = Fields::new(&body);
    if !fields.mentions("metadata") {
        return Err(fields.expected("metadata", "an object"));
    }
    let metadata = Some(parse_metadata(&fields)?.unwrap_or_default());
    let change = UpdateSession { metadata, ..UpdateSession::default() };
    let session = app.runtime.update(&app.caller.tenant, &session_id(&id), change).await.map_err(blame)?;
    Ok(Json(object(&session)))
}

pub async fn delete(app: App, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.runtime.delete(&app.caller.tenant, &session_id(&id)).await.map_err(blame)?;
    let id = conversation_id(&session_id(&id));
    Ok(Json(json!({ "id": id, "object": "conversation.deleted", "deleted": true })))
}

pub async fn list_items(app: App, Path(id): Path<String>, params: Params) -> Result<Json<Value>, ApiError> {
    let found = app.runtime.items(&app.caller.tenant, &session_id(&id)).await.map_err(blame)?;
    Ok(Json(page(found.iter().flat_map(items::objects).collect(), &params)?))
}

/// Appends items; their tokens are computed with the next response.
pub async fn create_items(
    app: App,
    Path(id): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let fields = Fields::new(&body);
    let values = fields.list("items")?.ok_or_else(|| fields.expected("items", "an array of items"))?;
    let messages = items::to_messages(checked(values)?, "items")?;
    if messages.is_empty() {
        return Err(fields.expected("items", "at least one item"));
    }
    let added = app.runtime.add_items(&app.caller.tenant, &session_id(&id), messages).await.map_err(blame)?;
    Ok(Json(list_object(added.iter().flat_map(items::objects).collect(), false)))
}

pub async fn show_item(app: App, Path((id, item)): Path<(String, String)>) -> Result<Json<Value>, ApiError> {
    let holder = holder(&app, &id, &item).await?;
    let part = items::objects(&holder).into_iter().find(|part| part["id"] == item.as_str());
    Ok(Json(part.ok_or(SessionError::ItemNotFound(item))?))
}

/// Takes an item out. What the conversation said after it is computed again with the next response.
pub async fn delete_item(
    app: App,
    Path((id, item)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let holder = holder(&app, &id, &item).await?;
    let rest = items::without(&holder, &item);
    let changed = app.runtime.change_item(&app.caller.tenant, &session_id(&id), &holder.id, rest).await;
    Ok(Json(object(&changed.map_err(blame)?)))
}

/// The session's item that this one is, or is a part of.
async fn holder(app: &App, id: &str, item: &str) -> Result<Item, ApiError> {
    let found = app.runtime.items(&app.caller.tenant, &session_id(id)).await.map_err(blame)?;
    let is_it = |found: &Item| items::objects(found).iter().any(|part| part["id"] == item);
    match found.into_iter().find(is_it) {
        Some(found) => Ok(found),
        None => Err(SessionError::ItemNotFound(item.to_owned()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_the_session_with_the_same_random_part() {
        assert_eq!(session_id("conv_0a"), "sess_0a");
        assert_eq!(session_id("sess_0a"), "sess_0a");
        assert_eq!(conversation_id("sess_0a"), "conv_0a");
        assert!(session_id("a-name").contains('/'));
    }

    #[test]
    fn at_most_twenty_items_are_added_at_once() {
        assert!(checked(&vec![json!({}); 20]).is_ok());
        assert_eq!(checked(&vec![json!({}); 21]).unwrap_err().param.as_deref(), Some("items"));
    }
}
