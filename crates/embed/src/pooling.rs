//! [`Pooling`]: from one vector per token to one per text.

/// A way to make one vector out of many; the names are those of sentence-transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's vector.
    Cls,
    /// The largest number of each column.
    Max,
    Mean,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLength,
    /// The mean, in which token `i` counts `i + 1` times.
    WeightedMean,
    LastToken,
}

impl Pooling {
    /// In the order in which sentence-transformers puts their vectors one after the other.
    pub const ALL: [Pooling; 6] = [
        Pooling::Cls,
        Pooling::Max,
        Pooling::Mean,
        Pooling::MeanSqrtLength,
        Pooling::WeightedMean,
        Pooling::LastToken,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Pooling::Cls => "cls",
            Pooling::Max => "max",
            Pooling::Mean => "mean",
            Pooling::MeanSqrtLength => "mean_sqrt_len_tokens",
            Pooling::WeightedMean => "weightedmean",
            Pooling::LastToken => "lasttoken",
        }
    }

    pub fn parse(name: &str) -> Option<Pooling> {
        Pooling::ALL.into_iter().find(|pooling| pooling.name() == name)
    }

    /// The key that stood for it before there were names.
    pub(crate) fn legacy_key(self) -> &'static str {
        match self {
            Pooling::Cls => "pooling_mode_cls_token",
            Pooling::Max => "pooling_mode_max_tokens",
            Pooling::Mean => "pooling_mode_mean_tokens",
            Pooling::MeanSqrtLength => "pooling_mode_mean_sqrt_len_tokens",
            Pooling::WeightedMean => "pooling_mode_weightedmean_tokens",
            Pooling::LastToken => "pooling_mode_lasttoken",
        }
    }

    /// `[width]` out of `hidden`, `[tokens, width]` with at least one token.
    pub(crate) fn pool(self, hidden: &[f32], width: usize) -> Vec<f32> {
        debug_assert!(width > 0 && !hidden.is_empty() && hidden.len().is_multiple_of(width));
        let tokens = hidden.len() / width;
        match self {
            Pooling::Cls => hidden[..width].to_vec(),
            Pooling::LastToken => hidden[hidden.len() - width..].to_vec(),
            Pooling::Max => {
                let mut most = hidden[..width].to_vec();
                for row in hidden.chunks_exact(width) {
                    most.iter_mut().zip(row).for_each(|(most, value)| *most = most.max(*value));
                }
                most
            }
            Pooling::Mean => sum(hidden, width, |_| 1.0, tokens as f64),
            Pooling::MeanSqrtLength => sum(hidden, width, |_| 1.0, (tokens as f64).sqrt()),
            Pooling::WeightedMean => {
                sum(hidden, width, |token| (token + 1) as f64, (tokens * (tokens + 1) / 2) as f64)
            }
        }
    }
}

/// The rows' weighted sum over `divisor`. In f64, so that long texts lose nothing.
fn sum(hidden: &[f32], width: usize, weight: impl Fn(usize) -> f64, divisor: f64) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for (token, row) in hidden.chunks_exact(width).enumerate() {
        let weight = weight(token);
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * f64::from(*value));
    }
    sums.into_iter().map(|sum| (sum / divisor) as f32).collect()
}

/// Scales to length 1; a vector of zeros stays what it is.
pub(crate) fn normalise(vector: &mut [f32]) {
    // sentence-transformers divides by at least this much.
    const LEAST_LENGTH: f64 = 1e-12;
    let length = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt().max(LEAST_LENGTH);
    vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pooling_makes_its_own_vector_of_the_same_tokens() {
        let hidden = [1.0, -2.0, 3.0, 0.0, 5.0, 8.0];
        for (pooling, expected) in [
            (Pooling::Cls, [1.0, -2.0]),
            (Pooling::Max, [5.0, 8.0]),
            (Pooling::Mean, [3.0, 2.0]),
            (Pooling::MeanSqrtLength, [9.0f64 / 3f64.sqrt(), 6.0 / 3f64.sqrt()].map(|value| value as f32)),
            (Pooling::WeightedMean, [22.0 / 6.0, 22.0 / 6.0]),
            (Pooling::LastToken, [5.0, 8.0]),
        ] {
            assert_eq!(pooling.pool(&hidden, 2), expected, "{}", pooling.name());
            assert_eq!(Pooling::parse(pooling.name()), Some(pooling));
        }
    }

    #[test]
    fn a_normalised_vector_has_length_one_and_zeros_stay_zeros() {
        let mut vector = [3.0, -4.0];
        normalise(&mut vector);
        assert_eq!(vector, [0.6, -0.8]);
        let mut zeros = [0.0; 3];
        normalise(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }
}
