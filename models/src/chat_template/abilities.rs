//! What a chat template shows of a conversation, found out by rendering one.

use serde_json::{Map, Value, json};

use super::ChatTemplate;

/// What a template makes of system messages, tools, calls and their results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// System messages are in the prompt.
    pub system: bool,
    /// The tools that are offered are in the prompt.
    pub tools: bool,
    /// None: an answer's calls or their results are not in the prompt, or the template refuses them.
    pub calls: Option<WrittenCall>,
}

/// How a template writes the call of [`WrittenCall::NAME`] with [`WrittenCall::arguments`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenCall {
    /// The call, and what is around it between the question before it and the result after it.
    pub text: String,
    /// The template wants the arguments as the text that they are in the API, and not as an object.
    pub arguments_as_text: bool,
}

const QUESTION: &str = "Example question?";
const RESULT: &str = "example result";
const DESCRIPTION: &str = "example description";
const SYSTEM: &str = "Example instructions.";
const KEY: &str = "example_key";

impl WrittenCall {
    pub const NAME: &str = "example_tool";

    pub fn arguments() -> Value {
        json!({ KEY: "example value" })
    }
}

impl Abilities {
    pub(super) fn of(template: &ChatTemplate) -> Abilities {
        let tool = json!({ "type": "function", "function": {
            "name": WrittenCall::NAME, "description": DESCRIPTION,
            "parameters": {
                "type": "object",
                "properties": { KEY: { "type": "string", "description": "An example." } },
                "required": [KEY],
            },
        }});
        let tools = std::slice::from_ref(&tool);
        let asked =
            |messages: &[Map<String, Value>], tools: &[Value]| template.render(messages, tools, true).ok();
        let question = message(json!({ "role": "user", "content": QUESTION }));
        let system = message(json!({ "role": "system", "content": SYSTEM }));
        let shows = |text: Option<String>, what: &str| text.is_some_and(|text| text.contains(what));
        let calls = [false, true].into_iter().find_map(|arguments_as_text| {
            let arguments = WrittenCall::arguments();
            let arguments = if arguments_as_text { Value::from(arguments.to_string()) } else { arguments };
            // Some templates want ids of just this length.
            let call = json!({ "id": "example01", "type": "function", "function": {
                "name": WrittenCall::NAME, "arguments": arguments,
            }});
            let messages = [
                question.clone(),
                message(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
                message(json!({
                    "role": "tool", "tool_call_id": "example01", "name": WrittenCall::NAME, "content": RESULT,
                })),
            ];
            let text = asked(&messages, tools)?;
            let (before, _) = text.split_once(RESULT)?;
            let text = before.rsplit_once(QUESTION).map_or(before, |(_, after)| after).to_owned();
            // Text that was taken for an object, or the other way round, comes with other quotes.
            text.contains(&format!("\"{KEY}\"")).then_some(WrittenCall { text, arguments_as_text })
        });
        Abilities {
            system: shows(asked(&[system, question.clone()], &[]), SYSTEM),
            tools: shows(asked(&[question], tools), DESCRIPTION),
            calls,
        }
    }
}

fn message(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(message) => message,
        _ => Map::new(),
    }
}
