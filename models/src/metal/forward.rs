//! One pass over the layers, as [`crate::decoder::Decoder`] makes it.

use candle_core::{D, DType, Device, Result, Tensor};
use dormouse_kernels::cpu::attention::{Attention, Sequence, store_rows};
use dormouse_kernels::cpu::rope::RopeKind;
use dormouse_kernels::{Cpu, PageLayout};
use half::f16;

use super::attention::{Plan, soft_cap};
use super::pages::PageCache;
use super::weights::OnDevice;
use super::{State, Weights};
use crate::config::{Activation, ModelConfig};
use crate::decoder::experts::choose;
use crate::decoder::weights::{FeedForward, Gated, Layer, Projection, Routed};
use crate::decoder::{Batch, embed};

/// The largest half-precision number: a key or value beyond it is stored as it, as on the CPU.
const LARGEST_HALF: f64 = 65504.0;

/// What the layers of a pass have in common.
struct Pass<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    layout: &'a PageLayout,
    pages: &'a PageCache,
    sequences: &'a [Sequence<'a>],
    /// Places of the pages of all sequences, one after the other.
    places: &'a [u32],
    rows: usize,
    /// Cosine and sine of each rotation, `[rows, 1, rope dims / 2]` each.
    angles: Vec<(Tensor, Tensor)>,
    /// Of each row, the factor on its queries, `[rows, 1, 1]`.
    warmth: Option<Tensor>,
    /// Of the sequences, in layers without a window and in windowed ones.
    plans: [Vec<Plan>; 2],
}

impl State {
    /// Computes `batch`, whose pages fit on the device together; appends to `self.logits`.
    pub(super) fn pass(&mut self, cpu: &Cpu, weights: &Weights, batch: &Batch<'_>) -> Result<()> {
        let (config, layout, device) = (weights.config(), self.layout, weights.candle());
        let rows = batch.tokens.len();
        if rows == 0 {
            return Ok(());
        }
        let places = self.pages.place(batch.sequences)?;
        let pass = Pass::new(weights, &layout, &self.pages, batch, &places)?;
        let mut embedded = vec![0.0; rows * config.d_model];
        embed(config, &weights.embedding, batch.tokens, &mut embedded);
        let mut x = Tensor::from_vec(embedded, (rows, config.d_model), device)?;
        let mut down = Vec::with_capacity(layout.layers);
        for (index, layer) in weights.layers.iter().enumerate() {
            let (attended, stored) = pass.attention(index, layer, &x)?;
            x = (x + attended)?;
            x = (&x + pass.feed_forward(layer, &x)?)?;
            down.push(stored);
        }
        if !batch.logit_rows.is_empty() {
            let wanted: Vec<u32> = batch.logit_rows.iter().map(|row| *row as u32).collect();
            let logits = pass.logits(weights, &x.index_select(&Tensor::new(wanted, device)?, 0)?)?;
            self.logits.extend(logits.flatten_all()?.to_vec1::<f32>()?);
        }
        let down = Tensor::stack(&down, 0)?.flatten_all()?.to_vec1::<f16>()?;
        let layer_values = down.len() / layout.layers;
        cpu.pool.run(layout.layers, &|layer| {
            let values = &down[layer * layer_values..(layer + 1) * layer_values];
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            store_rows(&layout, layer, batch.sequences, &bytes);
        });
        self.pages.wrote(batch.sequences);
        Ok(())
    }
}

