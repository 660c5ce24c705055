//! The simple block quantisations, written the plain way.

use dormouse_kernels::GgmlType;
use dormouse_kernels::quant::dequantize;
use half::f16;

/// Values of a block.
pub const BLOCK: usize = 32;

/// How the matrices of a file are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weights {
    Floats,
    Quantised(GgmlType),
    /// As F32, rounded to what the quantised ones stand for.
    Rounded(GgmlType),
}

impl Weights {
    /// The type's number in a GGUF header, and the bytes.
    pub fn encode(self, values: &[f32]) -> (u32, Vec<u8>) {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
        match self {
            Weights::Floats => (0, floats(values)),
            Weights::Quantised(ty) => (ty.gguf_id(), quantise(ty, values)),
            Weights::Rounded(ty) => {
                let mut rounded = vec![0.0; values.len()];
                dequantize(ty, &quantise(ty, values), &mut rounded);
                (0, floats(&rounded))
            }
        }
    }
}

fn quantise(ty: GgmlType, values: &[f32]) -> Vec<u8> {
    values.as_chunks::<BLOCK>().0.iter().flat_map(|block| quantise_block(ty, block)).collect()
}

fn quantise_block(ty: GgmlType, values: &[f32; BLOCK]) -> Vec<u8> {
    let (least, most) =
        values.iter().fold((0.0f32, 0.0f32), |(least, most), value| (least.min(*value), most.max(*value)));
    let widest = most.max(-least);
    // The scale, the minimum where the type has one, what a code of 0 stands for in steps, and the largest code.
    let (step, minimum, zero, largest) = match ty {
        GgmlType::Q4_0 => (widest / 7.0, None, 8.0, 15.0),
        GgmlType::Q4_1 => ((most - least) / 15.0, Some(least), 0.0, 15.0),
        GgmlType::Q5_1 => ((most - least) / 31.0, Some(least), 0.0, 31.0),
        GgmlType::Q8_0 => (widest / 127.0, None, 128.0, 255.0),
        other => panic!("{} is not written here", other.name()),
    };
    let step = f16::from_f32(step);
    let codes = values.map(|value| {
        let steps = (value - minimum.unwrap_or(0.0)) / step.to_f32().max(f32::MIN_POSITIVE);
        (steps.round() + zero).clamp(0.0, largest) as u8
    });
    let mut bytes = step.to_le_bytes().to_vec();
    bytes.extend(minimum.iter().flat_map(|minimum| f16::from_f32(*minimum).to_le_bytes()));
    if ty == GgmlType::Q8_0 {
        bytes.extend(codes.map(|code| code ^ 0x80));
        return bytes;
    }
    if ty == GgmlType::Q5_1 {
        let fifth = codes.iter().enumerate().fold(0u32, |bits, (i, code)| bits | u32::from(code >> 4) << i);
        bytes.extend(fifth.to_le_bytes());
    }
    bytes.extend((0..16).map(|i| codes[i] & 15 | codes[i + 16] << 4));
    bytes
}

#[test]
fn a_quantised_block_stands_for_nearly_the_same_numbers() {
    let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 30.0) / 100.0).collect();
    for (ty, step) in [
        (GgmlType::Q4_0, 0.33 / 7.0),
        (GgmlType::Q4_1, 0.63 / 15.0),
        (GgmlType::Q5_1, 0.63 / 31.0),
        (GgmlType::Q8_0, 0.33 / 127.0),
    ] {
        let mut back = vec![0.0; 64];
        dequantize(ty, &quantise(ty, &values), &mut back);
        let furthest = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest > 0.0 && furthest < 0.51 * step + 1e-3, "{}: {furthest}", ty.name());
    }
}
