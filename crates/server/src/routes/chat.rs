//! `POST /v1/chat/completions`: the request.

use axum::Json;
use axum::response::{IntoResponse, Response};
use dormouse_session::{ChatRequest, Scope, Session, SessionError};

use super::chat_answer::{self, Answer};
use super::chunks::Head;
use super::sessions::{check_name, parse_cache_salt};
use crate::App;
use crate::body::JsonObject;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::{generation, messages, random_u64, tools};

const MOST_CHOICES: i64 = 16;

pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let fields = Fields::new(&body);
    let mut request = parse_chat(&fields, random_u64()?)?;
    let delivery = parse_delivery(&fields)?;
    let permit = app.admit()?;
    if request.session.is_some() {
        app.caller.require(Scope::Sessions)?;
    }
    if let Some(session) = &request.session {
        match app.runtime.get(&app.caller.tenant, session).await {
            Ok(session) => {
                go_on_in(&session, &mut request, fields.get("seed").is_some())?;
            }
            // A name that does not exist yet is created.
            Err(SessionError::SessionNotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (model, session) = (request.model.clone(), request.session.is_some());
    let logprobs = request.generation.sampling.logprobs.is_some();
    let streams = app.runtime.chat(&app.caller.tenant, request).await?;
    let Some(first) = streams.first() else {
        return Err(SessionError::Internal("no answer was begun".into()).into());
    };
    // A session answers with its own model, whatever the request said.
    let model =
        if session { Some(app.runtime.get(&app.caller.tenant, &first.session).await?.model) } else { model };
    let answer = Answer {
        head: Head::new(&app, "chatcmpl", &first.turn, model),
        runtime: app.runtime.clone(),
        logprobs,
        include_usage: delivery.include_usage,
        goes_on: session.then(|| (first.session.clone(), first.turn.clone())),
    };
    if delivery.stream {
        return Ok(chat_answer::stream(answer, streams, permit));
    }
    Ok(Json(chat_answer::whole(&answer, streams).await?).into_response())
}

/// A session answers with its own model and, where the request has none, its own seed, whichever door it came through.
fn go_on_in(session: &Session, request: &mut ChatRequest, seeded: bool) -> Result<(), ApiError> {
    if let Some(model) = request.model.as_deref().filter(|model| *model != session.model) {
        let text = format!("model: the session was begun with '{}', not with '{model}'", session.model);
        return Err(ApiError::invalid("model", text));
    }
    if !seeded {
        request.generation.sampling.seed = session.seed;
    }
    Ok(())
}

/// How the answer is to come.
#[derive(Debug, PartialEq)]
struct Delivery {
    stream: bool,
    include_usage: bool,
}

fn parse_delivery(fields: &Fields<'_>) -> Result<Delivery, ApiError> {
    let include_usage = match fields.object("stream_options")? {
        Some(options) => {
            Fields::inside(options, "stream_options.").boolean("include_usage")?.unwrap_or(false)
        }
        None => false,
    };
    Ok(Delivery { stream: fields.boolean("stream")?.unwrap_or(false), include_usage })
}

fn parse_chat(fields: &Fields<'_>, random_seed: u64) -> Result<ChatRequest, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| fields.expected("messages", "an array of messages"))?;
    let session = fields.string("session")?;
    if let Some(session) = session.filter(|session| !session.starts_with("sess_")) {
        // A name that does not exist yet is created.
        check_name("session", session)?;
    }
    let n = fields.integer("n", 1..=MOST_CHOICES)?.unwrap_or(1);
    if n > 1 && session.is_some() {
        let text = "n: a session goes on with one answer; fork it for others, or leave n out";
        return Err(ApiError::unsupported("n", text));
    }
    let mut generation = generation::parse(fields, random_seed)?;
    tools::choose(fields, &mut generation)?;
    Ok(ChatRequest {
        cache_salt: parse_cache_salt(fields)?,
        model: fields.string("model")?.map(String::from),
        messages: messages::parse_list(list, "messages")?,
        session: session.map(String::from),
        tools: tools::parse(fields)?,
        generation,
        n: n.unsigned_abs() as usize,
        store: fields.boolean("store")?.unwrap_or(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(value: Value) -> Result<ChatRequest, ApiError> {
        parse_chat(&Fields::new(value.as_object().unwrap()), 7)
    }

    fn with(field: &str, value: Value) -> Value {
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], field: value})
    }

    #[test]
    fn a_plain_request_of_the_openai_client_is_understood() {
        let request = parse(with("temperature", json!(0.5))).unwrap();
        assert_eq!((request.model.as_deref(), request.n, request.store), (Some("m"), 1, true));
        assert_eq!(request.messages, vec![messages::message("user", "hi")]);
        assert_eq!((request.generation.sampling.temperature, request.generation.sampling.seed), (0.5, 7));
        assert!(request.session.is_none());
    }

    #[test]
    fn messages_are_needed() {
        for bad in [json!({}), json!({"messages": null}), json!({"messages": "hi"}), json!({"messages": []})]
        {
            assert_eq!(parse(bad).unwrap_err().param.as_deref(), Some("messages"));
        }
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        for (field, value) in [
            ("model", json!(5)),
            ("session", json!(5)),
            ("n", json!(17)),
            ("store", json!("no")),
            ("session", json!("a/b")),
        ] {
            assert_eq!(parse(with(field, value)).unwrap_err().param.as_deref(), Some(field));
        }
    }

    #[test]
    fn a_session_has_one_next_answer() {
        let mut value = with("session", json!("notes"));
        value["n"] = json!(2);
        assert_eq!(parse(value).unwrap_err().param.as_deref(), Some("n"));
    }

    #[test]
    fn usage_in_the_stream_is_asked_for_in_stream_options() {
        let map = json!({"stream": true, "stream_options": {"include_usage": true}});
        let expected = Delivery { stream: true, include_usage: true };
        assert_eq!(parse_delivery(&Fields::new(map.as_object().unwrap())).unwrap(), expected);
        let map = json!({"stream_options": {"include_usage": 1}});
        let error = parse_delivery(&Fields::new(map.as_object().unwrap())).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("stream_options.include_usage"));
    }
}
