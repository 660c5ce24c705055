//! The decoder's weights, found in the file and checked against the model's description.

use std::ops::Range;

use crate::ModelError;
use crate::config::{Experts, ModelConfig, QkNorm, Role};
use crate::pack::PackedWeights;
use crate::weights::{Operand, Tensor, WeightSource};

/// Where weights go to be computed with: what a tensor of the file becomes there.
pub(crate) trait Home {
    type Matrix;
    type Vector;

    /// The matrix `name`, which is `tensor` in the file; None where the home lacks it.
    fn matrix(&self, name: &str, tensor: &Tensor) -> Result<Option<Self::Matrix>, ModelError>;

    /// Some of its rows as a matrix of their own.
    fn rows(
        &self,
        name: &str,
        tensor: &Tensor,
        range: Range<usize>,
    ) -> Result<Option<Self::Matrix>, ModelError>;

    /// Norm weights and biases.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, ModelError>;
}

/// The CPU's matrices are packed ones, and floats as they lie in the file.
impl Home for PackedWeights {
    type Matrix = Operand;
    type Vector = Vec<f32>;

    fn matrix(&self, name: &str, tensor: &Tensor) -> Result<Option<Operand>, ModelError> {
        Ok(self.operand(name, tensor))
    }

    fn rows(&self, name: &str, tensor: &Tensor, range: Range<usize>) -> Result<Option<Operand>, ModelError> {
        PackedWeights::rows(self, name, tensor, range)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        Ok(values)
    }
}

pub(crate) struct Layer<H: Home> {
    /// Positions that attention sees; None: all.
    pub window: Option<usize>,
    /// Which of the decoder's rotations this layer's queries and keys take.
    pub rotation: Option<usize>,
    pub attn_norm: Option<H::Vector>,
    pub q: Projection<H>,
    pub k: Projection<H>,
    pub v: Projection<H>,
    pub q_norm: Option<H::Vector>,
    pub k_norm: Option<H::Vector>,
    pub attn_output: Projection<H>,
    pub attn_post_norm: Option<H::Vector>,
    pub ffn_norm: Option<H::Vector>,
    pub feed_forward: FeedForward<H>,
    pub ffn_post_norm: Option<H::Vector>,
}

/// A matrix, and what is added to its product.
pub(crate) struct Projection<H: Home> {
    pub weight: H::Matrix,
    pub bias: Option<H::Vector>,
}

pub(crate) enum FeedForward<H: Home> {
    Dense(Gated<H>),
    Experts(Routed<H>),
}

/// Experts, and what chooses among them.
pub(crate) struct Routed<H: Home> {
    pub settings: Experts,
    /// `[experts, d_model]`
    pub router: H::Matrix,
    pub experts: Vec<Gated<H>>,
}

/// `down · (activation(gate · x) ∘ (up · x))`
pub(crate) struct Gated<H: Home> {
    pub gate: H::Matrix,
    pub up: H::Matrix,
    pub down: H::Matrix,
}

/// Looks tensors up by role.
pub(crate) struct Finder<'a, H: Home> {
    pub source: &'a dyn WeightSource,
    /// Of the same source.
    pub home: &'a H,
    pub config: &'a ModelConfig,
}

