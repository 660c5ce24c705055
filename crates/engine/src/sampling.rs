//! How the next token is chosen from the logits.

use std::collections::HashMap;

use dormouse_grammar::{Constraint, ConstraintError};

use crate::TokenLogprob;

/// A request's sampling settings, already validated.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens whose probabilities sum to `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token already in the output.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for every time it is already in the output.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The random draw at a position is a function of (seed, position) alone.
    pub seed: u64,
    /// Report the chosen token's log-probability and this many alternatives (0 to 20).
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// What sampling must know of the sequence so far: kept up to date token by token.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// For each token: whether it occurs in the prompt, and how often in the output.
    seen: HashMap<u32, Seen>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_output: u32,
}

impl History {
    pub fn new(prompt: &[u32], output: &[u32]) -> History {
        let mut history = History { seen: prompt.iter().map(|token| (*token, Seen::default())).collect() };
        output.iter().for_each(|token| history.push(*token));
        history
    }

    /// A token was generated.
    pub fn push(&mut self, token: u32) {
        self.seen.entry(token).or_default().in_output += 1;
    }
}

impl Sampling {
    /// Whether the choice depends on the tokens so far; if not, no [`History`] need be kept.
    pub fn uses_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether the choice is the likeliest token, whatever else is likely. Where a grammar has a say, it may not be.
    pub fn takes_likeliest(&self) -> bool {
        let is_greedy = self.temperature == 0.0 || self.top_k == 1;
        is_greedy && self.logit_bias.is_empty() && !self.uses_history() && self.logprobs.is_none()
    }

    /// Chooses the token at `position` of the log. Alters `logits` (length: vocabulary).
    ///
    /// The order is: bias, penalties, the grammar, temperature, top-k, top-p, min-p, one draw. Ties go to the smaller token id.
    pub fn choose(
        &self,
        logits: &mut [f32],
        history: &History,
        constraint: Option<&mut Constraint>,
        position: usize,
    ) -> Result<u32, ConstraintError> {
        self.adjust(logits, history);
        let greedy = self.temperature == 0.0 || self.top_k == 1;
        if let Some(constraint) = constraint {
            // The likeliest of all is the likeliest of those that are allowed, if it is one of them: no need to know the others.
            if greedy {
                let best = argmax(logits);
                if constraint.allows(best)? {
                    return Ok(best);
                }
            }
            constraint.mask(logits)?;
        }
        let best = argmax(logits);
        if greedy {
            return Ok(best);
        }
        Ok(self.draw(logits, logits[best as usize], uniform(self.seed, position as u64)))
    }

