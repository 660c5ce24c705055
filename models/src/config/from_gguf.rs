//! A model's description from the settings of a GGUF file.

use super::families::{Family, is_last_of};
use super::rope::{linear, long_rope_magnitude, yarn_magnitude};
use super::{Experts, LayerKind, ModelConfig, NameScheme, Role, Rope, RopeScaling, Temperature};
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::weights::WeightSource;

impl ModelConfig {
    /// Reads the settings of a GGUF file.
    pub fn from_gguf(file: &GgufFile) -> Result<ModelConfig, ModelError> {
        let family = Family::of_gguf(file.architecture()?)?;
        let settings = Settings { file, family };
        let (d_model, heads) =
            (settings.required("embedding_length")?, settings.required("attention.head_count")?);
        let head_dim = settings.size("attention.key_length").unwrap_or(d_model / heads.max(1));
        if settings.size("attention.value_length").is_some_and(|length| length != head_dim) {
            return Err(settings.refuse("key and value heads of different sizes are not supported".into()));
        }
        let embedding_name = NameScheme::Gguf.name(0, Role::TokenEmbedding);
        let embedding = file.tensor(&embedding_name).ok_or_else(|| ModelError::MissingTensor {
            path: file.path().to_owned(),
            tensor: embedding_name,
        })?;
        let layers = settings.required("block_count")?;
        let scaled_by_width = family.layers_scaled_by_width == Some(layers);
        let scaled_size = if scaled_by_width { d_model / heads.max(1) } else { head_dim };
        let rope = settings.rope(head_dim)?;
        let soft_cap =
            |name: &str, usual: Option<f32>| settings.number(name).or(usual).filter(|&cap| cap > 0.0);
        let experts = settings.experts()?;
        let config = ModelConfig {
            architecture: family.gguf.to_owned(),
            vocab: embedding.rows,
            context: settings.required("context_length")?,
            layers,
            d_model,
            heads,
            kv_heads: settings.size("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            d_ff: settings
                .size("feed_forward_length")
                .or(experts.map(|experts| experts.d_ff))
                .ok_or_else(|| file.missing(&settings.key("feed_forward_length")))?,
            layer_kinds: settings.layer_kinds(layers),
            norm_eps: settings
                .number("attention.layer_norm_rms_epsilon")
                .ok_or_else(|| file.missing(&settings.key("attention.layer_norm_rms_epsilon")))?,
            norm_offset: 0.0,
            pre_norms: family.pre_norms,
            post_norms: family.post_norms,
            qk_norm: family.qk_norm,
            local_rope: family.local_theta.map(|theta| Rope {
                theta: settings.number("rope.freq_base_swa").unwrap_or(theta),
                scaling: RopeScaling::None,
                ..rope.clone()
            }),
            rope,
            sliding_window: settings.size("attention.sliding_window").filter(|&window| window > 0),
            attention_scale: settings
                .number("attention.scale")
                .filter(|&scale| scale != 0.0)
                .unwrap_or(1.0 / (scaled_size as f32).sqrt()),
            attention_temperature: settings.attention_temperature()?,
            attention_soft_cap: soft_cap("attn_logit_softcapping", family.soft_caps.0),
            qkv_bias: family.qkv_bias || file.tensor(&NameScheme::Gguf.bias(0, Role::AttnQ)).is_some(),
            output_bias: file.tensor(&NameScheme::Gguf.bias(0, Role::AttnOutput)).is_some(),
            fused: family.fused && file.tensor(&NameScheme::Gguf.name(0, Role::AttnQkv)).is_some(),
            activation: family.activation,
            experts,
            embedding_scale: match family.scaled_embedding {
                true => (d_model as f32).sqrt(),
                false => settings.number("embedding_scale").unwrap_or(1.0),
            },
            residual_scale: settings.number("residual_scale").unwrap_or(1.0),
            // The file has the divisor.
            logit_scale: 1.0 / settings.number("logit_scale").filter(|&scale| scale != 0.0).unwrap_or(1.0),
            logit_soft_cap: soft_cap("final_logit_softcapping", family.soft_caps.1),
            tied_head: file.tensor(&NameScheme::Gguf.name(0, Role::Output)).is_none(),
            names: NameScheme::Gguf,
        };
        config.check(file.path())?;
        Ok(config)
    }
}

/// The settings of one file, by the family's own keys.
struct Settings<'a> {
    file: &'a GgufFile,
    family: &'static Family,
}

