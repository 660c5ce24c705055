//! `POST /v1/responses`: from JSON to a [`ResponseRequest`].

use dormouse_answer::{OutputFormat, ToolChoice};
use dormouse_session::{Generation, ResponseRequest};
use serde_json::{Map, Value, json};

use super::super::sessions::{parse_cache_salt, parse_metadata};
use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::routes::conversations::session_id;
use crate::{generation, tools};

/// Fields that would change what an answer means, and that this version cannot honour.
const UNSUPPORTED: [&str; 4] = ["prompt", "context_management", "moderation", "access_programs"];
/// What `include` may name. Only log-probabilities are there to be included; of the others there is nothing.
const INCLUDABLE: [&str; 8] = [
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const SERVICE_TIERS: [&str; 7] = ["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"];
/// OpenAI's bound for keys and identifiers.
const MOST_LABEL_CHARACTERS: usize = 512;

/// A parsed request; its input is still in OpenAI's items, as some of them may name stored ones.
#[derive(Debug)]
pub struct Parsed {
    pub request: ResponseRequest,
    pub input: Vec<Value>,
    pub stream: bool,
}

pub fn parse(fields: &Fields<'_>, random_seed: u64) -> Result<Parsed, ApiError> {
    for name in UNSUPPORTED {
        let is_empty = fields.get(name).and_then(Value::as_array).is_some_and(Vec::is_empty);
        if fields.get(name).is_some() && !is_empty {
            return Err(ApiError::unsupported(name, format!("{name}: not supported; leave it out")));
        }
    }
    // Ignored, it would let an answer run to the end of the context.
    let misnamed =
        ["max_tokens", "max_completion_tokens"].into_iter().find(|name| fields.get(name).is_some());
    if let Some(name) = misnamed {
        return Err(ApiError::unsupported(
            name,
            format!("{name}: not supported here; use max_output_tokens"),
        ));
    }
    let (stream, background) = (flag(fields, "stream", false)?, flag(fields, "background", false)?);
    let store = flag(fields, "store", true)?;
    if background && !store {
        let text =
            "background: the answer of a background response is fetched later, so it needs \"store\": true";
        return Err(ApiError::invalid("background", text));
    }
    let previous = fields.string("previous_response_id")?;
    let conversation = conversation(fields)?;
    if previous.is_some() && conversation.is_some() {
        let text = "previous_response_id: a response follows either another one or a conversation, not both";
        return Err(ApiError::invalid("previous_response_id", text));
    }
    let (tools, shown_tools) = tools(fields)?;
    let generation = generation(fields, random_seed)?;
    let instructions = fields.string("instructions")?;
    let truncate = one_of(fields, "truncation", &["auto", "disabled"])? == Some("auto");
    let logprobs = generation.sampling.logprobs;
    let mut object = echo(fields, &generation)?;
    let mut put = |name: &str, value: Value| object.insert(name.into(), value);
    put("background", background.into());
    put("store", store.into());
    put("instructions", instructions.into());
    put("previous_response_id", previous.into());
    put("conversation", conversation.as_ref().map_or(Value::Null, |id| json!({ "id": id })));
    put("tools", shown_tools.into());
    put("truncation", if truncate { "auto" } else { "disabled" }.into());
    put("top_logprobs", logprobs.unwrap_or(0).into());
    let record = json!({ "object": object, "logprobs": logprobs.is_some() });
    Ok(Parsed {
        request: ResponseRequest {
            model: fields.string("model")?.map(String::from),
            instructions: instructions.map(String::from),
            input: Vec::new(),
            previous: previous.map(String::from),
            conversation: conversation.as_deref().map(session_id),
            tools,
            cache_salt: parse_cache_salt(fields)?,
            generation,
            background,
            store,
            truncate,
            record: record.as_object().cloned().unwrap_or_default(),
        },
        input: input(fields)?,
        stream,
    })
}

/// A string is one message of the user's.
fn input(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    match fields.get("input") {
        Some(Value::String(text)) if !text.is_empty() => Ok(vec![json!({ "role": "user", "content": text })]),
        Some(Value::Array(items)) if !items.is_empty() => Ok(items.clone()),
        Some(Value::String(_) | Value::Array(_)) => {
            Err(ApiError::invalid("input", "input: expected at least one item or some text, found nothing"))
        }
        _ => Err(fields.expected("input", "a string or an array of items")),
    }
}

fn flag(fields: &Fields<'_>, name: &str, default: bool) -> Result<bool, ApiError> {
    Ok(fields.boolean(name)?.unwrap_or(default))
}

fn one_of<'a>(fields: &Fields<'a>, name: &str, allowed: &[&str]) -> Result<Option<&'a str>, ApiError> {
    match fields.string(name)? {
        Some(value) if !allowed.contains(&value) => {
            Err(fields.expected(name, &format!("one of {}", allowed.join(", "))))
        }
        value => Ok(value),
    }
}

