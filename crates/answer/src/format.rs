//! How a model writes its calls and its reasoning.

use serde::{Deserialize, Serialize};

/// The syntax in which a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallSyntax {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen, Granite and many others.
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, perhaps after `<|python_tag|>`: Llama 3. One call.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral up to Nemo.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{…}`, once for each call: Mistral since Small 3.2.
    MistralArgs,
    /// A Markdown block `tool_code` with `{"name": …, "parameters": {…}}`: Gemma, which is told so by our own words.
    Gemma,
    /// As Hermes, for models that were taught no syntax: our own words ask for it.
    Generic,
}

/// The fixed texts of a syntax, around the name and the arguments (a JSON object) of each call. What a model is made to
/// write is `open`, `begin` NAME `middle` ARGUMENTS `end`, perhaps `separator` and the next call, then `close`; it is read with
/// any white space between the parts of its JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallShape {
    /// Begins calls wherever it stands in the content.
    pub trigger: Option<&'static str>,
    /// Begin calls where the content begins with them.
    pub at_start: &'static [&'static str],
    pub open: &'static str,
    pub begin: &'static str,
    pub middle: &'static str,
    pub end: &'static str,
    /// None: an answer has one call.
    pub separator: Option<&'static str>,
    pub close: &'static str,
}

impl CallSyntax {
    pub fn shape(self) -> CallShape {
        match self {
            CallSyntax::Hermes | CallSyntax::Generic => CallShape {
                trigger: Some("<tool_call>"),
                at_start: &[],
                open: "",
                begin: "<tool_call>\n{\"name\": \"",
                middle: "\", \"arguments\": ",
                end: "}\n</tool_call>",
                separator: Some("\n"),
                close: "",
            },
            CallSyntax::Llama3 => CallShape {
                trigger: Some("<|python_tag|>"),
                at_start: &["{"],
                open: "",
                begin: "{\"name\": \"",
                middle: "\", \"parameters\": ",
                end: "}",
                separator: None,
                close: "",
            },
            CallSyntax::Mistral => CallShape {
                trigger: Some("[TOOL_CALLS]"),
                at_start: &[],
                open: "[TOOL_CALLS][",
                begin: "{\"name\": \"",
                middle: "\", \"arguments\": ",
                end: "}",
                separator: Some(", "),
                close: "]",
            },
            CallSyntax::MistralArgs => CallShape {
                trigger: Some("[TOOL_CALLS]"),
                at_start: &[],
                open: "",
                begin: "[TOOL_CALLS]",
                middle: "[ARGS]",
                end: "",
                separator: Some(""),
                close: "",
            },
            CallSyntax::Gemma => CallShape {
                trigger: Some("```tool_code"),
                at_start: &["```json"],
                open: "",
                begin: "```tool_code\n{\"name\": \"",
                middle: "\", \"parameters\": ",
                end: "}\n```",
                separator: Some("\n"),
                close: "",
            },
        }
    }

    /// Calls, names with the JSON of their arguments, as a model writes them.
    pub fn write<'a>(self, calls: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
        let shape = self.shape();
        let mut text = shape.open.to_owned();
        for (index, (name, arguments)) in calls.into_iter().enumerate() {
            if index > 0 {
                text += shape.separator.unwrap_or("\n");
            }
            for part in [shape.begin, name, shape.middle, arguments, shape.end] {
                text += part;
            }
        }
        text + shape.close
    }

    /// The marks of the syntax that are single tokens in the vocabularies of models that were trained on it.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            CallSyntax::Hermes | CallSyntax::Generic => &["<tool_call>", "</tool_call>"],
            CallSyntax::Llama3 => &["<|python_tag|>"],
            CallSyntax::Mistral => &["[TOOL_CALLS]"],
            CallSyntax::MistralArgs => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            CallSyntax::Gemma => &[],
        }
    }
}

/// The marks around a model's reasoning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasoning {
    pub open: String,
    pub close: String,
    /// The prompt ends with the opening mark: the answer begins inside the reasoning.
    pub starts_open: bool,
}

/// How the text of one answer is to be read. The default is plain text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerFormat {
    /// None: what looks like a call is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<CallSyntax>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Reasoning>,
}

impl AnswerFormat {
    /// Nothing is to be told apart: the content is the text.
    pub fn is_plain(&self) -> bool {
        self.calls.is_none() && self.reasoning.is_none()
    }

    /// Texts that mean something here. Where one is a control token of the vocabulary, it has to be shown in the answer's
    /// text for the parser to see it.
    pub fn marks(&self) -> Vec<&str> {
        let reasoning = self.reasoning.iter().flat_map(|it| [it.open.as_str(), it.close.as_str()]);
        self.calls.iter().flat_map(|calls| calls.marks().iter().copied()).chain(reasoning).collect()
    }
}
