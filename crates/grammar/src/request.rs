//! What is asked of an answer's form.

use dormouse_answer::{AnswerFormat, OutputFormat, ToolChoice};
use serde_json::Value;

/// What an answer may be. A function of what the turn's record holds, so that a turn which goes on after a crash is
/// constrained as it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GrammarRequest {
    pub format: OutputFormat,
    /// In OpenAI's shape: `{"type": "function", "function": {"name", "parameters"}}`.
    pub tools: Vec<Value>,
    pub choice: ToolChoice,
    /// An answer may hold several calls.
    pub parallel: bool,
    /// How the model writes calls and reasoning.
    pub answer_format: AnswerFormat,
}

/// A function that an answer may call.
pub(crate) struct Function<'a> {
    pub name: &'a str,
    pub parameters: Option<&'a Value>,
    /// Its arguments must satisfy the schema of its parameters: it says so, or a call is asked for. Else they satisfy what of
    /// the schema a grammar can say, so that one odd tool of many does not keep a model from using the others.
    pub strict: bool,
    /// The request field that the parameters are in.
    pub param: String,
}

impl GrammarRequest {
    /// Whether any text is an answer.
    pub fn is_free(&self) -> bool {
        let calls =
            self.choice.permits_calls() && !self.tools.is_empty() && self.answer_format.calls.is_some();
        self.format == OutputFormat::Text && !calls && !self.choice.requires_call()
    }

    /// The functions that may be called.
    pub(crate) fn functions(&self) -> Vec<Function<'_>> {
        let tools = self.tools.iter().enumerate().filter_map(|(index, tool)| {
            let function = tool.get("function").unwrap_or(tool);
            Some(Function {
                name: function.get("name")?.as_str()?,
                parameters: function.get("parameters").filter(|schema| !schema.is_null()),
                strict: self.choice.requires_call() || function.get("strict") == Some(&Value::Bool(true)),
                param: format!("tools[{index}].function.parameters"),
            })
        });
        tools.filter(|function| self.choice.permits(function.name)).collect()
    }

    /// Equal where the grammars are.
    pub(crate) fn key(&self) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        let functions: Vec<Value> = self
            .functions()
            .iter()
            .map(|it| serde_json::json!([it.name, it.parameters, it.param, it.strict]))
            .collect();
        let parts =
            serde_json::json!([self.format, functions, self.choice, self.parallel, self.answer_format]);
        hash.update(parts.to_string().as_bytes());
        hash.finalize()
    }
}
