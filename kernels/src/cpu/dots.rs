//! Sixteen integer dot products at a time: unsigned codes of weights with signed bytes of activations.
//!
//! The unit is [`Dots::Bytes`], 64 bytes that hold four columns of sixteen rows. Sums are exact integers, so tiers differ in
//! speed only. Methods are called only inside functions compiled for their tier, and never in closures (see [`super::lanes`]).

use super::lanes::{LANES, Lanes, Portable};

/// One tier's integer dot products.
pub trait Dots {
    /// The tier's f32 lanes.
    type F: Lanes;
    /// 64 bytes.
    type Bytes: Copy;
    /// Tokens of the widest register block of a product with packed weights and one plane of quants.
    const TOKENS: usize;

    fn load(from: &[u8; 64]) -> Self::Bytes;
    /// Each byte's bits `shift ..` that `mask` keeps; `mask << shift` must fit a byte.
    fn field(bytes: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;
    /// Each byte's lowest bits, those `mask` keeps, moved up by `shift`, or'ed into `onto`.
    fn raise(bytes: Self::Bytes, shift: u32, mask: u8, onto: Self::Bytes) -> Self::Bytes;
    /// Each byte, 0 to 15, replaced by its entry.
    fn look_up(levels: &[u8; 16], bytes: Self::Bytes) -> Self::Bytes;
    /// For each of sixteen rows `Σ codes · quants` over `N` groups of four columns, as exact f32 numbers. Codes have
    /// `bits` bits or come from a table (8 bits); quants are any bytes; `N ≤ 8` keeps every sum below 2²⁴.
    fn dot<const N: usize>(codes: &[Self::Bytes], quants: &[i8], bits: usize) -> Self::F;
    /// Rounds to the nearest integer, ties to even, and stores its bytes: one plane of values in −127..=127, or two, 256 · high +
    /// low, of values in ±32,512. Returns the sum.
    fn store_rounded<const P: usize>(values: Self::F, to: &mut [[i8; LANES]; P]) -> i32;
}

pub struct PortableDots;

impl Dots for PortableDots {
    type F = Portable;
    type Bytes = [u8; 64];
    const TOKENS: usize = 2;

