//! Causal attention over pages, in products of one shape.
//!
//! Positions are cut into blocks of [`BLOCK`] queries and segments of [`SEGMENT`] keys, both counted from a sequence's first
//! one. A block's queries are multiplied with one segment's keys at a time, whether they are in the batch or not and whether
//! they see them or not, so a query meets the same shape at the same place however a prompt was cut. Each segment has its
//! softmax; segments are merged in pairs, and pairs in pairs, by their numbers, so that those which a query does not see add
//! zeros wherever they are.

use candle_core::{D, DType, Device, Result, Tensor};
use dormouse_kernels::PAGE_TOKENS;
use dormouse_kernels::cpu::attention::{Attention, Sequence};

use super::pages::{PageCache, ZEROS};

/// Positions of one segment: whole pages.
const SEGMENT: usize = 4 * PAGE_TOKENS;
const SEGMENT_PAGES: usize = SEGMENT / PAGE_TOKENS;
/// Positions of one block of queries.
const BLOCK: usize = 32;
/// Less than any score: the largest one of a segment of which nothing is seen; and so much less that it weighs nothing even
/// there, the score of a key that is not seen. Numbers, since a device's arithmetic need not know infinities.
const LOWEST: f64 = -1e30;
const UNSEEN: f32 = -2e30;

/// One sequence's part of a batch, in the layers that have the same window.
pub(super) struct Plan {
    first_row: usize,
    rows: usize,
    start: usize,
    /// First of the segments that any of its rows sees.
    first_segment: usize,
    /// Places of the pages of all its segments from there.
    places: Tensor,
    blocks: Vec<Block>,
}

struct Block {
    /// Position of its first query, in the batch or not.
    position: usize,
    /// Segments that its queries see, counted from the plan's first.
    segments: std::ops::Range<usize>,
    /// 1 where a query sees a key, `[segments, 1, BLOCK, 1, SEGMENT]`.
    seen: Tensor,
}

impl Plan {
    /// For the sequence whose pages have these places.
    pub fn new(
        sequence: &Sequence<'_>,
        places: &[u32],
        window: Option<usize>,
        device: &Device,
    ) -> Result<Plan> {
        let first_seen = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
        let Sequence { first_row, rows, start, .. } = *sequence;
        let end = start + rows;
        let first_segment = first_seen(start) / SEGMENT;
        let pages = first_segment * SEGMENT_PAGES..end.div_ceil(SEGMENT) * SEGMENT_PAGES;
        let places: Vec<u32> = pages.map(|page| places.get(page).copied().unwrap_or(ZEROS as u32)).collect();
        let mut blocks = Vec::new();
        for position in (start / BLOCK * BLOCK..end).step_by(BLOCK) {
            // Of the queries that are in the batch; the others' results mean nothing.
            let (first, last) = (position.max(start), (position + BLOCK).min(end) - 1);
            let segments = first_seen(first) / SEGMENT..last / SEGMENT + 1;
            let mut seen = vec![0u8; segments.len() * BLOCK * SEGMENT];
            for (segment, seen) in segments.clone().zip(seen.chunks_exact_mut(BLOCK * SEGMENT)) {
                for (query, seen) in (position..).zip(seen.chunks_exact_mut(SEGMENT)) {
                    let keys = first_seen(query)..query + 1;
                    let key = |key: usize| u8::from(keys.contains(&(segment * SEGMENT + key)));
                    seen.iter_mut().enumerate().for_each(|(index, seen)| *seen = key(index));
                }
            }
            let seen = Tensor::from_vec(seen, (segments.len(), 1, BLOCK, 1, SEGMENT), device)?;
            let segments = segments.start - first_segment..segments.end - first_segment;
            blocks.push(Block { position, segments, seen });
        }
        let count = places.len();
        let places = Tensor::from_vec(places, count, device)?;
        Ok(Plan { first_row, rows, start, first_segment, places, blocks })
    }

