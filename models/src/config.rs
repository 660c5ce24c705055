//! What a model is: the description from which the one generic decoder is built.

mod families;
mod from_gguf;
mod from_json;
mod names;
mod rope;

use std::path::Path;

use dormouse_kernels::{KvDtype, PageLayout};

use crate::error::ModelError;

pub use names::{NameScheme, Role};
pub use rope::{Rope, RopeKind, RopeScaling};

/// Sizes beyond any real model, against nonsense that would exhaust memory.
const LARGEST_SIZE: usize = 1 << 24;
/// Layers, and experts of a layer, beyond any real model: something is made for each of them.
const LARGEST_COUNT: usize = 1 << 12;
/// The widest head that a KV row buffer holds.
const LARGEST_HEAD: usize = 512;

/// What one multiply-add of attention takes, in those of weights: floats against integers.
const ATTENTION_COST: f64 = 2.5;

/// The function between the two halves of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Whether queries and keys are RMS-normalised before rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Each head by itself, all with the same weights.
    Head,
    /// All heads of a row as one vector.
    Projection,
}

/// In what a layer may differ from its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKind {
    /// Attention sees only [`ModelConfig::sliding_window`] positions.
    pub windowed: bool,
    /// Queries and keys carry their position.
    pub rotated: bool,
    /// The feed-forward block is a choice of experts.
    pub experts: bool,
}

/// Queries grow with their position, so that attention over a long text stays sharp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    pub slope: f32,
    /// Positions from one step to the next.
    pub length: usize,
}

impl Temperature {
    /// The factor on the queries of a position: 1 in the first `length` positions.
    pub fn factor(&self, position: usize) -> f32 {
        1.0 + self.slope * (1.0 + (position / self.length) as f32).ln()
    }
}

/// A feed-forward block of which each token uses a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// Experts that one token uses.
    pub used: usize,
    /// Width of one expert.
    pub d_ff: usize,
    /// The weights of the used ones are made to sum to one.
    pub normalised: bool,
}

/// A model's description. Sizes count values, not bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture as the file names it.
    pub architecture: String,
    pub vocab: usize,
    /// Positions that the model can be used with.
    pub context: usize,
    pub layers: usize,
    pub d_model: usize,
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width of the feed-forward block; of layers with experts, see [`Experts::d_ff`].
    pub d_ff: usize,
    /// `[layers]`
    pub layer_kinds: Vec<LayerKind>,

    /// Added to the mean square in RMS normalisation.
    pub norm_eps: f32,
    /// Added to every norm weight of the file.
    pub norm_offset: f32,
    /// Norms before the attention and feed-forward blocks.
    pub pre_norms: bool,
    /// Norms after them, before the residual addition.
    pub post_norms: bool,
    pub qk_norm: QkNorm,

    pub rope: Rope,
    /// The rotation of windowed layers, where it is not `rope`.
    pub local_rope: Option<Rope>,
    /// Positions that attention sees in windowed layers, the query's own counted in.
    pub sliding_window: Option<usize>,
    /// Factor on attention scores.
    pub attention_scale: f32,
    pub attention_temperature: Option<Temperature>,
    /// `cap · tanh(score / cap)` on attention scores.
    pub attention_soft_cap: Option<f32>,

    /// Q, K and V projections add a bias.
    pub qkv_bias: bool,
    /// The projection after attention adds a bias.
    pub output_bias: bool,
    /// Q, K and V are the rows of one matrix, gate and up those of another.
    pub fused: bool,
    pub activation: Activation,
    pub experts: Option<Experts>,

    /// Factor on token embeddings.
    pub embedding_scale: f32,
    /// Factor on what a block adds.
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// `cap · tanh(logit / cap)` on logits.
    pub logit_soft_cap: Option<f32>,
    /// The output matrix is the token embedding.
    pub tied_head: bool,
    pub names: NameScheme,
}

