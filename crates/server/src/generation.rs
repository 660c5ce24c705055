//! How an answer is to be generated: the request fields that chat completions and session turns have in common.

use dormouse_answer::OutputFormat;
use dormouse_engine::Sampling;
use dormouse_session::Generation;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;

const MOST_STOPS: usize = 16;
const MOST_STOP_BYTES: usize = 1024;
const MOST_BIASES: usize = 4096;

/// Fields that are called the same at every endpoint.
const COMMON: [&str; 11] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "ignore_eos",
];

/// Those fields of a request, and `more`: the rest means something else at its endpoint than in a chat.
pub fn common(fields: &Fields<'_>, more: &[&str]) -> Map<String, Value> {
    let names = COMMON.iter().chain(more);
    names.filter_map(|name| Some(((*name).to_owned(), fields.get(name)?.clone()))).collect()
}

/// Reads the sampling fields; `default_seed` serves when the request has no `seed`.
pub fn parse(fields: &Fields<'_>, default_seed: u64) -> Result<Generation, ApiError> {
    refuse_unsupported(fields)?;
    let standard = Sampling::default();
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(standard.temperature),
        // -1 is how some clients write "off".
        top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map_or(0, |k| k.max(0) as u32),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(standard.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(standard.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=100.0)?
            .unwrap_or(standard.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(standard.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(standard.frequency_penalty),
        logit_bias: logit_bias(fields)?,
        seed: fields.seed("seed")?.unwrap_or(default_seed),
        logprobs: logprobs(fields)?,
    };
    let most = i64::MAX;
    let max_completion_tokens = fields.integer("max_completion_tokens", 1..=most)?;
    let max_tokens = fields.integer("max_tokens", 1..=most)?;
    Ok(Generation {
        sampling,
        max_tokens: max_completion_tokens
            .or(max_tokens)
            .map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX)),
        stop: stop(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        format: output_format(fields)?,
        ..Generation::default()
    })
}

/// Fields that would change what an answer means, and that this version cannot honour.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    if fields.list("functions")?.is_some_and(|functions| !functions.is_empty()) {
        return Err(ApiError::unsupported("functions", "functions: not supported; its newer form is tools"));
    }
    if let Some(modalities) = fields.list("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported("modalities", "modalities: only [\"text\"] is supported"));
    }
    for name in [
        "audio",
        "web_search_options",
        "moderation",
        "grammar",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ] {
        if fields.get(name).is_some() {
            return Err(ApiError::unsupported(name, format!("{name}: not supported; leave it out")));
        }
    }
    Ok(())
}

/// `response_format`. Whether a schema can be honoured is known when the grammar of the answer is made.
fn output_format(fields: &Fields<'_>) -> Result<OutputFormat, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(OutputFormat::Text) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(OutputFormat::Text),
        Some("json_object") => Ok(match format.get("schema").filter(|schema| !schema.is_null()) {
            None => OutputFormat::JsonObject,
            // As llama.cpp's server and others spell a schema.
            Some(schema) => {
                OutputFormat::JsonSchema { name: "answer".into(), schema: schema.clone(), strict: false }
            }
        }),
        Some("json_schema") => {
            let outer = Fields::inside(format, "response_format.");
            let Some(named) = outer.object("json_schema")? else {
                let text = "response_format.json_schema: expected an object with name and schema";
                return Err(ApiError::invalid("response_format.json_schema", text));
            };
            json_schema(named, "response_format.json_schema.")
        }
        _ => {
            let kinds = "\"text\", \"json_object\" or \"json_schema\"";
            Err(Fields::inside(format, "response_format.").expected("type", kinds))
        }
    }
}

/// `{name, schema, strict?}`; `place` is what the names of its fields begin with in errors.
pub fn json_schema(named: &Map<String, Value>, place: &str) -> Result<OutputFormat, ApiError> {
    const MOST_NAME_BYTES: usize = 64;
    let inner = Fields::inside(named, place);
    let name = inner.string("name")?.unwrap_or("");
    let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if name.is_empty() || name.len() > MOST_NAME_BYTES || !name.bytes().all(usual) {
        let param = format!("{place}name");
        let text =
            format!("{param}: expected 1 to {MOST_NAME_BYTES} letters, digits, _ or -, found {name:?}");
        return Err(ApiError::invalid(param, text));
    }
    Ok(OutputFormat::JsonSchema {
        name: name.to_owned(),
        // Without a schema the answer is any JSON.
        schema: named.get("schema").filter(|schema| !schema.is_null()).cloned().unwrap_or(Value::Bool(true)),
        strict: inner.boolean("strict")?.unwrap_or(false),
    })
}

/// `stop`: a string or a list of them, none empty.
fn stop(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let stops: Vec<&str> = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(values)) => {
            let texts: Option<Vec<&str>> = values.iter().map(Value::as_str).collect();
            texts.ok_or_else(|| {
                ApiError::invalid("stop", "stop: expected strings, found something else in the array")
            })?
        }
        Some(_) => return Err(fields.expected("stop", "a string or an array of strings")),
    };
    if stops.len() > MOST_STOPS {
        let text = format!("stop: at most {MOST_STOPS} strings, found {}", stops.len());
        return Err(ApiError::invalid("stop", text));
    }
    if let Some(bad) = stops.iter().find(|stop| stop.is_empty() || stop.len() > MOST_STOP_BYTES) {
        let text =
            format!("stop: expected strings of 1 to {MOST_STOP_BYTES} bytes, found one of {}", bad.len());
        return Err(ApiError::invalid("stop", text));
    }
    Ok(stops.into_iter().map(String::from).collect())
}

