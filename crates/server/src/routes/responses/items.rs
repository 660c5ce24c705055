//! Items: how OpenAI's Responses and Conversations APIs write messages, calls, their outputs and reasoning.
//!
//! A session keeps one message for an assistant's whole answer; here it is several items: its reasoning, its text, each of
//! its calls. Their ids are the session item's under other prefixes, and the part's index after it.

use dormouse_session::{Item, Message};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::messages;

/// More items than any context of known models can hold with sense.
const MOST_ITEMS: usize = 100_000;

/// The random part of a session's item id, a turn id, or an id made of one.
pub fn core(id: &str) -> &str {
    let bare = id.split_once('_').map_or(id, |(_, bare)| bare);
    bare.split_once('_').map_or(bare, |(core, _)| core)
}

/// The id of a part of a session's item (or of a turn's answer).
pub fn part_id(prefix: &str, id: &str, index: usize) -> String {
    match index {
        0 => format!("{prefix}_{}", core(id)),
        index => format!("{prefix}_{}_{index}", core(id)),
    }
}

/// The messages that a list of items says. Items that belong to one answer (reasoning, text, calls, in this order) become
/// one message, as the session has it.
pub fn to_messages(values: &[Value], field: &str) -> Result<Vec<Message>, ApiError> {
    if values.len() > MOST_ITEMS {
        let text = format!("{field}: at most {MOST_ITEMS} items, found {}", values.len());
        return Err(ApiError::invalid(field, text));
    }
    let mut messages: Vec<Message> = Vec::new();
    for (index, value) in values.iter().enumerate() {
        let place = format!("{field}[{index}]");
        let Some(item) = value.as_object() else {
            let text = format!("{place}: expected an item, found {}", describe(value));
            return Err(ApiError::invalid(place, text));
        };
        let prefix = format!("{place}.");
        let fields = Fields::inside(item, &prefix);
        match fields.string("type")?.unwrap_or("message") {
            "message" => add_message(&mut messages, value, &place)?,
            "function_call" => add_call(&mut messages, &fields)?,
            "function_call_output" => messages.push(call_output(&fields)?),
            "reasoning" => messages.push(reasoning(&fields)?),
            other => {
                let name = fields.name("type");
                let text = format!(
                    "{name}: items of type {other:?} are not supported; send message, function_call, \
                     function_call_output, reasoning or item_reference"
                );
                return Err(ApiError::unsupported(name, text));
            }
        }
    }
    // Reasoning that no answer followed is nothing that a template could show.
    messages.retain(|message| !is_open(message));
    Ok(messages)
}

/// An assistant's message that has only reasoning yet.
fn is_open(message: &Message) -> bool {
    is_assistant(message)
        && text(message, "content").is_empty()
        && !message.contains_key("tool_calls")
        && message.contains_key("reasoning_content")
}

fn is_assistant(message: &Message) -> bool {
    text(message, "role") == "assistant"
}

fn text<'a>(message: &'a Message, field: &str) -> &'a str {
    message.get(field).and_then(Value::as_str).unwrap_or("")
}

fn add_message(messages: &mut Vec<Message>, value: &Value, place: &str) -> Result<(), ApiError> {
    let mut message = messages::parse_one(value, place)?;
    if is_assistant(&message)
        && let Some(open) = messages.pop_if(|last| is_open(last))
        && let Some(reasoning) = open.get("reasoning_content")
    {
        message.insert("reasoning_content".into(), reasoning.clone());
    }
    messages.push(message);
    Ok(())
}

fn add_call(messages: &mut Vec<Message>, fields: &Fields<'_>) -> Result<(), ApiError> {
    let required = |name| fields.string(name)?.ok_or_else(|| fields.expected(name, "a string"));
    let call = json!({
        "id": required("call_id")?,
        "type": "function",
        "function": { "name": required("name")?, "arguments": required("arguments")? },
    });
    if !messages.last().is_some_and(is_assistant) {
        messages.push(messages::message("assistant", ""));
    }
    if let Some(last) = messages.last_mut()
        && let Some(calls) = last.entry("tool_calls").or_insert_with(|| json!([])).as_array_mut()
    {
        calls.push(call);
    }
    Ok(())
}

fn call_output(fields: &Fields<'_>) -> Result<Message, ApiError> {
    let call = fields.string("call_id")?.ok_or_else(|| fields.expected("call_id", "a string"))?;
    let output = fields.get("output").ok_or_else(|| fields.expected("output", "a string"))?;
    let mut message = messages::message("tool", &messages::parse_content(output, &fields.name("output"))?);
    message.insert("tool_call_id".into(), call.into());
    Ok(message)
}

/// The reasoning's own words, else its summary.
fn reasoning(fields: &Fields<'_>) -> Result<Message, ApiError> {
    let mut words = String::new();
    for name in ["content", "summary"] {
        let parts = fields.list(name)?.map(Vec::as_slice).unwrap_or_default();
        if words.is_empty() {
            let texts = parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str));
            words = texts.collect::<Vec<_>>().join("\n");
        }
    }
    let mut message = messages::message("assistant", "");
    message.insert("reasoning_content".into(), words.into());
    Ok(message)
}

/// A session's item as OpenAI's items.
pub fn objects(item: &Item) -> Vec<Value> {
    let message = &item.message;
    match text(message, "role") {
        "assistant" => answer_objects(item),
        "tool" => vec![json!({
            "id": part_id("fco", &item.id, 0),
            "type": "function_call_output",
            "call_id": text(message, "tool_call_id"),
            "output": text(message, "content"),
            "status": "completed",
        })],
        role => vec![json!({
            "id": part_id("msg", &item.id, 0),
            "type": "message",
            "role": role,
            "status": "completed",
            "content": [{ "type": "input_text", "text": text(message, "content") }],
        })],
    }
}

