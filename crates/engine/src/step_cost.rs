//! What a step takes, learnt from the steps themselves.

/// How much of what it knew a new step replaces.
const LEARNING_RATE: f64 = 0.05;
/// Before anything is known, a row is taken to cost this share of a step of one row. Low, so that drafts are tried.
const ROW_SHARE: f64 = 0.1;
/// How much variance in the number of rows outweighs that guess.
const TRUSTED_VARIANCE: f64 = 0.5;

/// A pace is that of about so many seconds of work.
const PACE_SECONDS: f64 = 0.3;

/// The time of steps of few rows as a line: `fixed + rows × row`. Reading the weights is the fixed part; what is
/// computed for each row, its logits and their sampling included, is the other. The line of least squares over the last
/// steps, newer ones counting more, drawn towards a first guess while all have the same number of rows: so an estimate
/// that a disturbed moment left wrong is forgotten, and tried again.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepCost {
    rows: f64,
    seconds: f64,
    variance: f64,
    covariance: f64,
}

impl StepCost {
    /// A step of so many rows, the logits of all of them wanted, took so long.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        let rows = rows as f64;
        if self.seconds == 0.0 {
            (self.rows, self.seconds) = (rows, seconds);
            return;
        }
        // The system was busy with something else.
        let seconds = seconds.min(3.0 * self.seconds.max(self.of(rows)));
        let (more_rows, more_seconds) = (rows - self.rows, seconds - self.seconds);
        self.rows += LEARNING_RATE * more_rows;
        self.seconds += LEARNING_RATE * more_seconds;
        let keep = 1.0 - LEARNING_RATE;
        self.variance = keep * (self.variance + LEARNING_RATE * more_rows * more_rows);
        self.covariance = keep * (self.covariance + LEARNING_RATE * more_rows * more_seconds);
    }

    /// Whether a step of `rows` that yields `tokens` yields them faster with one more row, which has this chance to
    /// yield one more: whether that row's tokens per second are more than the step's.
    pub fn pays(&self, rows: usize, tokens: f64, chance: f64) -> bool {
        chance * self.of(rows as f64) > tokens * self.of_a_row()
    }

    /// What a step of so many rows takes, in seconds; 0 before any was seen.
    pub fn of(&self, rows: f64) -> f64 {
        self.seconds + (rows - self.rows) * self.of_a_row()
    }

    fn of_a_row(&self) -> f64 {
        let guess = ROW_SHARE * self.seconds;
        let slope = (self.covariance + TRUSTED_VARIANCE * guess) / (self.variance + TRUSTED_VARIANCE);
        // A row costs something, and no more than its part of a step, which can be less than that.
        slope.max(0.01 * self.seconds).min(self.seconds / self.rows.max(1.0))
    }
}

/// Work per second, learnt from the last pieces of it, newer ones counting more: one that the system disturbed moves it little.
/// Of prompts, the work is in the decoder's measure, which knows how deep in a prompt a row is; of disks it is bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    work: f64,
    seconds: f64,
}

impl Pace {
    /// So much work took so long.
    pub fn observe(&mut self, work: f64, seconds: f64) {
        let seconds = match self.per_second() {
            0.0 => seconds,
            pace => seconds.clamp(work / pace / 3.0, work / pace * 3.0),
        };
        // By work, not by pieces: a whole step of prompt tells more than a few rows beside others.
        let share = (PACE_SECONDS / (self.seconds + seconds)).min(1.0);
        self.work = share * (self.work + work);
        self.seconds = share * (self.seconds + seconds);
    }

    /// A step took so long, this work and `others` seconds that the rest of it usually takes. What it took beyond or below what
    /// was expected is part of both, as much as each is of it: of a disturbance, too, the work bears no more than its part.
    pub fn observe_beside(&mut self, work: f64, seconds: f64, others: f64) {
        let own = match self.per_second() {
            0.0 => (seconds - others).max(seconds / 8.0),
            pace => seconds * work / (work + others * pace),
        };
        self.observe(work, own);
    }