    fn adjust(&self, logits: &mut [f32], history: &History) {
        for (token, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if self.uses_history() {
            for (token, seen) in &history.seen {
                let Some(logit) = logits.get_mut(*token as usize) else { continue };
                *logit = if *logit > 0.0 {
                    *logit / self.repetition_penalty
                } else {
                    *logit * self.repetition_penalty
                };
                if seen.in_output > 0 {
                    *logit -= self.presence_penalty + self.frequency_penalty * seen.in_output as f32;
                }
            }
        }
    }

    fn draw(&self, logits: &[f32], largest: f32, uniform: f64) -> u32 {
        let inverse = 1.0 / f64::from(self.temperature);
        let weight = |logit: f32| (f64::from(logit - largest) * inverse).exp();
        let mut kept: Vec<(f64, u32)> = logits
            .iter()
            .zip(0..)
            .map(|(logit, token)| (weight(*logit), token))
            .filter(|(w, _)| *w > 0.0)
            .collect();
        let likelier = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.top_k > 0 && (self.top_k as usize) < kept.len() {
            kept.select_nth_unstable_by(self.top_k as usize - 1, likelier);
            kept.truncate(self.top_k as usize);
        }
        if self.top_p < 1.0 {
            let total = kept.iter().map(|(w, _)| w).sum::<f64>();
            let enough = total * f64::from(self.top_p);
            // Those below this weight have less than 1 − top_p together, so none of them is needed: most of a vocabulary
            // is not sorted. Half of it leaves room for rounding.
            let least = 0.5 * (total - enough) / kept.len() as f64;
            kept.retain(|(w, _)| *w >= least);
            kept.sort_unstable_by(likelier);
            let mut sum = 0.0;
            let count = kept
                .iter()
                .take_while(|(w, _)| {
                    let more = sum < enough;
                    sum += w;
                    more
                })
                .count();
            kept.truncate(count.max(1));
        }
        kept.retain(|(w, _)| *w >= f64::from(self.min_p));
        // A fixed order makes the sum, and with it the draw, a function of the logits alone.
        kept.sort_unstable_by_key(|(_, token)| *token);
        let mut left = kept.iter().map(|(w, _)| w).sum::<f64>() * uniform;
        for (weight, token) in &kept {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a crumb after the last token.
        kept.last().map_or(0, |(_, token)| *token)
    }
}

/// Log-probabilities of the chosen token and of the `top` likeliest, under the softmax of the raw `logits`.
pub fn logprobs(logits: &[f32], chosen: u32, top: usize) -> TokenLogprob {
    let largest = f64::from(logits[argmax(logits) as usize]);
    let total = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum::<f64>().ln() + largest;
    let logprob = |token: u32| (f64::from(logits[token as usize]) - total) as f32;
    let mut best: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < best.len() {
        best.select_nth_unstable_by(top - 1, likelier);
    }
    best.truncate(top);
    best.sort_unstable_by(likelier);
    TokenLogprob {
        logprob: logprob(chosen),
        top: best.into_iter().map(|token| (token, logprob(token))).collect(),
    }
}

/// The first of the largest logits; 0 where none is larger than −∞. By parts, whose maximums vectors find: in steps of many turns this
/// is what one thread does while the others wait.
fn argmax(logits: &[f32]) -> u32 {
    const PART: usize = 1024;
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (part, values) in logits.chunks(PART).enumerate() {
        let most = maximum(values);
        if most > largest {
            (best, largest) = (part * PART, most);
        }
    }
    let is_it = |logit: &f32| *logit == largest && largest > f32::NEG_INFINITY;
    let at = logits[best..].iter().take(PART).position(is_it);
    (best + at.unwrap_or(0)) as u32
}

fn maximum(values: &[f32]) -> f32 {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (lines, rest) = values.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for line in lines {
        for lane in 0..LANES {
            most[lane] = larger(most[lane], line[lane]);
        }
    }
    most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// A number in 0..1 that is a function of (seed, position) alone: Philox-2x64-10 (Salmon et al., 2011), so there is
/// no generator state that a crash could lose.
fn uniform(seed: u64, position: u64) -> f64 {
    const MULTIPLIER: u64 = 0xD2B7_4407_B1CE_6E93;
    const KEY_STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let (mut left, mut right, mut key) = (position, 0, seed);
    for _ in 0..10 {
        let product = u128::from(left) * u128::from(MULTIPLIER);
        (left, right) = ((product >> 64) as u64 ^ key ^ right, product as u64);
        key = key.wrapping_add(KEY_STEP);
    }
    (left >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_logits_is_found_in_any_length() {
        let mut state = 7u32;
        for length in (1..70).chain([1023, 1024, 1025, 3000, 49_152]) {
            let logits: Vec<f32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Few values, so that the largest comes more than once; some of them are none that could be chosen.
                    [f32::NAN, f32::NEG_INFINITY, -1.5, -0.0, 0.0, 2.5, 2.5][(state >> 20) as usize % 7]
                })
                .collect();
            let mut expected = 0;
            for (at, logit) in logits.iter().enumerate() {
                if *logit > logits[expected] || logits[expected].is_nan() && !logit.is_nan() {
                    expected = at;
                }
            }
            let is_number = logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
            assert_eq!(argmax(&logits), if is_number { expected as u32 } else { 0 }, "{length}");
        }
    }

    fn choose(sampling: &Sampling, logits: &mut [f32], history: &History, position: usize) -> u32 {
        sampling.choose(logits, history, None, position).unwrap()
    }

    fn logits() -> Vec<f32> {
        (0..50).map(|i| ((i * 31 % 50) as f32) / 10.0).collect()
    }

    fn chosen(sampling: &Sampling, draws: usize) -> Vec<u32> {
        let mut tokens: Vec<u32> =
            (0..draws).map(|p| choose(sampling, &mut logits(), &History::default(), p)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn greedy_takes_the_likeliest_and_the_smaller_id_of_a_tie() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(choose(&greedy, &mut [1.0, 3.0, 3.0, 2.0], &History::default(), 0), 1);
    }

    #[test]
    fn top_k_top_p_and_min_p_keep_exactly_the_tokens_they_name() {
        let by_likelihood = {
            let mut ids: Vec<u32> = (0..50).collect();
            ids.sort_by(|a, b| logits()[*b as usize].total_cmp(&logits()[*a as usize]));
            ids
        };
        let expect = |count: usize| {
            let mut ids = by_likelihood[..count].to_vec();
            ids.sort_unstable();
            ids
        };
        assert_eq!(chosen(&Sampling { top_k: 3, ..Sampling::default() }, 2000), expect(3));
        // Weights fall by e^-0.1 a token: the first five hold 39.6 % of the total, the first six 45.4 %.
        assert_eq!(chosen(&Sampling { top_p: 0.42, ..Sampling::default() }, 4000), expect(6));
        assert_eq!(chosen(&Sampling { min_p: 0.75, ..Sampling::default() }, 2000), expect(3));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let sampling = Sampling { temperature: 0.7, seed: 11, ..Sampling::default() };
        let row = [0.0f32, 1.0, 2.0, -1.0];
        let mut counts = [0f64; 4];
        let draws = 40_000;
        for position in 0..draws {
            counts[choose(&sampling, &mut row.clone(), &History::default(), position) as usize] += 1.0;
        }
        let weights = row.map(|l| (f64::from(l) / 0.7).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let p = weight / total;
            let deviation = (p * (1.0 - p) / draws as f64).sqrt();
            assert!((count / draws as f64 - p).abs() < 5.0 * deviation);
        }
    }

    #[test]
    fn a_draw_is_a_function_of_seed_and_position() {
        let at = |seed, position| {
            choose(&Sampling { seed, ..Sampling::default() }, &mut logits(), &History::default(), position)
        };
        assert_eq!((at(5, 9), at(5, 9)), (at(5, 9), at(5, 9)));
        assert!((0..64).any(|p| at(5, p) != at(6, p)));
        assert!((0..64).any(|p| at(5, p) != at(5, p + 1)));
    }

    #[test]
    fn penalties_count_the_prompt_and_the_output_as_each_is_defined() {
        let history = History::new(&[1], &[2, 2]);
        let after = |sampling: Sampling| {
            let mut row = [1.0f32, 2.0, 2.0, -2.0];
            choose(&sampling, &mut row, &history, 0);
            row
        };
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(after(Sampling { repetition_penalty: 2.0, ..greedy.clone() }), [1.0, 1.0, 1.0, -2.0]);
        assert_eq!(after(Sampling { presence_penalty: 0.5, ..greedy.clone() }), [1.0, 2.0, 1.5, -2.0]);
        assert_eq!(after(Sampling { frequency_penalty: 0.5, ..greedy.clone() }), [1.0, 2.0, 1.0, -2.0]);
        assert_eq!(after(Sampling { logit_bias: vec![(3, 5.0)], ..greedy }), [1.0, 2.0, 2.0, 3.0]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_raw_softmax_best_first() {
        let got = logprobs(&[0.0, 2.0, 1.0], 0, 2);
        let total = (1f64 + 2f64.exp() + 1f64.exp()).ln();
        assert!((f64::from(got.logprob) + total).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|(token, _)| *token).collect::<Vec<u32>>(), [1, 2]);
        assert!((f64::from(got.top[0].1) - (2.0 - total)).abs() < 1e-6);
    }
}
