//! Grammars in the engine's language (a dialect of Lark): where reasoning, text, JSON and calls may stand.

use dormouse_answer::{CallShape, OutputFormat, Reasoning};
use serde_json::{Value, json};

use crate::request::{Function, GrammarRequest};
use crate::vocabulary::Vocabulary;
use crate::{GrammarError, schema};

/// Calls in one answer at the most.
const MOST_CALLS: usize = 16;
/// JSON is written on one line, as most programs write it: fewer tokens, most of them without a choice, and a model that has
/// lost its way cannot write white space for ever.
const SEPARATORS: [&str; 2] = [", ", ": "];
/// No `\u0041`: a name that is spelled in another way would be the name of a declared property.
const ESCAPES: &str = "nrbtf\"\\";

/// The schema that `response_format` holds.
pub const FORMAT: &str = "response_format.json_schema.schema";

/// The grammar of the answers to a request. None: any text.
///
/// `free`: names of functions whose arguments may be any object.
pub fn grammar(
    request: &GrammarRequest,
    vocabulary: &Vocabulary,
    free: &[&str],
) -> Result<Option<String>, GrammarError> {
    let content = match &request.format {
        OutputFormat::Text => None,
        OutputFormat::JsonObject => Some(schema::rewrite(&schema::any_object(), "response_format")?),
        OutputFormat::JsonSchema { schema, .. } => Some(schema::rewrite(schema, FORMAT)?),
    };
    let functions = request.functions();
    let shape = request.answer_format.calls.filter(|_| !functions.is_empty()).map(|calls| calls.shape());
    if request.choice.requires_call() && shape.is_none() {
        return Err(GrammarError::new("tool_choice", "there is no such function among the tools"));
    }
    if content.is_none() && shape.is_none() {
        return Ok(None);
    }
    let mut lark = Lark { request, vocabulary, text: "%llguidance {\"no_forcing\": true}\n".into() };
    for (index, function) in functions.iter().enumerate().filter(|_| shape.is_some()) {
        let arguments = match free.contains(&function.name) {
            true => schema::rewrite(&schema::any_object(), &function.param)?,
            false => parameters(function)?,
        };
        lark.json(&format!("arguments_{index}"), arguments);
    }
    let body = match (&shape, content) {
        (Some(shape), _) if request.choice.requires_call() => {
            let opening = format!("{}{}", shape.open, shape.begin);
            lark.calls("calls", shape, &opening, &functions)
        }
        (Some(shape), Some(content)) => {
            lark.json("json", content);
            let opening = format!("{}{}", shape.open, shape.begin);
            format!("json | {}", lark.calls("calls", shape, &opening, &functions))
        }
        (Some(shape), None) => lark.text_or_calls(shape, &functions),
        (None, Some(content)) => {
            lark.json("json", content);
            "json".into()
        }
        (None, None) => return Ok(None),
    };
    lark.rule("body", &body);
    lark.start();
    Ok(Some(lark.text))
}

/// The schema of a function's arguments: an object.
fn parameters(function: &Function<'_>) -> Result<Value, GrammarError> {
    let Some(parameters) = function.parameters else {
        return Ok(json!({ "type": "object", "additionalProperties": false }));
    };
    let Value::Object(map) = parameters else {
        return Err(GrammarError::new(&function.param, "expected a JSON Schema"));
    };
    let mut map = map.clone();
    match map.get("type").and_then(Value::as_str) {
        Some("object") => {}
        None if !map.contains_key("type") => {
            if !map.keys().any(|keyword| ["$ref", "anyOf", "oneOf", "allOf"].contains(&keyword.as_str())) {
                map.insert("type".into(), "object".into());
            }
        }
        _ => return Err(GrammarError::keyword(&function.param, "", "type", "arguments are an \"object\"")),
    }
    match function.strict {
        true => schema::rewrite(&Value::Object(map), &function.param),
        false => Ok(schema::relax(&Value::Object(map), &function.param)),
    }
}

struct Lark<'a> {
    request: &'a GrammarRequest,
    vocabulary: &'a Vocabulary,
    text: String,
}

