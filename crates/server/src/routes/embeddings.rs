//! `POST /v1/embeddings`: texts or tokens to vectors.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use dormouse_embed::{EmbedError, Embedder, Embeddings, Input};
use serde::Serialize;
use serde_json::Value;

use crate::App;
use crate::body::JsonObject;
use crate::error::ApiError;
use crate::fields::Fields;

/// As at OpenAI.
const MOST_INPUTS: usize = 2048;

pub async fn create(app: App, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let fields = Fields::new(&body);
    let embedder = choose(app.embedder.as_ref(), fields.string("model")?)?;
    let request = parse(&fields, embedder.dimensions())?;
    let _permit = app.admit()?;
    let embeddings = embedder.embed(request.inputs, request.dimensions).await;
    let embeddings = embeddings.map_err(|error| api_error(error, request.shape))?;
    let model = embedder.name().to_owned();
    // Thousands of vectors make megabytes of text: not where other requests wait for their turn.
    let written = tokio::task::spawn_blocking(move || write(embeddings, model, request.encoding));
    let body = written.await.map_err(|error| error.to_string());
    let body = body.and_then(|body| body.map_err(|error| error.to_string())).map_err(|error| {
        let message = format!("the embeddings could not be written as JSON: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message)
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The embedding model, unless the request names another one.
fn choose<'a>(embedder: Option<&'a Embedder>, model: Option<&str>) -> Result<&'a Embedder, ApiError> {
    let not_found = |message: String| ApiError {
        param: Some("model".into()),
        ..ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message)
    };
    let embedder = embedder.ok_or_else(|| {
        let message = "model: no embedding model is served here; start the server with `--embedding-model \
                       all-MiniLM-L6-v2`, or the folder of another one";
        not_found(message.into())
    })?;
    match model.filter(|model| *model != embedder.name()) {
        Some(model) => {
            let message = format!("model: '{model}' gives no embeddings here; '{}' does", embedder.name());
            Err(not_found(message))
        }
        None => Ok(embedder),
    }
}

struct Request {
    inputs: Vec<Input>,
    shape: Shape,
    dimensions: Option<usize>,
    encoding: Encoding,
}

/// How `input` was written, which decides what its parts are called in errors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    /// A string or an array of tokens.
    One,
    /// An array of either.
    Many,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Encoding {
    Float,
    Base64,
}

fn parse(fields: &Fields<'_>, most_dimensions: usize) -> Result<Request, ApiError> {
    let (inputs, shape) = parse_input(fields)?;
    let most = i64::try_from(most_dimensions).unwrap_or(i64::MAX);
    let dimensions = fields.integer("dimensions", 1..=most)?;
    let encoding = match fields.string("encoding_format")? {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(_) => return Err(fields.expected("encoding_format", "\"float\" or \"base64\"")),
    };
    let dimensions = dimensions.and_then(|dimensions| usize::try_from(dimensions).ok());
    Ok(Request { inputs, shape, dimensions, encoding })
}

fn parse_input(fields: &Fields<'_>) -> Result<(Vec<Input>, Shape), ApiError> {
    const EXPECTED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let parts = match fields.get("input") {
        Some(Value::Array(parts)) if !parts.is_empty() => parts,
        Some(Value::String(text)) => return Ok((vec![parse_one("input", text)?], Shape::One)),
        _ => return Err(fields.expected("input", EXPECTED)),
    };
    if parts[0].is_number() {
        return Ok((vec![parse_tokens("input", parts)?], Shape::One));
    }
    if parts.len() > MOST_INPUTS {
        let message = format!("input: {} inputs, but one request takes at most {MOST_INPUTS}", parts.len());
        return Err(ApiError::invalid("input", message));
    }
    let wants_text = parts[0].is_string();
    let parse_part = |(index, part): (usize, &Value)| {
        let name = format!("input[{index}]");
        match part {
            Value::String(text) if wants_text => parse_one(&name, text),
            Value::Array(tokens) if !wants_text => parse_tokens(&name, tokens),
            other => {
                let expected = match index {
                    0 => "a string, a token id or an array of token ids",
                    _ if wants_text => "a string, like the first",
                    _ => "an array of token ids, like the first",
                };
                Err(wrong(&name, expected, other))
            }
        }
    };
    let inputs = parts.iter().enumerate().map(parse_part).collect::<Result<_, _>>()?;
    Ok((inputs, Shape::Many))
}

fn wrong(name: &str, expected: &str, found: &Value) -> ApiError {
    let message = format!("{name}: expected {expected}, found {}", crate::fields::describe(found));
    ApiError { code: Some("invalid_type"), ..ApiError::invalid(name, message) }
}

fn parse_one(name: &str, text: &str) -> Result<Input, ApiError> {
    if text.is_empty() {
        return Err(ApiError::invalid(name, format!("{name}: an empty string has no embedding")));
    }
    Ok(Input::Text(text.to_owned()))
}

fn parse_tokens(name: &str, tokens: &[Value]) -> Result<Input, ApiError> {
    if tokens.is_empty() {
        return Err(ApiError::invalid(name, format!("{name}: an empty array has no embedding")));
    }
    let parse = |(index, token): (usize, &Value)| {
        let token_id = token.as_u64().and_then(|token| u32::try_from(token).ok());
        token_id.ok_or_else(|| wrong(&format!("{name}[{index}]"), "a token id", token))
    };
    tokens.iter().enumerate().map(parse).collect::<Result<_, _>>().map(Input::Tokens)
}

fn api_error(error: EmbedError, shape: Shape) -> ApiError {
    let name = |index: usize| match shape {
        Shape::One => "input".to_owned(),
        Shape::Many => format!("input[{index}]"),
    };
    let (param, code) = match &error {
        EmbedError::TooLong { index, .. } => (name(*index), Some("context_length_exceeded")),
        EmbedError::UnknownToken { index, position, .. } => (format!("{}[{position}]", name(*index)), None),
        EmbedError::NoTokens { index } | EmbedError::Tokenizer { index, .. } => (name(*index), None),
        EmbedError::TooManyTokens { .. } => ("input".to_owned(), None),
        EmbedError::Busy { .. } => {
            let message = error.to_string();
            return ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("too_many_requests"), message);
        }
        EmbedError::Cancelled | EmbedError::NotFinite | EmbedError::Compute(_) | EmbedError::Broken => {
            let message = format!("no embeddings: {error}");
            return ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message);
        }
    };
    ApiError { code, ..ApiError::invalid(param.clone(), format!("{param}: {error}")) }
}

