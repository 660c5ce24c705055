//! A model's description from the `config.json` of a model folder.

use std::path::Path;

use serde_json::{Map, Value};

use super::families::{Family, is_last_of};
use super::rope::{linear, long_rope_magnitude, yarn_magnitude};
use super::{
    Activation, Experts, LayerKind, ModelConfig, NameScheme, Rope, RopeKind, RopeScaling, Temperature,
};
use crate::error::ModelError;
use crate::safetensors::SafetensorsFolder;
use crate::weights::WeightSource;

impl ModelConfig {
    /// Reads the `config.json` of a folder.
    pub fn from_folder(folder: &SafetensorsFolder) -> Result<ModelConfig, ModelError> {
        let path = folder.path().join("config.json");
        let json: Map<String, Value> =
            folder.json("config.json")?.ok_or_else(|| ModelError::malformed(&path, "the file is missing"))?;
        ModelConfig::from_json(&path, &json)
    }

    /// Reads the object of a `config.json`; `path` is for messages.
    pub fn from_json(path: &Path, json: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
        let class =
            json.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str).unwrap_or("");
        let family = Family::of_class(class)?;
        let settings = Settings { path, json, family };
        let (d_model, heads) = (settings.required("hidden_size")?, settings.required("num_attention_heads")?);
        let head_dim = settings.size("head_dim").unwrap_or(d_model / heads.max(1));
        if settings.flag("mlp_bias") == Some(true) {
            return Err(ModelError::malformed(path, format!("mlp_bias is not supported for {class}")));
        }
        let layers = settings.required("num_hidden_layers")?;
        let bias = settings.flag("attention_bias").unwrap_or(false);
        let scaled_size = settings.number("query_pre_attn_scalar").unwrap_or(head_dim as f32);
        let rope = settings.rope("full_attention", head_dim)?;
        let experts = settings.experts()?;
        let config = ModelConfig {
            architecture: class.to_owned(),
            vocab: settings.required("vocab_size")?,
            context: settings.context(&rope)?,
            layers,
            d_model,
            heads,
            kv_heads: settings.size("num_key_value_heads").unwrap_or(heads),
            head_dim,
            d_ff: settings.required("intermediate_size")?,
            layer_kinds: settings.layer_kinds(layers),
            norm_eps: settings
                .number("rms_norm_eps")
                .ok_or_else(|| ModelError::missing_metadata(path, "rms_norm_eps"))?,
            norm_offset: family.norm_offset,
            pre_norms: family.pre_norms,
            post_norms: family.post_norms,
            qk_norm: family.qk_norm,
            rope,
            local_rope: match family.local_theta {
                None => None,
                Some(theta) => Some(settings.local_rope(theta, head_dim)?),
            },
            sliding_window: settings
                .size("sliding_window")
                .filter(|&window| window > 0 && settings.flag("use_sliding_window") != Some(false)),
            attention_scale: settings.number("attention_multiplier").unwrap_or(1.0 / scaled_size.sqrt()),
            attention_temperature: settings.attention_temperature()?,
            attention_soft_cap: settings.number("attn_logit_softcapping"),
            qkv_bias: family.qkv_bias || bias,
            output_bias: bias && !family.qkv_bias,
            fused: family.fused,
            activation: settings.activation()?,
            experts,
            embedding_scale: match family.scaled_embedding {
                true => (d_model as f32).sqrt(),
                false => settings.number("embedding_multiplier").unwrap_or(1.0),
            },
            residual_scale: settings.number("residual_multiplier").unwrap_or(1.0),
            logit_scale: 1.0 / settings.number("logits_scaling").unwrap_or(1.0),
            logit_soft_cap: settings.number("final_logit_softcapping"),
            // Gemma leaves out that its head is tied.
            tied_head: settings.flag("tie_word_embeddings").unwrap_or(family.scaled_embedding),
            names: NameScheme::HuggingFace { post_norms: family.post_norms },
        };
        config.check(path)?;
        Ok(config)
    }
}

/// The settings of one `config.json`.
struct Settings<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
    family: &'static Family,
}