impl<H: Home> Finder<'_, H> {
    /// The tensor of this role as it lies in the file, which must have this shape.
    pub fn tensor(&self, layer: usize, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.named(&self.config.names.name(layer, role), rows, cols)
    }

    /// The same as a matrix to multiply with.
    pub fn matrix(
        &self,
        layer: usize,
        role: Role,
        rows: usize,
        cols: usize,
    ) -> Result<H::Matrix, ModelError> {
        let name = self.config.names.name(layer, role);
        let tensor = self.named(&name, rows, cols)?;
        self.home.matrix(&name, &tensor)?.ok_or_else(|| self.not_packed(&name))
    }

    /// Some of the rows of a tensor `[rows, cols]`, as a matrix of their own.
    fn part(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        range: Range<usize>,
    ) -> Result<H::Matrix, ModelError> {
        let tensor = self.named(name, rows, cols)?;
        self.home.rows(name, &tensor, range)?.ok_or_else(|| self.not_packed(name))
    }

    fn not_packed(&self, name: &str) -> ModelError {
        ModelError::malformed(self.source.path(), format!("the packed weights lack the matrix '{name}'"))
    }

    /// The weights of a norm over `width` values.
    pub fn norm(&self, layer: usize, role: Role, width: usize) -> Result<H::Vector, ModelError> {
        let mut weights = self.tensor(layer, role, 1, width)?.to_f32();
        weights.iter_mut().for_each(|weight| *weight += self.config.norm_offset);
        self.home.vector(weights)
    }

    /// The embedding, of which rows are looked up where the file is mapped.
    pub fn embedding(&self) -> Result<Tensor, ModelError> {
        self.tensor(0, Role::TokenEmbedding, self.config.vocab, self.config.d_model)
    }

    /// The matrix that logits come of.
    pub fn output(&self) -> Result<H::Matrix, ModelError> {
        let head = if self.config.tied_head { Role::TokenEmbedding } else { Role::Output };
        self.matrix(0, head, self.config.vocab, self.config.d_model)
    }

    pub fn layer(&self, layer: usize) -> Result<Layer<H>, ModelError> {
        let config = self.config;
        let kind = config.layer_kinds[layer];
        let (d, hd) = (config.d_model, config.head_dim);
        let (q_width, kv_width) = (config.heads * hd, config.kv_heads * hd);
        let [q, k, v] = self.parts(
            layer,
            Role::AttnQkv,
            [(Role::AttnQ, q_width), (Role::AttnK, kv_width), (Role::AttnV, kv_width)],
        )?;
        let norm = |present: bool, role: Role, width: usize| {
            present.then(|| self.norm(layer, role, width)).transpose()
        };
        let (q_norm_width, k_norm_width) = match config.qk_norm {
            QkNorm::Projection => (q_width, kv_width),
            QkNorm::Head | QkNorm::None => (hd, hd),
        };
        let qk_norm = config.qk_norm != QkNorm::None;
        Ok(Layer {
            window: config.window(layer),
            rotation: kind.rotated.then_some(usize::from(kind.windowed && config.local_rope.is_some())),
            attn_norm: norm(config.pre_norms, Role::AttnNorm, d)?,
            q: self.projection(layer, Role::AttnQ, (q, q_width), config.qkv_bias)?,
            k: self.projection(layer, Role::AttnK, (k, kv_width), config.qkv_bias)?,
            v: self.projection(layer, Role::AttnV, (v, kv_width), config.qkv_bias)?,
            q_norm: norm(qk_norm, Role::AttnQNorm, q_norm_width)?,
            k_norm: norm(qk_norm, Role::AttnKNorm, k_norm_width)?,
            attn_output: self.projection(
                layer,
                Role::AttnOutput,
                (self.matrix(layer, Role::AttnOutput, d, q_width)?, d),
                config.output_bias,
            )?,
            attn_post_norm: norm(config.post_norms, Role::AttnPostNorm, d)?,
            ffn_norm: norm(config.pre_norms, Role::FfnNorm, d)?,
            feed_forward: self.feed_forward(layer)?,
            ffn_post_norm: norm(config.post_norms, Role::FfnPostNorm, d)?,
        })
    }

    fn feed_forward(&self, layer: usize) -> Result<FeedForward<H>, ModelError> {
        let config = self.config;
        let (d, ff) = (config.d_model, config.d_ff);
        let Some(experts) = config.experts.filter(|_| config.layer_kinds[layer].experts) else {
            let [gate, up] = self.parts(layer, Role::FfnGateUp, [(Role::FfnGate, ff), (Role::FfnUp, ff)])?;
            let down = self.matrix(layer, Role::FfnDown, d, ff)?;
            return Ok(FeedForward::Dense(Gated { gate, up, down }));
        };
        let expert = |role: fn(usize) -> Role, index: usize, rows: usize, cols: usize| {
            let name = config.names.name(layer, role(index));
            // One tensor for all experts has one name for all.
            if name != config.names.name(layer, role(index + 1)) {
                return self.matrix(layer, role(index), rows, cols);
            }
            self.part(&name, experts.count * rows, cols, index * rows..(index + 1) * rows)
        };
        let gated = |index: usize| {
            Ok(Gated {
                gate: expert(Role::ExpertGate, index, experts.d_ff, d)?,
                up: expert(Role::ExpertUp, index, experts.d_ff, d)?,
                down: expert(Role::ExpertDown, index, d, experts.d_ff)?,
            })
        };
        Ok(FeedForward::Experts(Routed {
            settings: experts,
            router: self.matrix(layer, Role::Router, experts.count, d)?,
            experts: (0..experts.count).map(gated).collect::<Result<_, ModelError>>()?,
        }))
    }

    /// Matrices that read the model's width: the rows of one fused matrix, in order, or a tensor each.
    fn parts<const N: usize>(
        &self,
        layer: usize,
        fused: Role,
        parts: [(Role, usize); N],
    ) -> Result<[H::Matrix; N], ModelError> {
        let d = self.config.d_model;
        let mut matrices = Vec::with_capacity(N);
        if self.config.fused {
            let name = self.config.names.name(layer, fused);
            let all = parts.iter().map(|(_, rows)| rows).sum();
            let mut at = 0;
            for (_, rows) in parts {
                matrices.push(self.part(&name, all, d, at..at + rows)?);
                at += rows;
            }
        } else {
            for (role, rows) in parts {
                matrices.push(self.matrix(layer, role, rows, d)?);
            }
        }
        // One matrix was pushed for each part.
        matrices
            .try_into()
            .map_err(|_| ModelError::malformed(self.source.path(), "a fused matrix lost a part"))
    }

    fn projection(
        &self,
        layer: usize,
        role: Role,
        (weight, rows): (H::Matrix, usize),
        biased: bool,
    ) -> Result<Projection<H>, ModelError> {
        let bias = || {
            let tensor = self.named(&self.config.names.bias(layer, role), 1, rows)?;
            self.home.vector(tensor.to_f32())
        };
        Ok(Projection { weight, bias: biased.then(bias).transpose()? })
    }

    fn named(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let path = self.source.path();
        let Some(tensor) = self.source.tensor(name) else {
            return Err(ModelError::MissingTensor { path: path.to_owned(), tensor: name.to_owned() });
        };
        if (tensor.rows, tensor.cols) != (rows, cols) {
            return Err(ModelError::malformed(
                path,
                format!(
                    "tensor '{name}' is {} × {}, but the model's settings ask for {rows} × {cols}",
                    tensor.rows, tensor.cols
                ),
            ));
        }
        Ok(tensor)
    }
}