    /// Attention of the sequence's rows of `q`, `[rows of the batch, heads, head_dim]`, whose keys and values are in their
    /// pages: `[rows, heads · head_dim]`.
    pub fn attend(&self, attention: &Attention, pages: &PageCache, q: &Tensor) -> Result<Tensor> {
        let [keys, values] = pages.pages(attention.layer, &self.places)?;
        let (keys, values) = (segments(&keys)?, segments(&values)?);
        let mut out = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (first, end) =
                (block.position.max(self.start), (block.position + BLOCK).min(self.start + self.rows));
            let rows = q.narrow(0, self.first_row + first - self.start, end - first)?;
            let (before, behind) = (first - block.position, block.position + BLOCK - end);
            let queries = rows.pad_with_zeros(0, before, behind)?;
            let attended = self.attend_block(attention, block, &queries, (&keys, &values))?;
            out.push(attended.narrow(0, before, end - first)?);
        }
        Tensor::cat(&out, 0)
    }

    /// `[BLOCK, heads, head_dim]` to `[BLOCK, heads · head_dim]`.
    fn attend_block(
        &self,
        attention: &Attention,
        block: &Block,
        q: &Tensor,
        (keys, values): (&Tensor, &Tensor),
    ) -> Result<Tensor> {
        let (kv_heads, head_dim) = (attention.layout.kv_heads, attention.layout.head_dim);
        let group = attention.heads / kv_heads;
        // Each KV head with the queries that share it: `[kv_heads, BLOCK · group, head_dim]`.
        let q = q.reshape((BLOCK, kv_heads, group, head_dim))?.transpose(0, 1)?.contiguous()?;
        let q = q.reshape((kv_heads, BLOCK * group, head_dim))?;
        let of_segments = |product: &dyn Fn(usize) -> Result<Tensor>| {
            let parts = block.segments.clone().map(product).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&parts, 0)
        };
        let scores = of_segments(&|segment| q.matmul(&keys.get(segment)?.transpose(1, 2)?))?;
        let mut scores = (scores * f64::from(attention.scale))?;
        if let Some(cap) = attention.soft_cap {
            scores = soft_cap(&scores, cap)?;
        }
        let count = block.segments.len();
        let shape = (count, kv_heads, BLOCK, group, SEGMENT);
        let scores = scores.reshape(shape)?;
        let unseen = Tensor::new(UNSEEN, scores.device())?.broadcast_as(shape)?;
        let scores = block.seen.broadcast_as(shape)?.where_cond(&scores, &unseen)?;
        let scores = scores.reshape((count, kv_heads, BLOCK * group, SEGMENT))?;

        let largest = scores.max_keepdim(D::Minus1)?.maximum(LOWEST)?;
        let weights = scores.broadcast_sub(&largest)?.exp()?;
        let sums = weights.sum_keepdim(D::Minus1)?;
        let first = block.segments.start;
        let results = of_segments(&|segment| weights.get(segment - first)?.matmul(&values.get(segment)?))?;

        let factors = largest.broadcast_sub(&largest.max_keepdim(0)?)?.exp()?;
        let number = self.first_segment + first;
        let sum = sum_in_pairs((sums * &factors)?, number)?;
        let result = sum_in_pairs(results.broadcast_mul(&factors)?, number)?;
        let result = result.broadcast_div(&sum)?.reshape((kv_heads, BLOCK, group * head_dim))?;
        result.transpose(0, 1)?.reshape((BLOCK, attention.heads * head_dim))
    }
}

/// `[pages, kv_heads, PAGE_TOKENS, head_dim]` to `[segments, kv_heads, SEGMENT, head_dim]`, as f32.
fn segments(pages: &Tensor) -> Result<Tensor> {
    let (count, kv_heads, positions, head_dim) = pages.dims4()?;
    let pages = pages.reshape((count / SEGMENT_PAGES, SEGMENT_PAGES, kv_heads, positions, head_dim))?;
    let segments = pages.transpose(1, 2)?.contiguous()?;
    segments.reshape((count / SEGMENT_PAGES, kv_heads, SEGMENT, head_dim))?.to_dtype(DType::F32)
}

/// The sum of summands with the numbers `first ..`, `[count, …]`, as that of all from 0 on, where all others are zero: the first
/// with the second, the third with the fourth, and so on, and the same with these sums.
fn sum_in_pairs(mut summands: Tensor, mut first: usize) -> Result<Tensor> {
    while summands.dim(0)? > 1 {
        let before = first % 2;
        let behind = (summands.dim(0)? + before) % 2;
        summands = summands.pad_with_zeros(0, before, behind)?;
        let pairs = summands.dim(0)? / 2;
        let mut shape = vec![pairs, 2];
        shape.extend(&summands.dims()[1..]);
        let pair = summands.reshape(shape)?;
        summands = (pair.narrow(1, 0, 1)? + pair.narrow(1, 1, 1)?)?.squeeze(1)?;
        first /= 2;
    }
    summands.squeeze(0)
}

/// `cap · tanh(x / cap)`
pub(super) fn soft_cap(x: &Tensor, cap: f32) -> Result<Tensor> {
    (x / f64::from(cap))?.tanh()? * f64::from(cap)
}
