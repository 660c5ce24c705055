//! `/v1/sessions/{id}/turns`: append to a session and let it answer; look at, re-attach to and cancel an answer.

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dormouse_session::{SessionError, TurnEvent, TurnEventBody, TurnRequest, TurnStream};
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{page, to_value};
use crate::App;
use crate::body::{JsonObject, Params};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::{generation, messages, sse, tools};

/// Answers with the finished turn, with its events (`stream`), or at once with the begun turn (`background`, 202).
pub async fn create(
    app: App,
    Path(session): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    let fields = Fields::new(&body);
    // Everything about the request is checked before the session is looked at, and before anything is appended.
    let (mut request, streams) = parse_turn(&fields)?;
    let permit = app.admit()?;
    let session = app.runtime.get(&app.caller.tenant, &session).await?;
    if fields.get("seed").is_none() {
        request.generation.sampling.seed = session.seed;
    }
    let background = request.background;
    let started =
        app.runtime.start_turn(&app.caller.tenant, &session.id, request).await.map_err(blame_input)?;
    if streams {
        return Ok(stream(started, Some(permit)));
    }
    let turn = if background {
        app.runtime.turn(&app.caller.tenant, &session.id, &started.turn).await?
    } else {
        finished(started).await?
    };
    let status = if background { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, Json(to_value(&turn)?)).into_response())
}

pub async fn list(app: App, Path(session): Path<String>, params: Params) -> Result<Json<Value>, ApiError> {
    let turns = app.runtime.turns(&app.caller.tenant, &session).await?;
    Ok(Json(page(turns.iter().map(to_value).collect::<Result<_, _>>()?, &params)?))
}

/// The turn as it is, or with `?stream=true` its events after `starting_after`, however old they are.
pub async fn show(
    app: App,
    Path((session, turn)): Path<(String, String)>,
    params: Params,
) -> Result<Response, ApiError> {
    if params.flag("stream")? {
        let starting_after = params.number("starting_after")?;
        let attached = app.runtime.attach(&app.caller.tenant, &session, &turn, starting_after).await?;
        return Ok(stream(attached, None));
    }
    let turn = app.runtime.turn(&app.caller.tenant, &session, &turn).await?;
    Ok(Json(to_value(&turn)?).into_response())
}

pub async fn cancel(
    app: App,
    Path((session, turn)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(to_value(&app.runtime.cancel(&app.caller.tenant, &session, &turn).await?)?))
}

/// What chat requests call `messages` is `input` here.
fn blame_input(error: SessionError) -> ApiError {
    let mut error = ApiError::from(error);
    if error.param.as_deref() == Some("messages") {
        error.param = Some("input".into());
    }
    error
}

/// The request, and whether its answer is to be streamed.
fn parse_turn(fields: &Fields<'_>) -> Result<(TurnRequest, bool), ApiError> {
    if fields.integer("n", 1..=i64::MAX)?.is_some_and(|n| n > 1) {
        let text = "n: a session goes on with one answer; fork it for others, or leave n out";
        return Err(ApiError::unsupported("n", text));
    }
    let mut generation = generation::parse(fields, 0)?;
    tools::choose(fields, &mut generation)?;
    let request = TurnRequest {
        input: messages::parse_input(fields)?,
        tools: tools::parse(fields)?,
        generation,
        background: fields.boolean("background")?.unwrap_or(false),
    };
    Ok((request, fields.boolean("stream")?.unwrap_or(false)))
}

fn stream(turn: TurnStream, permit: Option<OwnedSemaphorePermit>) -> Response {
    let frames = UnboundedReceiverStream::new(turn.events).map(move |event| {
        let _held_while_streaming = &permit;
        sse::named(event_name(&event), &event)
    });
    sse::respond(frames)
}

fn event_name(event: &TurnEvent) -> &'static str {
    match event.body {
        TurnEventBody::Created { .. } => "session.turn.created",
        TurnEventBody::InProgress { .. } => "session.turn.in_progress",
        TurnEventBody::Delta { .. } => "session.turn.output_text.delta",
        TurnEventBody::Completed { .. } => "session.turn.completed",
        TurnEventBody::Cancelled { .. } => "session.turn.cancelled",
        TurnEventBody::Failed { .. } => "session.turn.failed",
    }
}

/// Waits for the turn's end.
async fn finished(mut stream: TurnStream) -> Result<dormouse_session::Turn, ApiError> {
    while let Some(event) = stream.events.recv().await {
        if let TurnEventBody::Completed { turn }
        | TurnEventBody::Cancelled { turn }
        | TurnEventBody::Failed { turn } = event.body
        {
            return Ok(*turn);
        }
    }
    Err(ApiError::interrupted(&stream.session, &stream.turn))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<(TurnRequest, bool), ApiError> {
        parse_turn(&Fields::new(value.as_object().unwrap()))
    }

    #[test]
    fn a_turn_is_its_input_and_how_to_answer() {
        let (request, streams) = parse(json!({"input": "hello", "stream": true, "max_tokens": 4})).unwrap();
        assert_eq!(request.input, vec![messages::message("user", "hello")]);
        assert_eq!(request.generation.max_tokens, Some(4));
        assert!(streams && !request.background);
    }

    #[test]
    fn an_input_is_needed_and_has_its_types() {
        for bad in [json!({}), json!({"input": 5}), json!({"input": ""}), json!({"input": []})] {
            assert_eq!(parse(bad).unwrap_err().param.as_deref(), Some("input"));
        }
    }

    #[test]
    fn an_input_that_does_not_fit_is_blamed_by_its_own_name() {
        let full = || SessionError::ContextLengthExceeded { context: 256, tokens: 300, or_more: true };
        assert_eq!(blame_input(full()).param.as_deref(), Some("input"));
        assert_eq!(blame_input(full()).code, ApiError::from(full()).code);
        let other = SessionError::Invalid { param: "logit_bias".into(), message: String::new() };
        assert_eq!(blame_input(other).param.as_deref(), Some("logit_bias"));
    }

    #[test]
    fn the_event_line_names_the_type_of_its_data() {
        let delta = TurnEventBody::Delta { delta: "x".into(), token: 1, logprob: None };
        let event = TurnEvent { sequence_number: 2, body: delta };
        let value = to_value(&event).unwrap();
        assert_eq!(value["type"], event_name(&event));
        assert_eq!(value["sequence_number"], 2);
    }
}
