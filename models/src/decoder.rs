//! The one decoder of every supported family: a transformer read off a [`ModelConfig`].

pub(crate) mod experts;
pub(crate) mod weights;

use std::ops::Range;

use dormouse_kernels::Cpu;
use dormouse_kernels::cpu::attention::{Attention, Sequence, attend, store_kv};
use dormouse_kernels::cpu::matmul::{Product, matmul};
use dormouse_kernels::cpu::norm::{
    add_bias, add_scaled, gelu_gate, rms_norm, rms_norm_in_place, scale, silu_gate, soft_cap,
};
use dormouse_kernels::cpu::rope;
use dormouse_kernels::{KvDtype, PageLayout};

use crate::config::{Activation, ModelConfig, Role, Rope, Temperature};
use crate::pack::PackedWeights;
use crate::weights::{Operand, Tensor, WeightSource};
use crate::{ModelError, TokenId};
use experts::ExpertBuffers;
use weights::{FeedForward, Finder, Gated, Layer, Projection};

pub struct Decoder {
    config: ModelConfig,
    /// That of most layers, then that of windowed ones where it differs.
    rotations: Vec<Rotation>,
    embedding: Tensor,
    layers: Vec<Layer<PackedWeights>>,
    output_norm: Vec<f32>,
    output: Operand,
}

/// How queries and keys carry their position.
pub(crate) struct Rotation {
    /// `[rope dims / 2]`
    frequencies: Vec<f32>,
    magnitude: f32,
}

impl Rotation {
    /// Those of most layers, then of windowed ones where it differs.
    pub(crate) fn of(config: &ModelConfig) -> Vec<Rotation> {
        let rotation = |rope: &Rope| Rotation {
            frequencies: rope.frequencies(config.context),
            magnitude: rope.magnitude(),
        };
        [Some(&config.rope), config.local_rope.as_ref()].into_iter().flatten().map(rotation).collect()
    }

    /// Cosine and sine of every pair's angle at a position, `[rope dims / 2]` each.
    pub(crate) fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        rope::angles(position, &self.frequencies, cos, sin);
        if self.magnitude != 1.0 {
            scale(cos, self.magnitude);
            scale(sin, self.magnitude);
        }
    }
}

/// Rows to compute together: prompt chunks and single decode steps of any number of sequences, token-flattened.
pub struct Batch<'a> {
    /// `[rows]`, the rows of each sequence together.
    pub tokens: &'a [TokenId],
    /// Covers all rows. The pages of every position up to a sequence's last row are present, and those of its own rows
    /// are reserved for it.
    pub sequences: &'a [Sequence<'a>],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
}

impl Batch<'_> {
    /// Calls `f` with some consecutive ones of its sequences, as a batch of their own.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(crate) fn part<R>(&self, sequences: &[Sequence<'_>], f: impl FnOnce(&Batch<'_>) -> R) -> R {
        let first = sequences.first().map_or(0, |sequence| sequence.first_row);
        let end = first + sequences.iter().map(|sequence| sequence.rows).sum::<usize>();
        let mut sequences = sequences.to_vec();
        sequences.iter_mut().for_each(|sequence| sequence.first_row -= first);
        let own_logits = self.logit_rows.iter().filter(|row| (first..end).contains(row));
        let logit_rows: Vec<usize> = own_logits.map(|row| row - first).collect();
        f(&Batch { tokens: &self.tokens[first..end], sequences: &sequences, logit_rows: &logit_rows })
    }
}

/// A batch's last sequence, where it goes through some layers only: a long prompt's rows, several passes' work.
pub struct Chunk<'a> {
    pub layers: Range<usize>,
    /// What these layers begin with, `[rows of the sequence, d_model]`, and what they leave for the next ones. Before the
    /// first layer and after the last it is of no meaning.
    pub hidden: &'a mut Vec<f32>,
}

/// The buffers of a forward pass, kept from one to the next.
#[derive(Default)]
pub struct Activations {
    /// The residual stream, `[rows, d_model]`.
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// What a block adds to the residual stream.
    delta: Vec<f32>,
    gated: GatedBuffers,
    experts: ExpertBuffers,
    /// `[rotations, rows, rope dims / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
    logits: Vec<f32>,
}