    #[inline(always)]
    fn load(from: &[u8; 64]) -> [u8; 64] {
        *from
    }
    #[inline(always)]
    fn field(bytes: [u8; 64], shift: u32, mask: u8) -> [u8; 64] {
        bytes.map(|byte| (byte >> shift) & mask)
    }
    #[inline(always)]
    fn raise(bytes: [u8; 64], shift: u32, mask: u8, onto: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| onto[i] | (bytes[i] & mask) << shift)
    }
    #[inline(always)]
    fn look_up(levels: &[u8; 16], bytes: [u8; 64]) -> [u8; 64] {
        bytes.map(|byte| levels[usize::from(byte & 15)])
    }
    #[inline(always)]
    fn dot<const N: usize>(codes: &[[u8; 64]], quants: &[i8], _bits: usize) -> Portable {
        let mut sums = [0i32; LANES];
        for four in 0..N {
            for column in 0..4 {
                let quant = i32::from(quants[4 * four + column]);
                for row in 0..LANES {
                    sums[row] += i32::from(codes[four][4 * row + column]) * quant;
                }
            }
        }
        Portable::load(&sums.map(|sum| sum as f32))
    }
    #[inline(always)]
    fn store_rounded<const P: usize>(values: Portable, to: &mut [[i8; LANES]; P]) -> i32 {
        let mut lanes = [0.0f32; LANES];
        values.store(&mut lanes);
        let integers = lanes.map(|value| value.round_ties_even() as i32);
        for lane in 0..LANES {
            let high = if P == 1 { integers[lane] } else { (integers[lane] + 128) >> 8 };
            to[0][lane] = high as i8;
            if P == 2 {
                to[1][lane] = (integers[lane] - 256 * high) as i8;
            }
        }
        integers.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2Dots, Avx512Dots, Avx512VnniDots, AvxVnniDots};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Dots, LANES};
    use crate::cpu::lanes::{Avx2, Avx512};

    /// Four quants as one little-endian word, to spread over all rows.
    #[inline(always)]
    fn word(quants: &[i8], four: usize) -> i32 {
        let q = &quants[4 * four..4 * four + 4];
        i32::from_le_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8])
    }

    /// Sums of products of a code of `bits` bits and a quant that fit an i16: `n · 2 · (2^bits − 1) · 128 < 2¹⁵`.
    const fn sums_in_i16(bits: usize) -> usize {
        match bits {
            ..=4 => 8,
            5 => 4,
            6 => 2,
            _ => 0,
        }
    }

    // SAFETY, for every block below: the intrinsics need the tier's instructions, which `dispatch_dots!` guarantees, and
    // the loads and stores stay inside the arrays they are given.
    macro_rules! intrinsic {
        ($($body:tt)*) => {
            // SAFETY: see above.
            unsafe { $($body)* }
        };
    }

    /// What all AVX2 tiers share: the two halves are rows 0 to 7 and 8 to 15.
    macro_rules! avx2_bytes {
        () => {
            type F = Avx2;
            type Bytes = (__m256i, __m256i);
            const TOKENS: usize = 4;

            #[inline(always)]
            fn load(from: &[u8; 64]) -> Self::Bytes {
                intrinsic! {
                    let p = from.as_ptr().cast::<__m256i>();
                    (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)))
                }
            }
            #[inline(always)]
            fn field(bytes: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes {
                intrinsic! {
                    let (count, mask) = (_mm_cvtsi32_si128(shift as i32), _mm256_set1_epi8(mask as i8));
                    (
                        _mm256_and_si256(_mm256_srl_epi16(bytes.0, count), mask),
                        _mm256_and_si256(_mm256_srl_epi16(bytes.1, count), mask),
                    )
                }
            }
            #[inline(always)]
            fn raise(bytes: Self::Bytes, shift: u32, mask: u8, onto: Self::Bytes) -> Self::Bytes {
                intrinsic! {
                    let (count, mask) = (_mm_cvtsi32_si128(shift as i32), _mm256_set1_epi8((mask << shift) as i8));
                    (
                        _mm256_or_si256(_mm256_and_si256(_mm256_sll_epi16(bytes.0, count), mask), onto.0),
                        _mm256_or_si256(_mm256_and_si256(_mm256_sll_epi16(bytes.1, count), mask), onto.1),
                    )
                }
            }
            #[inline(always)]
            fn look_up(levels: &[u8; 16], bytes: Self::Bytes) -> Self::Bytes {
                intrinsic! {
                    let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.as_ptr().cast()));
                    (_mm256_shuffle_epi8(table, bytes.0), _mm256_shuffle_epi8(table, bytes.1))
                }
            }
            #[inline(always)]
            fn store_rounded<const P: usize>(values: Avx2, to: &mut [[i8; LANES]; P]) -> i32 {
                intrinsic! {
                    let (low, high) = (_mm256_cvtps_epi32(values.0), _mm256_cvtps_epi32(values.1));
                    let words = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(low, high));
                    let upper = match P {
                        1 => words,
                        _ => _mm256_srai_epi16::<8>(_mm256_add_epi16(words, _mm256_set1_epi16(128))),
                    };
                    store_bytes(upper, &mut to[0]);
                    if P == 2 {
                        store_bytes(_mm256_sub_epi16(words, _mm256_slli_epi16::<8>(upper)), &mut to[1]);
                    }
                    sum8(_mm256_madd_epi16(words, _mm256_set1_epi16(1)))
                }
            }
        };
    }

    /// Sixteen i16 that fit a byte.
    #[inline(always)]
    fn store_bytes(words: __m256i, to: &mut [i8; LANES]) {
        intrinsic! {
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn sum8(values: __m256i) -> i32 {
        intrinsic! {
            let four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256::<1>(values));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0x4e>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0xb1>(two)))
        }
    }

    /// AVX2: pairs of products are added in i16, as many pairs as fit, then widened.
    pub struct Avx2Dots;

    /// Eight rows.
    #[inline(always)]
    fn avx2_dot<const N: usize>(codes: [__m256i; N], quants: &[i8], bits: usize) -> __m256i {
        intrinsic! {
            let ones = _mm256_set1_epi16(1);
            let mut sum = _mm256_setzero_si256();
            if sums_in_i16(bits) == 0 {
                // Codes of eight bits: their low and their high nibbles, each as codes of four bits.
                let fifteen = _mm256_set1_epi8(15);
                let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                for four in 0..N {
                    let quants = _mm256_set1_epi32(word(quants, four));
                    let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(codes[four]), fifteen);
                    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(codes[four], fifteen), quants));
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper, quants));
                }
                let high = _mm256_madd_epi16(high, _mm256_set1_epi16(16));
                return _mm256_add_epi32(_mm256_madd_epi16(low, ones), high);
            }
            let mut some = _mm256_setzero_si256();
            for four in 0..N {
                let products = _mm256_maddubs_epi16(codes[four], _mm256_set1_epi32(word(quants, four)));
                some = _mm256_add_epi16(some, products);
                if (four + 1) % sums_in_i16(bits) == 0 || four + 1 == N {
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(some, ones));
                    some = _mm256_setzero_si256();
                }
            }
            sum
        }
    }

    impl Dots for Avx2Dots {
        avx2_bytes!();

        #[inline(always)]
        fn dot<const N: usize>(codes: &[Self::Bytes], quants: &[i8], bits: usize) -> Avx2 {
            let (mut low, mut high) =
                (intrinsic!([_mm256_setzero_si256(); N]), intrinsic!([_mm256_setzero_si256(); N]));
            for four in 0..N {
                (low[four], high[four]) = codes[four];
            }
            let (low, high) = (avx2_dot::<N>(low, quants, bits), avx2_dot::<N>(high, quants, bits));
            intrinsic!(Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)))
        }
    }

    /// AVX2 with the VEX form of VNNI.
    pub struct AvxVnniDots;

    impl Dots for AvxVnniDots {
        avx2_bytes!();

        #[inline(always)]
        fn dot<const N: usize>(codes: &[Self::Bytes], quants: &[i8], _bits: usize) -> Avx2 {
            intrinsic! {
                let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                for four in 0..N {
                    let quants = _mm256_set1_epi32(word(quants, four));
                    low = _mm256_dpbusd_avx_epi32(low, codes[four].0, quants);
                    high = _mm256_dpbusd_avx_epi32(high, codes[four].1, quants);
                }
                Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }
    }

    /// What both AVX-512 tiers share.
    macro_rules! avx512_bytes {
        () => {
            type F = Avx512;
            type Bytes = __m512i;
            const TOKENS: usize = 8;

            #[inline(always)]
            fn load(from: &[u8; 64]) -> __m512i {
                intrinsic!(_mm512_loadu_si512(from.as_ptr().cast()))
            }
            #[inline(always)]
            fn field(bytes: __m512i, shift: u32, mask: u8) -> __m512i {
                intrinsic! {
                    let shifted = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
                    _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
                }
            }
            #[inline(always)]
            fn raise(bytes: __m512i, shift: u32, mask: u8, onto: __m512i) -> __m512i {
                intrinsic! {
                    let shifted = _mm512_sll_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
                    _mm512_or_si512(_mm512_and_si512(shifted, _mm512_set1_epi8((mask << shift) as i8)), onto)
                }
            }
            #[inline(always)]
            fn look_up(levels: &[u8; 16], bytes: __m512i) -> __m512i {
                intrinsic! {
                    let table = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.as_ptr().cast()));
                    _mm512_shuffle_epi8(table, bytes)
                }
            }
            #[inline(always)]
            fn store_rounded<const P: usize>(values: Avx512, to: &mut [[i8; LANES]; P]) -> i32 {
                intrinsic! {
                    let integers = _mm512_cvtps_epi32(values.0);
                    let upper = match P {
                        1 => integers,
                        _ => _mm512_srai_epi32::<8>(_mm512_add_epi32(integers, _mm512_set1_epi32(128))),
                    };
                    _mm_storeu_si128(to[0].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(upper));
                    if P == 2 {
                        let lower = _mm512_sub_epi32(integers, _mm512_slli_epi32::<8>(upper));
                        _mm_storeu_si128(to[1].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(lower));
                    }
                    let high = _mm512_extracti64x4_epi64::<1>(integers);
                    sum8(_mm256_add_epi32(_mm512_castsi512_si256(integers), high))
                }
            }
        };
    }

    /// AVX-512 without VNNI: as [`Avx2Dots`], sixteen rows at once.
    pub struct Avx512Dots;

    impl Dots for Avx512Dots {
        avx512_bytes!();

        #[inline(always)]
        fn dot<const N: usize>(codes: &[__m512i], quants: &[i8], bits: usize) -> Avx512 {
            intrinsic! {
                let ones = _mm512_set1_epi16(1);
                if sums_in_i16(bits) == 0 {
                    let fifteen = _mm512_set1_epi8(15);
                    let (mut low, mut high) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                    for four in 0..N {
                        let quants = _mm512_set1_epi32(word(quants, four));
                        let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(codes[four]), fifteen);
                        let lower = _mm512_and_si512(codes[four], fifteen);
                        low = _mm512_add_epi16(low, _mm512_maddubs_epi16(lower, quants));
                        high = _mm512_add_epi16(high, _mm512_maddubs_epi16(upper, quants));
                    }
                    let high = _mm512_madd_epi16(high, _mm512_set1_epi16(16));
                    return Avx512(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_madd_epi16(low, ones), high)));
                }
                let (mut sum, mut some) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                for four in 0..N {
                    let products = _mm512_maddubs_epi16(codes[four], _mm512_set1_epi32(word(quants, four)));
                    some = _mm512_add_epi16(some, products);
                    if (four + 1) % sums_in_i16(bits) == 0 || four + 1 == N {
                        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(some, ones));
                        some = _mm512_setzero_si512();
                    }
                }
                Avx512(_mm512_cvtepi32_ps(sum))
            }
        }
    }

    /// AVX-512 with VNNI: one instruction for four columns of sixteen rows.
    pub struct Avx512VnniDots;

    impl Dots for Avx512VnniDots {
        avx512_bytes!();

        #[inline(always)]
        fn dot<const N: usize>(codes: &[__m512i], quants: &[i8], _bits: usize) -> Avx512 {
            intrinsic! {
                let mut sum = _mm512_setzero_si512();
                for four in 0..N {
                    sum = _mm512_dpbusd_epi32(sum, codes[four], _mm512_set1_epi32(word(quants, four)));
                }
                Avx512(_mm512_cvtepi32_ps(sum))
            }
        }
    }
}