impl Lark<'_> {
    fn rule(&mut self, name: &str, body: &str) {
        self.text.push_str(&format!("{name}: {body}\n"));
    }

    fn json(&mut self, name: &str, mut schema: Value) {
        let [item, key] = SEPARATORS;
        schema["x-guidance"] = json!({
            "item_separator": item,
            "key_separator": key,
            "whitespace_flexible": false,
            "json_allowed_escapes": ESCAPES,
        });
        self.rule(name, &format!("%json {schema}"));
    }

    /// A fixed text. Marks in it that are tokens which steer are these tokens.
    fn literal(&self, text: &str) -> String {
        let marks = self.request.answer_format.marks();
        let controls: Vec<(&str, u32)> = marks
            .into_iter()
            .filter_map(|mark| Some((mark, self.vocabulary.control(mark)?)))
            .filter(|(mark, _)| !mark.is_empty())
            .collect();
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = controls.iter().filter_map(|(mark, id)| Some((rest.find(mark)?, *mark, *id))).min();
            let (plain, after) = match found {
                Some((at, mark, id)) => (&rest[..at], Some((id, &rest[at + mark.len()..]))),
                None => (rest, None),
            };
            if !plain.is_empty() {
                parts.push(Value::from(plain).to_string());
            }
            rest = after.map_or("", |(id, rest)| {
                parts.push(format!("<[{id}]>"));
                rest
            });
        }
        if parts.is_empty() { "\"\"".into() } else { parts.join(" ") }
    }

    /// Calls, the first after `opening`. Answers what they are called.
    fn calls(&mut self, name: &str, shape: &CallShape, opening: &str, functions: &[Function<'_>]) -> String {
        let first = self.call(&format!("{name}_first"), shape, opening, functions);
        let mut body = first;
        if let Some(separator) = shape.separator.filter(|_| self.request.parallel && !self.is_one_call()) {
            let next = self.call(&format!("{name}_next"), shape, shape.begin, functions);
            body += &format!(" ({} {next}){{0,{}}}", self.literal(separator), MOST_CALLS - 1);
        }
        body += &format!(" {}", self.literal(shape.close));
        self.rule(name, &body);
        name.to_owned()
    }

    /// A named function is called once.
    fn is_one_call(&self) -> bool {
        matches!(self.request.choice, dormouse_answer::ToolChoice::Function(_))
    }

    fn call(&mut self, name: &str, shape: &CallShape, opening: &str, functions: &[Function<'_>]) -> String {
        let alternatives: Vec<String> = functions
            .iter()
            .enumerate()
            .map(|(index, function)| {
                let quoted = Value::from(function.name).to_string();
                // In JSON the name stands between quotes.
                let spelled =
                    if opening.ends_with('"') { &quoted[1..quoted.len() - 1] } else { function.name };
                let before = self.literal(&format!("{opening}{spelled}{}", shape.middle));
                format!("{before} arguments_{index} {}", self.literal(shape.end))
            })
            .collect();
        self.rule(name, &alternatives.join(" | "));
        name.to_owned()
    }

    /// Any text, until a call begins.
    fn text_or_calls(&mut self, shape: &CallShape, functions: &[Function<'_>]) -> String {
        let opening = format!("{}{}", shape.open, shape.begin);
        let mut body = vec!["FREE?".to_owned()];
        let mut forbidden: Vec<String> = Vec::new();
        if let Some(reasoning) = self.request.answer_format.reasoning.as_ref().filter(|it| !it.starts_open) {
            forbidden.push(format!(r"[ \t\r\n]*{}(?s:.*)", quoted(&reasoning.open)));
        }
        for (index, start) in shape.at_start.iter().enumerate() {
            // The call as it is written, from its beginning to the name.
            let opening = match shape.trigger.and_then(|trigger| shape.begin.strip_prefix(trigger)) {
                Some(rest) if !shape.begin.starts_with(start) => format!("{start}{rest}"),
                _ => shape.begin.to_owned(),
            };
            forbidden.push(format!(r"[ \t\r\n]*{}(?s:.*)", loosely(&opening)));
            body.push(self.calls(&format!("at_start_{index}"), shape, &opening, functions));
        }
        let begins = forbidden.clone();
        if let Some(trigger) = shape.trigger {
            let rest = opening.strip_prefix(trigger).unwrap_or(&opening).to_owned();
            let calls = self.calls("triggered", shape, &rest, functions);
            forbidden.push(format!("(?s:.*){}(?s:.*)", quoted(trigger)));
            body.push(match self.vocabulary.control(trigger) {
                Some(id) => format!("FREE? <[{id}]> {calls}"),
                None => {
                    let head = terminal(&format!("(?s:.*){}", quoted(trigger)), &begins);
                    self.rule("head[lazy]", &head);
                    format!("head {calls}")
                }
            });
        }
        let free = terminal("(?s:.+)", &forbidden);
        self.rule("FREE", &free);
        body.join(" | ")
    }

    /// Reasoning, where the model reasons, and then the rest.
    fn start(&mut self) {
        let Some(reasoning) = &self.request.answer_format.reasoning else {
            return self.rule("start", "body");
        };
        let Reasoning { open, close, starts_open } = reasoning.clone();
        let thought = match self.vocabulary.control(&close) {
            Some(id) => {
                self.rule("THOUGHT", "/(?s:.+)/");
                format!("THOUGHT? <[{id}]>")
            }
            None => {
                self.rule("thought[lazy]", &format!("/(?s:.*){}/", quoted(&close)));
                "thought".into()
            }
        };
        self.rule("SPACE", r"/[ \n]{1,4}/");
        match starts_open {
            true => self.rule("start", &format!("{thought} SPACE? body")),
            false => {
                let open = self.literal(&open);
                self.rule("start", &format!("({open} {thought} SPACE?)? body"));
            }
        }
    }
}

/// A terminal of texts that match `expression` and none of `forbidden`.
fn terminal(expression: &str, forbidden: &[String]) -> String {
    let mut text = format!("/{expression}/");
    for expression in forbidden {
        text += &format!(" & ~/{expression}/");
    }
    text
}

/// A text as a regular expression.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() * 2);
    for character in text.chars() {
        match character {
            '\n' => quoted += "\\n",
            '<' | '>' => quoted.push(character),
            _ if character.is_ascii_punctuation() => quoted.extend(['\\', character]),
            _ => quoted.push(character),
        }
    }
    quoted
}

/// The same with any white space around the marks of JSON.
fn loosely(text: &str) -> String {
    const SPACE: &str = r"[ \t\r\n]*";
    let mut loose = String::new();
    for character in text.chars() {
        match character {
            ' ' | '\n' => {}
            ':' => loose.extend([SPACE, ":", SPACE]),
            '{' => loose.extend([SPACE, "\\{", SPACE]),
            _ => loose += &quoted(character.encode_utf8(&mut [0; 4])),
        }
    }
    loose
}