    /// 0 before any was seen.
    pub fn per_second(&self) -> f64 {
        if self.seconds == 0.0 { 0.0 } else { self.work / self.seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_of_prompts_follows_the_steps_and_outlives_a_disturbance() {
        let mut pace = Pace::default();
        (0..100).for_each(|_| pace.observe(50.0, 0.005));
        assert!((pace.per_second() / 10_000.0 - 1.0).abs() < 0.01, "{pace:?}");
        pace.observe(50.0, 0.5);
        assert!(pace.per_second() > 9_000.0, "{pace:?}");
        (0..200).for_each(|_| pace.observe(50.0, 0.010));
        assert!((pace.per_second() / 5_000.0 - 1.0).abs() < 0.05, "{pace:?}");
    }

    #[test]
    fn the_pace_of_work_beside_other_work_is_found_from_any_first_guess_and_bears_its_part_of_disturbances() {
        // A step has decoding of 10 ms, and as much work as should take 5 ms more. Of every few steps the system takes some time,
        // of those that only decode as well.
        let after = |first: f64, taken: f64, every: u32| {
            let mut pace = Pace::default();
            pace.observe(first, 1.0);
            for step in 0..1000 {
                let work = 0.005 * pace.per_second();
                let disturbance = if step % every == 0 { taken } else { 0.0 };
                pace.observe_beside(
                    work,
                    0.010 + work / 10_000.0 + disturbance,
                    0.010 + taken / f64::from(every),
                );
            }
            pace.per_second()
        };
        for first in [1_000.0, 10_000.0, 100_000.0] {
            for (taken, every, within) in [(0.0, 1, 0.05), (0.020, 4, 0.2), (0.040, 8, 0.2)] {
                let pace = after(first, taken, every);
                assert!((pace / 10_000.0 - 1.0).abs() < within, "{first}, {taken} of {every}: {pace}");
            }
        }
    }

    fn after(steps: impl IntoIterator<Item = (usize, f64)>) -> StepCost {
        let mut cost = StepCost::default();
        steps.into_iter().for_each(|(rows, seconds)| cost.observe(rows, seconds));
        cost
    }

    fn line(fixed: f64, row: f64) -> impl Iterator<Item = (usize, f64)> {
        (0..200).map(move |step| 1 + step * 7 % 11).map(move |rows| (rows, fixed + row * rows as f64))
    }

    #[test]
    fn it_learns_the_line_that_steps_lie_on() {
        let cost = after(line(0.010, 0.003));
        assert!((cost.of_a_row() - 0.003).abs() < 0.0003, "{cost:?}");
        assert!((cost.of(4.0) - 0.022).abs() < 0.001, "{cost:?}");
    }

    #[test]
    fn rows_are_added_while_they_are_nearly_free_and_not_when_they_cost_what_they_bring() {
        let memory_bound = after(line(0.010, 0.0005));
        assert!(memory_bound.pays(1, 1.0, 0.2));
        assert!(!memory_bound.pays(1, 1.0, 0.02));
        // Eight sequences share the reading of the weights already.
        let compute_bound = after(line(0.010, 0.005));
        assert!(compute_bound.pays(1, 1.0, 0.5));
        assert!(!compute_bound.pays(8, 8.0, 0.5));
        assert!(compute_bound.pays(8, 8.0, 0.95));
    }

    #[test]
    fn steps_of_very_many_rows_are_steps_like_others() {
        let cost = after([(300, 0.1); 50]);
        assert!((cost.of(300.0) - 0.1).abs() < 0.001 && cost.of_a_row() > 0.0, "{cost:?}");
    }

    #[test]
    fn drafts_are_tried_before_anything_is_known_of_more_rows() {
        assert!(after([(1, 0.01); 50]).pays(1, 1.0, 0.3));
        assert!(!after([(1, 0.01); 50]).pays(1, 1.0, 0.05));
    }

    #[test]
    fn a_wrong_estimate_is_forgotten_when_steps_no_longer_speak_for_it() {
        let mut cost = after(line(0.0, 0.01));
        assert!(!cost.pays(1, 1.0, 0.8), "{cost:?}");
        (0..300).for_each(|_| cost.observe(1, 0.01));
        assert!(cost.pays(1, 1.0, 0.8), "{cost:?}");
    }
}