impl ModelConfig {
    /// Positions that attention sees in this layer; None: all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| self.layer_kinds[layer].windowed)
    }

    /// The shape of this model's KV pages.
    pub fn page_layout(&self, dtype: KvDtype) -> PageLayout {
        let ModelConfig { layers, kv_heads, head_dim, .. } = *self;
        PageLayout { layers, kv_heads, head_dim, dtype }
    }

    /// About what a row at `position` costs in one layer, in multiply-adds of weights.
    pub fn row_work(&self, layer: usize, position: usize) -> f64 {
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let d_ff = self.experts.map_or(self.d_ff, |experts| experts.d_ff * experts.used);
        let weights = self.d_model * (2 * (q_width + kv_width) + 3 * d_ff);
        let seen = self.window(layer).unwrap_or(usize::MAX).min(position + 1);
        weights as f64 + ATTENTION_COST * (2 * q_width * seen) as f64
    }

    /// The description for sessions of at most `context` positions. Only rotations that depend on the length of a text
    /// notice: a short context keeps them as they were first trained.
    pub fn for_context(mut self, context: usize) -> ModelConfig {
        if matches!(self.rope.scaling, RopeScaling::LongRope { .. } | RopeScaling::DynamicNtk { .. }) {
            self.context = context;
        }
        self
    }

    /// Refuses sizes that no decoder can be built from, so that the decoder can trust them.
    fn check(&self, path: &Path) -> Result<(), ModelError> {
        match self.fault() {
            None => Ok(()),
            Some(what) => Err(ModelError::malformed(path, what)),
        }
    }

    fn fault(&self) -> Option<String> {
        let sizes = [
            ("vocabulary", self.vocab, LARGEST_SIZE),
            ("context", self.context, LARGEST_SIZE),
            ("layer count", self.layers, LARGEST_COUNT),
            ("model width", self.d_model, LARGEST_SIZE),
            ("head count", self.heads, LARGEST_SIZE),
            ("key-value head count", self.kv_heads, LARGEST_SIZE),
            ("head width", self.head_dim, LARGEST_HEAD),
            ("feed-forward width", self.d_ff, LARGEST_SIZE),
            ("sliding window", self.sliding_window.unwrap_or(1), LARGEST_SIZE),
            (
                "attention temperature's step",
                self.attention_temperature.map_or(1, |t| t.length),
                LARGEST_SIZE,
            ),
            ("number of experts", self.experts.map_or(1, |experts| experts.count), LARGEST_COUNT),
            ("number of experts used", self.experts.map_or(1, |experts| experts.used), LARGEST_COUNT),
            ("experts' width", self.experts.map_or(1, |experts| experts.d_ff), LARGEST_SIZE),
        ];
        if let Some((name, size, largest)) =
            sizes.into_iter().find(|(_, size, largest)| !(1..=*largest).contains(size))
        {
            return Some(format!(
                "the {name} is {size}, which cannot be right (1 to {largest} are possible)"
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Some(format!("{heads} heads cannot share {kv_heads} key-value heads"));
        }
        if self.layer_kinds.len() != self.layers {
            let (kinds, layers) = (self.layer_kinds.len(), self.layers);
            return Some(format!("a setting for each layer has {kinds} values for {layers} layers"));
        }
        if let Some(experts) = self.experts.filter(|experts| experts.used > experts.count) {
            return Some(format!("{} of {} experts cannot be used", experts.used, experts.count));
        }
        if self.local_rope.as_ref().is_some_and(|local| local.dims != self.rope.dims) {
            return Some("windowed layers that rotate another part of a head are not supported".to_owned());
        }
        let ropes = [Some(&self.rope), self.local_rope.as_ref()].into_iter().flatten();
        if let Some(fault) = ropes.filter_map(|rope| rope.fault(self.head_dim)).next() {
            return Some(fault);
        }
        let factors = [
            ("normalisation epsilon", Some(self.norm_eps)),
            ("attention scale", Some(self.attention_scale)),
            ("attention temperature", self.attention_temperature.map(|temperature| temperature.slope)),
            ("attention soft cap", self.attention_soft_cap),
            ("embedding scale", Some(self.embedding_scale)),
            ("residual scale", Some(self.residual_scale)),
            ("logit scale", Some(self.logit_scale)),
            ("logit soft cap", self.logit_soft_cap),
        ];
        let unfit = |value: f32| !(value.is_finite() && value >= 0.0);
        let wrong = factors.into_iter().find(|(_, value)| value.is_some_and(unfit));
        wrong.map(|(name, value)| {
            format!("the {name} is {}, which cannot be right", value.unwrap_or(f32::NAN))
        })
    }
}

#[cfg(test)]
mod tests;
