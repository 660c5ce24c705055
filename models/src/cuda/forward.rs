//! One pass over the layers, as [`crate::decoder::Decoder`] makes it.

use std::ops::Range;
use std::sync::Arc;

use dormouse_kernels::cpu::attention::{Attention, store_rows};
use dormouse_kernels::cuda::{
    Append, Attend, CudaError, DeviceBuffer, Gpu, Pinned, Rotation, Span, Tile, tiles,
};
use dormouse_kernels::{Cpu, PAGE_TOKENS, PageLayout};

use super::buffers::Buffers;
use super::graphs::{Shape, Way};
use super::inputs::{Input, Inputs};
use super::pages::PageCache;
use super::weights::OnDevice;
use super::{State, Wanted, Weights, experts};
use crate::config::{Activation, ModelConfig};
use crate::decoder::weights::{FeedForward, Gated, Layer, Projection};
use crate::decoder::{Batch, embed};

/// Rows of the largest pass that is recorded. Beside the work of more, launches weigh little.
const STEP_ROWS_MOST: usize = 32;

/// A pass over the rows of a batch, and where its inputs are on the device.
struct Pass<'a> {
    gpu: &'a Arc<Gpu>,
    config: &'a ModelConfig,
    layout: &'a PageLayout,
    rows: usize,
    /// Segments of the longest sequence, and what their partial results take where they are computed apart.
    segments: usize,
    partials: usize,
    /// The residual stream, `[rows, d_model]`.
    x: Span<'a, f32>,
    /// Of each rotation, `[rows, rope dims / 2]`.
    angles: Vec<(Span<'a, f32>, Span<'a, f32>)>,
    /// Of all sequences, one after the other.
    pages: Span<'a, u64>,
    tiles: Span<'a, Tile>,
    /// Of each row: its position, its page, and its place there.
    positions: Span<'a, u32>,
    row_pages: Span<'a, u64>,
    row_places: Span<'a, u32>,
    /// Of each row, the factor on its queries.
    warmth: Option<Span<'a, f32>>,
    logit_rows: Span<'a, u32>,
}

/// What the host does in a pass.
struct Host<'a> {
    /// Brings up what the device lacks, layer by layer.
    pages: &'a mut PageCache,
    routing: &'a mut experts::Routing,
    wanted: Wanted,
    logits_out: &'a mut Pinned<f32>,
    likeliest_out: &'a mut Pinned<u32>,
    rows_out: &'a mut Pinned<u8>,
}

/// The inputs of a pass, before they are on the device.
struct Gathered {
    x: Input<f32>,
    angles: Vec<(Input<f32>, Input<f32>)>,
    tiles: Input<Tile>,
    positions: Input<u32>,
    row_pages: Input<u64>,
    row_places: Input<u32>,
    warmth: Option<Input<f32>>,
    logit_rows: Input<u32>,
    pages: Input<u64>,
    segments: usize,
}

impl Gathered {
    fn new(
        inputs: &mut Inputs,
        weights: &Weights,
        config: &ModelConfig,
        batch: &Batch<'_>,
        pages: &[u64],
    ) -> Gathered {
        inputs.clear();
        let rows = batch.tokens.len();
        let mut x = vec![0.0; rows * config.d_model];
        embed(config, &weights.embedding, batch.tokens, &mut x);
        let (mut positions, mut row_pages, mut row_places) = (Vec::new(), Vec::new(), Vec::new());
        let mut table = 0;
        for sequence in batch.sequences {
            assert_eq!(sequence.first_row, positions.len(), "sequences follow one another");
            for position in sequence.start..sequence.start + sequence.rows {
                positions.push(position as u32);
                row_pages.push(pages[table + position / PAGE_TOKENS]);
                row_places.push((position % PAGE_TOKENS) as u32);
            }
            table += sequence.pages.len();
        }
        assert_eq!((positions.len(), table), (rows, pages.len()), "sequences cover all rows");
        let pairs = config.rope.dims / 2;
        let angles = |rotation: &crate::decoder::Rotation| {
            let (mut cos, mut sin) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
            for (row, position) in positions.iter().enumerate() {
                let values = row * pairs..(row + 1) * pairs;
                rotation.angles(*position as usize, &mut cos[values.clone()], &mut sin[values]);
            }
            (cos, sin)
        };
        let angles: Vec<_> = weights.rotations.iter().map(angles).collect();
        let warmth = config.attention_temperature.map(|temperature| {
            positions.iter().map(|position| temperature.factor(*position as usize)).collect::<Vec<f32>>()
        });
        let (tiles, segments) = tiles(batch.sequences, config.heads / config.kv_heads);
        let logit_rows: Vec<u32> = batch.logit_rows.iter().map(|row| *row as u32).collect();
        Gathered {
            x: inputs.add(&x),
            angles: angles.iter().map(|(cos, sin)| (inputs.add(cos), inputs.add(sin))).collect(),
            tiles: inputs.add(&tiles),
            positions: inputs.add(&positions),
            row_pages: inputs.add(&row_pages),
            row_places: inputs.add(&row_places),
            warmth: warmth.map(|factors| inputs.add(&factors)),
            logit_rows: inputs.add(&logit_rows),
            // Last: how many there are must not move the others, for a recorded step's sake.
            pages: inputs.add(pages),
            segments,
        }
    }
}

