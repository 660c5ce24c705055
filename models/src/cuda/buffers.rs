//! The device's memory for what a pass computes.

use std::sync::Arc;

use dormouse_kernels::PageLayout;
use dormouse_kernels::cuda::{Activations, CudaError, DeviceBuffer, Gpu};

use super::experts;
use crate::config::ModelConfig;

/// The device's buffers, which grow to the largest pass.
pub(super) struct Buffers {
    pub normed: DeviceBuffer<f32>,
    pub q: DeviceBuffer<f32>,
    pub k: DeviceBuffer<f32>,
    pub v: DeviceBuffer<f32>,
    pub attended: DeviceBuffer<f32>,
    pub partials: DeviceBuffer<f32>,
    /// What a block adds to the residual stream.
    pub delta: DeviceBuffer<f32>,
    pub gate: DeviceBuffer<f32>,
    pub up: DeviceBuffer<f32>,
    pub logits: DeviceBuffer<f32>,
    pub likeliest: DeviceBuffer<u32>,
    /// What is multiplied with weights, rounded.
    pub rounded: Activations,
    /// Rows of keys and values for the host, `[layers, rows, {K, V}, kv_heads, row_bytes]`.
    pub down: DeviceBuffer<u8>,
    pub experts: experts::Buffers,
}

impl Buffers {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Buffers, CudaError> {
        let none = || DeviceBuffer::new(gpu, 0, "activations");
        Ok(Buffers {
            normed: none()?,
            q: none()?,
            k: none()?,
            v: none()?,
            attended: none()?,
            partials: none()?,
            delta: none()?,
            gate: none()?,
            up: none()?,
            logits: none()?,
            likeliest: DeviceBuffer::new(gpu, 0, "activations")?,
            rounded: Activations::new(gpu)?,
            down: DeviceBuffer::new(gpu, 0, "activations")?,
            experts: experts::Buffers::new(gpu)?,
        })
    }

    /// Room for a pass over `rows` rows.
    pub fn grow(
        &mut self,
        config: &ModelConfig,
        layout: &PageLayout,
        rows: usize,
        logit_rows: usize,
        partials: usize,
    ) -> Result<(), CudaError> {
        const WHAT: &str = "activations";
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let d_ff = config.d_ff.max(config.experts.map_or(0, |experts| experts.d_ff));
        let wide = rows * d_ff;
        let hidden = rows.max(logit_rows) * config.d_model;
        for (buffer, len) in [
            (&mut self.normed, hidden),
            (&mut self.delta, hidden),
            (&mut self.q, rows * q_width),
            (&mut self.attended, rows * q_width),
            (&mut self.k, rows * kv_width),
            (&mut self.v, rows * kv_width),
            (&mut self.gate, wide),
            (&mut self.up, wide),
            (&mut self.logits, logit_rows * config.vocab),
            (&mut self.partials, partials),
        ] {
            buffer.grow(len, WHAT)?;
        }
        self.likeliest.grow(logit_rows, WHAT)?;
        self.rounded.grow(rows.max(logit_rows), config.d_model.max(q_width).max(d_ff))?;
        self.down.grow(rows * layout.token_bytes(), WHAT)?;
        config.experts.map_or(Ok(()), |experts| self.experts.grow(&experts, rows, config.d_model))
    }
}
