//! Rows of weights decoded to f32, sixteen lanes at a time. Equal bit for bit to [`crate::quant::dequantize`].

use half::f16;

use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use crate::GgmlType;
use crate::quant::dequantize;

/// Decodes whole blocks of `ty` from `src` into `dst`.
#[inline(always)]
pub fn decode_row<L: Lanes>(ty: GgmlType, src: &[u8], dst: &mut [f32]) {
    debug_assert_eq!(src.len(), ty.row_bytes(dst.len()));
    macro_rules! pairs {
        ($bytes:literal, $decode:ident) => {
            for (block, out) in src.as_chunks::<$bytes>().0.iter().zip(dst.as_chunks_mut::<32>().0) {
                let (first, second) = $decode::<L>(block);
                put(first, out, 0);
                put(second, out, 16);
            }
        };
    }
    macro_rules! blocks {
        ($bytes:literal, $decode:ident) => {
            for (block, out) in src.as_chunks::<$bytes>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                $decode::<L>(block, out);
            }
        };
    }
    match ty {
        GgmlType::F16 => f16_row::<L>(src, dst),
        GgmlType::BF16 => bf16_row::<L>(src, dst),
        GgmlType::Q4_0 => pairs!(18, q4_0),
        GgmlType::Q4_1 => pairs!(20, q4_1),
        GgmlType::Q5_0 => pairs!(22, q5_0),
        GgmlType::Q8_0 => pairs!(34, q8_0),
        GgmlType::Q4K => blocks!(144, q4_k),
        GgmlType::Q6K => blocks!(210, q6_k),
        other => dequantize(other, src, dst),
    }
}

#[inline(always)]
fn f16_row<L: Lanes>(src: &[u8], dst: &mut [f32]) {
    let (vectors, rest) = src.as_chunks::<32>();
    let (outs, out_rest) = dst.as_chunks_mut::<LANES>();
    for (bytes, out) in vectors.iter().zip(outs) {
        L::load_f16(&words(bytes)).store(out);
    }
    for (bytes, out) in rest.as_chunks::<2>().0.iter().zip(out_rest) {
        *out = f16::from_le_bytes(*bytes).to_f32();
    }
}

#[inline(always)]
fn bf16_row<L: Lanes>(src: &[u8], dst: &mut [f32]) {
    let (vectors, rest) = src.as_chunks::<32>();
    let (outs, out_rest) = dst.as_chunks_mut::<LANES>();
    for (bytes, out) in vectors.iter().zip(outs) {
        L::load_bf16(&words(bytes)).store(out);
    }
    for (bytes, out) in rest.as_chunks::<2>().0.iter().zip(out_rest) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

#[inline(always)]
fn words(bytes: &[u8; 32]) -> [u16; LANES] {
    std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
}

#[inline(always)]
fn q4_0<L: Lanes>(block: &[u8; 18]) -> (L, L) {
    let d = L::splat_f16([block[0], block[1]]);
    let (low, high) = nibbles(&block[2..]);
    let eight = L::splat(8.0);
    (L::load_u8(&low).sub(eight).mul(d), L::load_u8(&high).sub(eight).mul(d))
}

#[inline(always)]
fn q4_1<L: Lanes>(block: &[u8; 20]) -> (L, L) {
    let (d, m) = (L::splat_f16([block[0], block[1]]), L::splat_f16([block[2], block[3]]));
    let (low, high) = nibbles(&block[4..]);
    (L::load_u8(&low).mul(d).add(m), L::load_u8(&high).mul(d).add(m))
}

#[inline(always)]
fn q5_0<L: Lanes>(block: &[u8; 22]) -> (L, L) {
    let d = L::splat_f16([block[0], block[1]]);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let (mut low, mut high) = nibbles(&block[6..]);
    for i in 0..LANES {
        low[i] |= (((fifth >> i) & 1) << 4) as u8;
        high[i] |= (((fifth >> (i + 16)) & 1) << 4) as u8;
    }
    let sixteen = L::splat(16.0);
    (L::load_u8(&low).sub(sixteen).mul(d), L::load_u8(&high).sub(sixteen).mul(d))
}

#[inline(always)]
fn q8_0<L: Lanes>(block: &[u8; 34]) -> (L, L) {
    let d = L::splat_f16([block[0], block[1]]);
    (L::load_i8(first16(&block[2..])).mul(d), L::load_i8(first16(&block[18..])).mul(d))
}

#[inline(always)]
fn q4_k<L: Lanes>(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for pair in 0..4 {
        let quants = &block[16 + pair * 32..][..32];
        for half in 0..2 {
            let (scale, min) = scale_min(2 * pair + half, &block[4..16]);
            let (d, m) = (L::splat(d * f32::from(scale)), L::splat(dmin * f32::from(min)));
            for part in 0..2 {
                let (low, high) = nibbles(&quants[part * 16..]);
                let q = if half == 0 { low } else { high };
                put(L::load_u8(&q).mul(d).sub(m), out, pair * 64 + half * 32 + part * 16);
            }
        }
    }
}

#[inline(always)]
fn q6_k<L: Lanes>(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for half in 0..2 {
        let (low, high) = (&block[half * 64..], &block[128 + half * 32..]);
        let scales = &block[192 + half * 8..];
        for quarter in 0..4 {
            for part in 0..2 {
                let l = first16(&low[(quarter % 2) * 32 + part * 16..]);
                let h = first16(&high[part * 16..]);
                let q: [u8; LANES] = std::array::from_fn(|i| {
                    ((l[i] >> (4 * (quarter / 2))) & 15) | (((h[i] >> (2 * quarter)) & 3) << 4)
                });
                let scale = d * f32::from(scales[quarter * 2 + part] as i8);
                let values = L::load_u8(&q).sub(L::splat(32.0)).mul(L::splat(scale));
                put(values, out, half * 128 + quarter * 32 + part * 16);
            }
        }
    }
}

#[inline(always)]
fn put<L: Lanes, const N: usize>(values: L, out: &mut [f32; N], at: usize) {
    values.store(sixteen_mut(out, at));
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[inline(always)]
fn first16(bytes: &[u8]) -> &[u8; LANES] {
    sixteen(bytes, 0)
}

/// Low and high halves of the first sixteen bytes.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> ([u8; LANES], [u8; LANES]) {
    let bytes = first16(bytes);
    (bytes.map(|byte| byte & 15), bytes.map(|byte| byte >> 4))
}

/// The 6-bit scale and minimum of sub-block `j` of a Q4_K or Q5_K block.
#[inline(always)]
fn scale_min(j: usize, scales: &[u8]) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        ((low & 15) | ((scales[j - 4] >> 6) << 4), (low >> 4) | ((scales[j] >> 6) << 4))
    }
}