impl Settings<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.family.gguf)
    }

    fn size(&self, name: &str) -> Option<usize> {
        self.file.u32(&self.key(name)).map(|value| value as usize)
    }

    fn required(&self, name: &str) -> Result<usize, ModelError> {
        self.size(name).ok_or_else(|| self.file.missing(&self.key(name)))
    }

    fn number(&self, name: &str) -> Option<f32> {
        self.file.f32(&self.key(name))
    }

    fn refuse(&self, what: String) -> ModelError {
        ModelError::malformed(self.file.path(), what)
    }

    fn layer_kinds(&self, layers: usize) -> Vec<LayerKind> {
        let pattern = self.file.bools(&self.key("attention.sliding_window_pattern"));
        let global_every = self.size("attention.sliding_window_pattern").or(self.family.global_every);
        let kind = |layer: usize| LayerKind {
            windowed: match &pattern {
                Some(windowed) => windowed.get(layer).copied().unwrap_or(false),
                None => !is_last_of(global_every, layer),
            },
            rotated: !is_last_of(self.family.unrotated_every, layer),
            experts: self.family.experts,
        };
        (0..layers.min(super::LARGEST_COUNT)).map(kind).collect()
    }

    fn experts(&self) -> Result<Option<Experts>, ModelError> {
        if !self.family.experts {
            return match self.size("expert_count") {
                None | Some(0) => Ok(None),
                Some(count) => Err(self.refuse(format!(
                    "{count} experts are not supported for the architecture '{}'; use a dense model or qwen3moe",
                    self.family.gguf
                ))),
            };
        }
        Ok(Some(Experts {
            count: self.required("expert_count")?,
            used: self.required("expert_used_count")?,
            d_ff: self.required("expert_feed_forward_length")?,
            normalised: self.file.bool(&self.key("expert_weights_norm")).unwrap_or(true),
        }))
    }

    fn attention_temperature(&self) -> Result<Option<Temperature>, ModelError> {
        let Some(slope) = self.number("attention.temperature_scale").filter(|&slope| slope != 0.0) else {
            return Ok(None);
        };
        let length = self.size("attention.temperature_length");
        let length = length.or(self.size("rope.scaling.original_context_length"));
        let length = length.map_or_else(|| self.required("context_length"), Ok)?;
        Ok(Some(Temperature { slope, length }))
    }

    fn rope(&self, head_dim: usize) -> Result<Rope, ModelError> {
        Ok(Rope {
            kind: self.family.gguf_rope,
            theta: self.number("rope.freq_base").unwrap_or(10_000.0),
            dims: self.size("rope.dimension_count").unwrap_or(head_dim),
            scaling: self.rope_scaling()?,
        })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        let factors = |name: &str| self.file.tensor(name).map(|tensor| tensor.to_f32());
        if let Some(factors) = factors("rope_freqs.weight") {
            return Ok(RopeScaling::Factors(factors));
        }
        let context = self.required("context_length")?;
        let original_context = self.size("rope.scaling.original_context_length").unwrap_or(context);
        if let (Some(long), Some(short)) =
            (factors("rope_factors_long.weight"), factors("rope_factors_short.weight"))
        {
            let factor = context as f32 / original_context as f32;
            let magnitude = self
                .number("rope.scaling.attn_factor")
                .unwrap_or_else(|| long_rope_magnitude(factor, original_context));
            return Ok(RopeScaling::LongRope { short, long, original_context, magnitude });
        }
        // Very old files have only the bare factor.
        let factor = self.number("rope.scaling.factor").or(self.number("rope.scale_linear"));
        match self.file.str(&self.key("rope.scaling.type")).unwrap_or("linear") {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(factor.map_or(RopeScaling::None, linear)),
            "yarn" => {
                let factor = factor.ok_or_else(|| self.file.missing(&self.key("rope.scaling.factor")))?;
                let weight = self.number("rope.scaling.attn_factor").unwrap_or(1.0);
                // The weight of the part that the model was trained to do without.
                let unused = self.number("rope.scaling.yarn_log_multiplier").unwrap_or(0.0);
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context,
                    beta_fast: self.number("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
                    beta_slow: self.number("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
                    truncate: true,
                    magnitude: weight * yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, unused),
                })
            }
            other => Err(self.refuse(format!(
                "rope scaling of type '{other}' is not supported (supported: none, linear, yarn)"
            ))),
        }
    }
}