impl<'a> Pass<'a> {
    fn new(
        weights: &'a Weights,
        layout: &'a PageLayout,
        pages: &'a PageCache,
        batch: &'a Batch<'a>,
        places: &'a [u32],
    ) -> Result<Pass<'a>> {
        let (device, config, rows) = (weights.candle(), weights.config(), batch.tokens.len());
        let own = |sequence: &Sequence<'_>| sequence.start..sequence.start + sequence.rows;
        let positions: Vec<usize> = batch.sequences.iter().flat_map(own).collect();
        assert_eq!(positions.len(), rows, "sequences cover all rows");
        let pairs = config.rope.dims / 2;
        let mut angles = Vec::with_capacity(weights.rotations.len());
        for rotation in &weights.rotations {
            let (mut cos, mut sin) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
            for (row, position) in positions.iter().enumerate() {
                let values = row * pairs..(row + 1) * pairs;
                rotation.angles(*position, &mut cos[values.clone()], &mut sin[values]);
            }
            let tensor = |values| Tensor::from_vec(values, (rows, 1, pairs), device);
            angles.push((tensor(cos)?, tensor(sin)?));
        }
        let warmth = config.attention_temperature.map(|temperature| {
            let factors = positions.iter().map(|position| temperature.factor(*position)).collect();
            Tensor::from_vec(factors, (rows, 1, 1), device)
        });
        let plans = |window: Option<usize>| {
            let mut table = 0;
            let plan = |sequence: &Sequence<'_>| {
                let own = &places[table..table + sequence.pages.len()];
                table += own.len();
                Plan::new(sequence, own, window, device)
            };
            batch.sequences.iter().map(plan).collect::<Result<Vec<_>>>()
        };
        let windowed = match config.sliding_window {
            None => Vec::new(),
            window => plans(window)?,
        };
        Ok(Pass {
            device,
            config,
            layout,
            pages,
            sequences: batch.sequences,
            places,
            rows,
            angles,
            warmth: warmth.transpose()?,
            plans: [plans(None)?, windowed],
        })
    }

    /// Norm, projections, rotation, append to the pages, attend, project back, norm: what is added to `x`, and the rows of keys
    /// and values as they are stored, `[rows, {K, V}, kv_heads, head_dim]`.
    fn attention(&self, index: usize, layer: &Layer<OnDevice>, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (config, rows) = (self.config, self.rows);
        let input = self.normed(x, layer.attn_norm.as_ref())?;
        let heads = |x: Tensor, heads: usize| x.reshape((rows, heads, config.head_dim));
        let mut q = project(&layer.q, &input)?;
        let mut k = project(&layer.k, &input)?;
        let v = heads(project(&layer.v, &input)?, config.kv_heads)?;
        for (norm, out) in [(&layer.q_norm, &mut q), (&layer.k_norm, &mut k)] {
            if let Some(weight) = norm {
                let width = weight.dim(0)?;
                let rows_of_norm = out.elem_count() / width;
                let normed = self.normed(&out.reshape((rows_of_norm, width))?, Some(weight))?;
                *out = normed.reshape(out.shape())?;
            }
        }
        let (mut q, mut k) = (heads(q, config.heads)?, heads(k, config.kv_heads)?);
        if let Some(rotation) = layer.rotation {
            (q, k) = (self.rotate(rotation, &q)?, self.rotate(rotation, &k)?);
        }
        if let Some(factors) = &self.warmth {
            q = q.broadcast_mul(factors)?;
        }
        let stored = Tensor::stack(&[k, v], 1)?.clamp(-LARGEST_HALF, LARGEST_HALF)?.to_dtype(DType::F16)?;
        self.pages.append(index, &stored, self.sequences, self.places)?;
        let attention = Attention {
            layout: *self.layout,
            layer: index,
            heads: config.heads,
            scale: config.attention_scale,
            window: layer.window,
            soft_cap: config.attention_soft_cap,
        };
        let plans = &self.plans[usize::from(layer.window.is_some())];
        let attended =
            plans.iter().map(|plan| plan.attend(&attention, self.pages, &q)).collect::<Result<Vec<_>>>()?;
        let delta = project(&layer.attn_output, &Tensor::cat(&attended, 0)?)?;
        Ok((self.added(&delta, layer.attn_post_norm.as_ref())?, stored))
    }

    /// Gives queries or keys, `[rows, heads, head_dim]`, their position.
    fn rotate(&self, rotation: usize, x: &Tensor) -> Result<Tensor> {
        let (cos, sin) = &self.angles[rotation];
        let (rows, heads, head_dim) = x.dims3()?;
        let pairs = self.config.rope.dims / 2;
        if pairs == 0 {
            return Ok(x.clone());
        }
        let turned = x.narrow(2, 0, 2 * pairs)?;
        let (a, b) = match self.config.rope.kind {
            RopeKind::Half => (turned.narrow(2, 0, pairs)?, turned.narrow(2, pairs, pairs)?),
            RopeKind::Interleaved => {
                let pair = turned.contiguous()?.reshape((rows, heads, pairs, 2))?;
                (pair.narrow(3, 0, 1)?.squeeze(3)?, pair.narrow(3, 1, 1)?.squeeze(3)?)
            }
        };
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        let turned = match self.config.rope.kind {
            RopeKind::Half => Tensor::cat(&[first, second], 2)?,
            RopeKind::Interleaved => Tensor::stack(&[first, second], 3)?.reshape((rows, heads, 2 * pairs))?,
        };
        match head_dim - 2 * pairs {
            0 => Ok(turned),
            rest => Tensor::cat(&[turned, x.narrow(2, 2 * pairs, rest)?], 2),
        }
    }

    /// What a feed-forward block adds to `x`.
    fn feed_forward(&self, layer: &Layer<OnDevice>, x: &Tensor) -> Result<Tensor> {
        let input = self.normed(x, layer.ffn_norm.as_ref())?;
        let delta = match &layer.feed_forward {
            FeedForward::Dense(weights) => self.gated(weights, &input)?,
            FeedForward::Experts(weights) => self.experts(weights, &input)?,
        };
        self.added(&delta, layer.ffn_post_norm.as_ref())
    }

    /// `down · (activation(gate · x) ∘ (up · x))`
    fn gated(&self, weights: &Gated<OnDevice>, x: &Tensor) -> Result<Tensor> {
        let gate = weights.gate.product(x)?;
        let gate = match self.config.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        weights.down.product(&(gate * weights.up.product(x)?)?)
    }

    /// `Σ weight · expert(x)` over each row's experts, which the host chooses, in the order of their numbers.
    fn experts(&self, weights: &Routed<OnDevice>, x: &Tensor) -> Result<Tensor> {
        let Routed { settings, router, experts } = weights;
        let scores = router.product(x)?.to_vec2::<f32>()?;
        let (mut chosen, mut routes) = (Vec::new(), Vec::new());
        for (row, scores) in scores.iter().enumerate() {
            choose(settings, scores, &mut chosen);
            routes.extend(chosen.iter().map(|&(expert, weight)| (expert, row as u32, weight)));
        }
        routes.sort_unstable_by_key(|&(expert, row, _)| (expert, row));
        let mut out = x.zeros_like()?;
        for routes in routes.chunk_by(|a, b| a.0 == b.0) {
            let rows: Vec<u32> = routes.iter().map(|route| route.1).collect();
            let factors: Vec<f32> = routes.iter().map(|route| route.2).collect();
            let rows = Tensor::new(rows, self.device)?;
            let factors = Tensor::from_vec(factors, (routes.len(), 1), self.device)?;
            let result = self.gated(&experts[routes[0].0], &x.index_select(&rows, 0)?)?;
            out = out.index_add(&rows, &result.broadcast_mul(&factors)?, 0)?;
        }
        Ok(out)
    }

    fn logits(&self, weights: &Weights, x: &Tensor) -> Result<Tensor> {
        let mut logits = weights.output.product(&self.normed(x, Some(&weights.output_norm))?)?;
        if self.config.logit_scale != 1.0 {
            logits = (logits * f64::from(self.config.logit_scale))?;
        }
        match self.config.logit_soft_cap {
            Some(cap) => soft_cap(&logits, cap),
            None => Ok(logits),
        }
    }

    /// `x`, `[rows, width]`, after the norm; `x` itself where there is none.
    fn normed(&self, x: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
        let Some(weight) = weight else { return Ok(x.clone()) };
        let mean_square = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(1)? as f64)?;
        let root = (mean_square + f64::from(self.config.norm_eps))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(weight)
    }

    /// A block's result as it is added to the residual stream.
    fn added(&self, delta: &Tensor, post_norm: Option<&Tensor>) -> Result<Tensor> {
        let delta = self.normed(delta, post_norm)?;
        match self.config.residual_scale {
            1.0 => Ok(delta),
            scale => delta * f64::from(scale),
        }
    }
}

/// The projection of `x`, with its bias.
fn project(projection: &Projection<OnDevice>, x: &Tensor) -> Result<Tensor> {
    let out = projection.weight.product(x)?;
    match &projection.bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}
