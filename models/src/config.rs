//! What a model is: the description from which the one generic decoder is built.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFolder;
use crate::weights::WeightSource;

/// Architectures by the name that GGUF files give them.
const GGUF_ARCHITECTURES: [&str; 1] = ["llama"];
/// Architectures by the name that `config.json` gives them.
const JSON_ARCHITECTURES: [&str; 2] = ["LlamaForCausalLM", "MistralForCausalLM"];

/// Sizes beyond any real model, against nonsense that would exhaust memory.
const LARGEST_SIZE: usize = 1 << 24;

pub use dormouse_kernels::cpu::rope::RopeKind;

/// How rotation frequencies are changed to reach beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by this factor.
    Linear(f32),
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: usize,
    },
    /// Each frequency divided by a factor of its own (`[dims / 2]`, the tensor `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub kind: RopeKind,
    /// Base of the geometric series of frequencies.
    pub theta: f32,
    /// Values of a head that are rotated, from the first on; the rest pass unchanged.
    pub dims: usize,
    pub scaling: RopeScaling,
}

impl Rope {
    /// Radians per position of each rotated pair, `[dims / 2]`.
    pub fn frequencies(&self) -> Vec<f32> {
        (0..self.dims / 2).map(|pair| self.frequency(pair) as f32).collect()
    }

    fn frequency(&self, pair: usize) -> f64 {
        let base = f64::from(self.theta).powf(-2.0 * pair as f64 / self.dims as f64);
        match &self.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear(factor) => base / f64::from(*factor),
            RopeScaling::Factors(factors) => base / f64::from(factors[pair]),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let turns = *original_context as f64 * base / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                base * (kept + (1.0 - kept) / f64::from(*factor))
            }
        }
    }
}

/// The function between the two halves of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    TokenEmbedding,
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnDown,
    OutputNorm,
    Output,
}

/// How a file names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameScheme {
    Gguf,
    HuggingFace,
}

impl NameScheme {
    /// The weight's name; `layer` matters only for roles inside a layer.
    pub fn name(self, layer: usize, role: Role) -> String {
        use Role::*;
        let whole = match (self, role) {
            (NameScheme::Gguf, TokenEmbedding) => Some("token_embd"),
            (NameScheme::Gguf, OutputNorm) => Some("output_norm"),
            (NameScheme::Gguf, Output) => Some("output"),
            (NameScheme::HuggingFace, TokenEmbedding) => Some("model.embed_tokens"),
            (NameScheme::HuggingFace, OutputNorm) => Some("model.norm"),
            (NameScheme::HuggingFace, Output) => Some("lm_head"),
            _ => None,
        };
        if let Some(whole) = whole {
            return format!("{whole}.weight");
        }
        match self {
            NameScheme::Gguf => {
                let part = match role {
                    AttnNorm => "attn_norm",
                    AttnQ => "attn_q",
                    AttnK => "attn_k",
                    AttnV => "attn_v",
                    AttnOutput => "attn_output",
                    FfnNorm => "ffn_norm",
                    FfnGate => "ffn_gate",
                    FfnUp => "ffn_up",
                    FfnDown | TokenEmbedding | OutputNorm | Output => "ffn_down",
                };
                format!("blk.{layer}.{part}.weight")
            }
            NameScheme::HuggingFace => {
                let part = match role {
                    AttnNorm => "input_layernorm",
                    AttnQ => "self_attn.q_proj",
                    AttnK => "self_attn.k_proj",
                    AttnV => "self_attn.v_proj",
                    AttnOutput => "self_attn.o_proj",
                    FfnNorm => "post_attention_layernorm",
                    FfnGate => "mlp.gate_proj",
                    FfnUp => "mlp.up_proj",
                    FfnDown | TokenEmbedding | OutputNorm | Output => "mlp.down_proj",
                };
                format!("model.layers.{layer}.{part}.weight")
            }
        }
    }
}

