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

    fn zero() -> Self;
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// `self * a + b`: fused where the tier has it, else rounded twice.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// All lanes the half-precision number with these bits.
    fn splat_f16(bits: [u8; 2]) -> Self;
    fn load_f16(from: &[u16; LANES]) -> Self;
    fn load_bf16(from: &[u16; LANES]) -> Self;
    fn load_u8(from: &[u8; LANES]) -> Self;
    fn load_i8(from: &[u8; LANES]) -> Self;
    /// `2^self` for integral lanes in −126..=127.
    fn exp2_integral(self) -> Self;

    /// The sixteen lanes added as a fixed tree: halves, quarters, eighths, pairs.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        tree(&lanes, |a, b| a + b)
    }

    /// [`Lanes::sum`] of four at once, the same bits.
    #[inline(always)]
    fn sum4(four: [Self; 4]) -> [f32; 4] {
        [four[0].sum(), four[1].sum(), four[2].sum(), four[3].sum()]
    }

    /// The largest lane.
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        tree(&lanes, f32::max)
    }

    /// `e^self`; relative error under 2⁻²¹ for −87 ≤ x ≤ 88, and as at those ends outside.
    ///
    /// Cody-Waite reduction to |r| ≤ ln 2 / 2 and a degree-6 Taylor polynomial of e^r.
    #[inline(always)]
    fn exp(self) -> Self {
        let clamped_below = self.max(Self::splat(-87.0));
        let x = Self::zero().sub(Self::zero().sub(clamped_below).max(Self::splat(-88.0)));
        // Adding and taking away 1.5 · 2²³ rounds to the nearest integer without an instruction for it.
        let magic = Self::splat(12_582_912.0);
        let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).add(magic).sub(magic);
        let r = n.mul_add(Self::splat(-355.0 / 512.0), x);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.mul_add(r, Self::splat(c));
        }
        p.mul(n.exp2_integral())
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
    fn load_u8(from: &[u8; LANES]) -> Self {
        Portable(from.map(f32::from))
    }
    #[inline(always)]
    fn load_i8(from: &[u8; LANES]) -> Self {
        Portable(from.map(|byte| f32::from(byte as i8)))
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        Portable(self.0.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY, for every block below: the intrinsics need the tier's instructions, which `dispatch!` guarantees, and
    // the loads and stores stay inside the sixteen-element arrays they are given.
    macro_rules! intrinsic {
        ($($body:tt)*) => {
            // SAFETY: see above.
            unsafe { $($body)* }
        };
    }

    impl Lanes for Avx2 {
        const BLOCK_ROWS: usize = 2;
        const BLOCK_TOKENS: usize = 2;

        #[inline(always)]
        fn zero() -> Self {
            Self::splat(0.0)
        }
        #[inline(always)]
        fn splat(value: f32) -> Self {
            intrinsic!(Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)))
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            intrinsic!(Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))))
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            intrinsic! {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            intrinsic!(Avx2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)))
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            intrinsic!(Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)))
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            intrinsic!(Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)))
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            intrinsic!(Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)))
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            intrinsic!(Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)))
        }
        #[inline(always)]
        fn splat_f16(bits: [u8; 2]) -> Self {
            // Spread first, then widened: a move into one lane would wait for what that register held before.
            let bits = i16::from_le_bytes(bits);
            let wide = intrinsic!(_mm256_cvtph_ps(_mm_set1_epi16(bits)));
            Avx2(wide, wide)
        }
        #[inline(always)]
        fn load_f16(from: &[u16; LANES]) -> Self {
            intrinsic! {
                let p = from.as_ptr().cast::<__m128i>();
                Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))))
            }
        }
        #[inline(always)]
        fn load_bf16(from: &[u16; LANES]) -> Self {
            intrinsic! {
                let p = from.as_ptr().cast::<__m128i>();
                let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)));
                let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(1))));
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
        #[inline(always)]
        fn load_u8(from: &[u8; LANES]) -> Self {
            intrinsic! {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                let low = _mm256_cvtepu8_epi32(bytes);
                let high = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes));
                Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }
        #[inline(always)]
        fn load_i8(from: &[u8; LANES]) -> Self {
            intrinsic! {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                let low = _mm256_cvtepi8_epi32(bytes);
                let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes));
                Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }
        #[inline(always)]
        fn exp2_integral(self) -> Self {
            intrinsic! {
                let bias = _mm256_set1_epi32(127);
                let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(self.0), bias));
                let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(self.1), bias));
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
    }

    impl Lanes for Avx512 {
        const BLOCK_ROWS: usize = 4;
        const BLOCK_TOKENS: usize = 6;

        #[inline(always)]
        fn zero() -> Self {
            Self::splat(0.0)
        }
        #[inline(always)]
        fn splat(value: f32) -> Self {
            intrinsic!(Avx512(_mm512_set1_ps(value)))
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            intrinsic!(Avx512(_mm512_loadu_ps(from.as_ptr())))
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), self.0))
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            intrinsic!(Avx512(_mm512_fmadd_ps(self.0, a.0, b.0)))
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            intrinsic!(Avx512(_mm512_add_ps(self.0, other.0)))
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            intrinsic!(Avx512(_mm512_sub_ps(self.0, other.0)))
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            intrinsic!(Avx512(_mm512_mul_ps(self.0, other.0)))
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            intrinsic!(Avx512(_mm512_max_ps(self.0, other.0)))
        }
        #[inline(always)]
        fn splat_f16(bits: [u8; 2]) -> Self {
            // Spread first, then widened: a move into one lane would wait for what that register held before.
            let bits = i16::from_le_bytes(bits);
            intrinsic!(Avx512(_mm512_cvtph_ps(_mm256_set1_epi16(bits))))
        }
        #[inline(always)]
        fn load_f16(from: &[u16; LANES]) -> Self {
            intrinsic!(Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))))
        }
        #[inline(always)]
        fn load_bf16(from: &[u16; LANES]) -> Self {
            intrinsic! {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        fn load_u8(from: &[u8; LANES]) -> Self {
            intrinsic! {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                Avx512(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)))
            }
        }
        #[inline(always)]
        fn load_i8(from: &[u8; LANES]) -> Self {
            intrinsic! {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
            }
        }
        #[inline(always)]
        fn exp2_integral(self) -> Self {
            intrinsic!(Avx512(_mm512_scalef_ps(_mm512_set1_ps(1.0), self.0)))
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            intrinsic! {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), high);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        fn sum4(four: [Self; 4]) -> [f32; 4] {
            let mut sums = [0.0; 4];
            intrinsic! {
                // Each step of the tree is one addition for two or four of the sums.
                let [a, b, c, d] = four;
                let a = _mm256_add_ps(_mm512_castps512_ps256(a.0), _mm512_extractf32x8_ps::<1>(a.0));
                let b = _mm256_add_ps(_mm512_castps512_ps256(b.0), _mm512_extractf32x8_ps::<1>(b.0));
                let c = _mm256_add_ps(_mm512_castps512_ps256(c.0), _mm512_extractf32x8_ps::<1>(c.0));
                let d = _mm256_add_ps(_mm512_castps512_ps256(d.0), _mm512_extractf32x8_ps::<1>(d.0));
                let ab = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
                let cd = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(c, d), _mm256_permute2f128_ps::<0x31>(c, d));
                let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
                let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                let two = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
                // Lanes 0, 2, 4 and 6 now hold a, c, b and d.
                let one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
                let order = _mm256_setr_epi32(0, 4, 2, 6, 0, 0, 0, 0);
                let ordered = _mm256_permutevar8x32_ps(one, order);
                _mm_storeu_ps(sums.as_mut_ptr(), _mm256_castps256_ps128(ordered));
            }
            sums
        }
    }
}

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
