//! Chat templates as model files carry them: Jinja as `transformers` runs it, on minijinja.
//!
//! A template comes from a downloaded file, so its size, its steps, its depth and its output are bounded.

mod abilities;
mod limits;
mod python;

use std::borrow::Cow;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, Value, context};
use regex::Regex;
use serde_json::Map;

use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFolder;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightSource;
pub use abilities::{Abilities, WrittenCall};
pub use limits::STACK_BYTES;
use limits::{Bounded, SOURCE_LIMIT, check_source, on_deep_stack};

/// The plain ChatML turns that most small models have seen.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
     {% if message['content'] is string %}{{ message['content'] }}{% else %}\
     {% for part in message['content'] or [] %}{{ part['text'] }}{% endfor %}{% endif %}\
     {{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    is_default: bool,
    abilities: OnceLock<Abilities>,
}

impl ChatTemplate {
    /// The template in a GGUF file, or ChatML where it has none.
    pub fn from_gguf(file: &GgufFile, tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        let named = |name: &str| file.str(name).map(str::to_owned);
        let sources = Sources {
            default: named("tokenizer.chat_template"),
            tool_use: named("tokenizer.chat_template.tool_use"),
        };
        ChatTemplate::or_chatml(&sources, tokenizer)
    }

    /// The template of a model folder (`chat_template.jinja`, else `tokenizer_config.json`), or ChatML where it has
    /// none.
    pub fn from_folder(
        folder: &SafetensorsFolder,
        tokenizer: &Tokenizer,
    ) -> Result<ChatTemplate, ModelError> {
        let mut sources = Sources {
            default: read(&folder.path().join("chat_template.jinja"))?,
            tool_use: read(&folder.path().join("additional_chat_templates/tool_use.jinja"))?,
        };
        if sources.default.is_none() {
            let settings: Map<String, serde_json::Value> =
                folder.json("tokenizer_config.json")?.unwrap_or_default();
            sources = settings.get("chat_template").map(Sources::from_json).unwrap_or_default();
        }
        ChatTemplate::or_chatml(&sources, tokenizer)
    }

    fn or_chatml(sources: &Sources, tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        let (bos, eos) = (tokenizer.bos_text(), tokenizer.eos_text());
        let mut template = match &sources.default {
            Some(source) => ChatTemplate::new(source, &bos, &eos)?,
            None => ChatTemplate::chatml(&bos, &eos)?,
        };
        if let Some(source) = &sources.tool_use {
            template.environment = with_template(template.environment, TOOL_USE, source)?;
        }
        Ok(template)
    }

    /// Compiles a template; `bos` and `eos` are the texts that it sees as `bos_token` and `eos_token`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, ModelError> {
        ChatTemplate::compile(source, bos, eos, false)
    }

    /// Plain ChatML, for a model that has no template of its own: worth a warning, see [`ChatTemplate::is_default`].
    pub fn chatml(bos: &str, eos: &str) -> Result<ChatTemplate, ModelError> {
        ChatTemplate::compile(CHATML, bos, eos, true)
    }

    fn compile(source: &str, bos: &str, eos: &str, is_default: bool) -> Result<ChatTemplate, ModelError> {
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
        environment.set_syntax(syntax);
        python::teach(&mut environment);
        limits::bound(&mut environment);
        environment
            .add_function("strftime_now", |format: String| python::strftime(&format, &jiff::Zoned::now()));
        let environment = with_template(environment, DEFAULT, source)?;
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            is_default,
            abilities: OnceLock::new(),
        })
    }

    /// The template with its clock stopped: `strftime_now` tells `now`.
    pub fn at(mut self, now: jiff::Zoned) -> ChatTemplate {
        self.environment.add_function("strftime_now", move |format: String| python::strftime(&format, &now));
        self
    }

    /// The template as the file has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the model brought no template, and ChatML stands in.
    pub fn is_default(&self) -> bool {
        self.is_default
    }

    /// What the template shows of a conversation; found out once, by rendering examples.
    pub fn abilities(&self) -> &Abilities {
        self.abilities.get_or_init(|| Abilities::of(self))
    }

    /// The prompt text of a conversation. Messages and tools have the shapes of the Chat Completions API.
    pub fn render(
        &self,
        messages: &[Map<String, serde_json::Value>],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        self.render_with(messages, tools, add_generation_prompt, &Map::new())
    }

    /// As [`ChatTemplate::render`], with further variables (`chat_template_kwargs`), e.g. `enable_thinking`.
    pub fn render_with(
        &self,
        messages: &[Map<String, serde_json::Value>],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, ModelError> {
        let tools_given = !tools.is_empty();
        let tools = tools_given.then(|| Value::from(Serde(tools)));
        let variables = context! {
            messages => Value::from(Serde(with_reasoning(messages))),
            tools, add_generation_prompt,
            documents => (),
            bos_token => self.bos.as_str(), eos_token => self.eos.as_str(),
            ..Value::from(Serde(extra))
        };
        on_deep_stack(move || {
            let of_tools = tools_given.then(|| self.environment.get_template(TOOL_USE).ok()).flatten();
            let template = match of_tools {
                Some(template) => template,
                None => self.environment.get_template(DEFAULT).map_err(template_error)?,
            };
            let mut output = Bounded::default();
            template.render_captured_to(variables, &mut output).map_err(template_error)?;
            String::from_utf8(output.0)
                .map_err(|error| ModelError::Template(format!("the output is not text: {error}")))
        })
    }
}