impl State {
    /// Computes `batch`, whose pages fit on the device together; appends to `self.logits` or `self.likeliest`.
    pub(super) fn pass(
        &mut self,
        cpu: &Cpu,
        weights: &Weights,
        batch: &Batch<'_>,
        wanted: Wanted,
    ) -> Result<(), CudaError> {
        let (gpu, config) = (&self.gpu, weights.config());
        let (layout, rows) = (self.layout, batch.tokens.len());
        if rows == 0 {
            return Ok(());
        }
        gpu.enter()?;
        let pages = self.pages.place(batch.sequences)?;
        let gathered = Gathered::new(&mut self.inputs, weights, config, batch, &pages);
        self.inputs.send(gpu)?;
        let inputs = &self.inputs;
        let tiles = inputs.span(gathered.tiles);
        let logit_rows = batch.logit_rows.len();
        // Steps, and such guesses as they check. They have blocks for twice as many segments at most, so that a shape stays
        // while contexts grow.
        let is_step = rows <= STEP_ROWS_MOST && !self.pages.lacks_some();
        let segments = if is_step { gathered.segments.next_power_of_two() } else { gathered.segments };
        let partials = gpu.partials(&layout, config.heads, rows, tiles.len(), segments);
        self.buffers.grow(config, &layout, rows, logit_rows, partials)?;
        if let Some(settings) = &config.experts {
            self.routing.grow(settings, rows)?;
        }
        let down = rows * layout.token_bytes();
        let (logits, likeliest) = match wanted {
            Wanted::Logits => (logit_rows * config.vocab, 0),
            Wanted::Likeliest => (0, logit_rows),
        };
        self.logits_out.grow(logits)?;
        self.likeliest_out.grow(likeliest)?;
        self.rows_out.grow(down)?;
        let pass = Pass {
            gpu,
            config,
            layout: &layout,
            rows,
            segments,
            partials,
            x: inputs.span(gathered.x),
            angles: gathered.angles.iter().map(|(cos, sin)| (inputs.span(*cos), inputs.span(*sin))).collect(),
            pages: inputs.span(gathered.pages),
            tiles,
            positions: inputs.span(gathered.positions),
            row_pages: inputs.span(gathered.row_pages),
            row_places: inputs.span(gathered.row_places),
            warmth: gathered.warmth.map(|factors| inputs.span(factors)),
            logit_rows: inputs.span(gathered.logit_rows),
        };
        let shape = || Shape {
            rows: batch.sequences.iter().map(|sequence| sequence.rows).collect(),
            logit_rows,
            likeliest: wanted == Wanted::Likeliest,
            segments,
        };
        let mut way = self.graphs.begin(is_step.then(shape));
        let host = Host {
            pages: &mut self.pages,
            routing: &mut self.routing,
            wanted,
            logits_out: &mut self.logits_out,
            likeliest_out: &mut self.likeliest_out,
            rows_out: &mut self.rows_out,
        };
        pass.run(weights, &self.buffers, host, &mut way)?;
        gpu.wait()?;
        self.graphs.end(way);
        self.logits.extend_from_slice(&self.logits_out.as_slice()[..logits]);
        self.likeliest.extend_from_slice(&self.likeliest_out.as_slice()[..likeliest]);
        let (down, layer_down) = (self.rows_out.as_slice(), pass.layer_down());
        cpu.pool.run(layout.layers, &|layer| {
            let rows = &down[layer * layer_down..(layer + 1) * layer_down];
            store_rows(&layout, layer, batch.sequences, rows);
        });
        self.pages.wrote(batch.sequences);
        Ok(())
    }
}

