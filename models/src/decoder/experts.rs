//! A feed-forward block of experts: every token goes through the few that its router scores highest, and only those
//! are read.

use dormouse_kernels::Cpu;
use dormouse_kernels::cpu::matmul::{Product, matmul};
use dormouse_kernels::cpu::norm::add_scaled;

use super::weights::Routed;
use super::{GatedBuffers, gated};
use crate::config::{Activation, Experts};
use crate::pack::PackedWeights;

/// The buffers of [`forward`], kept from one call to the next.
#[derive(Default)]
pub(super) struct ExpertBuffers {
    scores: Vec<f32>,
    /// One row's experts and their weights.
    chosen: Vec<(usize, f32)>,
    routes: Vec<Route>,
    /// The rows that go through one expert, together.
    input: Vec<f32>,
    output: Vec<f32>,
}

/// One row's use of one expert.
struct Route {
    expert: usize,
    row: usize,
    weight: f32,
}

/// `out = Σ weight · expert(x)` over each row's experts, in the order of their numbers, so that a row's bits do not
/// depend on its neighbours.
pub(super) fn forward(
    cpu: &Cpu,
    activation: Activation,
    weights: &Routed<PackedWeights>,
    x: &[f32],
    (work, buffers): (&mut ExpertBuffers, &mut GatedBuffers),
    out: &mut [f32],
) {
    let Routed { settings, router, experts } = weights;
    let d = router.cols;
    work.scores.resize(x.len() / d * settings.count, 0.0);
    matmul(cpu, x, [Product { weights: router.matrix(), out: &mut work.scores }]);

    work.routes.clear();
    for (row, scores) in work.scores.chunks_exact(settings.count).enumerate() {
        choose(settings, scores, &mut work.chosen);
        work.routes.extend(work.chosen.iter().map(|&(expert, weight)| Route { expert, row, weight }));
    }
    work.routes.sort_unstable_by_key(|route| (route.expert, route.row));

    out.fill(0.0);
    for routes in work.routes.chunk_by(|a, b| a.expert == b.expert) {
        work.input.clear();
        for route in routes {
            work.input.extend_from_slice(&x[route.row * d..][..d]);
        }
        work.output.resize(work.input.len(), 0.0);
        gated(cpu, activation, &experts[routes[0].expert], &work.input, buffers, &mut work.output);
        for (route, result) in routes.iter().zip(work.output.chunks_exact(d)) {
            add_scaled(cpu, &mut out[route.row * d..][..d], result, route.weight);
        }
    }
}

/// Leaves in `chosen` the experts with the highest scores, equal ones by number, and their weights: the softmax over all
/// experts.
pub(crate) fn choose(config: &Experts, scores: &[f32], chosen: &mut Vec<(usize, f32)>) {
    chosen.clear();
    chosen.extend(scores.iter().copied().enumerate());
    chosen.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let largest = chosen.first().map_or(0.0, |(_, score)| *score);
    let weight = |score: f32| (score - largest).exp();
    // In the order of the experts' numbers, or of the chosen ones' scores.
    let all: f32 = scores.iter().map(|score| weight(*score)).sum();
    chosen.truncate(config.used);
    chosen.iter_mut().for_each(|(_, score)| *score = weight(*score));
    let total = if config.normalised { chosen.iter().map(|(_, weight)| weight).sum() } else { all };
    chosen.iter_mut().for_each(|(_, weight)| *weight /= total);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_scored_experts_are_chosen_and_ties_go_to_the_first() {
        let config = Experts { count: 4, used: 2, d_ff: 1, normalised: true };
        let chosen = |config: &Experts, scores: &[f32]| {
            let mut chosen = Vec::new();
            choose(config, scores, &mut chosen);
            chosen
        };
        assert_eq!(chosen(&config, &[0.0, 1.0, -3.0, 1.0]), [(1, 0.5), (3, 0.5)]);
        assert_eq!(chosen(&Experts { normalised: false, ..config }, &[0.0; 4]), [(0, 0.25), (1, 0.25)]);
        assert_eq!(chosen(&config, &[1000.0, -1000.0, 0.0, 0.0]), [(0, 1.0), (2, 0.0)]);
    }
}
