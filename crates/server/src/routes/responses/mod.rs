//! `/v1/responses`: turns under OpenAI's name, each with an id of its own.

mod diagnostics;
mod events;
pub mod items;
mod object;
mod request;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response as HttpResponse};
use dormouse_engine::TokenLogprob;
use dormouse_session::{
    Response, ResponseRequest, Runtime, Scope, SessionError, TurnEventBody, TurnStatus, TurnStream,
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::chat_answer::{failure, finite};
use super::list_object;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::{App, random_u64, sse};

use events::{LogprobWriter, Narrator, object_of};
use object::Envelope;
use request::Parsed;

/// Answers with the finished response, with its events (`stream`), or at once with the begun one (`background`).
pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<HttpResponse, ApiError> {
    let Parsed { mut request, input, stream } = request::parse(&Fields::new(&body), random_u64()?)?;
    may_continue(&app, &request)?;
    request.input = items::to_messages(&resolved(&app, input).await?, "input")?;
    compare(&app, &mut request).await?;
    let permit = app.admit()?;
    let (background, conversation) = (request.background, request.conversation.is_some());
    let begun = app.runtime.respond(&app.caller.tenant, request).await;
    let (response, turn) = begun.map_err(|error| blame(error, conversation))?;
    if stream {
        return Ok(narrated(&app, &response, turn, None, Some(permit)));
    }
    if background {
        let object = Envelope::new(&response).object("queued", &[]);
        return Ok(Json(object).into_response());
    }
    Ok(Json(finished(&app, &response, turn).await?).into_response())
}

/// The response as it is, or with `?stream=true` its events after `starting_after`, however old they are.
pub async fn show(app: App, Path(id): Path<String>, params: Params) -> Result<HttpResponse, ApiError> {
    if params.flag("stream")? {
        let starting_after = params.number("starting_after")?;
        let (response, turn) = app.runtime.attach_response(&app.caller.tenant, &id).await?;
        return Ok(narrated(&app, &response, turn, starting_after, None));
    }
    let (response, turn) = app.runtime.response(&app.caller.tenant, &id).await?;
    Ok(Json(object_of(Envelope::new(&response), &turn)).into_response())
}

pub async fn delete(app: App, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.runtime.delete_response(&app.caller.tenant, &id).await?;
    Ok(Json(json!({ "id": id, "object": "response", "deleted": true })))
}

/// Stops a response that is in progress. Of those that are over only background ones are answered again, as OpenAI does.
pub async fn cancel(app: App, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let (response, turn) = app.runtime.response(&app.caller.tenant, &id).await?;
    let is_over = turn.status != TurnStatus::InProgress;
    if is_over && !Envelope::new(&response).is_background() {
        let text = "this response is complete, and was no background response: there is nothing to cancel";
        return Err(ApiError::invalid("response_id", text));
    }
    let (response, turn) = app.runtime.cancel_response(&app.caller.tenant, &id).await?;
    Ok(Json(object_of(Envelope::new(&response), &turn)))
}

/// Everything that the response was generated from, newest first unless asked otherwise.
pub async fn input_items(app: App, Path(id): Path<String>, params: Params) -> Result<Json<Value>, ApiError> {
    let found = app.runtime.response_input(&app.caller.tenant, &id).await?;
    Ok(Json(page(found.iter().flat_map(items::objects).collect(), &params)?))
}

/// The tokens of the prompt that this request would have; nothing is generated.
pub async fn input_tokens(app: App, JsonObject(body): JsonObject) -> Result<Json<Value>, ApiError> {
    let Parsed { mut request, input, .. } = request::parse(&Fields::new(&body), random_u64()?)?;
    may_continue(&app, &request)?;
    request.input = items::to_messages(&resolved(&app, input).await?, "input")?;
    let conversation = request.conversation.is_some();
    let counted = app.runtime.count_input(&app.caller.tenant, request).await;
    let count = counted.map_err(|error| blame(error, conversation))?;
    Ok(Json(json!({ "object": "response.input_tokens", "input_tokens": count })))
}

/// Conversations are sessions, for which keys have a scope of their own.
fn may_continue(app: &App, request: &ResponseRequest) -> Result<(), ApiError> {
    request.conversation.as_ref().map_or(Ok(()), |_| app.caller.require(Scope::Sessions))
}

/// Looks up the response that the request's prompt is to be compared with, if any.
async fn compare(app: &App, request: &mut ResponseRequest) -> Result<(), ApiError> {
    let object = request.record.get("object").and_then(Value::as_object).cloned().unwrap_or_default();
    let options = object.get("prompt_cache_options");
    let Some(id) = options.and_then(|it| it.get("comparison_response_id")).and_then(Value::as_str) else {
        return Ok(());
    };
    let found = match app.runtime.response(&app.caller.tenant, id).await {
        Ok(found) => Some(found),
        Err(SessionError::ResponseNotFound(_)) => None,
        Err(why) => return Err(why.into()),
    };
    let other = found.as_ref().map(|(response, turn)| (response, turn));
    let comparison = diagnostics::comparison(request.model.as_deref(), &object, other);
    request.record.insert("comparison".into(), comparison);
    Ok(())
}

/// Items of which the request gives only the id, in full.
async fn resolved(app: &App, input: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    let mut whole = Vec::with_capacity(input.len());
    for (index, item) in input.into_iter().enumerate() {
        let has_only_id =
            item.get("type").is_none() && item.get("role").is_none() && item.get("id").is_some();
        if !has_only_id && item.get("type").and_then(Value::as_str) != Some("item_reference") {
            whole.push(item);
            continue;
        }
        let place = format!("input[{index}].id");
        let id = item.get("id").and_then(Value::as_str).unwrap_or("");
        let found = app.runtime.find_item(&app.caller.tenant, &format!("item_{}", items::core(id))).await?;
        let parts = found.map(|found| items::objects(&found)).unwrap_or_default();
        match parts.into_iter().find(|part| part["id"] == id) {
            Some(part) => whole.push(part),
            None => {
                let text = format!("{place}: there is no item '{id}'");
                let error = ApiError::new(StatusCode::NOT_FOUND, Some("item_not_found"), text);
                return Err(ApiError { param: Some(place), ..error });
            }
        }
    }
    Ok(whole)
}

/// What the session crate calls otherwise.
fn blame(error: SessionError, conversation: bool) -> ApiError {
    if let SessionError::Busy { turn, .. } = &error {
        let text = format!(
            "what this response would follow is still in progress (turn '{turn}'): wait for it, or cancel it"
        );
        return ApiError::new(StatusCode::CONFLICT, Some("response_in_progress"), text);
    }
    let is_previous = matches!(error, SessionError::ResponseNotFound(_));
    let is_conversation = conversation && matches!(error, SessionError::SessionNotFound(_));
    let mut error = ApiError::from(error);
    if is_conversation {
        error = super::conversations::not_found(error);
    }
    if is_previous {
        // OpenAI's code, by which clients know to send the whole history.
        error.code = Some("previous_response_not_found");
    }
    error.param = match error.param.as_deref() {
        _ if is_previous => Some("previous_response_id".into()),
        Some("messages") => Some("input".into()),
        Some(param) if param.starts_with("response_format") => {
            let own = |text: &str| {
                let text = text.replacen("response_format.json_schema", "text.format", 1);
                text.replacen("response_format", "text.format", 1)
            };
            error.message = own(&error.message);
            Some(own(param))
        }
        param => param.map(String::from),
    };
    error
}

/// OpenAI's page of a list that is given oldest first: newest first unless `order=asc`.
pub fn page(mut all: Vec<Value>, params: &Params) -> Result<Value, ApiError> {
    match params.text("order") {
        None | Some("desc") => all.reverse(),
        Some("asc") => {}
        Some(other) => {
            return Err(ApiError::invalid("order", format!("order: expected asc or desc, found {other:?}")));
        }
    }
    let limit = params.limit(20, 100)?;
    let start = match params.text("after") {
        None => 0,
        Some(after) => match all.iter().position(|value| value["id"] == after) {
            Some(index) => index + 1,
            None => {
                return Err(ApiError::invalid("after", format!("after: there is no '{after}' in this list")));
            }
        },
    };
    let has_more = all.len() > start + limit;
    Ok(list_object(all.into_iter().skip(start).take(limit).collect(), has_more))
}

fn narrator(app: &App, response: &Response, turn: &TurnStream) -> Narrator {
    let wants_logprobs = response.record.get("logprobs") == Some(&Value::Bool(true));
    let logprobs = wants_logprobs.then(|| logprob_writer(app.runtime.clone(), response.model.clone()));
    Narrator::new(Envelope::new(response), &turn.turn, &turn.answer_format, logprobs)
}

/// A token may be a part of a character, hence `bytes`.
fn logprob_writer(runtime: Runtime, model: String) -> LogprobWriter {
    Box::new(move |token: u32, it: &TokenLogprob| {
        let entry = |token: u32, logprob: f32| {
            let bytes = runtime.token_bytes(Some(&model), token);
            json!({ "token": String::from_utf8_lossy(&bytes), "logprob": finite(logprob), "bytes": bytes })
        };
        let mut value = entry(token, it.logprob);
        value["top_logprobs"] = it.top.iter().map(|(token, logprob)| entry(*token, *logprob)).collect();
        value
    })
}

/// Waits for the end and answers the object.
async fn finished(app: &App, response: &Response, mut turn: TurnStream) -> Result<Value, ApiError> {
    let mut narrator = narrator(app, response, &turn);
    while let Some(event) = turn.events.recv().await {
        if let TurnEventBody::Failed { turn } = &event.body {
            return Err(failure(turn));
        }
        let last = narrator.take(event.body).pop();
        if narrator.is_over()
            && let Some(mut last) = last
        {
            return Ok(last["response"].take());
        }
    }
    Err(interrupted(&response.id))
}

/// The events as they come, those after `starting_after` and in any case a failure.
fn narrated(
    app: &App,
    response: &Response,
    turn: TurnStream,
    starting_after: Option<u64>,
    permit: Option<OwnedSemaphorePermit>,
) -> HttpResponse {
    let narrator = narrator(app, response, &turn);
    let id = response.id.clone();
    let events = UnboundedReceiverStream::new(turn.events);
    let frames = stream::unfold(Some((events, narrator, id, permit)), move |state| async move {
        let (mut events, mut narrator, id, permit) = state?;
        let Some(event) = events.next().await else {
            // The server stops; whoever asks again after its next start is told the rest.
            return Some((broken_off(&narrator, &id), None));
        };
        let is_failure = event.body.is_failure();
        let mut frames = String::new();
        for event in narrator.take(event.body) {
            let number = event["sequence_number"].as_u64();
            if starting_after.is_none_or(|after| number > Some(after)) || (is_failure && narrator.is_over()) {
                frames += &sse::named(event["type"].as_str().unwrap_or_default(), &event);
            }
        }
        if narrator.is_over() {
            return Some((frames + sse::DONE, None));
        }
        Some((frames, Some((events, narrator, id, permit))))
    });
    sse::respond(frames.filter(|frames| {
        let has_something = !frames.is_empty();
        async move { has_something }
    }))
}

fn interrupted(id: &str) -> ApiError {
    let message =
        format!("the server is stopping; this response goes on after its next start: GET /v1/responses/{id}");
    let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some("turn_interrupted"), message);
    ApiError { is_taken_in: true, ..error }
}

/// An error event with the number of the last event: it is no event of the response, and is not told again.
fn broken_off(narrator: &Narrator, id: &str) -> String {
    let mut event = interrupted(id).body();
    event["type"] = "error".into();
    event["sequence_number"] = narrator.last_number().into();
    for name in ["message", "code", "param"] {
        event[name] = event["error"][name].clone();
    }
    sse::named("error", &event)
}

#[cfg(test)]
mod tests;