#[derive(Serialize)]
struct Answer {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    /// Of the little-endian bytes of the numbers.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

fn write(embeddings: Embeddings, model: String, encoding: Encoding) -> serde_json::Result<Vec<u8>> {
    let write_vector = |vector: Vec<f32>| match encoding {
        Encoding::Float => Vector::Numbers(vector),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.into_iter().flat_map(f32::to_le_bytes).collect();
            Vector::Base64(BASE64_STANDARD.encode(bytes))
        }
    };
    let vectors = embeddings.vectors.into_iter().enumerate();
    let item = |(index, vector)| Item { object: "embedding", index, embedding: write_vector(vector) };
    let usage = Usage { prompt_tokens: embeddings.tokens, total_tokens: embeddings.tokens };
    serde_json::to_vec(&Answer { object: "list", data: vectors.map(item).collect(), model, usage })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn request(body: Value) -> Result<Request, ApiError> {
        parse(&Fields::new(body.as_object().unwrap()), 384)
    }

    #[test]
    fn every_shape_of_input_is_understood() {
        let text = |text: &str| Input::Text(text.into());
        for (input, inputs, shape) in [
            (json!("a"), vec![text("a")], Shape::One),
            (json!(["a", "b"]), vec![text("a"), text("b")], Shape::Many),
            (json!([1, 2]), vec![Input::Tokens(vec![1, 2])], Shape::One),
            (json!([[1], [2, 3]]), vec![Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])], Shape::Many),
        ] {
            let request = request(json!({ "input": input })).unwrap();
            assert_eq!((request.inputs, request.shape), (inputs, shape));
            assert_eq!((request.dimensions, request.encoding), (None, Encoding::Float));
        }
        let request = request(json!({"input": "a", "dimensions": 64, "encoding_format": "base64"})).unwrap();
        assert_eq!((request.dimensions, request.encoding), (Some(64), Encoding::Base64));
    }

    #[test]
    fn what_cannot_be_embedded_is_named() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({ "input": [] }), "input"),
            (json!({ "input": {} }), "input"),
            (json!({ "input": "" }), "input"),
            (json!({ "input": ["a", ""] }), "input[1]"),
            (json!({ "input": ["a", 5] }), "input[1]"),
            (json!({ "input": [null] }), "input[0]"),
            (json!({ "input": [1, -2] }), "input[1]"),
            (json!({ "input": [[1], "a"] }), "input[1]"),
            (json!({ "input": [[1], []] }), "input[1]"),
            (json!({ "input": [[1], [4294967296u64]] }), "input[1][0]"),
            (json!({ "input": vec!["a"; 2049] }), "input"),
            (json!({ "input": "a", "dimensions": 0 }), "dimensions"),
            (json!({ "input": "a", "dimensions": 385 }), "dimensions"),
            (json!({ "input": "a", "encoding_format": "hex" }), "encoding_format"),
        ] {
            let error = request(body).err().unwrap();
            assert_eq!((error.status, error.param.as_deref()), (StatusCode::BAD_REQUEST, Some(param)));
            assert!(error.message.starts_with(param), "{}", error.message);
        }
    }

    #[test]
    fn what_the_model_refuses_is_named_as_the_request_wrote_it() {
        let long = || EmbedError::TooLong { index: 0, tokens: 300, limit: 256 };
        let error = api_error(long(), Shape::One);
        assert_eq!((error.param.as_deref(), error.code), (Some("input"), Some("context_length_exceeded")));
        assert!(error.message.contains("300") && error.message.contains("256"));
        assert_eq!(api_error(long(), Shape::Many).param.as_deref(), Some("input[0]"));
        let unknown = EmbedError::UnknownToken { index: 2, position: 7, token: 99, last: 9 };
        assert_eq!(api_error(unknown, Shape::Many).param.as_deref(), Some("input[2][7]"));
        assert_eq!(api_error(EmbedError::Busy { waiting: 32 }, Shape::One).status, 429);
        assert_eq!(api_error(EmbedError::Broken, Shape::One).status, 500);
    }

    #[test]
    fn vectors_are_written_as_short_numbers_or_as_their_bytes() {
        let written = |encoding| {
            let embeddings = Embeddings { vectors: vec![vec![0.1, -2.0]], tokens: 3 };
            String::from_utf8(write(embeddings, "m".into(), encoding).unwrap()).unwrap()
        };
        let floats = r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1,-2.0]}],"model":"m","usage":{"prompt_tokens":3,"total_tokens":3}}"#;
        assert_eq!(written(Encoding::Float), floats);
        assert!(written(Encoding::Base64).contains(r#""embedding":"zczMPQAAAMA=""#));
    }

    #[test]
    fn without_an_embedding_model_the_answer_says_how_to_serve_one() {
        let error = choose(None, Some("text-embedding-3-small")).unwrap_err();
        assert_eq!((error.status, error.param.as_deref()), (StatusCode::NOT_FOUND, Some("model")));
        assert!(error.message.contains("--embedding-model"));
    }
}
