//! [`Description`]: what a folder of sentence-transformers says about the model in it.

use std::path::{Component, Path, PathBuf};

use candle_transformers::models::bert;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::Pooling;
use crate::error::LoadError;

/// Everything about a model but its weights and its vocabulary.
pub struct Description {
    /// Where config, weights and vocabulary are: the folder itself, or one inside it.
    pub transformer: PathBuf,
    pub config: bert::Config,
    /// Their vectors are put one after the other; at least one.
    pub pooling: Vec<Pooling>,
    /// Vectors are scaled to length 1.
    pub normalise: bool,
    /// Most tokens of one input, special tokens included.
    pub max_tokens: usize,
    pub lowercase: bool,
    /// Comes before every text.
    pub prompt: String,
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Default, Deserialize)]
struct TransformerSettings {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

#[derive(Default, Deserialize)]
struct Prompts {
    #[serde(default)]
    prompts: Map<String, Value>,
    default_prompt_name: Option<String>,
}

/// The parts of `config.json` that the encoder depends on.
#[derive(Deserialize)]
struct BertConfig {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default = "gelu")]
    hidden_act: String,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    #[serde(default)]
    pad_token_id: usize,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

// What BERT has where its config is silent.
fn gelu() -> String {
    "gelu".into()
}

fn layer_norm_eps() -> f64 {
    1e-12
}

impl Description {
    /// Reads `modules.json` and what it names. Without it the folder is a bare encoder, whose vectors are the mean of
    /// its tokens', as in sentence-transformers.
    pub fn read(folder: &Path) -> Result<Description, LoadError> {
        if !folder.is_dir() {
            let what = "an embedding model is a folder as sentence-transformers saves it, with config.json, \
                        tokenizer.json and model.safetensors; this is none";
            return Err(LoadError::malformed(folder, what));
        }
        let modules_path = folder.join("modules.json");
        let modules: Option<Vec<Module>> = read_json(&modules_path)?;
        let (mut transformer, mut pooling, mut normalise) = (None, None, false);
        for module in modules.iter().flatten() {
            let place = inside(folder, &module.path)
                .ok_or_else(|| LoadError::malformed(&modules_path, format!("'{}' leads out", module.path)))?;
            let kind = module.kind.rsplit('.').next().unwrap_or_default();
            match kind {
                "Transformer" if transformer.is_none() => transformer = Some(place),
                "Pooling" if transformer.is_some() && pooling.is_none() => {
                    pooling = Some(read_pooling(&place.join("config.json"))?);
                }
                "Normalize" if pooling.is_some() => normalise = true,
                _ => {
                    let what = format!("the module {kind} at this place");
                    let supported = "Transformer, Pooling and Normalize, in this order";
                    return Err(LoadError::unsupported(&modules_path, what, supported));
                }
            }
        }
        if modules.is_some() && pooling.is_none() {
            return Err(LoadError::malformed(&modules_path, "there is no Pooling module in it"));
        }
        let transformer = transformer.unwrap_or_else(|| folder.to_owned());
        let config = read_config(&transformer.join("config.json"))?;
        let settings_path = transformer.join("sentence_bert_config.json");
        let settings: TransformerSettings = read_json(&settings_path)?.unwrap_or_default();
        let max_tokens = match settings.max_seq_length {
            Some(tokens) => tokens,
            None => tokenizer_limit(&transformer.join("tokenizer_config.json"))?,
        };
        if max_tokens == 0 {
            return Err(LoadError::malformed(&settings_path, "max_seq_length is 0"));
        }
        let pooling =
            pooling.unwrap_or(PoolingSettings { modes: vec![Pooling::Mean], excludes_prompt: false });
        let prompt = read_prompt(&folder.join("config_sentence_transformers.json"))?;
        if pooling.excludes_prompt && !prompt.is_empty() {
            let what = "a default prompt that pooling leaves out";
            return Err(LoadError::unsupported(&modules_path, what, "prompts that count as text"));
        }
        Ok(Description {
            max_tokens: max_tokens.min(config.max_position_embeddings),
            transformer,
            config,
            pooling: pooling.modes,
            normalise,
            lowercase: settings.do_lower_case,
            prompt,
        })
    }

    /// Numbers in a vector.
    pub fn dimensions(&self) -> usize {
        self.config.hidden_size * self.pooling.len()
    }
}

/// A module's folder; None for a path that leads anywhere else.
fn inside(folder: &Path, path: &str) -> Option<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| folder.join(path))
}

/// A JSON file; None where there is no such file.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LoadError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::io(path, error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| LoadError::malformed(path, error.to_string()))
}

