//! Distributions of what the engine measures: buckets of fixed bounds, so that counting allocates nothing.

/// Bounds of times, in seconds: from a decode step of a small model to a prompt that waited for a long queue.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// Bounds of the rows of a step.
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// How many values fell between which bounds, and their sum: a histogram as Prometheus knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Of the values up to each bound and above the one before it, then of those above the last.
    counts: [u64; 16],
    sum: f64,
}

impl Histogram {
    pub fn seconds() -> Histogram {
        Histogram::over(SECONDS)
    }

    pub fn rows() -> Histogram {
        Histogram::over(ROWS)
    }

    fn over(bounds: &'static [f64]) -> Histogram {
        let counts = [0; 16];
        assert!(bounds.len() < counts.len() && bounds.is_sorted());
        Histogram { bounds, counts, sum: 0.0 }
    }

    pub fn observe(&mut self, value: f64) {
        self.observe_many(value, 1);
    }

    /// The same value `times` times.
    pub fn observe_many(&mut self, value: f64, times: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += times;
        self.sum += value * times as f64;
    }

    /// Each bound with the number of values up to it; the last bound is infinite, and its number that of all values.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |total, (bound, count)| {
            *total += count;
            Some((bound, *total))
        })
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub fn sum(&self) -> f64 {
        self.sum
    }
}

/// What the engine measures of turns, steps and commits.
#[derive(Clone, Debug, PartialEq)]
pub struct Distributions {
    /// From submission to the first page.
    pub queue_seconds: Histogram,
    /// From submission to the first token.
    pub time_to_first_token_seconds: Histogram,
    /// Between two tokens of a turn; tokens of one step share its time.
    pub inter_token_seconds: Histogram,
    /// Mapping and checking the pages of a turn that found some.
    pub restore_seconds: Histogram,
    pub step_seconds: Histogram,
    /// Rows computed together: tokens that decode, guesses, pieces of prompts.
    pub step_rows: Histogram,
    /// From a commit's handover to the disk's answer.
    pub commit_seconds: Histogram,
}

impl Default for Distributions {
    fn default() -> Distributions {
        Distributions {
            queue_seconds: Histogram::seconds(),
            time_to_first_token_seconds: Histogram::seconds(),
            inter_token_seconds: Histogram::seconds(),
            restore_seconds: Histogram::seconds(),
            step_seconds: Histogram::seconds(),
            step_rows: Histogram::rows(),
            commit_seconds: Histogram::seconds(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_counts_in_every_bucket_whose_bound_it_does_not_exceed() {
        let mut rows = Histogram::rows();
        rows.observe(1.0);
        rows.observe(3.0);
        rows.observe_many(1000.0, 2);
        let counted: Vec<(f64, u64)> = rows.cumulative().collect();
        assert_eq!(&counted[..3], &[(1.0, 1), (2.0, 1), (4.0, 2)]);
        assert_eq!(&counted[8..], &[(256.0, 2), (f64::INFINITY, 4)]);
        assert_eq!((rows.count(), rows.sum()), (4, 2004.0));
    }

    #[test]
    fn every_kind_of_distribution_fits_its_counts() {
        let all = Distributions::default();
        assert_eq!(all.queue_seconds.cumulative().count(), 16);
        assert_eq!(all.step_rows.cumulative().count(), 10);
    }
}
