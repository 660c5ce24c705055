//! Activations as integers, for products with packed weights.
//!
//! A block of 32 activations becomes 32 integers and one f32 scale, so that each activation is nearly `scale · integer`. With
//! one plane, integers are bytes in −127..=127, as products with GGML types take them everywhere (`Q8_0`, but for the scale,
//! which stays f32). With two, they are 256 · high byte + low byte in ±32,512, 256 times as fine, and products are as near
//! to exact ones as f32 arithmetic is. Integers are rounded to the nearest, ties to even. A block whose values are all below
//! 1e-30 counts as zeros. Its bits depend on its own 32 values alone.

use super::dots::Dots;
use super::lanes::{LANES, Lanes, sixteen};
use crate::packed::BLOCK;

/// What activations are rounded to before they are multiplied with quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// One byte for each activation: the fastest.
    #[default]
    Int8,
    /// Two bytes: the tokens of unrounded activations, in up to twice the time.
    Int16,
}

impl Precision {
    pub const ALL: [Precision; 2] = [Precision::Int8, Precision::Int16];

    pub fn parse(name: &str) -> Option<Precision> {
        Precision::ALL.into_iter().find(|precision| precision.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Precision::Int8 => "int8",
            Precision::Int16 => "int16",
        }
    }
}

/// Thirty-two activations in `P` planes of bytes, the high ones first.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Block<const P: usize> {
    pub scale: f32,
    /// `scale · Σ integers`, what a weight's minimum is multiplied with.
    pub scaled_sum: f32,
    /// Sum of the integers, and of the last sixteen.
    pub sum: f32,
    pub upper_sum: f32,
    pub planes: [[i8; BLOCK]; P],
}

impl<const P: usize> Block<P> {
    pub const ZERO: Block<P> =
        Block { scale: 0.0, scaled_sum: 0.0, sum: 0.0, upper_sum: 0.0, planes: [[0; BLOCK]; P] };
    /// The largest integer.
    const LARGEST: f32 = if P == 1 { 127.0 } else { 127.0 * 256.0 };
}

/// Quantises whole blocks.
#[inline(always)]
pub fn quantise<D: Dots, const P: usize>(values: &[f32], blocks: &mut [Block<P>]) {
    for (values, block) in values.as_chunks::<BLOCK>().0.iter().zip(blocks) {
        let halves = [D::F::load(sixteen(values, 0)), D::F::load(sixteen(values, LANES))];
        let zero = D::F::zero();
        let largest = halves[0].max(zero.sub(halves[0])).max(halves[1].max(zero.sub(halves[1]))).largest();
        let (scale, inverse) = match largest >= 1e-30 {
            true => (largest / Block::<P>::LARGEST, Block::<P>::LARGEST / largest),
            false => (0.0, 0.0),
        };
        let mut sums = [0; 2];
        for half in 0..2 {
            let mut bytes = [[0; LANES]; P];
            sums[half] = D::store_rounded(halves[half].mul(D::F::splat(inverse)), &mut bytes);
            for plane in 0..P {
                block.planes[plane][half * LANES..][..LANES].copy_from_slice(&bytes[plane]);
            }
        }
        block.scale = scale;
        block.sum = (sums[0] + sums[1]) as f32;
        block.scaled_sum = scale * block.sum;
        block.upper_sum = sums[1] as f32;
    }
}
