//! Conversations with tools as a model's chat template can render them.
//!
//! A template that knows tools gets calls and results as they are, in the shapes that templates expect. For one that does
//! not, or that writes calls in a way which this version does not read, our own words say in the system message what the
//! tools are and how to call them, and calls and results become text: text is what every template shows.

use dormouse_answer::CallSyntax;
use dormouse_models::chat_template::ChatTemplate;
use serde_json::{Map, Value, json};

use crate::answers::Manner;
use crate::api::Message;
use crate::records::{content, message};

/// A conversation as its template gets it.
#[derive(Debug, PartialEq)]
pub(crate) struct Dressed {
    pub messages: Vec<Message>,
    pub tools: Vec<Value>,
    /// Index in `messages` of each message that went in; several may share one.
    pub places: Vec<usize>,
}

/// `as_text`: tools or calls hold text that a template must not get among its own words.
pub(crate) fn dress(
    template: &ChatTemplate,
    messages: Vec<Message>,
    tools: &[Value],
    as_text: bool,
) -> Dressed {
    let with_calls = |message: &Message| message.contains_key("tool_calls") || role(message) == "tool";
    if tools.is_empty() && !messages.iter().any(with_calls) {
        let places = (0..messages.len()).collect();
        return Dressed { messages, tools: Vec::new(), places };
    }
    let manner = Manner::of(template);
    if manner.native && !as_text {
        native(manner, messages, tools)
    } else {
        told(manner.syntax, template.abilities().system, messages, tools)
    }
}

/// For a template that writes tools, calls and results itself.
fn native(manner: Manner, mut messages: Vec<Message>, tools: &[Value]) -> Dressed {
    let mut names = Map::new();
    // Mistral's templates refuse ids of another form.
    let short = matches!(manner.syntax, CallSyntax::Mistral | CallSyntax::MistralArgs);
    let id = |id: &Value| match id.as_str() {
        Some(text) if short && !(text.len() == 9 && text.chars().all(|c| c.is_ascii_alphanumeric())) => {
            Value::from(&blake3::hash(text.as_bytes()).to_hex()[..9])
        }
        _ => id.clone(),
    };
    for message in &mut messages {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let (name, arguments) = call_parts(call);
            let (name, arguments) = (name.to_owned(), arguments.to_owned());
            let parsed = serde_json::from_str::<Map<String, Value>>(&arguments).ok();
            let arguments = match parsed.filter(|_| !manner.arguments_as_text) {
                Some(object) => Value::Object(object),
                None => Value::from(arguments),
            };
            let call_id = call.get("id").cloned().unwrap_or_default();
            if let Some(known) = call_id.as_str() {
                names.insert(known.to_owned(), name.as_str().into());
            }
            *call = json!({
                "id": id(&call_id), "type": "function", "function": { "name": name, "arguments": arguments },
            });
        }
        if let Some(of) = message.get("tool_call_id").cloned() {
            if let Some(name) = of.as_str().and_then(|of| names.get(of)) {
                message.entry("name").or_insert_with(|| name.clone());
            }
            message.insert("tool_call_id".into(), id(&of));
        }
    }
    let places = (0..messages.len()).collect();
    Dressed { messages, tools: tools.iter().map(shape).collect(), places }
}

/// A tool as templates expect it: without what only the API knows, and with parameters.
fn shape(tool: &Value) -> Value {
    let function = tool.get("function").unwrap_or(tool);
    let mut shaped = Map::new();
    shaped.insert("name".into(), function.get("name").cloned().unwrap_or_default());
    let description = function.get("description").filter(|text| !text.is_null()).cloned();
    shaped.insert("description".into(), description.unwrap_or_else(|| "".into()));
    let parameters = function.get("parameters").filter(|schema| !schema.is_null()).cloned();
    let none = || json!({ "type": "object", "properties": {} });
    shaped.insert("parameters".into(), parameters.unwrap_or_else(none));
    json!({ "type": "function", "function": shaped })
}

/// For a template that gets everything as text.
fn told(syntax: CallSyntax, system: bool, messages: Vec<Message>, tools: &[Value]) -> Dressed {
    let mut dressed: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    let mut places = Vec::with_capacity(messages.len());
    let mut first_text = (!tools.is_empty()).then(|| instructions(syntax, tools));
    let takes = |message: &Message| role(message) == if system { "system" } else { "user" };
    // A system message comes first; a question may come later.
    let has_place = if system { messages.first().is_some_and(takes) } else { messages.iter().any(takes) };
    if let Some(text) = first_text.take_if(|_| !has_place) {
        dressed.push(message("system", &text));
    }
    let mut last_was_result = false;
    for mut given in messages {
        let is_result = role(&given) == "tool";
        if is_result {
            let text = format!("<tool_response>\n{}\n</tool_response>", content(&given));
            // Results of parallel calls are one message: many templates want users and assistants to alternate.
            if last_was_result && let Some(last) = dressed.last_mut() {
                let joined = format!("{}\n{text}", content(last));
                last.insert("content".into(), joined.into());
                places.push(dressed.len() - 1);
                continue;
            }
            given = message("user", &text);
        } else if let Some(calls) = given.shift_remove("tool_calls") {
            let calls: Vec<(&str, &str)> = calls.as_array().into_iter().flatten().map(call_parts).collect();
            let calls = syntax.write(calls);
            let text = content(&given).trim_end();
            let text = if text.is_empty() { calls } else { format!("{text}\n{calls}") };
            given.insert("content".into(), text.into());
        }
        if let Some(text) = first_text.take_if(|_| takes(&given)) {
            let joined = match role(&given) {
                "system" => format!("{}\n\n{text}", content(&given).trim_end()),
                _ => format!("{text}\n\n{}", content(&given)),
            };
            given.insert("content".into(), joined.into());
        }
        last_was_result = is_result;
        places.push(dressed.len());
        dressed.push(given);
    }
    Dressed { messages: dressed, tools: Vec::new(), places }
}

/// What a model that was taught no tools is told about them.
fn instructions(syntax: CallSyntax, tools: &[Value]) -> String {
    let mut text =
        String::from("You can call functions. Each line between the tags describes one:\n<tools>\n");
    for tool in tools {
        text += &shape(tool)["function"].to_string();
        text.push('\n');
    }
    let call = syntax.write([("NAME", "{\"PARAMETER\": \"VALUE\"}")]);
    text += &format!(
        "</tools>\nTo call a function, answer with its name and its arguments in exactly this form:\n{call}\n\
         To call several, write one after the other. Their results come back between <tool_response> and \
         </tool_response>. Where no function helps, answer in plain words."
    );
    text
}

/// Name and arguments of a call in OpenAI's shape.
pub(crate) fn call_parts(call: &Value) -> (&str, &str) {
    let part = |name| call.pointer(name).and_then(Value::as_str).unwrap_or("");
    (part("/function/name"), part("/function/arguments"))
}

fn role(message: &Message) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or("")
}

#[cfg(test)]
#[path = "dressing_tests.rs"]
pub(crate) mod tests;