/// A model's description. Sizes count values, not bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture as the file names it.
    pub architecture: String,
    pub vocab: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    pub layers: usize,
    pub d_model: usize,
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub d_ff: usize,
    /// Added to the mean square in RMS normalisation.
    pub norm_eps: f32,
    pub rope: Rope,
    /// The output matrix is the token embedding.
    pub tied_head: bool,
    /// Q, K and V projections add a bias.
    pub qkv_bias: bool,
    /// Q and K heads are RMS-normalised before rotation.
    pub qk_norm: bool,
    pub activation: Activation,
    /// Positions that attention sees, where it does not see all.
    pub sliding_window: Option<usize>,
    /// `cap * tanh(score / cap)` on attention scores.
    pub attention_soft_cap: Option<f32>,
    /// The same on output logits.
    pub logit_soft_cap: Option<f32>,
    /// Factor on token embeddings.
    pub embedding_scale: Option<f32>,
    pub names: NameScheme,
}

impl ModelConfig {
    /// Reads the settings of a GGUF file.
    pub fn from_gguf(file: &GgufFile) -> Result<ModelConfig, ModelError> {
        let architecture = file.architecture()?;
        if !GGUF_ARCHITECTURES.contains(&architecture) {
            return Err(unsupported(architecture, &GGUF_ARCHITECTURES));
        }
        let key = |name: &str| format!("{architecture}.{name}");
        let optional = |name: &str| file.u32(&key(name)).map(|value| value as usize);
        let required = |name: &str| optional(name).ok_or_else(|| file.missing(&key(name)));

        let embedding_name = NameScheme::Gguf.name(0, Role::TokenEmbedding);
        let embedding = file.tensor(&embedding_name).ok_or_else(|| ModelError::MissingTensor {
            path: file.path().to_owned(),
            tensor: embedding_name,
        })?;
        let (d_model, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = optional("attention.key_length").unwrap_or(d_model / heads.max(1));
        let refuse = |what: String| ModelError::malformed(file.path(), what);
        if optional("expert_count").unwrap_or(0) > 0 {
            return Err(refuse("mixture-of-experts models are not supported; use a dense model".into()));
        }
        if optional("attention.value_length").is_some_and(|length| length != head_dim) {
            return Err(refuse("key and value heads of different sizes are not supported".into()));
        }
        let dims = optional("rope.dimension_count").unwrap_or(head_dim);
        let scaling = match file.tensor("rope_freqs.weight") {
            Some(factors) => RopeScaling::Factors(factors.to_f32()),
            None => {
                // Very old files have only the bare factor.
                let factor = file.f32(&key("rope.scaling.factor")).or(file.f32(&key("rope.scale_linear")));
                match file.str(&key("rope.scaling.type")).unwrap_or("linear") {
                    "none" => RopeScaling::None,
                    "linear" => factor.map_or(RopeScaling::None, linear),
                    other => return Err(refuse(format!("rope scaling of type '{other}' is not supported"))),
                }
            }
        };
        let config = ModelConfig {
            architecture: architecture.to_owned(),
            vocab: embedding.rows,
            context: required("context_length")?,
            layers: required("block_count")?,
            d_model,
            heads,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            d_ff: required("feed_forward_length")?,
            norm_eps: file
                .f32(&key("attention.layer_norm_rms_epsilon"))
                .ok_or_else(|| file.missing(&key("attention.layer_norm_rms_epsilon")))?,
            rope: Rope {
                kind: RopeKind::Interleaved,
                theta: file.f32(&key("rope.freq_base")).unwrap_or(10_000.0),
                dims,
                scaling,
            },
            tied_head: file.tensor(&NameScheme::Gguf.name(0, Role::Output)).is_none(),
            qkv_bias: file.tensor("blk.0.attn_q.bias").is_some(),
            qk_norm: false,
            activation: Activation::Silu,
            sliding_window: optional("attention.sliding_window").filter(|&window| window > 0),
            attention_soft_cap: None,
            logit_soft_cap: None,
            embedding_scale: None,
            names: NameScheme::Gguf,
        };
        config.check(file.path())?;
        Ok(config)
    }

    /// Reads the `config.json` of a folder.
    pub fn from_folder(folder: &SafetensorsFolder) -> Result<ModelConfig, ModelError> {
        let path = folder.path().join("config.json");
        let json: Map<String, Value> =
            folder.json("config.json")?.ok_or_else(|| ModelError::malformed(&path, "the file is missing"))?;
        ModelConfig::from_json(&path, &json)
    }

    /// Reads the object of a `config.json`; `path` is for messages.
    pub fn from_json(path: &Path, json: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
        let architecture =
            json.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str).unwrap_or("");
        if !JSON_ARCHITECTURES.contains(&architecture) {
            return Err(unsupported(architecture, &JSON_ARCHITECTURES));
        }
        let optional = |name: &str| json.get(name).and_then(Value::as_u64).map(|value| value as usize);
        let required = |name: &str| optional(name).ok_or_else(|| ModelError::missing_metadata(path, name));
        let number = |name: &str| json.get(name).and_then(Value::as_f64).map(|value| value as f32);
        let refuse = |what: String| ModelError::malformed(path, what);

        let (d_model, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let head_dim = optional("head_dim").unwrap_or(d_model / heads.max(1));
        match json.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(refuse(format!("the activation '{other}' is not supported"))),
        }
        for bias in ["attention_bias", "mlp_bias"] {
            if json.get(bias).and_then(Value::as_bool) == Some(true) {
                return Err(refuse(format!("{bias} is not supported for {architecture}")));
            }
        }
        // Newer files put theta and scaling into one object, `rope_parameters`.
        let rope = json.get("rope_parameters").or(json.get("rope_scaling")).and_then(Value::as_object);
        let theta = number("rope_theta").or(rope
            .and_then(|rope| rope.get("rope_theta"))
            .and_then(Value::as_f64)
            .map(|theta| theta as f32));
        let config = ModelConfig {
            architecture: architecture.to_owned(),
            vocab: required("vocab_size")?,
            context: required("max_position_embeddings")?,
            layers: required("num_hidden_layers")?,
            d_model,
            heads,
            kv_heads: optional("num_key_value_heads").unwrap_or(heads),
            head_dim,
            d_ff: required("intermediate_size")?,
            norm_eps: number("rms_norm_eps")
                .ok_or_else(|| ModelError::missing_metadata(path, "rms_norm_eps"))?,
            rope: Rope {
                kind: RopeKind::Half,
                theta: theta.unwrap_or(10_000.0),
                dims: head_dim,
                scaling: rope.map_or(Ok(RopeScaling::None), |rope| scaling_from_json(path, rope))?,
            },
            tied_head: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            qkv_bias: false,
            qk_norm: false,
            activation: Activation::Silu,
            sliding_window: optional("sliding_window").filter(|&window| window > 0),
            attention_soft_cap: None,
            logit_soft_cap: None,
            embedding_scale: None,
            names: NameScheme::HuggingFace,
        };
        config.check(path)?;
        Ok(config)
    }