/// `logit_bias`: token ids (as strings, JSON has no other keys) to numbers from -100 to 100.
fn logit_bias(fields: &Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if map.len() > MOST_BIASES {
        let text = format!("logit_bias: at most {MOST_BIASES} tokens, found {}", map.len());
        return Err(ApiError::invalid("logit_bias", text));
    }
    let inner = Fields::inside(map, "logit_bias.");
    let mut biases = Vec::with_capacity(map.len());
    for token in map.keys() {
        let id = token.parse().map_err(|_| {
            ApiError::invalid(
                "logit_bias",
                format!("logit_bias: expected token ids as keys, found {token:?}"),
            )
        })?;
        biases.extend(inner.number(token, -100.0..=100.0)?.map(|bias| (id, bias)));
    }
    Ok(biases)
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<u8>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    match fields.integer("top_logprobs", 0..=20)? {
        Some(top) if wanted => Ok(Some(top as u8)),
        Some(0) | None => Ok(wanted.then_some(0)),
        Some(_) => Err(ApiError::invalid("top_logprobs", "top_logprobs: needs \"logprobs\": true beside it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(value: Value) -> Result<Generation, ApiError> {
        parse(&Fields::new(value.as_object().unwrap()), 7)
    }

    #[test]
    fn an_empty_request_has_openais_defaults() {
        let generation = parsed(json!({})).unwrap();
        assert_eq!(generation.sampling, Sampling { seed: 7, ..Sampling::default() });
        assert_eq!((generation.max_tokens, generation.stop.len()), (None, 0));
    }

    #[test]
    fn every_field_reaches_the_sampler() {
        let generation = parsed(json!({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.25, "seed": 3,
            "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"17": -100},
            "logprobs": true, "top_logprobs": 2, "max_tokens": 9, "max_completion_tokens": 8, "stop": "END",
            "ignore_eos": true}))
        .unwrap();
        let expected = Sampling {
            temperature: 0.0,
            top_k: 5,
            top_p: 0.5,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(17, -100.0)],
            seed: 3,
            logprobs: Some(2),
        };
        assert_eq!(generation.sampling, expected);
        assert_eq!(
            (generation.max_tokens, generation.stop, generation.ignore_eos),
            (Some(8), vec!["END".into()], true)
        );
    }

    #[test]
    fn response_formats_are_read_and_wrong_ones_named() {
        let read = |format: Value| parsed(json!({ "response_format": format })).map(|it| it.format);
        assert_eq!(read(json!({"type": "json_object"})).unwrap(), OutputFormat::JsonObject);
        let schema = json!({"type": "object"});
        let beside =
            OutputFormat::JsonSchema { name: "answer".into(), schema: schema.clone(), strict: false };
        assert_eq!(read(json!({"type": "json_object", "schema": schema})).unwrap(), beside);
        let named = json!({"name": "answer", "schema": schema, "strict": true, "description": "d"});
        let expected = OutputFormat::JsonSchema { name: "answer".into(), schema, strict: true };
        assert_eq!(read(json!({"type": "json_schema", "json_schema": named})).unwrap(), expected);
        for (param, format) in [
            ("response_format.type", json!({"type": "xml"})),
            ("response_format", json!("json_object")),
            ("response_format.json_schema", json!({"type": "json_schema"})),
            (
                "response_format.json_schema.name",
                json!({"type": "json_schema", "json_schema": {"schema": {}}}),
            ),
            (
                "response_format.json_schema.name",
                json!({"type": "json_schema", "json_schema": {"name": "a b"}}),
            ),
            (
                "response_format.json_schema.strict",
                json!({"type": "json_schema", "json_schema": {"name": "a", "strict": "yes"}}),
            ),
        ] {
            let error = read(format).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (field, value) in [
            ("temperature", json!(2.1)),
            ("top_p", json!(-0.1)),
            ("top_k", json!("many")),
            ("max_tokens", json!(0)),
            ("seed", json!(1.5)),
            ("top_logprobs", json!(21)),
            ("stop", json!(vec!["x"; 17])),
            ("stop", json!([""])),
            ("stop", json!([1])),
            ("stop", json!(1)),
            ("frequency_penalty", json!(true)),
            ("ignore_eos", json!("yes")),
        ] {
            let error = parsed(json!({ field: value })).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field), "{}", error.message);
            assert!(error.message.starts_with(field), "{}", error.message);
        }
        let error = parsed(json!({"logit_bias": {"hello": 1}})).unwrap_err();
        assert!(error.message.contains("\"hello\""));
    }

    #[test]
    fn meanings_that_are_not_supported_are_refused_and_harmless_spellings_accepted() {
        for (field, value) in [
            ("functions", json!([{"name": "f"}])),
            ("structured_outputs", json!({})),
            ("modalities", json!(["text", "audio"])),
            ("audio", json!({})),
        ] {
            let error = parsed(json!({ field: value })).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code), (Some(field), Some("unsupported_parameter")));
        }
        let harmless = json!({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
            "modalities": ["text"], "audio": null, "user": "me", "something_new": {}});
        assert!(parsed(harmless).is_ok());
    }
}
