//! `dormouse models inspect`: what is in a model, what it needs, and whether it will run here. Only headers are read, so
//! that a file of any size is told about at once.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use dormouse_models::decoder::Decoder;
use dormouse_models::machine::Memory;
use dormouse_models::pack::PackedWeights;
use dormouse_models::weights::WeightSource;
use dormouse_models::{ChatTemplate, ModelConfig, ModelError, ModelSource, Tokenizer};
use serde_json::{Map, Value, json};

use super::needed::{Needed, look_at_machine};
use super::report::Report;
use crate::config::Config;
use crate::sizes::Bytes;

/// Tells about the model at `path`; exit code 0 where it will run, 1 where it will not.
pub fn inspect(config: &Config, name: &str, path: &Path, as_json: bool) -> Result<ExitCode> {
    let mut report = Report::default();
    report.fact("name", name);
    report.fact("path", path.display().to_string());
    // The mark of a folder of sentence-transformers.
    if path.join("modules.json").is_file() {
        report.bytes("file_size", size_on_disk(path));
        let use_it = format!("it is an embedding model; `dormouse serve --embedding-model {name}` serves it");
        report.obstacle = Some(use_it);
    } else if let Err(error) = look(config, path, &mut report) {
        let hint = error.downcast_ref().and_then(what_to_do);
        report.obstacle = Some(format!("{error:#}{}", hint.unwrap_or_default()));
    }
    report.print(as_json)
}

/// What an error's own words leave out.
fn what_to_do(error: &ModelError) -> Option<&'static str> {
    match error {
        ModelError::UnsupportedArchitecture { .. } => Some("; choose a model of one of these"),
        ModelError::UnsupportedType { .. } => Some("; take a file of the model in one of these types"),
        ModelError::MissingTensor { .. } | ModelError::MissingMetadata { .. } => {
            Some("; the file is not whole, or no language model: fetch it again, or take another conversion")
        }
        _ => None,
    }
}

/// Looks at everything that can be looked at; the first error is why the model will not run.
fn look(config: &Config, path: &Path, report: &mut Report) -> Result<()> {
    report.bytes("file_size", size_on_disk(path));
    let source = ModelSource::open(path)?;
    look_at_tensors(&source, report);
    let description = look_at_description(&source, report);
    let tokenizer = look_at_tokenizer(&source, report);
    let template = tokenizer.as_ref().ok().map(|tokenizer| look_at_template(&source, tokenizer, report));
    let needed =
        description.as_ref().ok().map(|description| Needed::of(config, description, &source, report));
    look_at_machine(config, path, needed.as_ref(), report)?;

    let description = description?;
    tokenizer?.limited_to(description.vocab)?;
    template.transpose()?;
    check_context(config, &description)?;
    if let Some(needed) = needed {
        needed.compare(Memory::here(), report)?;
    }
    // The decoder itself finds every tensor and checks its shape, over a pack that holds nothing.
    Decoder::new(&source, &PackedWeights::without_contents(&source)?, description)?;
    Ok(())
}

fn size_on_disk(path: &Path) -> u64 {
    let size = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
    match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| size(&entry.path())).sum(),
        Err(_) => size(path),
    }
}

/// Parameters, and how many tensors and bytes there are of each type.
fn look_at_tensors(source: &ModelSource, report: &mut Report) {
    report.fact(
        "format",
        match source {
            ModelSource::Gguf(_) => "GGUF",
            ModelSource::Folder(_) => "safetensors",
        },
    );
    let mut types: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let (mut parameters, mut bytes) = (0u64, 0u64);
    for tensor in source.names().into_iter().filter_map(|name| source.tensor(name)) {
        let (count, of_type) = types.entry(tensor.ty.name()).or_default();
        *count += 1;
        *of_type += tensor.bytes().len() as u64;
        bytes += tensor.bytes().len() as u64;
        parameters += tensor.rows as u64 * tensor.cols as u64;
    }
    report.told("parameters", parameters, count_in_words(parameters));
    report.bytes("weight_bytes", bytes);
    let words = types.iter().map(|(ty, (count, bytes))| format!("{ty} {count} ({})", Bytes(*bytes)));
    let words = words.collect::<Vec<_>>().join(", ");
    let object = types
        .iter()
        .map(|(ty, (count, bytes))| ((*ty).to_owned(), json!({ "tensors": count, "bytes": bytes })));
    report.told("tensor_types", object.collect::<Map<_, _>>(), words);
}

/// `134.5 M`
fn count_in_words(count: u64) -> String {
    match count {
        0..=999_999 => count.to_string(),
        1_000_000..=999_999_999 => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.2} B", count as f64 / 1e9),
    }
}

