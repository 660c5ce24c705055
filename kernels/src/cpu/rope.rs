//! Rotary position embedding (Su et al., 2021).

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

/// Rotates every head of `row`, `[heads, head_dim]`; the first `2 · cos.len()` values of a head take part.
pub fn rotate(kind: RopeKind, row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    for head in row.chunks_exact_mut(head_dim) {
        for i in 0..pairs {
            let (a, b) = match kind {
                RopeKind::Interleaved => (2 * i, 2 * i + 1),
                RopeKind::Half => (i, i + pairs),
            };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos[i] - y * sin[i];
            head[b] = x * sin[i] + y * cos[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_preserves_length_and_depends_on_relative_position_only() {
        let frequencies: Vec<f32> = (0..4).map(|i| 10_000f32.powf(-2.0 * i as f32 / 8.0)).collect();
        for kind in [RopeKind::Interleaved, RopeKind::Half] {
            let dot_at = |p: usize, q: usize| {
                let at = |position: usize, seed: f32| {
                    let mut row: Vec<f32> = (0..8).map(|i| (i as f32 * seed).sin()).collect();
                    let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
                    angles(position, &frequencies, &mut cos, &mut sin);
                    rotate(kind, &mut row, 8, &cos, &sin);
                    row
                };
                at(p, 1.3).iter().zip(at(q, 0.7)).map(|(a, b)| a * b).sum::<f32>()
            };
            assert!((dot_at(5, 3) - dot_at(405, 403)).abs() < 1e-4);
            assert!((dot_at(5, 3) - dot_at(5, 4)).abs() > 1e-3);
        }
    }
}
