//! The one decoder of every supported family: a transformer read off a [`ModelConfig`].

use std::path::Path;

use dormouse_kernels::Cpu;
use dormouse_kernels::cpu::attention::{Attention, Sequence, attend, store_kv};
use dormouse_kernels::cpu::matmul::{Matrix, Product, matmul};
use dormouse_kernels::cpu::norm::{add, rms_norm, silu_gate};
use dormouse_kernels::cpu::rope;
use dormouse_kernels::{KvDtype, PAGE_TOKENS, PageLayout};

use crate::config::{Activation, ModelConfig, Role};
use crate::weights::{Tensor, WeightSource};
use crate::{ModelError, TokenId};

/// The widest head that a KV row buffer holds.
const LARGEST_HEAD: usize = 512;

pub struct Decoder {
    config: ModelConfig,
    frequencies: Vec<f32>,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Vec<f32>,
    output: Tensor,
}

struct Layer {
    attn_norm: Vec<f32>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_output: Tensor,
    ffn_norm: Vec<f32>,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
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

/// The buffers of a forward pass, kept from one to the next.
#[derive(Default)]
pub struct Activations {
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    delta: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    logits: Vec<f32>,
}

impl Activations {
    /// The logits of the last forward pass, `[logit_rows, vocab]`.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits
    }
}

