//! `POST /v1/completions`: the request. Raw text or tokens go on, without chat template.

use axum::Json;
use axum::response::{IntoResponse, Response};
use dormouse_session::{Completion, CompletionRequest, Generation, RawPrompt, SessionError};
use serde_json::Value;

use super::chunks::Head;
use super::completion_answer::{self, Answer, Continued};
use super::sessions::parse_cache_salt;
use crate::App;
use crate::body::JsonObject;
use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::{generation, random_u64};

/// Continuations of one request: its prompts, times `n`.
const MOST_CHOICES: usize = 1024;
const MOST_LOGPROBS: i64 = 5;
/// As at OpenAI.
const DEFAULT_MAX_TOKENS: usize = 16;

pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let fields = Fields::new(&body);
    let asked = parse(&fields, random_u64()?)?;
    let permit = app.admit()?;
    let model = asked.request.model.clone();
    let prompts = asked.request.prompts.clone();
    let completions = app.runtime.complete(&app.caller.tenant, asked.request).await.map_err(blame_prompt)?;
    let Some(first) = completions.first().and_then(|completion| completion.streams.first()) else {
        return Err(SessionError::Internal("no continuation was begun".into()).into());
    };
    let answer = Answer {
        head: Head::new(&app, "cmpl", &first.turn, model),
        runtime: app.runtime.clone(),
        logprobs: asked.logprobs,
        echo: asked.echo,
        include_usage: asked.include_usage,
    };
    let continued = prompts.into_iter().zip(completions).map(|(prompt, completion)| {
        let Completion { tokens, streams } = completion;
        let text = match prompt {
            RawPrompt::Text(text) => text,
            RawPrompt::Tokens(tokens) => app.runtime.text_of(Some(&answer.head.model), &tokens),
        };
        Continued { text, tokens, streams }
    });
    let continued: Vec<Continued> = continued.collect();
    if asked.stream {
        return Ok(completion_answer::stream(answer, continued, permit));
    }
    Ok(Json(completion_answer::whole(&answer, continued).await?).into_response())
}

/// What chat requests call `messages` is `prompt` here.
fn blame_prompt(error: SessionError) -> ApiError {
    let mut error = ApiError::from(error);
    if error.param.as_deref() == Some("messages") {
        error.param = Some("prompt".into());
    }
    error
}

/// A request, and how its answer is to come.
#[derive(Debug)]
struct Asked {
    request: CompletionRequest,
    echo: bool,
    logprobs: Option<u8>,
    stream: bool,
    include_usage: bool,
}

fn parse(fields: &Fields<'_>, random_seed: u64) -> Result<Asked, ApiError> {
    if fields.get("suffix").is_some_and(|suffix| suffix != "") {
        let text = "suffix: filling in between is not supported; leave it out, or write the model's own marks into the prompt";
        return Err(ApiError::unsupported("suffix", text));
    }
    let prompts = parse_prompts(fields)?;
    let most = i64::try_from(MOST_CHOICES).unwrap_or(i64::MAX);
    let n = fields.integer("n", 1..=most)?.unwrap_or(1);
    if fields.integer("best_of", 1..=most)?.is_some_and(|best_of| best_of != n) {
        let text = "best_of: answers are not chosen from more than n; leave it out";
        return Err(ApiError::unsupported("best_of", text));
    }
    let n = usize::try_from(n).unwrap_or(1);
    if prompts.len().saturating_mul(n) > MOST_CHOICES {
        let text = format!("n: {} prompts, {n} times each, are more than {MOST_CHOICES}", prompts.len());
        return Err(ApiError::invalid("n", text));
    }
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let logprobs = fields.integer("logprobs", 0..=MOST_LOGPROBS)?.and_then(|top| u8::try_from(top).ok());
    let include_usage = match fields.object("stream_options")? {
        Some(options) => {
            Fields::inside(options, "stream_options.").boolean("include_usage")?.unwrap_or(false)
        }
        None => false,
    };
    let request = CompletionRequest {
        model: fields.string("model")?.map(String::from),
        prompts,
        generation: parse_generation(fields, random_seed, logprobs, echo)?,
        n,
        cache_salt: parse_cache_salt(fields)?,
    };
    Ok(Asked { request, echo, logprobs, stream: fields.boolean("stream")?.unwrap_or(false), include_usage })
}

/// The sampling fields, and what means something else here than in a chat.
fn parse_generation(
    fields: &Fields<'_>,
    random_seed: u64,
    logprobs: Option<u8>,
    echo: bool,
) -> Result<Generation, ApiError> {
    let sampling = generation::common(fields, &["grammar", "guided_json"]);
    let mut generation = generation::parse(&Fields::new(&sampling), random_seed)?;
    let max_tokens = fields.integer("max_tokens", 0..=i64::MAX)?;
    generation.max_tokens =
        Some(max_tokens.map_or(DEFAULT_MAX_TOKENS, |most| usize::try_from(most).unwrap_or(usize::MAX)));
    generation.sampling.logprobs = logprobs;
    generation.prompt_logprobs = logprobs.filter(|_| echo);
    Ok(generation)
}