impl Pass<'_> {
    /// All layers, the logits, and the way of both to the host. The host interrupts the device where it chooses experts;
    /// what lies between is a stretch of `way`.
    fn run(
        &self,
        weights: &Weights,
        buffers: &Buffers,
        host: Host<'_>,
        way: &mut Way,
    ) -> Result<(), CudaError> {
        let Host { pages, routing, wanted, logits_out, likeliest_out, rows_out } = host;
        let gpu = self.gpu;
        let mut first = 0;
        for (index, layer) in weights.layers.iter().enumerate() {
            let FeedForward::Experts(routed) = &layer.feed_forward else { continue };
            let input = self.normed_place(self.x, &layer.ffn_norm, buffers);
            let mut stretch = || {
                self.dense_layers(weights, first..index, buffers, pages)?;
                self.attention(index, layer, buffers, pages)?;
                self.normed(self.x, &layer.ffn_norm, buffers)?;
                experts::score(gpu, routed, input, buffers, routing)
            };
            // SAFETY: the pass's memory was taken before it began, and stays until its end, which waits for the device.
            unsafe { way.stretch(gpu, &mut stretch)? };
            let delta = buffers.delta.first(self.rows * self.config.d_model);
            experts::forward(gpu, self.config.activation, routed, input, (buffers, routing), delta)?;
            self.add_block(delta, &layer.ffn_post_norm, buffers)?;
            first = index + 1;
        }
        let mut stretch = || {
            self.dense_layers(weights, first..weights.layers.len(), buffers, pages)?;
            let logits = self.logits(weights, buffers)?;
            let likeliest = buffers.likeliest.first(self.logit_rows.len());
            if wanted == Wanted::Likeliest {
                gpu.likeliest(logits, likeliest)?;
            }
            // SAFETY: all are waited for before anybody looks at them.
            unsafe {
                match wanted {
                    Wanted::Logits => logits.copy_out(gpu, logits_out)?,
                    Wanted::Likeliest => likeliest.copy_out(gpu, likeliest_out)?,
                }
                buffers.down.first(self.rows * self.layout.token_bytes()).copy_out(gpu, rows_out)
            }
        };
        // SAFETY: as above.
        unsafe { way.stretch(gpu, &mut stretch) }
    }

    /// Layers without experts.
    fn dense_layers(
        &self,
        weights: &Weights,
        layers: Range<usize>,
        buffers: &Buffers,
        pages: &mut PageCache,
    ) -> Result<(), CudaError> {
        for index in layers {
            let layer = &weights.layers[index];
            self.attention(index, layer, buffers, pages)?;
            if let FeedForward::Dense(gates) = &layer.feed_forward {
                let input = self.normed(self.x, &layer.ffn_norm, buffers)?;
                let delta = buffers.delta.first(self.rows * self.config.d_model);
                gated(self.gpu, self.config.activation, gates, input, buffers, delta)?;
                self.add_block(delta, &layer.ffn_post_norm, buffers)?;
            }
        }
        Ok(())
    }

    /// Bytes of a layer's new keys and values.
    fn layer_down(&self) -> usize {
        self.rows * self.layout.token_bytes() / self.layout.layers
    }

    /// Norm, projections, rotation, append to the pages, attend, project back, norm, add.
    fn attention(
        &self,
        index: usize,
        layer: &Layer<OnDevice>,
        buffers: &Buffers,
        pages: &mut PageCache,
    ) -> Result<(), CudaError> {
        let (gpu, config, rows) = (self.gpu, self.config, self.rows);
        let down = buffers.down.span().part(index * self.layer_down()..(index + 1) * self.layer_down());
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (q, k, v) = (
            buffers.q.first(rows * q_width),
            buffers.k.first(rows * kv_width),
            buffers.v.first(rows * kv_width),
        );
        let input = self.normed(self.x, &layer.attn_norm, buffers)?;
        self.project(input, &[(&layer.q, q), (&layer.k, k), (&layer.v, v)], buffers)?;
        for (norm, out) in [(&layer.q_norm, q), (&layer.k_norm, k)] {
            if let Some(weight) = norm {
                gpu.rms_norm(out, weight.span(), config.norm_eps, out)?;
            }
        }
        if let Some(rotation) = layer.rotation {
            let (cos, sin) = self.angles[rotation];
            let (head_dim, pairs) = (config.head_dim, config.rope.dims / 2);
            let rotation = Rotation { kind: config.rope.kind, head_dim, pairs, cos, sin };
            gpu.rotate(q, rotation)?;
            gpu.rotate(k, rotation)?;
        }
        if let Some(factors) = self.warmth {
            gpu.scale_rows(q, factors)?;
        }
        let attended = buffers.attended.first(rows * q_width);
        let append = Append {
            layout: self.layout,
            layer: index,
            k,
            v,
            pages: self.row_pages,
            places: self.row_places,
            down,
        };
        let attend = Attend {
            attention: Attention {
                layout: *self.layout,
                layer: index,
                heads: config.heads,
                scale: config.attention_scale,
                window: layer.window,
                soft_cap: config.attention_soft_cap,
            },
            q,
            out: attended,
            tiles: self.tiles,
            pages: self.pages,
            positions: self.positions,
            segments: self.segments,
            partials: buffers.partials.first(self.partials),
        };
        // While this layer's projections are computed. In a recorded step nothing is lacking.
        pages.bring_layer(index)?;
        // SAFETY: the page cache has places for every page of the batch's sequences up to their last rows, and this layer's
        // part of them there; rows, tiles and pages are of the same batch, and this layer's rows are appended before they are
        // attended.
        unsafe {
            gpu.append_kv(&append)?;
            gpu.attend(&attend)?;
        }
        let delta = buffers.delta.first(rows * config.d_model);
        self.project(attended, &[(&layer.attn_output, delta)], buffers)?;
        self.add_block(delta, &layer.attn_post_norm, buffers)
    }

    /// Logits of the rows that ask for them.
    fn logits<'b>(&self, weights: &Weights, buffers: &'b Buffers) -> Result<Span<'b, f32>, CudaError> {
        let (gpu, config, wanted) = (self.gpu, self.config, self.logit_rows.len());
        let hidden = buffers.delta.first(wanted * config.d_model);
        let normed = buffers.normed.first(wanted * config.d_model);
        let logits = buffers.logits.first(wanted * config.vocab);
        gpu.gather_rows(self.x, self.logit_rows, config.d_model, hidden)?;
        gpu.rms_norm(hidden, weights.output_norm.span(), config.norm_eps, normed)?;
        gpu.matmul(normed, &buffers.rounded, &[(&weights.output, logits)])?;
        if config.logit_scale != 1.0 {
            gpu.scale(logits, config.logit_scale)?;
        }
        if let Some(cap) = config.logit_soft_cap {
            gpu.soft_cap(logits, cap)?;
        }
        Ok(logits)
    }

    /// `x` after the norm; `x` itself where there is none.
    fn normed<'b>(
        &'b self,
        x: Span<'b, f32>,
        weight: &Option<DeviceBuffer<f32>>,
        buffers: &'b Buffers,
    ) -> Result<Span<'b, f32>, CudaError> {
        let out = self.normed_place(x, weight, buffers);
        if let Some(weight) = weight {
            self.gpu.rms_norm(x, weight.span(), self.config.norm_eps, out)?;
        }
        Ok(out)
    }

    /// Where [`Pass::normed`] leaves it.
    fn normed_place<'b>(
        &'b self,
        x: Span<'b, f32>,
        weight: &Option<DeviceBuffer<f32>>,
        buffers: &'b Buffers,
    ) -> Span<'b, f32> {
        if weight.is_some() { buffers.normed.first(x.len()) } else { x }
    }

    /// Every projection of `x`, with its bias.
    fn project<const N: usize>(
        &self,
        x: Span<'_, f32>,
        projections: &[(&Projection<OnDevice>, Span<'_, f32>); N],
        buffers: &Buffers,
    ) -> Result<(), CudaError> {
        let products = projections.map(|(projection, out)| (&projection.weight, out));
        self.gpu.matmul(x, &buffers.rounded, &products)?;
        for (projection, out) in projections {
            if let Some(bias) = &projection.bias {
                self.gpu.add_bias(*out, bias.span())?;
            }
        }
        Ok(())
    }

    /// Adds a block's result to the residual stream.
    fn add_block(
        &self,
        delta: Span<'_, f32>,
        post_norm: &Option<DeviceBuffer<f32>>,
        buffers: &Buffers,
    ) -> Result<(), CudaError> {
        let delta = self.normed(delta, post_norm, buffers)?;
        self.gpu.add_scaled(self.x, delta, self.config.residual_scale)
    }
}

/// `out = down · (activation(gate · x) ∘ (up · x))`
pub(super) fn gated(
    gpu: &Gpu,
    activation: Activation,
    weights: &Gated<OnDevice>,
    x: Span<'_, f32>,
    buffers: &Buffers,
    out: Span<'_, f32>,
) -> Result<(), CudaError> {
    let wide = x.len() / weights.gate.cols * weights.gate.rows;
    let (gate, up) = (buffers.gate.first(wide), buffers.up.first(wide));
    gpu.matmul(x, &buffers.rounded, &[(&weights.gate, gate), (&weights.up, up)])?;
    match activation {
        Activation::Silu => gpu.silu_gate(gate, up)?,
        Activation::GeluTanh => gpu.gelu_gate(gate, up)?,
    }
    gpu.matmul(gate, &buffers.rounded, &[(&weights.down, out)])
}