impl Settings<'_> {
    fn size(&self, name: &str) -> Option<usize> {
        self.json.get(name).and_then(Value::as_u64).map(|value| value as usize)
    }

    fn required(&self, name: &str) -> Result<usize, ModelError> {
        self.size(name).ok_or_else(|| ModelError::missing_metadata(self.path, name))
    }

    fn number(&self, name: &str) -> Option<f32> {
        self.json.get(name).and_then(Value::as_f64).map(|value| value as f32)
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.json.get(name).and_then(Value::as_bool)
    }

    fn list(&self, name: &str) -> Option<&Vec<Value>> {
        self.json.get(name).and_then(Value::as_array)
    }

    fn activation(&self) -> Result<Activation, ModelError> {
        // The newer name wins where Gemma files have both.
        match self.json.get("hidden_activation").or(self.json.get("hidden_act")).and_then(Value::as_str) {
            None => Ok(self.family.activation),
            Some("silu" | "swish") => Ok(Activation::Silu),
            // Gemma was trained with the approximation, though its first files say "gelu".
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu")
                if self.family.activation == Activation::GeluTanh =>
            {
                Ok(Activation::GeluTanh)
            }
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some(other) => Err(ModelError::malformed(
                self.path,
                format!("the activation '{other}' is not supported (supported: silu, gelu_pytorch_tanh)"),
            )),
        }
    }

    /// Files of models that a scaling stretches may state the context before it.
    fn context(&self, rope: &Rope) -> Result<usize, ModelError> {
        let stated = self.required("max_position_embeddings")?;
        Ok(match rope.scaling {
            RopeScaling::DynamicNtk { factor, original_context }
            | RopeScaling::Yarn { factor, original_context, .. } => {
                stated.max((original_context as f32 * factor) as usize)
            }
            _ => stated,
        })
    }

    fn layer_kinds(&self, layers: usize) -> Vec<LayerKind> {
        let types = self.list("layer_types");
        let unrotated = self.list("no_rope_layers");
        let global_every = self.size("sliding_window_pattern").or(self.family.global_every);
        let unrotated_every = self.size("no_rope_layer_interval").or(self.family.unrotated_every);
        // Qwen: the layers below this one see everything.
        let first_windowed = self.size("max_window_layers").unwrap_or(0);
        let dense = self.list("mlp_only_layers");
        let sparse_step = self.size("decoder_sparse_step").unwrap_or(1);
        let kind = |layer: usize| LayerKind {
            windowed: match types {
                Some(types) => types.get(layer).is_some_and(|kind| kind == "sliding_attention"),
                None => layer >= first_windowed && !is_last_of(global_every, layer),
            },
            rotated: match unrotated.filter(|_| self.family.unrotated_every.is_some()) {
                Some(rotated) => rotated.get(layer).is_none_or(|rotated| rotated != 0),
                None => self.family.unrotated_every.is_none() || !is_last_of(unrotated_every, layer),
            },
            experts: self.family.experts
                && !dense.is_some_and(|dense| dense.contains(&Value::from(layer)))
                && is_last_of(Some(sparse_step), layer),
        };
        (0..layers.min(super::LARGEST_COUNT)).map(kind).collect()
    }

    fn experts(&self) -> Result<Option<Experts>, ModelError> {
        if !self.family.experts {
            return Ok(None);
        }
        Ok(Some(Experts {
            count: self.required("num_experts")?,
            used: self.required("num_experts_per_tok")?,
            d_ff: self.required("moe_intermediate_size")?,
            normalised: self.flag("norm_topk_prob").unwrap_or(false),
        }))
    }

    fn attention_temperature(&self) -> Result<Option<Temperature>, ModelError> {
        let parameters = self.rope_parameters("full_attention");
        let number = |name: &str| parameters.get(name).and_then(Value::as_f64);
        let Some(slope) = number("llama_4_scaling_beta").filter(|&slope| slope != 0.0) else {
            return Ok(None);
        };
        let length = number("original_max_position_embeddings").map(|length| length as usize);
        let length = length.map_or_else(|| self.required("max_position_embeddings"), Ok)?;
        Ok(Some(Temperature { slope: slope as f32, length }))
    }

    /// What says how layers of one kind rotate. Newer files put theta and scaling into one object,
    /// `rope_parameters`, which may have an object for each kind of layer.
    fn rope_parameters(&self, layer_type: &str) -> Map<String, Value> {
        let parameters =
            self.json.get("rope_parameters").or(self.json.get("rope_scaling")).and_then(Value::as_object);
        let own = parameters.and_then(|all| all.get(layer_type)).and_then(Value::as_object);
        own.or(parameters).cloned().unwrap_or_default()
    }

    fn rope(&self, layer_type: &str, head_dim: usize) -> Result<Rope, ModelError> {
        let parameters = self.rope_parameters(layer_type);
        let number = |name: &str| {
            let own = parameters.get(name).and_then(Value::as_f64).map(|value| value as f32);
            own.or(self.number(name))
        };
        let partial = number("partial_rotary_factor").unwrap_or(1.0);
        Ok(Rope {
            kind: RopeKind::Half,
            theta: number("rope_theta").unwrap_or(10_000.0),
            dims: (head_dim as f32 * partial) as usize,
            scaling: self.rope_scaling(&parameters)?,
        })
    }

    /// The rotation of windowed layers; older files have only its base.
    fn local_rope(&self, usual_theta: f32, head_dim: usize) -> Result<Rope, ModelError> {
        let parameters = self.json.get("rope_parameters");
        if parameters.is_some_and(|parameters| parameters.get("sliding_attention").is_some()) {
            return self.rope("sliding_attention", head_dim);
        }
        let theta = self.number("rope_local_base_freq").unwrap_or(usual_theta);
        Ok(Rope { kind: RopeKind::Half, theta, dims: head_dim, scaling: RopeScaling::None })
    }

    fn rope_scaling(&self, parameters: &Map<String, Value>) -> Result<RopeScaling, ModelError> {
        let number = |name: &str| parameters.get(name).and_then(Value::as_f64).map(|value| value as f32);
        let missing = |name: &str| ModelError::missing_metadata(self.path, format!("rope_scaling.{name}"));
        let required = |name: &str| number(name).ok_or_else(|| missing(name));
        let stated_context = self.required("max_position_embeddings")?;
        let original_context = number("original_max_position_embeddings")
            .map(|context| context as usize)
            .or(self.size("original_max_position_embeddings"));
        let kind = parameters
            .get("rope_type")
            .or(parameters.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        // Phi 3 called LongRoPE by two other names first.
        let has_factors = parameters.contains_key("long_factor");
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(linear(required("factor")?)),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_context: original_context
                    .ok_or_else(|| missing("original_max_position_embeddings"))?,
            }),
            // Its original context is the stated one, whatever else the file says.
            "dynamic" => {
                Ok(RopeScaling::DynamicNtk { factor: required("factor")?, original_context: stated_context })
            }
            "longrope" | "su" | "yarn" if has_factors => {
                let factors = |name: &str| -> Result<Vec<f32>, ModelError> {
                    let values =
                        parameters.get(name).and_then(Value::as_array).ok_or_else(|| missing(name))?;
                    let factor =
                        |value: &Value| value.as_f64().map(|value| value as f32).ok_or_else(|| missing(name));
                    values.iter().map(factor).collect()
                };
                let original_context = original_context.unwrap_or(stated_context);
                let factor = number("factor").unwrap_or(stated_context as f32 / original_context as f32);
                let magnitude = number("attention_factor");
                Ok(RopeScaling::LongRope {
                    short: factors("short_factor")?,
                    long: factors("long_factor")?,
                    original_context,
                    magnitude: magnitude.unwrap_or_else(|| long_rope_magnitude(factor, original_context)),
                })
            }
            "yarn" => {
                let factor = required("factor")?;
                let magnitude = match (number("attention_factor"), number("mscale"), number("mscale_all_dim"))
                {
                    (Some(given), ..) => given,
                    (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => {
                        yarn_magnitude(factor, one) / yarn_magnitude(factor, all)
                    }
                    _ => yarn_magnitude(factor, 1.0),
                };
                let truncate = parameters.get("truncate").and_then(Value::as_bool).unwrap_or(true);
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context: original_context.unwrap_or(stated_context),
                    beta_fast: number("beta_fast").unwrap_or(32.0),
                    beta_slow: number("beta_slow").unwrap_or(1.0),
                    truncate,
                    magnitude,
                })
            }
            other => Err(ModelError::malformed(
                self.path,
                format!(
                    "rope scaling of type '{other}' is not supported (supported: linear, dynamic, llama3, yarn, \
                     longrope)"
                ),
            )),
        }
    }
}
