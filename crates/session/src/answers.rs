//! How a model's answers are to be read: the syntax of its calls, the marks of its reasoning, and the messages that its
//! answers become.

use std::sync::Arc;

use dormouse_answer::{Answer, AnswerFormat, AnswerParser, CallSyntax, Reasoning, ToolChoice, call_id};
use dormouse_engine::OutputText;
use dormouse_models::chat_template::{ChatTemplate, WrittenCall};
use dormouse_models::{Specials, TokenId, Tokenizer};
use serde_json::{Value, json};

use crate::api::{Generation, Message, SessionError};
use crate::records::message;

/// Marks of reasoning that models are trained on.
const REASONING_MARKS: [(&str, &str); 3] =
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")];

/// How tools, calls and results are put into a model's prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Manner {
    pub syntax: CallSyntax,
    /// The template writes them; else our own words do, and the template sees only texts.
    pub native: bool,
    /// A native template wants arguments as text.
    pub arguments_as_text: bool,
}

impl Manner {
    /// What the model was taught, as far as its template tells, and this version reads.
    pub fn of(template: &ChatTemplate) -> Manner {
        let abilities = template.abilities();
        let written = abilities.calls.as_ref().filter(|_| abilities.tools);
        if let Some(written) = written
            && let Some(syntax) = taught(template, written)
        {
            return Manner { syntax, native: true, arguments_as_text: written.arguments_as_text };
        }
        let syntax = match template.source().contains("<start_of_turn>") {
            true => CallSyntax::Gemma,
            false => CallSyntax::Generic,
        };
        Manner { syntax, native: false, arguments_as_text: false }
    }
}

/// The syntax that reads what the template wrote.
fn taught(template: &ChatTemplate, written: &WrittenCall) -> Option<CallSyntax> {
    // The object itself, where a template puts it behind words of its own.
    let bare = written.text.find("{\"name\"").map_or("", |at| &written.text[at..]);
    let bare = if bare.contains("\"parameters\"") { bare } else { "" };
    let mistral = match template.source().contains("[ARGS]") {
        true => CallSyntax::MistralArgs,
        false => CallSyntax::Mistral,
    };
    let candidates =
        [(CallSyntax::Hermes, written.text.as_str()), (mistral, &written.text), (CallSyntax::Llama3, bare)];
    let reads = |(syntax, text): &(CallSyntax, &str)| {
        let answer = Answer::parse(&AnswerFormat { calls: Some(*syntax), reasoning: None }, text);
        answer.calls.iter().any(|call| {
            call.name == WrittenCall::NAME
                && serde_json::from_str::<Value>(&call.arguments).ok() == Some(WrittenCall::arguments())
        })
    };
    candidates.into_iter().find(reads).map(|(syntax, _)| syntax)
}

/// How the answer to a prompt is to be read. `prompt` is the end of its text.
pub(crate) fn format(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    prompt: &str,
    tools: &[Value],
    generation: &Generation,
) -> Result<AnswerFormat, SessionError> {
    let calls =
        (!tools.is_empty() && generation.tool_choice.permits_calls()).then(|| Manner::of(template).syntax);
    let mut reasoning = None;
    for (open, close) in REASONING_MARKS {
        let taught = template.source().contains(open)
            || template.is_default() && tokenizer.encode(open, Specials::Parse, false)?.len() == 1;
        if taught {
            let starts_open = prompt.trim_end().ends_with(open);
            reasoning = Some(Reasoning { open: open.into(), close: close.into(), starts_open });
            break;
        }
    }
    Ok(AnswerFormat { calls, reasoning })
}

/// Refuses a choice of tools that are not offered.
pub(crate) fn check_choice(choice: &ToolChoice, tools: &[Value]) -> Result<(), SessionError> {
    let names: Vec<&str> = tools.iter().map(tool_name).collect();
    let asked: &[String] = match choice {
        ToolChoice::None | ToolChoice::Auto => return Ok(()),
        ToolChoice::Required => &[],
        ToolChoice::Function(name) => std::slice::from_ref(name),
        ToolChoice::Allowed { names, .. } => names,
    };
    let message = match asked.iter().find(|name| !names.contains(&name.as_str())) {
        Some(name) => format!("tool_choice: there is no function {name:?} in tools; they are {names:?}"),
        None if tools.is_empty() => "tool_choice: an answer cannot call a tool where tools has none".into(),
        None => return Ok(()),
    };
    Err(SessionError::Invalid { param: "tool_choice".into(), message })
}

/// The name of a tool in OpenAI's shape.
fn tool_name(tool: &Value) -> &str {
    tool.pointer("/function/name").and_then(Value::as_str).unwrap_or("")
}

/// The control tokens whose text the answer's reader needs.
pub(crate) fn shown(tokenizer: &Tokenizer, format: &AnswerFormat) -> Vec<TokenId> {
    let token = |mark: &str| {
        // A mark that cannot be encoded is no token.
        let ids = tokenizer.encode(mark, Specials::Parse, false).unwrap_or_default();
        ids.into_iter()
            .find(|id| tokenizer.is_control(*id) && tokenizer.token_bytes(*id) == Some(mark.as_bytes()))
    };
    format.marks().into_iter().filter_map(token).collect()
}

/// An answer as a message: `content` is text, empty where there is none.
pub(crate) fn answer_message(turn: &str, format: &AnswerFormat, text: &str) -> Message {
    let answer = Answer::parse(format, text);
    let mut answered = message("assistant", &answer.content);
    if !answer.reasoning.is_empty() {
        answered.insert("reasoning_content".into(), answer.reasoning.into());
    }
    if !answer.calls.is_empty() {
        let call = |(index, call): (usize, dormouse_answer::Call)| {
            json!({
                "id": call_id(turn, index), "type": "function",
                "function": { "name": call.name, "arguments": call.arguments },
            })
        };
        answered.insert("tool_calls".into(), answer.calls.into_iter().enumerate().map(call).collect());
    }
    answered
}

/// How many of an answer's tokens are reasoning, the marks around it included.
pub(crate) fn reasoning_tokens(
    tokens: &[TokenId],
    tokenizer: &Arc<Tokenizer>,
    stop: &[String],
    format: &AnswerFormat,
) -> usize {
    if format.reasoning.is_none() {
        return 0;
    }
    let mut text = OutputText::new(tokenizer, stop, &shown(tokenizer, format));
    let mut parser = AnswerParser::new(format);
    let counts = |token: &TokenId| {
        let before = parser.is_reasoning();
        parser.push(&text.push(*token).0);
        before || parser.is_reasoning()
    };
    tokens.iter().map(counts).filter(|counts| *counts).count()
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
