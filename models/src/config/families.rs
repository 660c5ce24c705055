//! The families: for each, what its files leave unsaid. Everything else is read from the file.

use super::{Activation, QkNorm, RopeKind};
use crate::error::ModelError;

/// What distinguishes a family from plain Llama.
#[derive(Clone, Copy)]
pub(super) struct Family {
    /// Its `general.architecture` in GGUF files.
    pub gguf: &'static str,
    /// Its `architectures` in `config.json`.
    pub classes: &'static [&'static str],
    /// The order of rotated pairs in GGUF files; those of Llama and its kin have the rows of Q and K permuted.
    pub gguf_rope: RopeKind,
    /// Norms stand before the attention and feed-forward blocks.
    pub pre_norms: bool,
    /// Norms stand after them, before the residual addition.
    pub post_norms: bool,
    /// safetensors hold the distance of norm weights from this number (GGUF files hold the weights).
    pub norm_offset: f32,
    pub qk_norm: QkNorm,
    /// Q, K and V projections always have a bias.
    pub qkv_bias: bool,
    /// Q, K and V are one matrix, gate and up another.
    pub fused: bool,
    pub activation: Activation,
    /// Token embeddings are multiplied by the square root of the model's width.
    pub scaled_embedding: bool,
    /// In every run of this many layers the last attends to all positions, the others to a window; None: a window, if
    /// the file names one, is for all layers.
    pub global_every: Option<usize>,
    /// The base of rotation in windowed layers, where it is not that of the others.
    pub local_theta: Option<f32>,
    /// In every run of this many layers the last does not rotate.
    pub unrotated_every: Option<usize>,
    /// The feed-forward block is a choice of experts.
    pub experts: bool,
    /// Soft caps of attention scores and of logits that old GGUF files leave out.
    pub soft_caps: (Option<f32>, Option<f32>),
    /// The layer count of the one size whose attention scale goes by width over heads, in GGUF files of Gemma.
    pub layers_scaled_by_width: Option<usize>,
}

const LLAMA: Family = Family {
    gguf: "llama",
    classes: &["LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM"],
    gguf_rope: RopeKind::Interleaved,
    pre_norms: true,
    post_norms: false,
    norm_offset: 0.0,
    qk_norm: QkNorm::None,
    qkv_bias: false,
    fused: false,
    activation: Activation::Silu,
    scaled_embedding: false,
    global_every: None,
    local_theta: None,
    unrotated_every: None,
    experts: false,
    soft_caps: (None, None),
    layers_scaled_by_width: None,
};

const QWEN2: Family = Family {
    gguf: "qwen2",
    classes: &["Qwen2ForCausalLM"],
    gguf_rope: RopeKind::Half,
    qkv_bias: true,
    ..LLAMA
};

const QWEN3: Family =
    Family { gguf: "qwen3", classes: &["Qwen3ForCausalLM"], qkv_bias: false, qk_norm: QkNorm::Head, ..QWEN2 };

const GEMMA: Family = Family {
    gguf: "gemma",
    classes: &["GemmaForCausalLM"],
    gguf_rope: RopeKind::Half,
    norm_offset: 1.0,
    activation: Activation::GeluTanh,
    scaled_embedding: true,
    ..LLAMA
};

const GEMMA2: Family = Family {
    gguf: "gemma2",
    classes: &["Gemma2ForCausalLM"],
    post_norms: true,
    global_every: Some(2),
    soft_caps: (Some(50.0), Some(30.0)),
    layers_scaled_by_width: Some(46),
    ..GEMMA
};

const FAMILIES: [Family; 12] = [
    LLAMA,
    Family { gguf: "mistral3", classes: &["Ministral3ForCausalLM"], ..LLAMA },
    Family { gguf: "smollm3", classes: &["SmolLM3ForCausalLM"], unrotated_every: Some(4), ..LLAMA },
    Family { gguf: "granite", classes: &["GraniteForCausalLM"], ..LLAMA },
    QWEN2,
    QWEN3,
    Family { gguf: "qwen3moe", classes: &["Qwen3MoeForCausalLM"], experts: true, ..QWEN3 },
    GEMMA,
    GEMMA2,
    Family {
        gguf: "gemma3",
        classes: &["Gemma3ForCausalLM"],
        qk_norm: QkNorm::Head,
        global_every: Some(6),
        local_theta: Some(10_000.0),
        soft_caps: (None, None),
        layers_scaled_by_width: Some(62),
        ..GEMMA2
    },
    Family { gguf: "phi3", classes: &["Phi3ForCausalLM"], gguf_rope: RopeKind::Half, fused: true, ..LLAMA },
    Family {
        gguf: "olmo2",
        classes: &["Olmo2ForCausalLM"],
        gguf_rope: RopeKind::Half,
        pre_norms: false,
        post_norms: true,
        qk_norm: QkNorm::Projection,
        ..LLAMA
    },
];

impl Family {
    /// The family with this architecture name in GGUF files.
    pub fn of_gguf(architecture: &str) -> Result<&'static Family, ModelError> {
        FAMILIES.iter().find(|family| family.gguf == architecture).ok_or_else(|| {
            let supported: Vec<&str> = FAMILIES.iter().map(|family| family.gguf).collect();
            unsupported(architecture, &supported)
        })
    }

    /// The family with this class name in `config.json`.
    pub fn of_class(class: &str) -> Result<&'static Family, ModelError> {
        FAMILIES.iter().find(|family| family.classes.contains(&class)).ok_or_else(|| {
            let supported: Vec<&str> = FAMILIES.iter().flat_map(|family| family.classes).copied().collect();
            unsupported(class, &supported)
        })
    }
}

/// Whether a layer is the last in its run of so many.
pub(super) fn is_last_of(every: Option<usize>, layer: usize) -> bool {
    every.is_some_and(|every| (layer + 1).is_multiple_of(every))
}

fn unsupported(found: &str, supported: &[&str]) -> ModelError {
    ModelError::UnsupportedArchitecture { found: found.to_owned(), supported: supported.join(", ") }
}
