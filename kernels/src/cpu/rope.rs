//! Rotary position embedding (Su et al., 2021).

use super::Cpu;
use super::disjoint::Disjoint;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use super::rows::each_range;

/// Which values form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// `(2i, 2i + 1)`: the order of Llama weights in GGUF files.
    Interleaved,
    /// `(i, i + dims / 2)`: the order of Hugging Face weights.
    Half,
}

/// Cosine and sine of every pair's angle at one position: `[dims / 2]` each, `angle_i = position · frequency_i`.
///
/// Frequency and angle are rounded to f32, as in the implementations that models are trained with.
pub fn angles(position: usize, frequencies: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    for (i, frequency) in frequencies.iter().enumerate() {
        let (s, c) = f64::from(position as f32 * frequency).sin_cos();
        cos[i] = c as f32;
        sin[i] = s as f32;
    }
}

/// Rotates every head of every row of `x`, `[rows, heads, head_dim]`, by its row's `cos` and `sin`, `[rows, pairs]`;
/// the first `2 · pairs` values of a head take part.
pub fn rotate(
    cpu: &Cpu,
    kind: RopeKind,
    x: &mut [f32],
    head_dim: usize,
    pairs: usize,
    cos: &[f32],
    sin: &[f32],
) {
    assert!(2 * pairs <= head_dim && cos.len() == sin.len());
    if pairs == 0 || cos.is_empty() {
        return;
    }
    let (isa, rows) = (cpu.isa, cos.len() / pairs);
    let width = x.len() / rows;
    let x = Disjoint::new(x);
    each_range(cpu, rows, width, &|rows| {
        for row in rows {
            let x = x.part(row * width..(row + 1) * width);
            let (cos, sin) = (&cos[row * pairs..][..pairs], &sin[row * pairs..][..pairs]);
            match kind {
                RopeKind::Interleaved => {
                    dispatch!(isa, rotate_interleaved(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]))
                }
                RopeKind::Half => {
                    dispatch!(isa, rotate_halves(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]))
                }
            }
        }
    });
}

/// `(x, y)` rotated: `(x cos − y sin, x sin + y cos)`, every product rounded, so that vectors and single values agree.
#[inline(always)]
fn rotate_halves<L: Lanes>(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    for head in row.chunks_exact_mut(head_dim) {
        let (first, second) = head[..2 * pairs].split_at_mut(pairs);
        let mut i = 0;
        while i + LANES <= pairs {
            let (x, y) = (L::load(sixteen(first, i)), L::load(sixteen(second, i)));
            let (c, s) = (L::load(sixteen(cos, i)), L::load(sixteen(sin, i)));
            x.mul(c).sub(y.mul(s)).store(sixteen_mut(first, i));
            x.mul(s).add(y.mul(c)).store(sixteen_mut(second, i));
            i += LANES;
        }
        while i < pairs {
            let (x, y) = (first[i], second[i]);
            first[i] = x * cos[i] - y * sin[i];
            second[i] = x * sin[i] + y * cos[i];
            i += 1;
        }
    }
}

/// As [`rotate_halves`] for neighbours; the compiler makes vectors of it, of the tier's width.
#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)] // `dispatch!` names the tier by it.
fn rotate_interleaved<L: Lanes>(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(head_dim) {
        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            let [x, y] = *pair;
            *pair = [x * cos - y * sin, x * sin + y * cos];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Pool};
    use super::*;

    const KINDS: [RopeKind; 2] = [RopeKind::Interleaved, RopeKind::Half];

    fn cpus() -> impl Iterator<Item = Cpu> {
        Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu {
            isa,
            precision: crate::cpu::Precision::Int8,
            pool: Pool::new(2),
        })
    }

    fn turn(pairs: usize, rows: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies: Vec<f32> =
            (0..pairs).map(|i| 10_000f32.powf(-2.0 * i as f32 / (2.0 * pairs as f32))).collect();
        let (mut cos, mut sin) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
        for row in 0..rows {
            let at = row * pairs..(row + 1) * pairs;
            angles(40 + 3 * row, &frequencies, &mut cos[at.clone()], &mut sin[at]);
        }
        (cos, sin)
    }

    #[test]
    fn rotation_preserves_length_and_depends_on_relative_position_only() {
        let frequencies: Vec<f32> = (0..4).map(|i| 10_000f32.powf(-2.0 * i as f32 / 8.0)).collect();
        let cpu = Cpu { isa: Isa::best(), precision: crate::cpu::Precision::Int8, pool: Pool::new(1) };
        for kind in KINDS {
            let dot_at = |p: usize, q: usize| {
                let at = |position: usize, seed: f32| {
                    let mut row: Vec<f32> = (0..8).map(|i| (i as f32 * seed).sin()).collect();
                    let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
                    angles(position, &frequencies, &mut cos, &mut sin);
                    rotate(&cpu, kind, &mut row, 8, 4, &cos, &sin);
                    row
                };
                at(p, 1.3).iter().zip(at(q, 0.7)).map(|(a, b)| a * b).sum::<f32>()
            };
            assert!((dot_at(5, 3) - dot_at(405, 403)).abs() < 1e-4);
            assert!((dot_at(5, 3) - dot_at(5, 4)).abs() > 1e-3);
        }
    }

    #[test]
    fn rows_heads_and_tiers_rotate_as_the_formula_says_bit_for_bit() {
        let (rows, heads) = (70, 3);
        for (head_dim, pairs) in [(64, 32), (80, 40), (96, 16), (20, 5)] {
            let (cos, sin) = turn(pairs, rows);
            let x: Vec<f32> =
                (0..rows * heads * head_dim).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect();
            for kind in KINDS {
                let mut expected = x.clone();
                for (row, values) in expected.chunks_mut(heads * head_dim).enumerate() {
                    for head in values.chunks_mut(head_dim) {
                        for i in 0..pairs {
                            let (a, b) = match kind {
                                RopeKind::Interleaved => (2 * i, 2 * i + 1),
                                RopeKind::Half => (i, i + pairs),
                            };
                            let (c, s) = (cos[row * pairs + i], sin[row * pairs + i]);
                            (head[a], head[b]) = (head[a] * c - head[b] * s, head[a] * s + head[b] * c);
                        }
                    }
                }
                for cpu in cpus() {
                    let mut out = x.clone();
                    rotate(&cpu, kind, &mut out, head_dim, pairs, &cos, &sin);
                    assert!(out == expected, "{kind:?} {head_dim} {}", cpu.isa.name());
                }
            }
        }
    }
}
