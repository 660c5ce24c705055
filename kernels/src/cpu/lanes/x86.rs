//! The lanes of AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::{LANES, Lanes};

#[derive(Clone, Copy)]
pub struct Avx2(pub __m256, pub __m256);

#[derive(Clone, Copy)]
pub struct Avx512(pub __m512);

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
    const QUERIES: usize = 6;
    const VECTORS: usize = 1;

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
    fn div(self, other: Self) -> Self {
        intrinsic!(Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)))
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
    fn store_f16(self, to: &mut [u16; LANES]) {
        intrinsic! {
            let p = to.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(p, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(p.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
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
    fn times_power_of_two(self, n: Self) -> Self {
        intrinsic! {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias));
            self.mul(Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)))
        }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        intrinsic! {
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsic! {
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

impl Lanes for Avx512 {
    const BLOCK_ROWS: usize = 4;
    const BLOCK_TOKENS: usize = 6;
    const QUERIES: usize = 6;
    const VECTORS: usize = 4;

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
    fn div(self, other: Self) -> Self {
        intrinsic!(Avx512(_mm512_div_ps(self.0, other.0)))
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
    fn store_f16(self, to: &mut [u16; LANES]) {
        intrinsic! {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
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
    fn times_power_of_two(self, n: Self) -> Self {
        intrinsic!(Avx512(_mm512_scalef_ps(self.0, n.0)))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        intrinsic! {
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            let eight = _mm256_max_ps(_mm512_castps512_ps256(self.0), high);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
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
}