const PROMPT: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";

fn parse_prompts(fields: &Fields<'_>) -> Result<Vec<RawPrompt>, ApiError> {
    let parts = match fields.get("prompt") {
        Some(Value::String(text)) => return Ok(vec![RawPrompt::Text(text.clone())]),
        Some(Value::Array(parts)) if !parts.is_empty() => parts,
        _ => return Err(fields.expected("prompt", PROMPT)),
    };
    if parts[0].is_number() {
        return Ok(vec![parse_tokens("prompt", parts)?]);
    }
    if parts.len() > MOST_CHOICES {
        let text = format!("prompt: {} prompts, but one request takes at most {MOST_CHOICES}", parts.len());
        return Err(ApiError::invalid("prompt", text));
    }
    let parse = |(index, part): (usize, &Value)| {
        let place = format!("prompt[{index}]");
        match part {
            Value::String(text) => Ok(RawPrompt::Text(text.clone())),
            Value::Array(tokens) => parse_tokens(&place, tokens),
            other => Err(wrong(&place, "a string or an array of token ids", other)),
        }
    };
    parts.iter().enumerate().map(parse).collect()
}

fn parse_tokens(place: &str, tokens: &[Value]) -> Result<RawPrompt, ApiError> {
    let parse = |(index, token): (usize, &Value)| {
        let id = token.as_u64().and_then(|token| u32::try_from(token).ok());
        id.ok_or_else(|| wrong(&format!("{place}[{index}]"), "a token id", token))
    };
    tokens.iter().enumerate().map(parse).collect::<Result<_, _>>().map(RawPrompt::Tokens)
}

fn wrong(place: &str, expected: &str, found: &Value) -> ApiError {
    let message = format!("{place}: expected {expected}, found {}", describe(found));
    ApiError { code: Some("invalid_type"), ..ApiError::invalid(place, message) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(value: Value) -> Result<Asked, ApiError> {
        parse(&Fields::new(value.as_object().unwrap()), 7)
    }

    #[test]
    fn a_prompt_is_text_or_tokens_one_or_many() {
        let prompts = |prompt: Value| parsed(json!({ "prompt": prompt })).unwrap().request.prompts;
        let text = |text: &str| RawPrompt::Text(text.into());
        assert_eq!(prompts(json!("a")), [text("a")]);
        assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])), [RawPrompt::Tokens(vec![1, 2])]);
        assert_eq!(
            prompts(json!([[1], [2, 3]])),
            [RawPrompt::Tokens(vec![1]), RawPrompt::Tokens(vec![2, 3])]
        );
    }

    #[test]
    fn wrong_prompts_are_refused_at_their_place() {
        for (prompt, place) in [
            (json!(null), "prompt"),
            (json!([]), "prompt"),
            (json!({}), "prompt"),
            (json!([1, "a"]), "prompt[1]"),
            (json!(["a", 1]), "prompt[1]"),
            (json!([[1], [-2]]), "prompt[1][0]"),
            (json!([[1.5]]), "prompt[0][0]"),
        ] {
            assert_eq!(parsed(json!({ "prompt": prompt })).unwrap_err().param.as_deref(), Some(place));
        }
    }

    #[test]
    fn what_lm_eval_asks_for_scores_the_prompt() {
        let asked = parsed(
            json!({"prompt": [[1, 2]], "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0}),
        );
        let Asked { request, echo, logprobs, .. } = asked.unwrap();
        assert!(echo && logprobs == Some(1));
        let generation = request.generation;
        assert_eq!((generation.prompt_logprobs, generation.sampling.logprobs), (Some(1), Some(1)));
        assert_eq!(generation.max_tokens, Some(1));
        let plain = parsed(json!({"prompt": "a", "logprobs": 0})).unwrap().request.generation;
        assert_eq!((plain.prompt_logprobs, plain.sampling.logprobs), (None, Some(0)));
        assert_eq!(plain.max_tokens, Some(DEFAULT_MAX_TOKENS));
    }

    #[test]
    fn meanings_that_are_not_offered_are_refused_by_name() {
        for (field, value) in [
            ("suffix", json!("end")),
            ("best_of", json!(3)),
            ("n", json!(0)),
            ("n", json!(2000)),
            ("logprobs", json!(6)),
            ("logprobs", json!(true)),
            ("echo", json!(1)),
            ("max_tokens", json!(-1)),
            ("temperature", json!(3)),
        ] {
            let mut request = json!({"prompt": "a"});
            request[field] = value;
            assert_eq!(parsed(request).unwrap_err().param.as_deref(), Some(field), "{field}");
        }
        assert!(parsed(json!({"prompt": "a", "suffix": "", "best_of": 2, "n": 2})).is_ok());
    }
}