    /// Refuses sizes that no decoder can be built from, so that the decoder can trust them.
    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let sizes = [
            ("vocabulary", self.vocab),
            ("context", self.context),
            ("layer count", self.layers),
            ("model width", self.d_model),
            ("head count", self.heads),
            ("key-value head count", self.kv_heads),
            ("head width", self.head_dim),
            ("feed-forward width", self.d_ff),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(1..=LARGEST_SIZE).contains(size)) {
            return Err(ModelError::malformed(path, format!("the {name} is {size}, which cannot be right")));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Err(ModelError::malformed(
                path,
                format!("{heads} heads cannot share {kv_heads} key-value heads"),
            ));
        }
        let dims = self.rope.dims;
        if dims == 0 || !dims.is_multiple_of(2) || dims > self.head_dim {
            let head = self.head_dim;
            return Err(ModelError::malformed(
                path,
                format!("rotation of {dims} of {head} head values is impossible"),
            ));
        }
        if let RopeScaling::Factors(factors) = &self.rope.scaling
            && factors.len() != dims / 2
        {
            let found = factors.len();
            return Err(ModelError::malformed(
                path,
                format!("rope_freqs.weight has {found} values, not {}", dims / 2),
            ));
        }
        if !(self.norm_eps >= 0.0 && self.rope.theta > 0.0 && self.rope.theta.is_finite()) {
            return Err(ModelError::malformed(
                path,
                "the normalisation epsilon or the rope base is not a number",
            ));
        }
        Ok(())
    }
}

