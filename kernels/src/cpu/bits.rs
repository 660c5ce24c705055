//! The bits that the numerics tag stands for, whatever machine computes them: sums of what every kernel makes of the same inputs.

use super::attention::{Attention, Sequence, attend, store_kv};
use super::matmul::{Matrix, Product, matmul};
use super::norm::{add_bias, add_scaled, gelu_gate, rms_norm, rms_norm_in_place, silu_gate, soft_cap};
use super::rope::{RopeKind, angles, rotate};
use super::{Cpu, Isa, KERNELS_VERSION, Pool, Precision};
use crate::testing::{packed, values, weights};
use crate::{GgmlType, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};

/// What is done to rows of values, in place.
type Step<'a> = &'a dyn Fn(&mut [f32]);

/// FNV-1a, a word at a time.
fn sum_of(words: impl IntoIterator<Item = u32>) -> u64 {
    words.into_iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| {
        (sum ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn sum_of_values(values: &[f32]) -> u64 {
    sum_of(values.iter().map(|value| value.to_bits()))
}

fn products(cpu: &Cpu) -> u64 {
    let (rows, cols, tokens) = (37, 512, 5);
    let x = values(tokens * cols, 3);
    let mut out = Vec::new();
    for ty in GgmlType::ALL {
        let bytes = packed(ty, rows, cols, &weights(ty, rows, cols, 7));
        let mut product = vec![0.0; tokens * rows];
        matmul(cpu, &x, [Product { weights: Matrix::new(ty, rows, cols, &bytes), out: &mut product }]);
        out.extend(product);
    }
    sum_of_values(&out)
}

fn vectors(cpu: &Cpu) -> u64 {
    let width = 70;
    let (mut x, other, weight) = (values(3 * width, 1), values(3 * width, 2), values(width, 4));
    x.iter_mut().for_each(|value| *value *= 9.0);
    let mut normed = vec![0.0; x.len()];
    rms_norm(cpu, &x, &weight, 1e-5, &mut normed);
    let mut out = normed.clone();
    let steps: [Step<'_>; 6] = [
        &|x| silu_gate(cpu, x, &other),
        &|x| gelu_gate(cpu, x, &other),
        &|x| add_scaled(cpu, x, &other, 0.3),
        &|x| add_bias(cpu, x, &weight),
        &|x| soft_cap(cpu, x, 3.0),
        &|x| rms_norm_in_place(cpu, x, &weight, 1e-6),
    ];
    for step in steps {
        let mut stepped = x.clone();
        step(&mut stepped);
        out.extend(stepped);
    }
    sum_of_values(&out)
}

fn rotations(cpu: &Cpu) -> u64 {
    let (head_dim, pairs, rows) = (64, 32, 40);
    let frequencies: Vec<f32> = (0..pairs).map(|i| 0.5f32.powi(i) / 3.0).collect();
    let pairs = frequencies.len();
    let (mut cos, mut sin) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
    for row in 0..rows {
        let part = row * pairs..(row + 1) * pairs;
        angles(row * row * 97, &frequencies, &mut cos[part.clone()], &mut sin[part]);
    }
    let mut out = [cos.clone(), sin.clone()].concat();
    for kind in [RopeKind::Interleaved, RopeKind::Half] {
        let mut x = values(rows * 2 * head_dim, 5);
        rotate(cpu, kind, &mut x, head_dim, pairs, &cos, &sin);
        out.extend(x);
    }
    sum_of_values(&out)
}

/// Pages as they are stored, and what attention reads from them.
fn attention(cpu: &Cpu, dtype: KvDtype) -> u64 {
    let (positions, rows, heads) = (5 * PAGE_TOKENS, 3, 4);
    let layout = PageLayout { layers: 1, kv_heads: 2, head_dim: 64, dtype };
    let mut memory = vec![vec![0u32; layout.page_bytes().div_ceil(4)]; positions.div_ceil(PAGE_TOKENS)];
    // SAFETY: the vectors are as long as a page and outlive the table.
    let pages: Vec<_> = memory.iter_mut().map(|m| unsafe { PagePtr::new(m.as_mut_ptr().cast()) }).collect();
    let width = layout.kv_heads * layout.head_dim;
    let all = Sequence { pages: &pages, first_row: 0, rows: positions, start: 0 };
    store_kv(cpu, &layout, 0, &[all], &values(positions * width, 6), &values(positions * width, 7));
    let mut words = Vec::new();
    for (window, soft_cap) in [(None, None), (Some(100), Some(20.0))] {
        let attention = Attention { layout, layer: 0, heads, scale: 0.7, window, soft_cap };
        let q = values(rows * heads * layout.head_dim, 8);
        let mut out = vec![0.0; q.len()];
        let last = Sequence { pages: &pages, first_row: 0, rows, start: positions - rows };
        attend(cpu, attention, &[last], &q, &mut out);
        words.extend(out.iter().map(|value| value.to_bits()));
    }
    for page in &pages {
        let bytes = page.bytes(&layout, 0, layout.page_bytes());
        words.extend(bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
    }
    sum_of(words)
}

/// What [`others`] gives: vectors, rotations, attention over f16 and over q8_0.
const UNFUSED: [u64; 4] =
    [0x3ca4_1b8f_2067_de33, 0x9e4c_85f6_60b8_1964, 0xa3f1_4fcc_43f9_d2f2, 0x5016_b98f_23e8_4993];
const FUSED: [u64; 4] =
    [0xa62f_8dc0_5628_94cc, 0x9e4c_85f6_60b8_1964, 0x7842_b812_b286_3bbf, 0xb9e1_8f06_adb7_4af5];

fn others(cpu: &Cpu) -> [u64; 4] {
    [vectors(cpu), rotations(cpu), attention(cpu, KvDtype::F16), attention(cpu, KvDtype::Q8_0)]
}

#[test]
fn a_numerics_tag_stands_for_the_same_bits_on_every_machine() {
    assert_eq!(KERNELS_VERSION, 2, "another version has other sums");
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        for precision in Precision::ALL {
            let cpu = Cpu { isa, precision, pool: Pool::new(2) };
            let (of_products, of_others) = match (isa.arithmetic(), precision) {
                ("unfused", Precision::Int8) => (0x3ab3_fd25_4a29_a3fd, UNFUSED),
                ("unfused", Precision::Int16) => (0x71e2_55a2_404f_8c5d, UNFUSED),
                (_, Precision::Int8) => (0xc5dd_dd47_3065_8f9b, FUSED),
                (_, Precision::Int16) => (0x2d3c_4b46_632e_382a, FUSED),
            };
            let why = "other bits than this tag stood for: raise KERNELS_VERSION, and put their sums here";
            assert_eq!(products(&cpu), of_products, "products, {isa:?} {precision:?}: {why}");
            assert_eq!(others(&cpu), of_others, "{isa:?} {precision:?}: {why}");
        }
    }
}
