//! What a request says of how its tokens are chosen. [`crate::sampler`] chooses them.

use std::collections::HashMap;

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

    /// No draw: the likeliest token of those that a grammar allows.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Whether the choice is the likeliest token, whatever else is likely. Where a grammar has a say, it may not be.
    pub fn takes_likeliest(&self) -> bool {
        self.is_greedy() && self.logit_bias.is_empty() && !self.uses_history() && self.logprobs.is_none()
    }

    /// Adds the bias and the penalties.
    pub(crate) fn adjust(&self, logits: &mut [f32], history: &History) {
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
}

/// A number in 0..1 that is a function of (seed, position) alone: Philox-2x64-10 (Salmon et al., 2011), so there is
/// no generator state that a crash could lose.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
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