fn linear(factor: f32) -> RopeScaling {
    if factor == 1.0 || factor <= 0.0 { RopeScaling::None } else { RopeScaling::Linear(factor) }
}

fn scaling_from_json(path: &Path, rope: &Map<String, Value>) -> Result<RopeScaling, ModelError> {
    let required = |name: &str| {
        let value = rope.get(name).and_then(Value::as_f64).map(|value| value as f32);
        value.ok_or_else(|| ModelError::missing_metadata(path, format!("rope_scaling.{name}")))
    };
    let kind = rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str).unwrap_or("default");
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(linear(required("factor")?)),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context: required("original_max_position_embeddings")? as usize,
        }),
        other => Err(ModelError::malformed(path, format!("rope scaling of type '{other}' is not supported"))),
    }
}

fn unsupported(found: &str, supported: &[&str]) -> ModelError {
    ModelError::UnsupportedArchitecture { found: found.to_owned(), supported: supported.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 8192, "num_hidden_layers": 2,
            "intermediate_size": 96, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
        });
        json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(Path::new("config.json"), json.as_object().unwrap())
    }

    #[test]
    fn the_real_model_is_described_by_its_own_settings() {
        let config = ModelConfig::from_gguf(&GgufFile::open(crate::test_model()).unwrap()).unwrap();
        assert_eq!((config.vocab, config.context, config.layers), (49152, 8192, 30));
        assert_eq!((config.d_model, config.heads, config.kv_heads, config.head_dim), (576, 9, 3, 64));
        assert_eq!((config.d_ff, config.rope.dims, config.rope.theta), (1536, 64, 100_000.0));
        assert!(config.tied_head && !config.qkv_bias && config.sliding_window.is_none());
        assert_eq!(config.rope.kind, RopeKind::Interleaved);
    }

    #[test]
    fn a_config_json_is_read_with_its_defaults() {
        let config = config(serde_json::json!({})).unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.rope.kind), (16, 2, RopeKind::Half));
        assert_eq!(config.rope.theta, 10_000.0);
        assert_eq!(config.names.name(3, Role::FfnGate), "model.layers.3.mlp.gate_proj.weight");
    }

    #[test]
    fn settings_that_would_compute_something_else_are_refused_by_name() {
        let error = |changes| config(changes).unwrap_err().to_string();
        let unknown = error(serde_json::json!({"architectures": ["MambaForCausalLM"]}));
        assert!(unknown.contains("'MambaForCausalLM'") && unknown.contains("LlamaForCausalLM"));
        assert!(
            error(serde_json::json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
                .contains("'yarn'")
        );
        assert!(error(serde_json::json!({"num_key_value_heads": 3})).contains("cannot share"));
        assert!(error(serde_json::json!({"hidden_size": 0})).contains("model width"));
        assert!(error(serde_json::json!({"num_attention_heads": 0})).contains("head count"));
        assert!(error(serde_json::json!({"attention_bias": true})).contains("attention_bias"));
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = serde_json::json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "head_dim": 128, "rope_theta": 500000.0});
        let scaled = config(scaling).unwrap().rope;
        let plain = Rope { scaling: RopeScaling::None, ..scaled.clone() }.frequencies();
        let scaled = scaled.frequencies();
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled[32] < plain[32] && scaled[32] > plain[32] / 8.0);
    }
}
