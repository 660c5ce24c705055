//! The softmax of a segment, in parts that can be merged (Milakov and Gimelshein, 2018).

use std::ops::Range;

use super::super::lanes::{LANES, Lanes, sixteen, sixteen_mut};

/// One query's maximum of a segment's scores and the sum of their exponentials, above that maximum.
pub struct Peak {
    pub maximum: f32,
    pub sum: f32,
}

/// Turns `scores` into the weights `e^(score − maximum)`; nothing outside `seen` has a weight. Capped scores are
/// `cap · tanh(score)`.
#[inline(always)]
pub fn softmax<L: Lanes>(scores: &mut [f32], seen: Range<usize>, soft_cap: Option<f32>) -> Peak {
    debug_assert!(scores.len().is_multiple_of(LANES) && seen.end <= scores.len());
    if seen.is_empty() {
        scores.fill(0.0);
        return Peak { maximum: f32::NEG_INFINITY, sum: 0.0 };
    }
    // Whole vectors that hold all that is seen.
    let (begin, end) = (seen.start - seen.start % LANES, seen.end.next_multiple_of(LANES));
    scores[..begin].fill(0.0);
    scores[end..].fill(0.0);
    let vectors = scores[begin..end].as_chunks_mut::<LANES>().0;
    if let Some(cap) = soft_cap {
        for scores in &mut *vectors {
            L::splat(cap).mul(L::load(scores).tanh()).store(scores);
        }
    }
    vectors.as_flattened_mut()[..seen.start - begin].fill(f32::NEG_INFINITY);
    vectors.as_flattened_mut()[seen.end - begin..].fill(f32::NEG_INFINITY);
    let mut largest = L::splat(f32::NEG_INFINITY);
    for scores in &*vectors {
        largest = largest.max(L::load(scores));
    }
    let maximum = largest.largest();
    let mut sum = L::zero();
    for scores in vectors {
        let weights = L::load(scores).sub(L::splat(maximum)).softmax_weight();
        weights.store(scores);
        sum = sum.add(weights);
    }
    Peak { maximum, sum: sum.sum() }
}

/// The attention of some queries over some positions: peaks, and weighted sums of values that are not yet divided by
/// the sums of weights.
pub struct Partial<'a> {
    /// `[states]`, padded to whole vectors.
    pub maxima: &'a mut [f32],
    /// As `maxima`.
    pub sums: &'a mut [f32],
    /// `[states, stride]`
    pub values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Numbers that a partial result takes.
    pub fn len(states: usize, stride: usize) -> usize {
        2 * states.next_multiple_of(LANES) + states * stride
    }

    pub fn over(memory: &'a mut [f32], states: usize) -> Partial<'a> {
        let padded = states.next_multiple_of(LANES);
        let (maxima, rest) = memory.split_at_mut(padded);
        let (sums, values) = rest.split_at_mut(padded);
        Partial { maxima, sums, values }
    }

    /// Adds the positions that come next.
    #[inline(always)]
    pub fn merge<L: Lanes>(&mut self, next: &Partial<'_>, stride: usize) {
        for first in (0..self.maxima.len()).step_by(LANES) {
            let (a, b) = (L::load(sixteen(self.maxima, first)), L::load(sixteen(next.maxima, first)));
            let maximum = a.max(b);
            // A query that has seen nothing has a maximum of −∞ and sums of zero, and takes the factor zero.
            let (keep, take) = (a.sub(maximum).softmax_weight(), b.sub(maximum).softmax_weight());
            maximum.store(sixteen_mut(self.maxima, first));
            let next_sums = L::load(sixteen(next.sums, first)).mul(take);
            L::load(sixteen(self.sums, first)).mul_add(keep, next_sums).store(sixteen_mut(self.sums, first));
            let (mut keeps, mut takes) = ([0.0; LANES], [0.0; LANES]);
            keep.store(&mut keeps);
            take.store(&mut takes);
            let states = (self.values.len() / stride).saturating_sub(first).min(LANES);
            for i in 0..states {
                let (keep, take) = (L::splat(keeps[i]), L::splat(takes[i]));
                for at in ((first + i) * stride..(first + i + 1) * stride).step_by(LANES) {
                    let next = L::load(sixteen(next.values, at)).mul(take);
                    L::load(sixteen(self.values, at)).mul_add(keep, next).store(sixteen_mut(self.values, at));
                }
            }
        }
    }
}
