//! GGML tensor types and their scalar decoders: the specification that every fast path is held against.
//!
//! The arithmetic is that of ggml's reference decoders, operation by operation (a product and a sum are two
//! roundings, never a fused one), so a decoded weight has the same bits everywhere. Block layouts are those of
//! `ggml-common.h`; all numbers are little-endian.

use half::{bf16, f16};

/// A GGML tensor type that Dormouse can compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

/// Values in a block of the simple quantisations (`Q4_0` to `Q8_0`, `IQ4_NL`, `MXFP4`).
const SMALL_BLOCK: usize = 32;
/// Values in a super-block of the K-quants and `IQ4_XS`.
const SUPER_BLOCK: usize = 256;

impl GgmlType {
    /// Every supported type, in the order of their GGUF numbers.
    pub const ALL: [GgmlType; 16] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
        GgmlType::Iq4Nl,
        GgmlType::Iq4Xs,
        GgmlType::BF16,
        GgmlType::Mxfp4,
    ];

    /// The type with this number in a GGUF tensor header, if Dormouse supports it.
    pub fn from_gguf(id: u32) -> Option<GgmlType> {
        GgmlType::ALL.into_iter().find(|ty| ty.gguf_id() == id)
    }

    /// The type's number in a GGUF tensor header.
    pub fn gguf_id(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
            GgmlType::Q2K => 10,
            GgmlType::Q3K => 11,
            GgmlType::Q4K => 12,
            GgmlType::Q5K => 13,
            GgmlType::Q6K => 14,
            GgmlType::Iq4Nl => 20,
            GgmlType::Iq4Xs => 23,
            GgmlType::BF16 => 30,
            GgmlType::Mxfp4 => 39,
        }
    }

    /// The type's name as llama.cpp writes it, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::BF16 => "BF16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
            GgmlType::Iq4Nl => "IQ4_NL",
            GgmlType::Iq4Xs => "IQ4_XS",
            GgmlType::Mxfp4 => "MXFP4",
        }
    }

    /// Values in one block (1 for the float types).
    #[inline]
    pub fn block_len(self) -> usize {
        use GgmlType::*;
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Iq4Nl | Mxfp4 => SMALL_BLOCK,
            Q2K | Q3K | Q4K | Q5K | Q6K | Iq4Xs => SUPER_BLOCK,
        }
    }

    /// Bytes of one block.
    #[inline]
    pub fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::BF16 => 2,
            GgmlType::Mxfp4 => 1 + 16,
            GgmlType::Q4_0 | GgmlType::Iq4Nl => 2 + 16,
            GgmlType::Q4_1 => 4 + 16,
            GgmlType::Q5_0 => 2 + 4 + 16,
            GgmlType::Q5_1 => 4 + 4 + 16,
            GgmlType::Q8_0 => 2 + 32,
            GgmlType::Q2K => 16 + 64 + 4,
            GgmlType::Q3K => 32 + 64 + 12 + 2,
            GgmlType::Q4K => 4 + 12 + 128,
            GgmlType::Q5K => 4 + 12 + 32 + 128,
            GgmlType::Q6K => 128 + 64 + 16 + 2,
            GgmlType::Iq4Xs => 2 + 2 + 4 + 128,
        }
    }

    /// Bytes of a row of `k` values; `k` is a multiple of [`GgmlType::block_len`].
    #[inline]
    pub fn row_bytes(self, k: usize) -> usize {
        debug_assert_eq!(k % self.block_len(), 0);
        k / self.block_len() * self.block_bytes()
    }
}

/// Decodes whole blocks of `ty` from `src` into `dst`.
///
/// `dst.len()` is a multiple of the block length and `src` holds exactly that many blocks.
pub fn dequantize(ty: GgmlType, src: &[u8], dst: &mut [f32]) {
    assert_eq!(dst.len() % ty.block_len(), 0, "{} decodes whole blocks", ty.name());
    assert_eq!(src.len(), ty.row_bytes(dst.len()), "{} source and destination differ in blocks", ty.name());
    match ty {
        GgmlType::F32 => {
            each::<4, 1>(src, dst, |block, out| out[0] = f32::from_le_bytes(*block));
        }
        GgmlType::F16 => {
            each::<2, 1>(src, dst, |block, out| out[0] = f16::from_le_bytes(*block).to_f32());
        }
        GgmlType::BF16 => {
            each::<2, 1>(src, dst, |block, out| out[0] = bf16::from_le_bytes(*block).to_f32());
        }
        GgmlType::Q4_0 => each(src, dst, decode_q4_0),
        GgmlType::Q4_1 => each(src, dst, decode_q4_1),
        GgmlType::Q5_0 => each(src, dst, decode_q5_0),
        GgmlType::Q5_1 => each(src, dst, decode_q5_1),
        GgmlType::Q8_0 => each(src, dst, decode_q8_0),
        GgmlType::Q2K => each(src, dst, decode_q2_k),
        GgmlType::Q3K => each(src, dst, decode_q3_k),
        GgmlType::Q4K => each(src, dst, decode_q4_k),
        GgmlType::Q5K => each(src, dst, decode_q5_k),
        GgmlType::Q6K => each(src, dst, decode_q6_k),
        GgmlType::Iq4Nl => each(src, dst, decode_iq4_nl),
        GgmlType::Iq4Xs => each(src, dst, decode_iq4_xs),
        GgmlType::Mxfp4 => each(src, dst, decode_mxfp4),
    }
}