/// The family and its sizes.
fn look_at_description(source: &ModelSource, report: &mut Report) -> Result<ModelConfig, ModelError> {
    let description = source.config().inspect_err(|error| {
        if let ModelError::UnsupportedArchitecture { found, .. } = error {
            report.fact("family", found.as_str());
        }
    })?;
    report.fact("family", description.architecture.as_str());
    report.fact("context", description.context);
    report.fact("layers", description.layers);
    report.fact("model_width", description.d_model);
    report.fact("heads", description.heads);
    report.fact("kv_heads", description.kv_heads);
    report.fact("head_dim", description.head_dim);
    report.fact("feed_forward_width", description.d_ff);
    if let Some(experts) = description.experts {
        let words = format!("{}, of which each token uses {}", experts.count, experts.used);
        report.told("experts", json!({ "count": experts.count, "used": experts.used }), words);
    }
    if let Some(window) = description.sliding_window {
        report.fact("sliding_window", window);
    }
    report.fact("rope_theta", description.rope.theta);
    Ok(description)
}

fn look_at_tokenizer(source: &ModelSource, report: &mut Report) -> Result<Tokenizer, ModelError> {
    let kind = match source {
        ModelSource::Gguf(file) => {
            let model = file.str("tokenizer.ggml.model").unwrap_or("none");
            let pre = file.str("tokenizer.ggml.pre").map(|pre| format!(", splits as {pre}"));
            let kind = match model {
                "gpt2" => "byte-level BPE",
                "llama" => "SentencePiece BPE",
                other => other,
            };
            format!("{kind}{}", pre.unwrap_or_default())
        }
        ModelSource::Folder(_) => "tokenizer.json".to_owned(),
    };
    report.fact("tokenizer", kind);
    let tokenizer = source.tokenizer()?;
    report.fact("vocabulary", tokenizer.vocab_size());
    let texts = |ids: &[u32]| {
        let text =
            |id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(*id).unwrap_or_default()).into_owned();
        ids.iter().map(text).collect::<Vec<_>>()
    };
    let ends = texts(tokenizer.eog_tokens());
    report.told("end_tokens", json!(ends), if ends.is_empty() { "none".to_owned() } else { ends.join(" ") });
    if ends.is_empty() {
        report.note("no token ends an answer: answers run to their longest length");
    }
    Ok(tokenizer)
}

/// What the chat template can do, found by rendering.
fn look_at_template(
    source: &ModelSource,
    tokenizer: &Tokenizer,
    report: &mut Report,
) -> Result<(), ModelError> {
    let template = source.chat_template(tokenizer)?;
    if template.is_default() {
        report.told("chat_template", Value::Null, "none in the file".to_owned());
        report.note(
            "the file has no chat template, as base models have none: use completions; chat goes by plain ChatML, which \
             the model may not know",
        );
        return Ok(());
    }
    let renders = render(&template, &[("user", "Hello?")], &[]);
    let system = render(&template, &[("system", "Be-brief."), ("user", "Hello?")], &[]);
    let tool = json!({ "type": "function", "function": { "name": "look_up_weather", "description": "The weather",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } } } } });
    let tools = render(&template, &[("user", "Hello?")], &[tool]);
    let shows = |rendered: &Result<String, ModelError>, text: &str| {
        rendered.as_ref().is_ok_and(|rendered| rendered.contains(text))
    };
    let (renders_a_chat, system, tools) =
        (shows(&renders, "Hello?"), shows(&system, "Be-brief."), shows(&tools, "look_up_weather"));
    let thinking = ["enable_thinking", "<think>", "reasoning_content"]
        .into_iter()
        .any(|mark| template.source().contains(mark));
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    let words = format!(
        "from the file; system message {}, tools {}, thinking {}",
        yes(system),
        yes(tools),
        yes(thinking)
    );
    let object = json!({ "renders": renders_a_chat, "system": system, "tools": tools, "thinking": thinking });
    report.told("chat_template", object, words);
    match renders {
        Err(error) => report.note(format!("chat will not work, completions will: {error}")),
        Ok(_) if !renders_a_chat => report.note("the chat template leaves out what a user says"),
        Ok(_) => {}
    }
    Ok(())
}

fn render(template: &ChatTemplate, messages: &[(&str, &str)], tools: &[Value]) -> Result<String, ModelError> {
    let message = |(role, content): &(&str, &str)| {
        Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), json!(content))])
    };
    template.render(&messages.iter().map(message).collect::<Vec<_>>(), tools, true)
}

/// What `serve --ctx` would refuse.
fn check_context(config: &Config, description: &ModelConfig) -> Result<()> {
    match config.context {
        Some(context) if context > description.context => Err(anyhow!(
            "a context of {context} tokens was asked for; the model was trained for 1 to {}",
            description.context
        )),
        _ => Ok(()),
    }
}
