//! Conversation messages as clients write them, brought into one shape: `role`, `content` (a string), and the few
//! fields that a chat template may look at.

use dormouse_session::Message;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;

/// More messages than any context of known models can hold with sense.
const MOST_MESSAGES: usize = 100_000;

/// Parses the array `field`: a list of chat messages, at least one.
pub fn parse_list(values: &[Value], field: &str) -> Result<Vec<Message>, ApiError> {
    if values.is_empty() {
        return Err(ApiError::invalid(
            field,
            format!("{field}: expected at least one message, found an empty array"),
        ));
    }
    if values.len() > MOST_MESSAGES {
        let message = format!("{field}: at most {MOST_MESSAGES} messages, found {}", values.len());
        return Err(ApiError::invalid(field, message));
    }
    values.iter().enumerate().map(|(index, value)| parse_one(value, &format!("{field}[{index}]"))).collect()
}

/// Parses `input`: a string is one user message, an array is a list of messages.
pub fn parse_input(fields: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    match fields.get("input") {
        Some(Value::String(text)) if text.is_empty() => {
            Err(ApiError::invalid("input", "input: expected some text, found an empty string"))
        }
        Some(Value::String(text)) => Ok(vec![message("user", text)]),
        Some(Value::Array(values)) => parse_list(values, "input"),
        _ => Err(fields.expected("input", "a string or an array of messages")),
    }
}

/// A plain message.
pub fn message(role: &str, content: &str) -> Message {
    Map::from_iter([("role".into(), role.into()), ("content".into(), content.into())])
}

/// Parses one message; `place` says where it is.
pub fn parse_one(value: &Value, place: &str) -> Result<Message, ApiError> {
    let Some(map) = value.as_object() else {
        let found = crate::fields::describe(value);
        return Err(ApiError::invalid(place, format!("{place}: expected a message object, found {found}")));
    };
    let prefix = format!("{place}.");
    let fields = Fields::inside(map, &prefix);
    if let Some(kind) = fields.string("type")?.filter(|kind| *kind != "message") {
        let name = fields.name("type");
        let text = format!(
            "{name}: items of type {kind:?} are not supported here; send messages with role and content"
        );
        return Err(ApiError::unsupported(name, text));
    }
    let role = match fields.string("role")? {
        // The newer name of the same role; templates know the older one.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        _ => {
            return Err(fields
                .expected("role", "one of \"system\", \"developer\", \"user\", \"assistant\", \"tool\""));
        }
    };
    let calls = fields.list("tool_calls")?.filter(|calls| !calls.is_empty() && role == "assistant");
    let content = match fields.get("content") {
        Some(value) => parse_content(value, &fields.name("content"))?,
        None if role == "assistant" => fields.string("refusal")?.unwrap_or_default().to_string(),
        None => return Err(fields.expected("content", "a string or an array of text parts")),
    };
    let mut parsed = message(role, &content);
    if let Some(calls) = calls {
        let calls = calls
            .iter()
            .enumerate()
            .map(|(index, call)| parse_call(call, &format!("{prefix}tool_calls[{index}]")));
        parsed.insert("tool_calls".into(), calls.collect::<Result<_, _>>()?);
    }
    if role == "tool" && fields.string("tool_call_id")?.is_none_or(str::is_empty) {
        return Err(fields.expected("tool_call_id", "the id of the call that this is the result of"));
    }
    for field in ["name", "tool_call_id"] {
        if let Some(text) = fields.string(field)? {
            parsed.insert(field.into(), text.into());
        }
    }
    // Two names are in use for the same thing; clients send back whichever they read.
    let reasoning = fields.string("reasoning_content")?.or(fields.string("reasoning")?);
    if let Some(text) = reasoning.filter(|_| role == "assistant") {
        parsed.insert("reasoning_content".into(), text.into());
    }
    Ok(parsed)
}

/// A call of an answer that a client sends back: only what templates read of it.
fn parse_call(value: &Value, place: &str) -> Result<Value, ApiError> {
    let prefix = format!("{place}.");
    let Some(map) = value.as_object() else {
        let found = crate::fields::describe(value);
        return Err(ApiError::invalid(place, format!("{place}: expected a tool call object, found {found}")));
    };
    let fields = Fields::inside(map, &prefix);
    if let Some(kind) = fields.string("type")?.filter(|kind| *kind != "function") {
        let name = fields.name("type");
        let text = format!("{name}: calls of type {kind:?} are not supported; send calls of functions");
        return Err(ApiError::unsupported(name, text));
    }
    let function = fields.object("function")?.ok_or_else(|| fields.expected("function", "an object"))?;
    let prefix = format!("{prefix}function.");
    let function = Fields::inside(function, &prefix);
    let name = function.string("name")?.ok_or_else(|| function.expected("name", "a string"))?;
    let arguments = match function.get("arguments") {
        Some(Value::String(text)) => text.clone(),
        // As some clients keep them.
        Some(object @ Value::Object(_)) => object.to_string(),
        None => String::new(),
        Some(_) => return Err(function.expected("arguments", "a string of JSON")),
    };
    Ok(json!({
        "id": fields.string("id")?.unwrap_or_default(), "type": "function",
        "function": { "name": name, "arguments": arguments },
    }))
}