/// Calls `decode` on each block of `BYTES` bytes and the `LEN` values it stands for.
#[inline]
fn each<const BYTES: usize, const LEN: usize>(
    src: &[u8],
    dst: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = src.as_chunks::<BYTES>();
    let (outputs, _) = dst.as_chunks_mut::<LEN>();
    for (block, output) in blocks.iter().zip(outputs) {
        decode(block, output);
    }
}

#[inline]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `[d: f16, quants: 16 bytes]`; value `j` is the low nibble of byte `j`, value `j + 16` its high nibble.
#[inline]
pub fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, &byte) in block[2..].iter().enumerate() {
        out[j] = ((byte & 0x0f) as i32 - 8) as f32 * d;
        out[j + 16] = ((byte >> 4) as i32 - 8) as f32 * d;
    }
}

/// `[d: f16, m: f16, quants: 16 bytes]`, nibbles as in `Q4_0`.
#[inline]
pub fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, &byte) in block[4..].iter().enumerate() {
        out[j] = (byte & 0x0f) as f32 * d + m;
        out[j + 16] = (byte >> 4) as f32 * d + m;
    }
}

/// The fifth bits of `Q5_0` and `Q5_1`: bit `j` of the word belongs to value `j`.
#[inline]
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// `[d: f16, fifth bits: u32, quants: 16 bytes]`.
#[inline]
pub fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (half_at(block, 0), fifth_bits(block, 2));
    for (j, &byte) in block[6..].iter().enumerate() {
        let low = (byte & 0x0f) as u32 | ((high >> j) & 1) << 4;
        let upper = (byte >> 4) as u32 | ((high >> (j + 16)) & 1) << 4;
        out[j] = (low as i32 - 16) as f32 * d;
        out[j + 16] = (upper as i32 - 16) as f32 * d;
    }
}

/// `[d: f16, m: f16, fifth bits: u32, quants: 16 bytes]`.
#[inline]
pub fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high) = (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
    for (j, &byte) in block[8..].iter().enumerate() {
        let low = (byte & 0x0f) as u32 | ((high >> j) & 1) << 4;
        let upper = (byte >> 4) as u32 | ((high >> (j + 16)) & 1) << 4;
        out[j] = low as f32 * d + m;
        out[j + 16] = upper as f32 * d + m;
    }
}

/// `[d: f16, quants: 32 signed bytes]`.
#[inline]
pub fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, &byte) in out.iter_mut().zip(&block[2..]) {
        *value = byte as i8 as f32 * d;
    }
}

/// `[scales: 16 bytes (scale low nibble, minimum high nibble), quants: 64 bytes, d: f16, dmin: f16]`.
///
/// Each 128 values share 32 bytes; the four 2-bit fields of a byte lie 32 values apart.
#[inline]
pub fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * (scales[group] & 0x0f) as f32;
        let minimum = dmin * (scales[group] >> 4) as f32;
        let (half, shift, first) = (group / 8, group % 8 / 2 * 2, group % 2 * 16);
        for (value, &byte) in values.iter_mut().zip(&quants[half * 32 + first..]) {
            *value = scale * ((byte >> shift) & 3) as f32 - minimum;
        }
    }
}

/// `[high bits: 32 bytes, quants: 64 bytes, scales: 12 bytes (sixteen 6-bit), d: f16]`.
///
/// Quants lie as in `Q2_K`; bit `n` of the high-bit bytes, when clear, subtracts 4 in the `n`th run of 32 values.
#[inline]
pub fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (high, quants, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low_bits = if group < 8 { scales[group] & 0x0f } else { scales[group - 8] >> 4 };
        let high_bits = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        let scale = d * ((low_bits | high_bits << 4) as i32 - 32) as f32;
        let (half, shift, first) = (group / 8, group % 8 / 2 * 2, group % 2 * 16);
        let bit = 1u8 << (group / 2);
        for (l, value) in values.iter_mut().enumerate() {
            let low = ((quants[half * 32 + first + l] >> shift) & 3) as i32;
            let offset = if high[first + l] & bit == 0 { 4 } else { 0 };
            *value = scale * (low - offset) as f32;
        }
    }
}

