//! Sixteen f32 lanes: the vocabulary every CPU kernel is written in.
//!
//! Lane `l` of an accumulator takes the terms with index ≡ l (mod 16), in order, and [`Lanes::sum`] adds the lanes
//! as one fixed tree. A dot product's bits therefore depend on its operands and the tier, and on nothing else.

use half::f16;

/// Number of lanes on every tier.
pub const LANES: usize = 16;

/// One tier's sixteen lanes. Methods are only called inside functions compiled for that tier (see `dispatch!`).
///
/// An intrinsic is inlined only into code compiled for its tier, and closures are not: so no kernel calls these
/// methods in a closure, where each would become a call with its operands in memory.
pub trait Lanes: Copy {
    /// Weight rows of the register block of a matrix product on this tier.
    const BLOCK_ROWS: usize;
    /// Tokens of that block: as many as leave its accumulators in registers.
    const BLOCK_TOKENS: usize;
    /// Queries and vectors of lanes of the register block of an attention product, chosen in the same way.
    const QUERIES: usize;
    const VECTORS: usize;

    fn zero() -> Self;
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// `self * a + b`: fused where the tier has it, else rounded twice.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// The larger of each pair of lanes; `other` where either is not a number.
    fn max(self, other: Self) -> Self;
    /// All lanes the half-precision number with these bits.
    fn splat_f16(bits: [u8; 2]) -> Self;
    fn load_f16(from: &[u16; LANES]) -> Self;
    /// Rounded to half precision, to nearest even.
    fn store_f16(self, to: &mut [u16; LANES]);
    fn load_bf16(from: &[u16; LANES]) -> Self;
    fn load_u8(from: &[u8; LANES]) -> Self;
    fn load_i8(from: &[u8; LANES]) -> Self;
    /// `self · 2^n` for integral `n` in −126..=127.
    fn times_power_of_two(self, n: Self) -> Self;

    /// The sixteen lanes added as a fixed tree: halves, quarters, eighths, pairs.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        tree(&lanes, |a, b| a + b)
    }

    /// The largest lane.
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        tree(&lanes, f32::max)
    }

    /// `e^self`; relative error under 2⁻²¹ for −87 ≤ x ≤ 88, and as at those ends outside.
    #[inline(always)]
    fn exp(self) -> Self {
        let clamped_below = self.max(Self::splat(-87.0));
        let clamped = Self::zero().sub(Self::zero().sub(clamped_below).max(Self::splat(-88.0)));
        clamped.exp_in_range()
    }

    /// [`Lanes::exp`] of what is known to lie in −87..=88.
    ///
    /// Cody-Waite reduction to |r| ≤ ln 2 / 2 and a polynomial 1 + r + … + r⁵ of e^r whose coefficients make the largest
    /// relative error least (10⁻⁷).
    #[inline(always)]
    fn exp_in_range(self) -> Self {
        // Adding and taking away 1.5 · 2²³ rounds to the nearest integer without an instruction for it.
        let magic = Self::splat(12_582_912.0);
        let n = self.mul_add(Self::splat(std::f32::consts::LOG2_E), magic).sub(magic);
        let r = n.mul_add(Self::splat(-355.0 / 512.0), self);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(0.008_312_516);
        for c in [0.041_890_2, 0.166_671_14, 0.499_992_3, 1.0, 1.0] {
            p = p.mul_add(r, Self::splat(c));
        }
        p.times_power_of_two(n)
    }

    /// `e^self` for self ≤ 0, and exactly nothing where that is under 10⁻³⁰: for −∞, and where products with it would leave the
    /// normal numbers, which costs some processors a hundred cycles each.
    #[inline(always)]
    fn softmax_weight(self) -> Self {
        self.max(Self::splat(-87.0)).exp_in_range().sub(Self::splat(1e-30)).max(Self::zero())
    }

    /// `tanh(self) = 1 − 2 / (1 + e^(2·self))`; absolute error under 2⁻²².
    #[inline(always)]
    fn tanh(self) -> Self {
        let one = Self::splat(1.0);
        one.sub(Self::splat(2.0).div(self.add(self).exp().add(one)))
    }
}

#[inline(always)]
fn tree(lanes: &[f32; LANES], op: impl Fn(f32, f32) -> f32) -> f32 {
    let mut v = *lanes;
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            v[i] = op(v[i], v[i + width]);
        }
    }
    v[0]
}

#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, op: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| op(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const BLOCK_ROWS: usize = 1;
    const BLOCK_TOKENS: usize = 2;
    const QUERIES: usize = if cfg!(target_arch = "aarch64") { 6 } else { 2 };
    const VECTORS: usize = 1;

    #[inline(always)]
    fn zero() -> Self {
        Portable([0.0; LANES])
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Portable(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.mul(a).add(b)
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn splat_f16(bits: [u8; 2]) -> Self {
        Self::splat(f16::from_le_bytes(bits).to_f32())
    }
    #[inline(always)]
    fn load_f16(from: &[u16; LANES]) -> Self {
        Portable(from.map(|bits| f16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    fn load_bf16(from: &[u16; LANES]) -> Self {
        Portable(from.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u16; LANES]) {
        *to = self.0.map(|value| f16::from_f32(value).to_bits());
    }
    #[inline(always)]
    fn load_u8(from: &[u8; LANES]) -> Self {
        Portable(from.map(f32::from))
    }
    #[inline(always)]
    fn load_i8(from: &[u8; LANES]) -> Self {
        Portable(from.map(|byte| f32::from(byte as i8)))
    }
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        self.mul(Portable(n.0.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))))
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;

/// The sixteen-element array at `at`. Bounds are checked; the check vanishes where the caller's loop proves it.
#[inline(always)]
pub fn sixteen<T>(slice: &[T], at: usize) -> &[T; LANES] {
    slice[at..at + LANES].first_chunk().expect("a range of sixteen has sixteen elements")
}

/// As [`sixteen`], to write.
#[inline(always)]
pub fn sixteen_mut<T>(slice: &mut [T], at: usize) -> &mut [T; LANES] {
    slice[at..at + LANES].first_chunk_mut().expect("a range of sixteen has sixteen elements")
}
