//! The choice of the next token, from its logits.
//!
//! It is a function of the logits, the settings, the tokens so far and the position alone, but for the rounding of sums, which is that
//! of the tier's arithmetic: a draw that is closer to the border of two tokens than 10⁻⁶ may be either. A vocabulary is long and few
//! of its tokens matter, so a row is read whole as seldom as can be, by vectors; what is sorted are the few.

use dormouse_grammar::{Constraint, ConstraintError};
use dormouse_kernels::Cpu;
use dormouse_kernels::cpu::{Pool, logits};

use crate::TokenLogprob;
use crate::sampling::{History, Sampling, uniform};

/// Chooses tokens. What it keeps from one to the next is memory.
pub struct Sampler {
    /// Of one thread.
    cpu: Cpu,
    /// Of each part of the row ([`logits::PART`]): its largest logit, and its share of the softmax's sum.
    maxima: Vec<f32>,
    sums: Vec<f32>,
    order: Vec<f32>,
    kept: Vec<Candidate>,
}

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    /// `e^((logit − largest) / temperature)`
    weight: f64,
    token: u32,
}

impl Sampler {
    /// Computes as `cpu` does, on the calling thread.
    pub fn new(cpu: &Cpu) -> Sampler {
        Sampler {
            cpu: Cpu { isa: cpu.isa, precision: cpu.precision, pool: Pool::new(1) },
            maxima: Vec::new(),
            sums: Vec::new(),
            order: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Chooses the token at `position` of the log. Alters `logits` (length: vocabulary).
    ///
    /// The order is: bias, penalties, the grammar, temperature, top-k, top-p, min-p, one draw. Ties go to the smaller token id.
    pub fn choose(
        &mut self,
        sampling: &Sampling,
        logits: &mut [f32],
        history: &History,
        constraint: Option<&mut Constraint>,
        position: usize,
    ) -> Result<u32, ConstraintError> {
        sampling.adjust(logits, history);
        if let Some(constraint) = constraint {
            // The likeliest of all is the likeliest of those that are allowed, if it is one of them: no need to know the others.
            if sampling.is_greedy() {
                let best = self.likeliest(logits);
                if constraint.allows(best)? {
                    return Ok(best);
                }
            }
            constraint.mask(logits)?;
        }
        let best = self.likeliest(logits);
        if sampling.is_greedy() {
            return Ok(best);
        }
        Ok(self.draw(sampling, logits, logits[best as usize], uniform(sampling.seed, position as u64)))
    }

    /// Log-probabilities of the chosen token and of the `top` likeliest, under the softmax of the raw `logits`.
    pub fn logprobs(&mut self, logits: &[f32], chosen: u32, top: usize) -> TokenLogprob {
        let largest = logits[self.likeliest(logits) as usize];
        let total = self.sum(logits, largest, 1.0).ln() + f64::from(largest);
        let logprob = |logit: f32| (f64::from(logit) - total) as f32;
        self.kept.clear();
        if top > 0 {
            self.keep_largest(logits, top);
            self.kept.sort_unstable_by(likelier);
        }
        TokenLogprob {
            logprob: logprob(logits[chosen as usize]),
            top: self.kept.iter().map(|it| (it.token, logprob(it.logit))).collect(),
        }
    }

    /// The first of the largest logits; 0 where none is larger than −∞. Learns the parts' maxima.
    fn likeliest(&mut self, logits: &[f32]) -> u32 {
        logits::maxima(&self.cpu, logits, &mut self.maxima);
        let (mut best, mut largest) = (0, f32::NEG_INFINITY);
        for (part, most) in self.maxima.iter().enumerate() {
            if *most > largest {
                (best, largest) = (part * logits::PART, *most);
            }
        }
        let is_it = |logit: &f32| *logit == largest && largest > f32::NEG_INFINITY;
        let at = logits[best..].iter().take(logits::PART).position(is_it);
        (best + at.unwrap_or(0)) as u32
    }

    /// The weights' sum over the vocabulary. Learns the parts' sums.
    fn sum(&mut self, logits: &[f32], largest: f32, scale: f64) -> f64 {
        logits::sums(&self.cpu, logits, largest, single(scale), &mut self.sums);
        self.sums.iter().copied().map(f64::from).sum()
    }

    fn draw(&mut self, sampling: &Sampling, logits: &[f32], largest: f32, uniform: f64) -> u32 {
        let (top_p, min_p) = (f64::from(sampling.top_p), f64::from(sampling.min_p));
        let top_k = Some(sampling.top_k as usize).filter(|top_k| (1..logits.len()).contains(top_k));
        let scale = 1.0 / f64::from(sampling.temperature);
        // The least logit with a weight, and room for rounding.
        let least = |weight: f64| ((weight.ln() - 1e-3) / scale + f64::from(largest)) as f32;
        let mut total = None;
        if let Some(top_k) = top_k {
            self.keep_largest(logits, top_k);
        } else if top_p < 1.0 {
            let sum = self.sum(logits, largest, scale);
            total = Some(sum);
            // Those below this weight have less than half of 1 − top_p together, so none of them is needed.
            self.keep_from(logits, least(0.5 * (1.0 - top_p) * sum / logits.len() as f64).next_down());
        } else if min_p > 0.0 {
            self.keep_from(logits, least(min_p).next_down());
        } else {
            return self.draw_of_all(logits, largest, scale, uniform);
        }
        let kept = &mut self.kept;
        for it in &mut *kept {
            it.weight = ((f64::from(it.logit) - f64::from(largest)) * scale).exp();
        }
        if top_p < 1.0 {
            kept.sort_unstable_by(likelier);
            let total = total.unwrap_or_else(|| kept.iter().map(|it| it.weight).sum());
            let (mut sum, enough) = (0.0, total * top_p);
            let is_needed = |it: &&Candidate| {
                let is_needed = sum < enough;
                sum += it.weight;
                is_needed
            };
            let count = kept.iter().take_while(is_needed).count();
            kept.truncate(count.max(1));
        }
        kept.retain(|it| it.weight > 0.0 && it.weight >= min_p);
        // A fixed order makes the sum, and with it the draw, a function of the logits alone.
        kept.sort_unstable_by_key(|it| it.token);
        let mut left = kept.iter().map(|it| it.weight).sum::<f64>() * uniform;
        for it in &*kept {
            left -= it.weight;
            if left < 0.0 {
                return it.token;
            }
        }
        // Rounding may leave a crumb after the last token.
        kept.last().map_or(0, |it| it.token)
    }

    /// A draw from the whole vocabulary: first of a part, then of its tokens.
    fn draw_of_all(&mut self, logits: &[f32], largest: f32, scale: f64, uniform: f64) -> u32 {
        let mut left = self.sum(logits, largest, scale) * uniform;
        let mut drawn = None;
        let sums = self.sums.iter().copied().map(f64::from).enumerate();
        for (part, sum) in sums.filter(|(_, sum)| *sum > 0.0) {
            drawn = Some((part, sum));
            if left < sum {
                break;
            }
            left -= sum;
        }
        let Some((part, sum)) = drawn else { return 0 };
        let first = part * logits::PART;
        let tokens = &logits[first..logits.len().min(first + logits::PART)];
        let weights = logits::terms(&self.cpu, tokens, largest, single(scale)).map(f64::from);
        // The same place in the sum without its rounding.
        left *= weights.iter().sum::<f64>() / sum;
        let mut token = first;
        for (at, weight) in weights.into_iter().enumerate() {
            if weight > 0.0 {
                token = first + at;
                left -= weight;
            }
            if left < 0.0 {
                break;
            }
        }
        token as u32
    }

    /// Keeps the `count` likeliest tokens, in any order.
    fn keep_largest(&mut self, logits: &[f32], count: usize) {
        self.order.clone_from(&self.maxima);
        // At least as many logits are no less as parts have such a maximum.
        let least = match count <= self.order.len() {
            true => *self.order.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1,
            false => f32::NEG_INFINITY,
        };
        self.keep_from(logits, least);
        if count < self.kept.len() {
            self.kept.select_nth_unstable_by(count - 1, likelier);
            self.kept.truncate(count);
        }
    }

    /// Keeps the tokens whose logits are no less than `least`, in their order. What is forbidden, at −∞, is never kept.
    fn keep_from(&mut self, logits: &[f32], least: f32) {
        let least = least.max(f32::MIN);
        self.kept.clear();
        for (part, most) in self.maxima.iter().enumerate() {
            if *most < least {
                continue;
            }
            let first = part * logits::PART;
            let tokens = logits[first..].iter().take(logits::PART).zip(first as u32..);
            let likely = tokens.filter(|(logit, _)| **logit >= least);
            self.kept.extend(likely.map(|(logit, token)| Candidate { logit: *logit, weight: 0.0, token }));
        }
    }
}

/// Best first; of equals, the smaller token. None of the logits is not a number.
fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(std::cmp::Ordering::Equal).then(a.token.cmp(&b.token))
}

/// As f32, finite: nothing times it is nothing.
fn single(scale: f64) -> f32 {
    scale.min(f64::from(f32::MAX)) as f32
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
