//! How likely a model finds a text: what perplexity is made of.

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PagePtr};

use crate::TokenId;
use crate::decoder::{Activations, Batch, Decoder};

/// Positions computed together.
const CHUNK: usize = 64;

/// `-ln p` of every token but the first, each given all before it. KV lies in memory, in the given type.
pub fn negative_log_likelihoods(
    decoder: &Decoder,
    cpu: &Cpu,
    dtype: KvDtype,
    tokens: &[TokenId],
) -> Vec<f64> {
    let layout = decoder.page_layout(dtype);
    let page = vec![0u64; layout.page_bytes().div_ceil(8)];
    let mut memory = vec![page; tokens.len().div_ceil(PAGE_TOKENS)];
    // SAFETY: each vector holds one page's bytes, aligned, and outlives the pointers; this thread alone uses them.
    let pages: Vec<PagePtr> =
        memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
    let mut work = Activations::default();
    let mut out = Vec::with_capacity(tokens.len().saturating_sub(1));
    for start in (0..tokens.len()).step_by(CHUNK) {
        let chunk = &tokens[start..tokens.len().min(start + CHUNK)];
        let sequence = Sequence { pages: &pages, first_row: 0, rows: chunk.len(), start };
        let logit_rows: Vec<usize> = (0..chunk.len()).collect();
        let batch = Batch { tokens: chunk, sequences: &[sequence], logit_rows: &logit_rows };
        decoder.forward(cpu, &layout, &batch, &mut work);
        let logits = work.logits_mut().chunks_exact(decoder.config().vocab);
        // The last position's logits score the first token of the next chunk.
        for (logits, next) in logits.zip(&tokens[start + 1..]) {
            out.push(negative_log_probability(logits, *next));
        }
    }
    out
}

fn negative_log_probability(logits: &[f32], token: TokenId) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certain_token_costs_nothing_and_one_of_four_equals_two_bits() {
        assert!(negative_log_probability(&[100.0, 0.0, 0.0], 0) < 1e-12);
        assert!((negative_log_probability(&[3.0; 4], 2) - 2.0 * std::f64::consts::LN_2).abs() < 1e-12);
    }
}