fn answer_objects(item: &Item) -> Vec<Value> {
    let message = &item.message;
    let (reasoning, content) = (text(message, "reasoning_content"), text(message, "content"));
    let calls = message.get("tool_calls").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut objects = Vec::new();
    if !reasoning.is_empty() {
        objects.push(reasoning_object(&part_id("rs", &item.id, 0), reasoning, "completed"));
    }
    if !content.is_empty() || calls.is_empty() {
        let id = part_id("msg", &item.id, objects.len());
        objects.push(message_object(&id, content, Vec::new(), "completed"));
    }
    for call in calls {
        let function = call.get("function").and_then(Value::as_object);
        let field = |name| function.map_or("", |function| text(function, name));
        let id = part_id("fc", &item.id, objects.len());
        let call_id = call.get("id").and_then(Value::as_str).unwrap_or("");
        objects.push(call_object(&id, call_id, field("name"), field("arguments"), "completed"));
    }
    objects
}

pub fn message_object(id: &str, text: &str, logprobs: Vec<Value>, status: &str) -> Value {
    let content = json!([text_part(text, logprobs)]);
    json!({ "id": id, "type": "message", "role": "assistant", "status": status, "content": content })
}

pub fn text_part(text: &str, logprobs: Vec<Value>) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
}

pub fn reasoning_object(id: &str, text: &str, status: &str) -> Value {
    let content = json!([{ "type": "reasoning_text", "text": text }]);
    json!({ "id": id, "type": "reasoning", "summary": [], "content": content, "status": status })
}

pub fn call_object(id: &str, call_id: &str, name: &str, arguments: &str, status: &str) -> Value {
    json!({
        "id": id, "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments,
        "status": status,
    })
}

/// What remains of a session's item without the part that has this id: None where nothing does.
pub fn without(item: &Item, id: &str) -> Option<Message> {
    let parts = answer_objects(item);
    let part = parts.iter().find(|part| part["id"] == id).filter(|_| is_assistant(&item.message))?;
    let mut message: Map<String, Value> = item.message.clone();
    match part["type"].as_str() {
        Some("reasoning") => drop(message.remove("reasoning_content")),
        Some("message") => drop(message.insert("content".into(), "".into())),
        _ => {
            let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut)?;
            calls.retain(|call| call.get("id") != part.get("call_id"));
            if calls.is_empty() {
                message.remove("tool_calls");
            }
        }
    }
    let remains = !text(&message, "content").is_empty() || message.contains_key("tool_calls");
    remains.then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(message: Value) -> Item {
        Item {
            id: "item_0a".into(),
            turn: None,
            message: message.as_object().unwrap().clone(),
            token_start: 0,
            token_end: 0,
            created_at: 0,
        }
    }

    fn whole_answer() -> Item {
        let call =
            |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        item(json!({"role": "assistant", "content": "text", "reasoning_content": "hm",
            "tool_calls": [call("call_1"), call("call_2")]}))
    }

    #[test]
    fn an_answer_taken_apart_into_items_joins_to_the_same_message() {
        let item = whole_answer();
        let parts = objects(&item);
        let kinds: Vec<&str> = parts.iter().map(|part| part["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
        assert_eq!(parts[0]["id"], "rs_0a");
        assert_eq!(parts[3]["id"], "fc_0a_3");
        assert_eq!(to_messages(&parts, "input").unwrap(), vec![item.message]);
    }

    #[test]
    fn plain_messages_come_in_several_spellings() {
        let parsed = to_messages(
            &[
                json!({"role": "developer", "content": "be kind"}),
                json!({"role": "user", "content": [{"type": "input_text", "text": "hi"}]}),
                json!({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                    "content": [{"type": "output_text", "text": "hello", "annotations": []}]}),
                json!({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "7"}]}),
            ],
            "input",
        )
        .unwrap();
        let roles: Vec<&str> = parsed.iter().map(|message| text(message, "role")).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!(text(&parsed[3], "content"), "7");
    }

    #[test]
    fn reasoning_without_an_answer_is_dropped() {
        let values = [
            json!({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}),
            json!({"role": "user", "content": "hi"}),
        ];
        assert_eq!(to_messages(&values, "input").unwrap().len(), 1);
    }

    #[test]
    fn other_items_are_refused_by_name_and_place() {
        let error = to_messages(&[json!({"type": "web_search_call"})], "input").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[0].type"));
        let error = to_messages(&[json!({"type": "function_call", "name": "f"})], "input").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[0].call_id"));
        assert_eq!(to_messages(&[json!(5)], "items").unwrap_err().param.as_deref(), Some("items[0]"));
    }

    #[test]
    fn a_part_of_an_answer_can_be_taken_out() {
        let item = whole_answer();
        let left = without(&item, "fc_0a_2").unwrap();
        assert_eq!(left["tool_calls"].as_array().unwrap().len(), 1);
        assert!(!without(&item, "rs_0a").unwrap().contains_key("reasoning_content"));
        assert_eq!(without(&item, "msg_0a_1").unwrap()["content"], "");
        let alone = self::item(json!({"role": "assistant", "content": "text"}));
        assert_eq!(without(&alone, "msg_0a"), None);
    }

    #[test]
    fn ids_lead_back_to_the_item_that_they_are_part_of() {
        for id in ["item_0a", "msg_0a", "fc_0a_3", "turn_0a"] {
            assert_eq!(core(id), "0a");
        }
    }
}
