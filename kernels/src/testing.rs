//! What several modules' tests are made of.

use crate::GgmlType;

/// A small deterministic generator: tests need spread-out bits, not randomness.
pub fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Random blocks with sane scales: every scale field is overwritten with a small number.
pub fn weights(ty: GgmlType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let bytes = values(rows * ty.row_bytes(cols), seed);
    let mut bytes: Vec<u8> = bytes.iter().map(|v| ((v + 1.0) * 127.9) as u8).collect();
    let scales = values(bytes.len() / ty.block_bytes() * 2, seed + 1);
    for (block, scales) in bytes.chunks_mut(ty.block_bytes()).zip(scales.as_chunks::<2>().0) {
        let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
        let fields: &[usize] = match ty {
            GgmlType::F32 => {
                block.copy_from_slice(&scales[0].to_le_bytes());
                &[]
            }
            GgmlType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(scales[0]).to_le_bytes());
                &[]
            }
            GgmlType::Mxfp4 => {
                block[0] = 120 + block[0] % 8;
                &[]
            }
            GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::Iq4Nl | GgmlType::Iq4Xs => &[0],
            GgmlType::F16 => &[0],
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
            GgmlType::Q2K => &[80, 82],
            GgmlType::Q3K => &[108],
            GgmlType::Q6K => &[208],
        };
        for (at, scale) in fields.iter().zip(scales) {
            block[*at..at + 2].copy_from_slice(&half(scale * 0.05));
        }
    }
    bytes
}

/// The same weights as products take them: packed, unless their type is a float.
pub fn packed(ty: GgmlType, rows: usize, cols: usize, source: &[u8]) -> Vec<u8> {
    if !ty.is_packed() {
        return source.to_vec();
    }
    let mut tiles = vec![0; ty.packed_bytes(rows, cols)];
    crate::packed::pack(&crate::cpu::Pool::new(1), ty, rows, cols, source, &mut tiles);
    tiles
}