/// The 6-bit scale and minimum of sub-block `j` (0 to 7) in the 12 packed bytes of `Q4_K` and `Q5_K`.
#[inline]
pub fn scale_min_k4(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let scale = (scales[j + 4] & 0x0f) | (scales[j - 4] >> 6) << 4;
        let minimum = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4;
        (scale, minimum)
    }
}

/// `[d: f16, dmin: f16, scales and minimums: 12 bytes, quants: 128 bytes]`.
///
/// Each run of 64 values shares 32 bytes: low nibbles first, then high nibbles.
#[inline]
pub fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, quants) = (&block[4..16], &block[16..]);
    for (j, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_min_k4(scales, j);
        let (scale, minimum) = (d * scale as f32, dmin * minimum as f32);
        let shift = j % 2 * 4;
        for (value, &byte) in values.iter_mut().zip(&quants[j / 2 * 32..]) {
            *value = scale * ((byte >> shift) & 0x0f) as f32 - minimum;
        }
    }
}

/// `[d: f16, dmin: f16, scales and minimums: 12 bytes, fifth bits: 32 bytes, quants: 128 bytes]`.
///
/// Quants lie as in `Q4_K`; bit `j` of the fifth-bit bytes belongs to the `j`th run of 32 values.
#[inline]
pub fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, high, quants) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_min_k4(scales, j);
        let (scale, minimum) = (d * scale as f32, dmin * minimum as f32);
        let shift = j % 2 * 4;
        for (l, value) in values.iter_mut().enumerate() {
            let quant = (quants[j / 2 * 32 + l] >> shift) & 0x0f | ((high[l] >> j) & 1) << 4;
            *value = scale * quant as f32 - minimum;
        }
    }
}

/// `[low nibbles: 128 bytes, high bit pairs: 64 bytes, scales: 16 signed bytes, d: f16]`.
///
/// Each 128 values share 64 low bytes and 32 high bytes; a byte's fields lie 32 (or 64) values apart.
#[inline]
pub fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * scales[group] as i8 as f32;
        let (half, run, first) = (group / 8, group % 8 / 2, group % 2 * 16);
        let (low_shift, low_start) = (run / 2 * 4, half * 64 + run % 2 * 32 + first);
        let high_start = half * 32 + first;
        for (l, value) in values.iter_mut().enumerate() {
            let nibble = (low[low_start + l] >> low_shift) & 0x0f;
            let pair = (high[high_start + l] >> (run * 2)) & 3;
            *value = scale * ((nibble | pair << 4) as i32 - 32) as f32;
        }
    }
}

/// The sixteen levels of `IQ4_NL` and `IQ4_XS`.
pub const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `[d: f16, indices: 16 bytes]`, nibbles as in `Q4_0`.
#[inline]
pub fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, &byte) in block[2..].iter().enumerate() {
        out[j] = d * IQ4_LEVELS[(byte & 0x0f) as usize] as f32;
        out[j + 16] = d * IQ4_LEVELS[(byte >> 4) as usize] as f32;
    }
}

/// `[d: f16, high scale bits: u16, low scale nibbles: 4 bytes, indices: 128 bytes]`, runs of 32 as in `IQ4_NL`.
#[inline]
pub fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let scales_high = u16::from_le_bytes([block[2], block[3]]);
    let (scales_low, indices) = (&block[4..8], &block[8..]);
    for (run, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low_bits = (scales_low[run / 2] >> (run % 2 * 4)) & 0x0f;
        let high_bits = ((scales_high >> (run * 2)) & 3) as u8;
        let scale = d * ((low_bits | high_bits << 4) as i32 - 32) as f32;
        for (j, &byte) in indices[run * 16..][..16].iter().enumerate() {
            values[j] = scale * IQ4_LEVELS[(byte & 0x0f) as usize] as f32;
            values[j + 16] = scale * IQ4_LEVELS[(byte >> 4) as usize] as f32;
        }
    }
}

/// Twice the sixteen values of the FP4 format E2M1, so that they are whole numbers.
pub const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of the power of two that an E8M0 exponent byte stands for: `2^(exponent - 128)`.
#[inline]
pub fn half_e8m0(exponent: u8) -> f32 {
    // The two smallest results are subnormal, below the reach of f32's own exponent field.
    let bits = match exponent {
        0 | 1 => 0x0020_0000 << exponent,
        _ => (exponent as u32 - 1) << 23,
    };
    f32::from_bits(bits)
}

/// `[exponent: E8M0, indices: 16 bytes]`, nibbles as in `Q4_0`.
#[inline]
pub fn decode_mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    let d = half_e8m0(block[0]);
    for (j, &byte) in block[1..].iter().enumerate() {
        out[j] = MXFP4_LEVELS[(byte & 0x0f) as usize] as f32 * d;
        out[j + 16] = MXFP4_LEVELS[(byte >> 4) as usize] as f32 * d;
    }
}