/// Names of templates; a model that has one for tools means it for conversations that offer them.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The templates that a model brings.
#[derive(Default)]
struct Sources {
    default: Option<String>,
    tool_use: Option<String>,
}

impl Sources {
    /// From `tokenizer_config.json`: a template, or a list of named ones.
    fn from_json(value: &serde_json::Value) -> Sources {
        if let serde_json::Value::String(source) = value {
            return Sources { default: Some(source.clone()), tool_use: None };
        }
        let named = |wanted: &str| {
            let entry = value
                .as_array()?
                .iter()
                .find(|entry| entry.get("name").is_some_and(|name| name == wanted))?;
            entry.get("template")?.as_str().map(str::to_owned)
        };
        Sources { default: named(DEFAULT), tool_use: named(TOOL_USE) }
    }
}

/// The text of a file, None without one. Of a file that is too long, enough to be refused.
fn read(path: &Path) -> Result<Option<String>, ModelError> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => Err(error),
        Ok(file) => file.take(SOURCE_LIMIT as u64 + 1).read_to_end(&mut bytes),
    }
    .map_err(|error| ModelError::io(path, error))?;
    // Too long a file may have been cut inside a character.
    match String::from_utf8(bytes) {
        Err(error) if error.as_bytes().len() <= SOURCE_LIMIT => {
            Err(ModelError::malformed(path, format!("the chat template is not text: {error}")))
        }
        Err(error) => Ok(Some(String::from_utf8_lossy(error.as_bytes()).into_owned())),
        Ok(text) => Ok(Some(text)),
    }
}

/// The environment with one more template, compiled.
fn with_template(
    mut environment: Environment<'static>,
    name: &'static str,
    source: &str,
) -> Result<Environment<'static>, ModelError> {
    check_source(source)?;
    let source = without_generation_marks(source)?;
    on_deep_stack(move || {
        environment.add_template_owned(name, source).map_err(template_error)?;
        Ok(environment)
    })
}

/// Training code marks the assistant's text with `{% generation %}`; for a prompt the marks mean nothing. An `if`
/// in their place keeps their effect on white space.
fn without_generation_marks(source: &str) -> Result<String, ModelError> {
    let mark = |pattern: &str| {
        Regex::new(pattern).map_err(|error| ModelError::Template(format!("cannot look for marks: {error}")))
    };
    let begin = mark(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")?;
    let end = mark(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")?;
    let opened = begin.replace_all(source, "{%$1 if true $2%}");
    Ok(end.replace_all(&opened, "{%$1 endif $2%}").into_owned())
}

fn template_error(error: Error) -> ModelError {
    let name =
        error.name().filter(|name| *name != DEFAULT).map_or_else(String::new, |name| format!("{name}, "));
    let line = error.line().map_or_else(String::new, |line| format!("{name}line {line}: "));
    let mut message = match error.detail() {
        Some(detail) => format!("{line}{}: {detail}", error.kind()),
        None => format!("{line}{}", error.kind()),
    };
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        cause = inner.source();
    }
    ModelError::Template(message)
}

/// Names that clients give a message's reasoning, the one that templates read first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The messages with their reasoning under both names that templates know it by.
fn with_reasoning(messages: &[Map<String, serde_json::Value>]) -> Cow<'_, [Map<String, serde_json::Value>]> {
    let reasoning = |message: &Map<String, serde_json::Value>| {
        REASONING.iter().find_map(|name| message.get(*name).filter(|text| !text.is_null()).cloned())
    };
    if messages.iter().all(|message| reasoning(message).is_none()) {
        return Cow::Borrowed(messages);
    }
    let mut messages = messages.to_vec();
    for message in &mut messages {
        if let Some(text) = reasoning(message) {
            message.entry("thinking").or_insert_with(|| text.clone());
            message.insert("reasoning_content".to_owned(), text);
        }
    }
    Cow::Owned(messages)
}

#[cfg(test)]
mod tests;