/// A JSON file that must be there.
fn need_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    read_json(path)?.ok_or_else(|| LoadError::io(path, std::io::ErrorKind::NotFound.into()))
}

fn read_config(path: &Path) -> Result<bert::Config, LoadError> {
    let value: Value = need_json(path)?;
    // Asked before anything else: configs of other architectures have other keys.
    let architecture = value.get("model_type").and_then(Value::as_str).unwrap_or("unknown");
    if architecture != "bert" {
        let found = architecture.to_owned();
        return Err(LoadError::UnsupportedArchitecture { path: path.to_owned(), found });
    }
    let config: BertConfig =
        serde_json::from_value(value).map_err(|error| LoadError::malformed(path, error.to_string()))?;
    let positions = config.position_embedding_type.as_deref().unwrap_or("absolute");
    if positions != "absolute" {
        return Err(LoadError::unsupported(
            path,
            format!("position_embedding_type '{positions}'"),
            "absolute",
        ));
    }
    if config.is_decoder {
        return Err(LoadError::unsupported(path, "a BERT that is a decoder", "encoders"));
    }
    let hidden_act = match config.hidden_act.as_str() {
        "gelu" => bert::HiddenAct::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => bert::HiddenAct::GeluApproximate,
        "relu" => bert::HiddenAct::Relu,
        other => {
            let what = format!("hidden_act '{other}'");
            return Err(LoadError::unsupported(path, what, "gelu, gelu_new, gelu_pytorch_tanh, relu"));
        }
    };
    for (key, value) in [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("max_position_embeddings", config.max_position_embeddings),
        ("type_vocab_size", config.type_vocab_size),
    ] {
        // Far above any encoder, and low enough that no product of two of them overflows.
        if !(1..=1 << 24).contains(&value) {
            return Err(LoadError::malformed(path, format!("{key} is {value}")));
        }
    }
    if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
        let what = format!(
            "hidden_size {} cannot be shared among {} heads",
            config.hidden_size, config.num_attention_heads
        );
        return Err(LoadError::malformed(path, what));
    }
    Ok(bert::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        hidden_act,
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        layer_norm_eps: config.layer_norm_eps,
        pad_token_id: config.pad_token_id,
        ..bert::Config::default()
    })
}

struct PoolingSettings {
    modes: Vec<Pooling>,
    excludes_prompt: bool,
}

/// `pooling_mode`, a name or a list of them, or the older flags, one for each.
fn read_pooling(path: &Path) -> Result<PoolingSettings, LoadError> {
    let map: Map<String, Value> = need_json(path)?;
    let excludes_prompt = map.get("include_prompt").and_then(Value::as_bool) == Some(false);
    let names: Vec<&Value> = match map.get("pooling_mode") {
        Some(Value::Array(names)) => names.iter().collect(),
        Some(name) => vec![name],
        None => Vec::new(),
    };
    let parse = |name: &Value| {
        name.as_str().and_then(Pooling::parse).ok_or_else(|| {
            let supported = Pooling::ALL.map(Pooling::name).join(", ");
            LoadError::unsupported(path, format!("pooling_mode {name}"), &supported)
        })
    };
    let mut modes = names.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    if modes.is_empty() {
        let is_on = |mode: &Pooling| map.get(mode.legacy_key()).and_then(Value::as_bool) == Some(true);
        modes = Pooling::ALL.into_iter().filter(is_on).collect();
    }
    if modes.is_empty() {
        modes.push(Pooling::Mean);
    }
    Ok(PoolingSettings { modes, excludes_prompt })
}

/// The tokenizer's own limit. Where it knows none it names a number far above any model's, or nothing.
fn tokenizer_limit(path: &Path) -> Result<usize, LoadError> {
    let settings: Option<Map<String, Value>> = read_json(path)?;
    let limit = settings.as_ref().and_then(|settings| settings.get("model_max_length")?.as_f64());
    Ok(limit.map_or(usize::MAX, |limit| limit as usize))
}

fn read_prompt(path: &Path) -> Result<String, LoadError> {
    let settings: Prompts = read_json(path)?.unwrap_or_default();
    let Some(name) = settings.default_prompt_name else { return Ok(String::new()) };
    match settings.prompts.get(&name) {
        Some(Value::String(prompt)) => Ok(prompt.clone()),
        Some(Value::Null) => Ok(String::new()),
        _ => {
            Err(LoadError::malformed(path, format!("there is no prompt '{name}', which is the default one")))
        }
    }
}

#[cfg(test)]
mod tests;