impl Decoder {
    /// Finds and checks every tensor that `config` describes.
    pub fn new(source: &dyn WeightSource, config: ModelConfig) -> Result<Decoder, ModelError> {
        refuse_unsupported(source.path(), &config)?;
        let matrix = |layer: usize, role: Role, rows: usize, cols: usize| {
            let name = config.names.name(layer, role);
            let Some(tensor) = source.tensor(&name) else {
                return Err(ModelError::MissingTensor { path: source.path().to_owned(), tensor: name });
            };
            if (tensor.rows, tensor.cols) != (rows, cols) {
                return Err(ModelError::Malformed {
                    path: source.path().to_owned(),
                    what: format!(
                        "tensor '{name}' is {} × {}, but the model's settings ask for {rows} × {cols}",
                        tensor.rows, tensor.cols
                    ),
                });
            }
            Ok(tensor)
        };
        let (d, ff) = (config.d_model, config.d_ff);
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layers = (0..config.layers)
            .map(|layer| {
                Ok(Layer {
                    attn_norm: matrix(layer, Role::AttnNorm, 1, d)?.to_f32(),
                    q: matrix(layer, Role::AttnQ, q_width, d)?,
                    k: matrix(layer, Role::AttnK, kv_width, d)?,
                    v: matrix(layer, Role::AttnV, kv_width, d)?,
                    attn_output: matrix(layer, Role::AttnOutput, d, q_width)?,
                    ffn_norm: matrix(layer, Role::FfnNorm, 1, d)?.to_f32(),
                    gate: matrix(layer, Role::FfnGate, ff, d)?,
                    up: matrix(layer, Role::FfnUp, ff, d)?,
                    down: matrix(layer, Role::FfnDown, d, ff)?,
                })
            })
            .collect::<Result<Vec<Layer>, ModelError>>()?;
        let embedding = matrix(0, Role::TokenEmbedding, config.vocab, d)?;
        let output = match config.tied_head {
            true => embedding.clone(),
            false => matrix(0, Role::Output, config.vocab, d)?,
        };
        let output_norm = matrix(0, Role::OutputNorm, 1, d)?.to_f32();
        Ok(Decoder { frequencies: config.rope.frequencies(), embedding, layers, output_norm, output, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shape of this model's KV pages.
    pub fn page_layout(&self, dtype: KvDtype) -> PageLayout {
        let config = &self.config;
        PageLayout { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim, dtype }
    }

    /// Computes every row of `batch`: writes its keys and values to its pages and leaves the wanted logits in
    /// `work.logits_mut()`. Each row's bits depend on its own sequence alone.
    pub fn forward(&self, cpu: &Cpu, layout: &PageLayout, batch: &Batch<'_>, work: &mut Activations) {
        let config = &self.config;
        let rows = batch.tokens.len();
        let (d, head_dim, eps) = (config.d_model, config.head_dim, config.norm_eps);
        let (q_width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        assert_eq!(batch.sequences.iter().map(|sequence| sequence.rows).sum::<usize>(), rows);
        work.prepare(rows, config);

        // Token embedding.
        let row_bytes = self.embedding.ty.row_bytes(d);
        for (token, x) in batch.tokens.iter().zip(work.x.chunks_exact_mut(d)) {
            let row = &self.embedding.bytes()[*token as usize * row_bytes..][..row_bytes];
            dormouse_kernels::quant::dequantize(self.embedding.ty, row, x);
        }

        // The rotation of every row's position, the same in all layers.
        let pairs = self.frequencies.len();
        for sequence in batch.sequences {
            for row in 0..sequence.rows {
                let at = (sequence.first_row + row) * pairs;
                let (cos, sin) = (&mut work.cos[at..at + pairs], &mut work.sin[at..at + pairs]);
                rope::angles(sequence.start + row, &self.frequencies, cos, sin);
            }
        }

        for (index, layer) in self.layers.iter().enumerate() {
            // Attention: norm, projections, rotation, append to the pages, attend, project back, add.
            rms_norm(cpu, &work.x, &layer.attn_norm, eps, &mut work.normed);
            let projections = [
                Product { weights: matrix(&layer.q), out: &mut work.q },
                Product { weights: matrix(&layer.k), out: &mut work.k },
                Product { weights: matrix(&layer.v), out: &mut work.v },
            ];
            matmul(cpu, &work.normed, projections);
            for sequence in batch.sequences {
                for row in 0..sequence.rows {
                    let at = sequence.first_row + row;
                    let (cos, sin) = (&work.cos[at * pairs..][..pairs], &work.sin[at * pairs..][..pairs]);
                    let kind = config.rope.kind;
                    rope::rotate(kind, &mut work.q[at * q_width..][..q_width], head_dim, cos, sin);
                    let k = &mut work.k[at * kv_width..][..kv_width];
                    rope::rotate(kind, k, head_dim, cos, sin);
                    let position = sequence.start + row;
                    let page = sequence.pages[position / PAGE_TOKENS];
                    store_kv(
                        layout,
                        page,
                        index,
                        position % PAGE_TOKENS,
                        k,
                        &work.v[at * kv_width..][..kv_width],
                    );
                }
            }
            let attention = Attention {
                layout: *layout,
                layer: index,
                heads: config.heads,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: config.sliding_window,
            };
            attend(cpu, attention, batch.sequences, &work.q, &mut work.attended);
            matmul(
                cpu,
                &work.attended,
                [Product { weights: matrix(&layer.attn_output), out: &mut work.delta }],
            );
            add(&mut work.x, &work.delta);

            // Feed-forward: norm, gate and up, activation, down, add.
            rms_norm(cpu, &work.x, &layer.ffn_norm, eps, &mut work.normed);
            let projections = [
                Product { weights: matrix(&layer.gate), out: &mut work.gate },
                Product { weights: matrix(&layer.up), out: &mut work.up },
            ];
            matmul(cpu, &work.normed, projections);
            silu_gate(cpu, &mut work.gate, &work.up);
            matmul(cpu, &work.gate, [Product { weights: matrix(&layer.down), out: &mut work.delta }]);
            add(&mut work.x, &work.delta);
        }

        // Logits of the rows that ask for them.
        let wanted = batch.logit_rows.len();
        work.logits.resize(wanted * config.vocab, 0.0);
        if wanted == 0 {
            return;
        }
        for (slot, row) in batch.logit_rows.iter().enumerate() {
            work.x.copy_within(row * d..(row + 1) * d, slot * d);
        }
        let normed = &mut work.normed[..wanted * d];
        rms_norm(cpu, &work.x[..wanted * d], &self.output_norm, eps, normed);
        matmul(cpu, normed, [Product { weights: matrix(&self.output), out: &mut work.logits }]);
    }
}

impl Activations {
    fn prepare(&mut self, rows: usize, config: &ModelConfig) {
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        self.x.resize(rows * config.d_model, 0.0);
        self.normed.resize(rows * config.d_model, 0.0);
        self.delta.resize(rows * config.d_model, 0.0);
        self.q.resize(rows * q_width, 0.0);
        self.attended.resize(rows * q_width, 0.0);
        self.k.resize(rows * kv_width, 0.0);
        self.v.resize(rows * kv_width, 0.0);
        self.gate.resize(rows * config.d_ff, 0.0);
        self.up.resize(rows * config.d_ff, 0.0);
        self.cos.resize(rows * config.rope.dims / 2, 0.0);
        self.sin.resize(rows * config.rope.dims / 2, 0.0);
    }
}

fn matrix(tensor: &Tensor) -> Matrix<'_> {
    Matrix::new(tensor.ty, tensor.rows, tensor.cols, tensor.bytes())
}

/// Refuses what the description can say and this decoder does not compute, by name, before a wrong token is computed.
fn refuse_unsupported(path: &Path, config: &ModelConfig) -> Result<(), ModelError> {
    let unsupported = [
        (config.qkv_bias, "biases on the attention projections"),
        (config.qk_norm, "normalised queries and keys"),
        (config.activation != Activation::Silu, "an activation other than SiLU"),
        (config.attention_soft_cap.is_some(), "soft-capped attention scores"),
        (config.logit_soft_cap.is_some(), "soft-capped logits"),
        (config.embedding_scale.is_some(), "scaled embeddings"),
        (config.head_dim > LARGEST_HEAD, "heads wider than 512"),
    ];
    match unsupported.iter().find(|(present, _)| *present) {
        None => Ok(()),
        Some((_, what)) => Err(ModelError::Malformed {
            path: path.to_owned(),
            what: format!("the model has {what}, which this version does not compute"),
        }),
    }
}