/// A string as it is; text parts joined by line breaks.
pub fn parse_content(value: &Value, place: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => {
            let found = crate::fields::describe(other);
            let text = format!("{place}: expected a string or an array of text parts, found {found}");
            return Err(ApiError::invalid(place, text));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let place = format!("{place}[{index}]");
        let kind = part.get("type").and_then(Value::as_str);
        let key = match kind {
            Some("text" | "input_text" | "output_text") => "text",
            Some("refusal") => "refusal",
            Some(other) => {
                let text =
                    format!("{place}.type: parts of type {other:?} are not supported; send text parts only");
                return Err(ApiError::unsupported(format!("{place}.type"), text));
            }
            None => {
                return Err(ApiError::invalid(
                    &place,
                    format!("{place}: expected an object with type and text"),
                ));
            }
        };
        match part.get(key).and_then(Value::as_str) {
            Some(text) => texts.push(text),
            None => {
                let text = format!("{place}.{key}: expected a string");
                return Err(ApiError::invalid(format!("{place}.{key}"), text));
            }
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Vec<Message>, ApiError> {
        parse_list(value.as_array().unwrap(), "messages")
    }

    #[test]
    fn content_parts_become_one_string() {
        let parsed = parse(json!([{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]));
        assert_eq!(parsed.unwrap(), vec![message("user", "a\nb")]);
    }

    #[test]
    fn an_answer_that_a_client_sends_back_whole_keeps_only_what_templates_read() {
        let parsed = parse(json!([{"role": "assistant", "content": "hi", "refusal": null, "annotations": [],
            "audio": null, "function_call": null, "tool_calls": null, "reasoning": "hm"}]));
        let mut expected = message("assistant", "hi");
        expected.insert("reasoning_content".into(), "hm".into());
        assert_eq!(parsed.unwrap(), vec![expected]);
    }

    #[test]
    fn calls_and_results_keep_what_templates_read() {
        let calls = json!([{"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": {"a": 1}}}]);
        let parsed = parse(json!([{"role": "assistant", "content": null, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "done"}]}]));
        let parsed = parsed.unwrap();
        let expected =
            json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]);
        assert_eq!(parsed[0]["tool_calls"], expected);
        assert_eq!((&parsed[1]["tool_call_id"], &parsed[1]["content"]), (&json!("c"), &json!("done")));
    }

    #[test]
    fn a_wrong_call_is_named_by_its_place() {
        let assistant = |calls: Value| json!([{"role": "assistant", "content": null, "tool_calls": calls}]);
        for (messages, param) in [
            (assistant(json!({})), "messages[0].tool_calls"),
            (assistant(json!([1])), "messages[0].tool_calls[0]"),
            (assistant(json!([{"type": "custom"}])), "messages[0].tool_calls[0].type"),
            (assistant(json!([{"id": "c"}])), "messages[0].tool_calls[0].function"),
            (
                assistant(json!([{"function": {"arguments": "{}"}}])),
                "messages[0].tool_calls[0].function.name",
            ),
            (
                assistant(json!([{"function": {"name": "f", "arguments": 1}}])),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (json!([{"role": "tool", "content": "done"}]), "messages[0].tool_call_id"),
        ] {
            assert_eq!(parse(messages.clone()).unwrap_err().param.as_deref(), Some(param), "{messages}");
        }
    }

    #[test]
    fn developer_is_the_system_role() {
        assert_eq!(
            parse(json!([{"role": "developer", "content": "x"}])).unwrap(),
            vec![message("system", "x")]
        );
    }

    #[test]
    fn images_are_refused_by_name() {
        let error = parse(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]))
            .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages[0].content[0].type"));
        assert_eq!(error.code, Some("unsupported_parameter"));
    }

    #[test]
    fn a_bad_message_is_named_with_its_index() {
        let error =
            parse(json!([{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}])).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages[1].role"));
        let error = parse(json!([{"role": "user", "content": 5}])).unwrap_err();
        assert!(error.message.contains("found the number 5"), "{}", error.message);
        assert_eq!(
            parse(json!([{"role": "user"}])).unwrap_err().param.as_deref(),
            Some("messages[0].content")
        );
        assert_eq!(parse(json!(["hello"])).unwrap_err().param.as_deref(), Some("messages[0]"));
    }

    #[test]
    fn no_messages_at_all_is_an_error() {
        assert_eq!(parse(json!([])).unwrap_err().param.as_deref(), Some("messages"));
    }

    #[test]
    fn a_string_input_is_one_user_message() {
        let map = json!({"input": "hello"});
        let parsed = parse_input(&Fields::new(map.as_object().unwrap())).unwrap();
        assert_eq!(parsed, vec![message("user", "hello")]);
        let none = Map::new();
        assert_eq!(parse_input(&Fields::new(&none)).unwrap_err().param.as_deref(), Some("input"));
    }
}