/// A conversation's id, given as such or as an object.
fn conversation(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    let id = match fields.get("conversation") {
        None => return Ok(None),
        Some(Value::Object(object)) => object.get("id").and_then(Value::as_str),
        Some(value) => value.as_str(),
    };
    let id =
        id.ok_or_else(|| fields.expected("conversation", "a conversation's id, or an object with it"))?;
    Ok(Some(id.to_owned()))
}

/// The fields of sampling, of the form and of the calls.
fn generation(fields: &Fields<'_>, random_seed: u64) -> Result<Generation, ApiError> {
    let mut sampling = generation::common(fields, &["chat_template_kwargs"]);
    let mut wants_logprobs = false;
    for item in fields.list("include")?.map(Vec::as_slice).unwrap_or_default() {
        match item.as_str() {
            Some("message.output_text.logprobs") => wants_logprobs = true,
            Some(known) if INCLUDABLE.contains(&known) => {}
            _ => return Err(fields.expected("include", &format!("names among {}", INCLUDABLE.join(", ")))),
        }
    }
    let top = fields.integer("top_logprobs", 0..=20)?;
    if wants_logprobs || top.is_some_and(|top| top > 0) {
        sampling.insert("logprobs".into(), true.into());
        sampling.insert("top_logprobs".into(), top.unwrap_or(0).into());
    }
    let reasoning = fields.object("reasoning")?;
    if let Some(effort) = reasoning.and_then(|reasoning| reasoning.get("effort")).filter(|it| !it.is_null()) {
        sampling.insert("reasoning_effort".into(), effort.clone());
    }
    let sampling = Fields::new(&sampling);
    let mut generation = generation::parse(&sampling, random_seed)?;
    tools::choose(&sampling, &mut generation)?;
    let max_tokens = fields.integer("max_output_tokens", 1..=i64::MAX)?;
    Ok(Generation {
        max_tokens: max_tokens.map(|most| usize::try_from(most).unwrap_or(usize::MAX)),
        format: format(fields)?,
        tool_choice: tool_choice(fields)?,
        parallel_tool_calls: flag(fields, "parallel_tool_calls", true)?,
        ..generation
    })
}

fn format(fields: &Fields<'_>) -> Result<OutputFormat, ApiError> {
    let Some(text) = fields.object("text")? else { return Ok(OutputFormat::Text) };
    let text = Fields::inside(text, "text.");
    let Some(format) = text.object("format")? else { return Ok(OutputFormat::Text) };
    let inner = Fields::inside(format, "text.format.");
    match inner.string("type")? {
        Some("text") => Ok(OutputFormat::Text),
        Some("json_object") => Ok(OutputFormat::JsonObject),
        Some("json_schema") => {
            inner.object("schema")?.ok_or_else(|| inner.expected("schema", "a JSON schema"))?;
            generation::json_schema(format, "text.format.")
        }
        _ => Err(inner.expected("type", "one of text, json_object, json_schema")),
    }
}

fn tool_choice(fields: &Fields<'_>) -> Result<ToolChoice, ApiError> {
    const EXPECTED: &str = "none, auto, required, {\"type\": \"function\", \"name\"} or {\"type\": \"allowed_tools\", \"mode\", \"tools\"}";
    let object = match fields.get("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(choice)) => {
            return match choice.as_str() {
                "none" => Ok(ToolChoice::None),
                "auto" => Ok(ToolChoice::Auto),
                "required" => Ok(ToolChoice::Required),
                _ => Err(fields.expected("tool_choice", EXPECTED)),
            };
        }
        Some(Value::Object(object)) => Fields::inside(object, "tool_choice."),
        Some(_) => return Err(fields.expected("tool_choice", EXPECTED)),
    };
    match object.string("type")? {
        Some("function") => {
            let name = object.string("name")?.ok_or_else(|| object.expected("name", "a string"))?;
            Ok(ToolChoice::Function(name.to_owned()))
        }
        Some("allowed_tools") => {
            let listed = object.list("tools")?.ok_or_else(|| object.expected("tools", "an array"))?;
            let name = |tool: &Value| tool.get("name").and_then(Value::as_str).map(String::from);
            let names: Option<Vec<String>> = listed.iter().map(name).collect();
            let names = names.ok_or_else(|| object.expected("tools", "an array of functions with names"))?;
            let required = one_of(&object, "mode", &["auto", "required"])? == Some("required");
            Ok(ToolChoice::Allowed { names, required })
        }
        Some(other) => {
            let text = format!("tool_choice.type: {other:?} is not supported; expected {EXPECTED}");
            Err(ApiError::unsupported("tool_choice.type", text))
        }
        None => Err(fields.expected("tool_choice", EXPECTED)),
    }
}