/// The two halves of a feed-forward block.
#[derive(Default)]
struct GatedBuffers {
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Activations {
    /// The logits of the last forward pass, `[logit_rows, vocab]`.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    /// About what the buffers take for passes of up to `rows` rows, with the logits of `logit_rows` of them, in bytes.
    pub fn bytes(config: &ModelConfig, rows: usize, logit_rows: usize) -> usize {
        let attention = 2 * (config.heads + config.kv_heads) * config.head_dim + 2 * config.rope.dims;
        let feed_forward = 2 * config.experts.map_or(config.d_ff, |experts| experts.d_ff * experts.used);
        let row = 3 * config.d_model + attention + feed_forward;
        (rows * row + logit_rows * config.vocab) * size_of::<f32>()
    }

    fn prepare(&mut self, rows: usize, config: &ModelConfig, rotations: usize) {
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        assert_eq!(self.x.len(), rows * config.d_model);
        self.normed.resize(rows * config.d_model, 0.0);
        self.delta.resize(rows * config.d_model, 0.0);
        self.q.resize(rows * q_width, 0.0);
        self.attended.resize(rows * q_width, 0.0);
        self.k.resize(rows * kv_width, 0.0);
        self.v.resize(rows * kv_width, 0.0);
        self.cos.resize(rotations * rows * config.rope.dims / 2, 0.0);
        self.sin.resize(rotations * rows * config.rope.dims / 2, 0.0);
    }
}

impl Decoder {
    /// Finds and checks every tensor that `config` describes; `packed` holds the tiles of the same source.
    pub fn new(
        source: &dyn WeightSource,
        packed: &PackedWeights,
        config: ModelConfig,
    ) -> Result<Decoder, ModelError> {
        let finder = Finder { source, home: packed, config: &config };
        let layers = (0..config.layers).map(|layer| finder.layer(layer)).collect::<Result<_, _>>()?;
        let (embedding, output) = (finder.embedding()?, finder.output()?);
        let output_norm = finder.norm(0, Role::OutputNorm, config.d_model)?;
        Ok(Decoder { rotations: Rotation::of(&config), embedding, layers, output_norm, output, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shape of this model's KV pages.
    pub fn page_layout(&self, dtype: KvDtype) -> PageLayout {
        self.config.page_layout(dtype)
    }

    /// Computes every row of `batch`: writes its keys and values to its pages and leaves the wanted logits in
    /// `work.logits_mut()`. Each row's bits depend on its own sequence alone.
    pub fn forward(&self, cpu: &Cpu, layout: &PageLayout, batch: &Batch<'_>, work: &mut Activations) {
        work.x.clear();
        self.embed(batch.tokens, work);
        self.pass(cpu, layout, batch, 0..self.layers.len(), work);
        self.logits(cpu, batch.logit_rows, work);
    }

    /// The same, but `batch`'s last sequence goes only through the chunk's layers, together with the others' rows. When
    /// it has gone through all, its keys, values and logits are the bits that one pass gives: only then logits of its
    /// rows may be wanted.
    pub fn forward_with_chunk(
        &self,
        cpu: &Cpu,
        layout: &PageLayout,
        batch: &Batch<'_>,
        chunk: Chunk<'_>,
        work: &mut Activations,
    ) {
        let (Range { start, end }, layers, d) = (chunk.layers, self.layers.len(), self.config.d_model);
        assert!(start < end && end <= layers, "layers {start}..{end} of {layers}");
        let Some((last, others)) = batch.sequences.split_last() else { return };
        let rows = last.first_row;
        assert_eq!(rows + last.rows, batch.tokens.len(), "the chunk's rows come last");
        let others = Batch { tokens: &batch.tokens[..rows], sequences: others, logit_rows: &[] };
        work.x.clear();
        self.embed(others.tokens, work);
        self.pass(cpu, layout, &others, 0..start, work);
        if start == 0 {
            self.embed(&batch.tokens[rows..], work);
        } else {
            assert_eq!(chunk.hidden.len(), last.rows * d, "what the layers before {start} left");
            work.x.append(chunk.hidden);
        }
        self.pass(cpu, layout, batch, start..end, work);
        if end < layers {
            assert!(batch.logit_rows.iter().all(|row| *row < rows), "the chunk has no logits yet");
            chunk.hidden.clear();
            chunk.hidden.extend_from_slice(&work.x[rows * d..]);
            work.x.truncate(rows * d);
            self.pass(cpu, layout, &others, end..layers, work);
        }
        self.logits(cpu, batch.logit_rows, work);
    }

    /// Takes the rows of `work.x`, which are those of `batch`, through some layers.
    fn pass(
        &self,
        cpu: &Cpu,
        layout: &PageLayout,
        batch: &Batch<'_>,
        layers: Range<usize>,
        work: &mut Activations,
    ) {
        let rows = batch.tokens.len();
        assert_eq!(batch.sequences.iter().map(|sequence| sequence.rows).sum::<usize>(), rows);
        if rows == 0 || layers.is_empty() {
            return;
        }
        work.prepare(rows, &self.config, self.rotations.len());
        self.angles(batch, work);
        for index in layers {
            let layer = &self.layers[index];
            self.attention(cpu, layout, batch, index, layer, work);
            self.feed_forward(cpu, layer, work);
        }
    }

    /// Appends each token's row of the embedding, scaled, to the residual stream.
    fn embed(&self, tokens: &[TokenId], work: &mut Activations) {
        let before = work.x.len();
        work.x.resize(before + tokens.len() * self.config.d_model, 0.0);
        embed(&self.config, &self.embedding, tokens, &mut work.x[before..]);
    }

    /// The rotation of every row's position, the same in all layers that share one.
    fn angles(&self, batch: &Batch<'_>, work: &mut Activations) {
        let pairs = self.config.rope.dims / 2;
        for (index, rotation) in self.rotations.iter().enumerate() {
            for sequence in batch.sequences {
                for row in 0..sequence.rows {
                    let at = (index * batch.tokens.len() + sequence.first_row + row) * pairs;
                    let (cos, sin) = (&mut work.cos[at..at + pairs], &mut work.sin[at..at + pairs]);
                    rotation.angles(sequence.start + row, cos, sin);
                }
            }
        }
    }

    /// Norm, projections, rotation, append to the pages, attend, project back, norm, add.
    fn attention(
        &self,
        cpu: &Cpu,
        layout: &PageLayout,
        batch: &Batch<'_>,
        index: usize,
        layer: &Layer<PackedWeights>,
        work: &mut Activations,
    ) {
        let config = &self.config;
        let input = normed(cpu, &work.x, layer.attn_norm.as_deref(), config.norm_eps, &mut work.normed);
        let projections = [
            Product { weights: layer.q.weight.matrix(), out: &mut work.q },
            Product { weights: layer.k.weight.matrix(), out: &mut work.k },
            Product { weights: layer.v.weight.matrix(), out: &mut work.v },
        ];
        matmul(cpu, input, projections);
        for (projection, out) in [(&layer.q, &mut work.q), (&layer.k, &mut work.k), (&layer.v, &mut work.v)] {
            add_own_bias(cpu, projection, out);
        }
        for (norm, out) in [(&layer.q_norm, &mut work.q), (&layer.k_norm, &mut work.k)] {
            if let Some(weight) = norm {
                rms_norm_in_place(cpu, out, weight, config.norm_eps);
            }
        }
        if let Some(rotation) = layer.rotation {
            self.rotate(cpu, rotation, batch.tokens.len(), work);
        }
        if let Some(temperature) = &config.attention_temperature {
            warm(temperature, batch, &mut work.q);
        }
        store_kv(cpu, layout, index, batch.sequences, &work.k, &work.v);
        let attention = Attention {
            layout: *layout,
            layer: index,
            heads: config.heads,
            scale: config.attention_scale,
            window: layer.window,
            soft_cap: config.attention_soft_cap,
        };
        attend(cpu, attention, batch.sequences, &work.q, &mut work.attended);
        let product = Product { weights: layer.attn_output.weight.matrix(), out: &mut work.delta };
        matmul(cpu, &work.attended, [product]);
        add_own_bias(cpu, &layer.attn_output, &mut work.delta);
        self.add_block(cpu, layer.attn_post_norm.as_deref(), work);
    }

    /// Gives queries and keys their position.
    fn rotate(&self, cpu: &Cpu, rotation: usize, rows: usize, work: &mut Activations) {
        let (kind, head_dim, pairs) =
            (self.config.rope.kind, self.config.head_dim, self.config.rope.dims / 2);
        let range = rotation * rows * pairs..(rotation + 1) * rows * pairs;
        let (cos, sin) = (&work.cos[range.clone()], &work.sin[range]);
        rope::rotate(cpu, kind, &mut work.q, head_dim, pairs, cos, sin);
        rope::rotate(cpu, kind, &mut work.k, head_dim, pairs, cos, sin);
    }

    /// Norm, gate and up, activation, down, norm, add; with experts, by those that each row is routed to.
    fn feed_forward(&self, cpu: &Cpu, layer: &Layer<PackedWeights>, work: &mut Activations) {
        let config = &self.config;
        let input = normed(cpu, &work.x, layer.ffn_norm.as_deref(), config.norm_eps, &mut work.normed);
        let (activation, buffers) = (config.activation, &mut work.gated);
        match &layer.feed_forward {
            FeedForward::Dense(weights) => gated(cpu, activation, weights, input, buffers, &mut work.delta),
            FeedForward::Experts(weights) => {
                experts::forward(
                    cpu,
                    activation,
                    weights,
                    input,
                    (&mut work.experts, buffers),
                    &mut work.delta,
                );
            }
        }
        self.add_block(cpu, layer.ffn_post_norm.as_deref(), work);
    }

    /// Adds a block's result, in `work.delta`, to the residual stream.
    fn add_block(&self, cpu: &Cpu, post_norm: Option<&[f32]>, work: &mut Activations) {
        let delta = normed(cpu, &work.delta, post_norm, self.config.norm_eps, &mut work.normed);
        add_scaled(cpu, &mut work.x, delta, self.config.residual_scale);
    }

    /// Logits of the rows that ask for them.
    fn logits(&self, cpu: &Cpu, wanted: &[usize], work: &mut Activations) {
        let config = &self.config;
        let d = config.d_model;
        work.logits.resize(wanted.len() * config.vocab, 0.0);
        if wanted.is_empty() {
            return;
        }
        for (slot, row) in wanted.iter().enumerate() {
            work.x.copy_within(row * d..(row + 1) * d, slot * d);
        }
        let normed = &mut work.normed[..wanted.len() * d];
        rms_norm(cpu, &work.x[..wanted.len() * d], &self.output_norm, config.norm_eps, normed);
        matmul(cpu, normed, [Product { weights: self.output.matrix(), out: &mut work.logits }]);
        if config.logit_scale != 1.0 {
            scale(&mut work.logits, config.logit_scale);
        }
        if let Some(cap) = config.logit_soft_cap {
            soft_cap(cpu, &mut work.logits, cap);
        }
    }
}

/// Each token's row of the embedding, scaled, to `out`, `[tokens, d_model]`.
pub(crate) fn embed(config: &ModelConfig, embedding: &Tensor, tokens: &[TokenId], out: &mut [f32]) {
    let row_bytes = embedding.ty.row_bytes(config.d_model);
    for (token, x) in tokens.iter().zip(out.chunks_exact_mut(config.d_model)) {
        let row = &embedding.bytes()[*token as usize * row_bytes..][..row_bytes];
        dormouse_kernels::quant::dequantize(embedding.ty, row, x);
    }
    if config.embedding_scale != 1.0 {
        scale(out, config.embedding_scale);
    }
}

/// Scales every row's queries by its position's factor.
fn warm(temperature: &Temperature, batch: &Batch<'_>, q: &mut [f32]) {
    let width = q.len() / batch.tokens.len();
    for sequence in batch.sequences {
        for row in 0..sequence.rows {
            let factor = temperature.factor(sequence.start + row);
            if factor != 1.0 {
                scale(&mut q[(sequence.first_row + row) * width..][..width], factor);
            }
        }
    }
}

/// `x` after the norm, in `buffer`; `x` itself where there is none.
fn normed<'a>(cpu: &Cpu, x: &'a [f32], weight: Option<&[f32]>, eps: f32, buffer: &'a mut [f32]) -> &'a [f32] {
    match weight {
        None => x,
        Some(weight) => {
            rms_norm(cpu, x, weight, eps, buffer);
            buffer
        }
    }
}

/// `out = down · (activation(gate · x) ∘ (up · x))`
fn gated(
    cpu: &Cpu,
    activation: Activation,
    weights: &Gated<PackedWeights>,
    x: &[f32],
    buffers: &mut GatedBuffers,
    out: &mut [f32],
) {
    let wide = x.len() / weights.gate.cols * weights.gate.rows;
    buffers.gate.resize(wide, 0.0);
    buffers.up.resize(wide, 0.0);
    let halves = [
        Product { weights: weights.gate.matrix(), out: &mut buffers.gate },
        Product { weights: weights.up.matrix(), out: &mut buffers.up },
    ];
    matmul(cpu, x, halves);
    match activation {
        Activation::Silu => silu_gate(cpu, &mut buffers.gate, &buffers.up),
        Activation::GeluTanh => gelu_gate(cpu, &mut buffers.gate, &buffers.up),
    }
    matmul(cpu, &buffers.gate, [Product { weights: weights.down.matrix(), out }]);
}

fn add_own_bias(cpu: &Cpu, projection: &Projection<PackedWeights>, out: &mut [f32]) {
    if let Some(bias) = &projection.bias {
        add_bias(cpu, out, bias);
    }
}
