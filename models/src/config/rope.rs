//! Rotary position embedding: which frequencies a model rotates with.

pub use dormouse_kernels::cpu::rope::RopeKind;

/// How rotation frequencies are changed to reach beyond the context of the first training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by this factor (Chen et al., 2023).
    Linear(f32),
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: usize,
    },
    /// Each frequency divided by a factor of its own (`[dims / 2]`, the tensor `rope_freqs.weight`).
    Factors(Vec<f32>),
    /// A larger base where the served context is longer than the original one.
    DynamicNtk {
        factor: f32,
        original_context: usize,
    },
    /// YaRN (Peng et al., 2023): pairs that turn more than `beta_fast` times in the original context are kept, those
    /// that turn fewer than `beta_slow` times are divided by `factor`, with a ramp between.
    Yarn {
        factor: f32,
        original_context: usize,
        beta_fast: f32,
        beta_slow: f32,
        truncate: bool,
        magnitude: f32,
    },
    /// LongRoPE (Ding et al., 2024): as [`RopeScaling::Factors`], one set for contexts up to the original one and
    /// another for longer ones.
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        original_context: usize,
        magnitude: f32,
    },
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub kind: RopeKind,
    /// Base of the geometric series of frequencies.
    pub theta: f32,
    /// Values of a head that are rotated, from the first on; the rest pass unchanged.
    pub dims: usize,
    pub scaling: RopeScaling,
}

impl Rope {
    /// Radians per position of each rotated pair, `[dims / 2]`.
    ///
    /// Some scalings depend on the length of the text. Keys outlive the length at which they were computed, so here
    /// they depend on `context`, the positions that a session may have, which is the same for all.
    pub fn frequencies(&self, context: usize) -> Vec<f32> {
        (0..self.dims / 2).map(|pair| self.frequency(pair, context) as f32).collect()
    }

    /// Factor on the rotated queries and keys.
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { magnitude, .. } | RopeScaling::LongRope { magnitude, .. } => magnitude,
            _ => 1.0,
        }
    }

    fn frequency(&self, pair: usize, context: usize) -> f64 {
        let dims = self.dims as f64;
        let base = |theta: f64| {
            // Rounded step by step to f32, as in the implementations that models are trained with.
            let exponent = (2.0 * pair as f64 / dims) as f32;
            f64::from(1.0 / theta.powf(f64::from(exponent)) as f32)
        };
        let theta = f64::from(self.theta);
        match &self.scaling {
            RopeScaling::None => base(theta),
            RopeScaling::Linear(factor) => base(theta) / f64::from(*factor),
            RopeScaling::Factors(factors) => base(theta) / f64::from(factors[pair]),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let base = base(theta);
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let turns = *original_context as f64 * base / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                base * (kept + (1.0 - kept) / f64::from(*factor))
            }
            RopeScaling::DynamicNtk { factor, original_context } => {
                let factor = f64::from(*factor);
                let longer = (context as f64 / *original_context as f64).max(1.0);
                base(theta * (factor * longer - (factor - 1.0)).powf(dims / (dims - 2.0)))
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                // The pair that turns so many times in the original context.
                let pair_of = |turns: f32| {
                    let period = *original_context as f64 / (f64::from(turns) * std::f64::consts::TAU);
                    dims * period.ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let base = base(theta);
                base * (1.0 - divided + divided / f64::from(*factor))
            }
            RopeScaling::LongRope { short, long, original_context, .. } => {
                let factors = if context > *original_context { long } else { short };
                base(theta) / f64::from(factors[pair])
            }
        }
    }

    /// What makes this rotation impossible for heads of `head_dim` values; None when nothing does.
    pub(super) fn fault(&self, head_dim: usize) -> Option<String> {
        let dims = self.dims;
        if dims == 0 || !dims.is_multiple_of(2) || dims > head_dim {
            return Some(format!("rotation of {dims} of {head_dim} head values is impossible"));
        }
        if !(self.theta > 1.0 && self.theta.is_finite()) {
            return Some(format!("the rope base {} is no number above one", self.theta));
        }
        let factors: &[&Vec<f32>] = match &self.scaling {
            RopeScaling::Factors(factors) => &[factors],
            RopeScaling::LongRope { short, long, .. } => &[short, long],
            _ => &[],
        };
        if let Some(wrong) = factors.iter().find(|factors| factors.len() != dims / 2) {
            return Some(format!("a list of rope factors has {} values, not {}", wrong.len(), dims / 2));
        }
        let original = match self.scaling {
            RopeScaling::Llama3 { original_context, .. }
            | RopeScaling::DynamicNtk { original_context, .. }
            | RopeScaling::Yarn { original_context, .. }
            | RopeScaling::LongRope { original_context, .. } => original_context,
            _ => 1,
        };
        if original == 0 || (dims == 2 && matches!(self.scaling, RopeScaling::DynamicNtk { .. })) {
            return Some(
                "the rope scaling's original context is 0, or only two values are rotated".to_owned(),
            );
        }
        let unfit = |value: &f32| !(*value > 0.0 && value.is_finite());
        let mut used = self.frequencies(original);
        used.push(self.magnitude());
        let wrong = used.iter().find(|value| unfit(value));
        wrong.map(|value| format!("the rope scaling gives a frequency or magnitude of {value}"))
    }
}

/// The factor on queries and keys that YaRN asks for when a file names none.
pub(super) fn yarn_magnitude(factor: f32, weight: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// The same for LongRoPE, whose factor is the ratio of the contexts.
pub(super) fn long_rope_magnitude(factor: f32, original_context: usize) -> f32 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_context as f32).ln()).sqrt() }
}

pub(super) fn linear(factor: f32) -> RopeScaling {
    if factor == 1.0 || factor <= 0.0 { RopeScaling::None } else { RopeScaling::Linear(factor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { kind: RopeKind::Half, theta: 10_000.0, dims: 64, scaling }
    }

    #[test]
    fn dynamic_ntk_keeps_the_original_context_and_stretches_a_longer_one() {
        let scaled = rope(RopeScaling::DynamicNtk { factor: 4.0, original_context: 128 });
        let plain = rope(RopeScaling::None);
        assert_eq!(scaled.frequencies(128), plain.frequencies(128));
        let (long, short) = (scaled.frequencies(512), plain.frequencies(512));
        assert_eq!(long[0], short[0]);
        // The lowest frequency is divided by exactly factor · length − (factor − 1).
        assert!((short[31] / long[31] / 13.0 - 1.0).abs() < 1e-5, "{}", short[31] / long[31]);
    }

    #[test]
    fn long_rope_switches_its_factors_with_the_context() {
        let (short, long) = (vec![1.0; 32], vec![2.0; 32]);
        let scaled = rope(RopeScaling::LongRope { short, long, original_context: 128, magnitude: 1.2 });
        assert_eq!(scaled.frequencies(128)[0], 1.0);
        assert_eq!(scaled.frequencies(129)[0], 0.5);
        assert_eq!(scaled.magnitude(), 1.2);
    }

    #[test]
    fn nonsense_is_told_apart_from_a_rotation() {
        assert_eq!(rope(RopeScaling::None).fault(64), None);
        assert!(rope(RopeScaling::None).fault(62).is_some());
        assert!(rope(RopeScaling::Factors(vec![1.0; 31])).fault(64).is_some());
        assert!(rope(RopeScaling::Factors(vec![0.0; 32])).fault(64).is_some());
        assert!(rope(RopeScaling::DynamicNtk { factor: 2.0, original_context: 0 }).fault(64).is_some());
        assert!(Rope { theta: 1.0, ..rope(RopeScaling::None) }.fault(64).is_some());
    }
}