/// The tools in the shape of chat completions, which templates know, and as they are shown again.
fn tools(fields: &Fields<'_>) -> Result<(Vec<Value>, Vec<Value>), ApiError> {
    let list = fields.list("tools")?.map(Vec::as_slice).unwrap_or_default();
    tools::check_count(list, "tools")?;
    let (mut parsed, mut shown) = (Vec::new(), Vec::new());
    for (index, tool) in list.iter().enumerate() {
        let name = format!("tools[{index}]");
        let Some(map) = tool.as_object() else {
            let text = format!("{name}: expected a tool object, found {}", describe(tool));
            return Err(ApiError::invalid(name, text));
        };
        let place = format!("{name}.");
        tools::check_type(&Fields::inside(map, &place))?;
        let tool = tools::parse_function(map, &place)?;
        let field = |name: &str| tool["function"].get(name);
        shown.push(json!({
            "type": "function",
            "name": field("name"),
            "description": field("description"),
            "parameters": field("parameters"),
            "strict": field("strict"),
        }));
        tools::add(&mut parsed, tool, &place)?;
    }
    Ok((parsed, shown))
}

/// What the object repeats of the request, with what holds where the request says nothing.
fn echo(fields: &Fields<'_>, generation: &Generation) -> Result<Map<String, Value>, ApiError> {
    let mut object = Map::new();
    let sampling = &generation.sampling;
    for (name, value) in [
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ] {
        // As it was written: 0.7 has no exact float of 32 bits.
        object.insert(name.into(), fields.get(name).cloned().unwrap_or_else(|| value.into()));
    }
    for name in ["max_output_tokens", "max_tool_calls"] {
        object.insert(name.into(), fields.integer(name, 1..=i64::MAX)?.into());
    }
    for name in ["prompt_cache_key", "safety_identifier", "user"] {
        let label = fields.string(name)?;
        if label.is_some_and(|label| label.chars().count() > MOST_LABEL_CHARACTERS) {
            let text = format!("{name}: at most {MOST_LABEL_CHARACTERS} characters");
            return Err(ApiError::invalid(name, text));
        }
        object.insert(name.into(), label.into());
    }
    one_of(fields, "service_tier", &SERVICE_TIERS)?;
    object.insert("service_tier".into(), "default".into());
    object.insert("metadata".into(), Value::Object(parse_metadata(fields)?.unwrap_or_default()));
    object.insert("parallel_tool_calls".into(), generation.parallel_tool_calls.into());
    object.insert("tool_choice".into(), fields.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()));
    let mut text = fields.object("text")?.cloned().unwrap_or_default();
    if text.get("format").is_none_or(Value::is_null) {
        text.insert("format".into(), json!({ "type": "text" }));
    }
    object.insert("text".into(), Value::Object(text));
    let mut reasoning = Map::from_iter([("effort".into(), Value::Null), ("summary".into(), Value::Null)]);
    reasoning.extend(fields.object("reasoning")?.cloned().unwrap_or_default());
    object.insert("reasoning".into(), Value::Object(reasoning));
    if let Some(options) = fields.object("prompt_cache_options")? {
        let mut shown = Map::from_iter([("mode".into(), "implicit".into()), ("ttl".into(), "30m".into())]);
        shown.extend(options.clone());
        object.insert("prompt_cache_options".into(), Value::Object(shown));
    }
    if let Some(retention) = one_of(fields, "prompt_cache_retention", &["in_memory", "24h"])? {
        object.insert("prompt_cache_retention".into(), retention.into());
    }
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(value: Value) -> Result<Parsed, ApiError> {
        parse(&Fields::new(value.as_object().unwrap()), 7)
    }

    fn with(field: &str, value: Value) -> Value {
        json!({ "input": "hi", field: value })
    }

    #[test]
    fn a_plain_request_has_openais_defaults() {
        let parsed = parsed(json!({"model": "m", "input": "hi"})).unwrap();
        let request = parsed.request;
        assert_eq!(request.model.as_deref(), Some("m"));
        assert!(request.store && !request.background && !request.truncate && !parsed.stream);
        assert_eq!(parsed.input, [json!({"role": "user", "content": "hi"})]);
        let object = &request.record["object"];
        for (name, expected) in [
            ("tool_choice", json!("auto")),
            ("parallel_tool_calls", json!(true)),
            ("truncation", json!("disabled")),
            ("text", json!({"format": {"type": "text"}})),
            ("metadata", json!({})),
            ("tools", json!([])),
            ("temperature", json!(1.0)),
            ("conversation", json!(null)),
        ] {
            assert_eq!(object[name], expected, "{name}");
        }
    }

    #[test]
    fn tools_are_shown_as_they_came_and_given_on_in_the_shape_of_chat() {
        let tool = json!({"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true});
        let request = parsed(with("tools", json!([tool]))).unwrap().request;
        assert_eq!(request.tools[0]["function"]["name"], "f");
        assert_eq!(request.record["object"]["tools"][0]["name"], "f");
        assert_eq!(request.record["object"]["tools"][0]["strict"], true);
    }

    #[test]
    fn choices_and_formats_reach_the_generation() {
        let choice = |value| parsed(with("tool_choice", value)).unwrap().request.generation.tool_choice;
        assert_eq!(choice(json!("required")), ToolChoice::Required);
        assert_eq!(choice(json!({"type": "function", "name": "f"})), ToolChoice::Function("f".into()));
        let allowed = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]});
        assert_eq!(choice(allowed), ToolChoice::Allowed { names: vec!["f".into()], required: true });
        let format = json!({"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": true}});
        let generation = parsed(with("text", format)).unwrap().request.generation;
        assert!(matches!(generation.format, OutputFormat::JsonSchema { strict: true, .. }));
    }

    #[test]
    fn logprobs_are_computed_when_they_are_asked_for() {
        let logprobs = |value: Value| parsed(value).unwrap().request.generation.sampling.logprobs;
        assert_eq!(logprobs(json!({"input": "hi"})), None);
        assert_eq!(logprobs(with("include", json!(["message.output_text.logprobs"]))), Some(0));
        assert_eq!(logprobs(with("top_logprobs", json!(3))), Some(3));
        assert_eq!(logprobs(with("include", json!(["reasoning.encrypted_content"]))), None);
    }

    #[test]
    fn a_wrong_field_is_refused_by_name() {
        for (field, value, param) in [
            ("prompt", json!({"id": "p"}), "prompt"),
            ("context_management", json!([{"type": "compaction"}]), "context_management"),
            ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
            ("tools", json!([{"type": "function"}]), "tools[0].name"),
            ("tool_choice", json!({"type": "mcp"}), "tool_choice.type"),
            ("tool_choice", json!("maybe"), "tool_choice"),
            ("text", json!({"format": {"type": "xml"}}), "text.format.type"),
            ("text", json!({"format": {"type": "json_schema", "name": "n"}}), "text.format.schema"),
            (
                "text",
                json!({"format": {"type": "json_schema", "schema": {}, "name": "two words"}}),
                "text.format.name",
            ),
            ("text", json!({"format": {"type": "json_schema", "schema": {}}}), "text.format.name"),
            ("include", json!(["everything"]), "include"),
            ("truncation", json!("some"), "truncation"),
            ("max_output_tokens", json!(0), "max_output_tokens"),
            ("metadata", json!({"k": 1}), "metadata"),
            ("conversation", json!(5), "conversation"),
            ("temperature", json!(3), "temperature"),
            ("service_tier", json!("gold"), "service_tier"),
            ("input", json!([]), "input"),
        ] {
            let error = parsed(with(field, value)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        }
        assert!(parsed(with("context_management", json!([]))).is_ok());
    }

    #[test]
    fn fields_that_exclude_each_other_are_refused() {
        let both = json!({"input": "hi", "previous_response_id": "resp_1", "conversation": "conv_1"});
        assert_eq!(parsed(both).unwrap_err().param.as_deref(), Some("previous_response_id"));
        let unstored = json!({"input": "hi", "background": true, "store": false});
        assert_eq!(parsed(unstored).unwrap_err().param.as_deref(), Some("background"));
    }
}
