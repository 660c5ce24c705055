//! A feed-forward block of experts: the router's scores come to the host, which chooses and groups rows as on the CPU.

use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, DeviceBuffer, Gpu, Pinned, Span};

use super::buffers;
use super::forward::gated;
use super::weights::OnDevice;
use crate::config::{Activation, Experts};
use crate::decoder::experts::choose;
use crate::decoder::weights::Routed;

/// The device's part.
pub(super) struct Buffers {
    scores: DeviceBuffer<f32>,
    /// The rows that go through one expert, together.
    input: DeviceBuffer<f32>,
    output: DeviceBuffer<f32>,
    /// Of each route, in order of experts: its row, and the expert's weight.
    rows: DeviceBuffer<u32>,
    weights: DeviceBuffer<f32>,
}

impl Buffers {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Buffers, CudaError> {
        let none = || DeviceBuffer::new(gpu, 0, "activations");
        let rows = DeviceBuffer::new(gpu, 0, "activations")?;
        Ok(Buffers { scores: none()?, input: none()?, output: none()?, rows, weights: none()? })
    }

    pub fn grow(&mut self, settings: &Experts, rows: usize, d_model: usize) -> Result<(), CudaError> {
        const WHAT: &str = "activations";
        self.scores.grow(rows * settings.count, WHAT)?;
        self.input.grow(rows * d_model, WHAT)?;
        self.output.grow(rows * d_model, WHAT)?;
        self.rows.grow(rows * settings.used, WHAT)?;
        self.weights.grow(rows * settings.used, WHAT)
    }
}

/// The host's part.
pub(super) struct Routing {
    scores: Pinned<f32>,
    rows: Pinned<u32>,
    weights: Pinned<f32>,
    chosen: Vec<(usize, f32)>,
    /// Expert, row and weight.
    routes: Vec<(usize, u32, f32)>,
}

impl Routing {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Routing, CudaError> {
        let none = || Pinned::new(gpu, 0);
        let (rows, chosen, routes) = (Pinned::new(gpu, 0)?, Vec::new(), Vec::new());
        Ok(Routing { scores: none()?, rows, weights: none()?, chosen, routes })
    }

    pub fn grow(&mut self, settings: &Experts, rows: usize) -> Result<(), CudaError> {
        self.scores.grow(rows * settings.count)?;
        self.rows.grow(rows * settings.used)?;
        self.weights.grow(rows * settings.used)
    }
}

/// The router's scores of `x`, on their way to the host.
pub(super) fn score(
    gpu: &Gpu,
    weights: &Routed<OnDevice>,
    x: Span<'_, f32>,
    buffers: &buffers::Buffers,
    routing: &mut Routing,
) -> Result<(), CudaError> {
    let scores = buffers.experts.scores.first(x.len() / weights.router.cols * weights.settings.count);
    gpu.matmul(x, &buffers.rounded, &[(&weights.router, scores)])?;
    // SAFETY: `forward` waits for it.
    unsafe { scores.copy_out(gpu, &mut routing.scores) }
}

/// `out = Σ weight · expert(x)` over each row's experts, in the order of their numbers. After [`score`] of the same `x`.
pub(super) fn forward(
    gpu: &Gpu,
    activation: Activation,
    weights: &Routed<OnDevice>,
    x: Span<'_, f32>,
    (buffers, routing): (&buffers::Buffers, &mut Routing),
    out: Span<'_, f32>,
) -> Result<(), CudaError> {
    let Routed { settings, router, experts } = weights;
    let (own, d) = (&buffers.experts, router.cols);
    gpu.wait()?;
    let Routing { chosen, routes, .. } = routing;
    routes.clear();
    let all = &routing.scores.as_slice()[..x.len() / d * settings.count];
    for (row, scores) in all.chunks_exact(settings.count).enumerate() {
        choose(settings, scores, chosen);
        routes.extend(chosen.iter().map(|&(expert, weight)| (expert, row as u32, weight)));
    }
    routes.sort_unstable_by_key(|&(expert, row, _)| (expert, row));
    let count = routes.len();
    for (at, &(_, row, weight)) in routes.iter().enumerate() {
        routing.rows.as_mut_slice()[at] = row;
        routing.weights.as_mut_slice()[at] = weight;
    }
    let (rows, factors) = (own.rows.first(count), own.weights.first(count));
    // SAFETY: the device is waited for, by the next such block or at the pass's end, before these are written again.
    unsafe {
        rows.copy_in(gpu, &routing.rows, 0)?;
        factors.copy_in(gpu, &routing.weights, 0)?;
    }

    out.clear(gpu)?;
    let mut first = 0;
    for routes in routes.chunk_by(|a, b| a.0 == b.0) {
        let own_routes = first..first + routes.len();
        first = own_routes.end;
        let (input, output) = (own.input.first(routes.len() * d), own.output.first(routes.len() * d));
        let rows = rows.part(own_routes.clone());
        gpu.gather_rows(x, rows, d, input)?;
        gated(gpu, activation, &experts[routes[0].0], input, buffers, output)?;
        gpu.scatter_rows(output, rows, factors.part(own_routes), out)?;
    }
    Ok(())
}
