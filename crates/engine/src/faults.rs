//! Faults that tests ask for: what a broken invariant, a stuck step or a slow disk does, without waiting for one.

use std::time::Duration;

use dormouse_kernels::Cpu;

/// What goes wrong, and when. Nothing, unless a test says so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// The engine thread panics in the middle of this step, counted from the server's start.
    pub panic_in_step: Option<u64>,
    /// It panics in every step that this number divides.
    pub panic_every_steps: Option<u64>,
    /// A compute thread panics in this step.
    pub compute_panic_in_step: Option<u64>,
    /// This step takes longer.
    pub slow_step: Option<(u64, Duration)>,
    /// Every commit waits as long before its first byte is synced.
    pub commit_delay: Duration,
    /// Every page that has to come from disk takes as much longer.
    pub page_in_delay: Duration,
}

impl Faults {
    /// Called between the forward pass of a step and its sampling.
    pub(crate) fn strike(&self, step: u64, cpu: &Cpu) {
        if let Some((_, delay)) = self.slow_step.filter(|(at, _)| *at == step) {
            std::thread::sleep(delay);
        }
        if self.compute_panic_in_step == Some(step) {
            cpu.pool.run(2, &|task| assert_eq!(task, 0, "a fault that was asked for"));
        }
        let due = self.panic_every_steps.is_some_and(|every| step.is_multiple_of(every.max(1)));
        assert!(!due && self.panic_in_step != Some(step), "a fault that was asked for, in step {step}");
    }
}
