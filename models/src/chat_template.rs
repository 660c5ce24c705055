//! Chat templates as model files carry them: Jinja as `transformers` runs it, on minijinja.
//!
//! A template comes from a downloaded file, so its size, its steps, its depth and its output are bounded.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use regex::Regex;
use serde::Serialize;
use serde_json::Map;

use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFolder;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightSource;

/// Largest template; real ones are under 30 kB.
const SOURCE_LIMIT: usize = 1 << 20;
/// Steps of one rendering; a thousand messages with tools take well under a tenth of it.
const FUEL: u64 = 20_000_000;
const RECURSION_LIMIT: usize = 200;
/// Largest rendered prompt, many times what any context holds.
const OUTPUT_LIMIT: usize = 64 << 20;

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
}

impl ChatTemplate {
    /// The template in a GGUF file, or ChatML where it has none.
    pub fn from_gguf(file: &GgufFile, tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        ChatTemplate::or_chatml(file.str("tokenizer.chat_template"), tokenizer)
    }

    /// The template of a model folder (`chat_template.jinja`, else `tokenizer_config.json`), or ChatML where it has
    /// none.
    pub fn from_folder(
        folder: &SafetensorsFolder,
        tokenizer: &Tokenizer,
    ) -> Result<ChatTemplate, ModelError> {
        let path = folder.path().join("chat_template.jinja");
        let source = if path.exists() {
            Some(std::fs::read_to_string(&path).map_err(|source| ModelError::io(&path, source))?)
        } else {
            let settings: Map<String, serde_json::Value> =
                folder.json("tokenizer_config.json")?.unwrap_or_default();
            settings.get("chat_template").and_then(default_template)
        };
        ChatTemplate::or_chatml(source.as_deref(), tokenizer)
    }

    fn or_chatml(source: Option<&str>, tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        let (bos, eos) = (tokenizer.bos_text(), tokenizer.eos_text());
        match source {
            Some(source) => ChatTemplate::new(source, &bos, &eos),
            None => ChatTemplate::chatml(&bos, &eos),
        }
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
        if source.len() > SOURCE_LIMIT {
            let bytes = source.len();
            return Err(ModelError::Template(format!(
                "{bytes} bytes are more than the {SOURCE_LIMIT} allowed"
            )));
        }
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", is_sequence);
        environment.add_template_owned("chat", without_generation_marks(source)?).map_err(template_error)?;
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            is_default,
        })
    }

    /// The template as the file has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the model brought no template, and ChatML stands in.
    pub fn is_default(&self) -> bool {
        self.is_default
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
        let template = self.environment.get_template("chat").map_err(template_error)?;
        let tools = (!tools.is_empty()).then(|| Value::from(Serde(tools)));
        let variables = context! {
            messages => Value::from(Serde(messages)),
            tools, add_generation_prompt,
            documents => (),
            bos_token => self.bos.as_str(), eos_token => self.eos.as_str(),
            ..Value::from(Serde(extra))
        };
        let mut output = Bounded(Vec::new());
        template.render_captured_to(variables, &mut output).map_err(template_error)?;
        String::from_utf8(output.0)
            .map_err(|error| ModelError::Template(format!("the output is not text: {error}")))
    }
}

/// A template, or the one called `default` of a list of named ones.
fn default_template(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(named) => {
            let default =
                named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"))?;
            default.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
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
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        cause = inner.source();
    }
    ModelError::Template(message)
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the template refuses the conversation: {message}")))
}

fn strftime_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now()).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now('{format}'): {error}"))
    })
}

/// What Python can iterate over, which is text too, and what is undefined, but not `None`.
fn is_iterable(value: &Value) -> bool {
    value.kind() == ValueKind::Iterable || is_sequence(value)
}

/// What has a length and items.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::*;
    matches!(value.kind(), Seq | Map | String | Bytes | Undefined)
}

/// `json.dumps(value, ensure_ascii=False)`, which is what `transformers` gives templates: no HTML escapes.
fn to_json(value: Value, keywords: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = keywords.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = keywords.get(ignored)?;
    }
    keywords.assert_all_used()?;
    let mut text = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, PythonFormatter)),
    };
    let failed = |error: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(text).map_err(|error| failed(error.to_string()))
}

/// Python's separators: a space after each comma and colon.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A buffer that refuses to grow past [`OUTPUT_LIMIT`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(io::Error::other(format!("the prompt would be longer than {OUTPUT_LIMIT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(serde::Deserialize)]
    struct Golden {
        template: String,
        messages: Vec<Map<String, serde_json::Value>>,
        tools: Vec<serde_json::Value>,
        add_generation_prompt: bool,
        extra: Map<String, serde_json::Value>,
        rendered: String,
    }

    #[test]
    fn conversations_render_as_jinja2_renders_them() {
        let goldens: Vec<Golden> =
            serde_json::from_str(include_str!("../tests/template_goldens.json")).unwrap();
        assert!(goldens.len() >= 50);
        let mut wrong = Vec::new();
        for golden in goldens {
            let rendered = ChatTemplate::new(&golden.template, "<s>", "</s>").and_then(|template| {
                let generate = golden.add_generation_prompt;
                template.render_with(&golden.messages, &golden.tools, generate, &golden.extra)
            });
            if rendered.as_ref().ok() != Some(&golden.rendered) {
                wrong.push((golden.template, golden.rendered, rendered));
            }
        }
        assert!(wrong.is_empty(), "(template, jinja2, ours): {wrong:#?}");
    }

    fn user(text: &str) -> Vec<Map<String, serde_json::Value>> {
        vec![json!({"role": "user", "content": text}).as_object().unwrap().clone()]
    }

    fn render(source: &str) -> Result<String, ModelError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&user("Hi"), &[], true)
    }

    #[test]
    fn a_template_can_refuse_and_its_words_are_kept() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(render(endless).is_err());
        assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
        assert!(render(&" ".repeat(SOURCE_LIMIT + 1)).is_err());
        assert!(render("{% include 'chat' %}").is_err());
        assert!(render("{% for %}").is_err());
        assert!(render(&format!("{{{{ {} }}}}", "(".repeat(10_000))).is_err());
        assert!(render(&format!("{{{{ {} }}}}", "[".repeat(10_000))).is_err());
    }

    #[test]
    fn the_date_is_formatted_and_generation_marks_vanish() {
        assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
        assert!(render("{{ strftime_now('%!') }}").is_err());
        assert_eq!(render("a {%- generation %} b {% endgeneration %} c").unwrap(), "a b  c");
    }

    #[test]
    fn chatml_stands_in_for_a_missing_template_and_says_so() {
        let template = ChatTemplate::chatml("", "<|im_end|>").unwrap();
        assert!(template.is_default());
        let rendered = template.render(&user("Hi"), &[], true).unwrap();
        assert_eq!(rendered, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn the_real_model_brings_its_own_template() {
        let file = GgufFile::open(crate::test_model()).unwrap();
        let template = ChatTemplate::from_gguf(&file, &Tokenizer::from_gguf(&file).unwrap()).unwrap();
        assert!(!template.is_default() && template.source().contains("SmolLM"));
    }

    #[test]
    fn of_several_named_templates_the_default_is_taken() {
        let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(default_template(&named).as_deref(), Some("d"));
    }
}
