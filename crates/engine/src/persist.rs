//! The last step of the loop, on a thread of its own: page bytes to disk, then the transaction that names them.

use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_kv::{PageOut, SyncRange, Ticket};
use dormouse_store::{Durability, StepCommit, Store, StoreError};

use crate::EngineError;
use crate::condition::{Condition, Work};
use crate::supervisor::Alarm;
use crate::worker::Command;

/// One commit on its way to disk.
pub struct Commit {
    pub ticket: Ticket,
    pub sync: SyncRange,
    pub step: StepCommit,
    /// The turn that waits for it; None for removals alone.
    pub turn: Option<String>,
}

impl Commit {
    pub fn answer(self, outcome: Result<(), EngineError>) -> Acknowledgement {
        let log_len = self.step.log_start + self.step.tokens.len();
        Acknowledgement { ticket: self.ticket, turn: self.turn, log_len, outcome }
    }
}

/// The outcome of a [`Commit`].
pub struct Acknowledgement {
    pub ticket: Ticket,
    pub turn: Option<String>,
    /// Durable length of the session's token log.
    pub log_len: usize,
    pub outcome: Result<(), EngineError>,
}

/// What the thread is asked.
enum Job {
    /// And when it was handed over.
    Commit(Vec<Commit>, Instant),
    PageOut(PageOut),
}

pub struct Persister {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Persister {
    /// `delay`: a fault that a test asks for, before every commit.
    pub fn start(
        store: Store,
        durability: Durability,
        answers: mpsc::Sender<Command>,
        condition: Arc<Condition>,
        delay: Duration,
    ) -> std::io::Result<Persister> {
        // Unbounded, but never holds more than the running turns' commits and one, each has at most one under way, and
        // what has to leave RAM.
        let (jobs, queue) = mpsc::channel();
        let thread = thread::Builder::new().name("dormouse-persist".into()).spawn(move || {
            let _alarm = Alarm(answers.clone(), "the thread that writes commits panicked");
            for job in queue {
                let (group, since) = match job {
                    Job::Commit(group, since) => (group, since),
                    Job::PageOut(out) => {
                        out.carry_out();
                        continue;
                    }
                };
                condition.disk.begin(Work::Commit { turns: group.len() });
                thread::sleep(delay);
                let outcomes = persist(&store, durability, &group);
                condition.disk.end();
                let told = group.into_iter().zip(outcomes).map(|(commit, outcome)| commit.answer(outcome));
                if answers.send(Command::Persisted(told.collect(), since.elapsed())).is_err() {
                    return; // the engine is gone, and with it everyone who waits
                }
            }
        })?;
        Ok(Persister { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Hands over commits that become durable together: those of turns, or removals alone. Gives them back when the thread
    /// is gone.
    pub fn send(&self, group: Vec<Commit>) -> Result<(), Vec<Commit>> {
        let Some(jobs) = &self.jobs else { return Err(group) };
        jobs.send(Job::Commit(group, Instant::now())).map_err(|mpsc::SendError(job)| match job {
            Job::Commit(group, _) => group,
            Job::PageOut(_) => Vec::new(),
        })
    }

    /// Gives RAM back, after the commits before it.
    pub fn page_out(&self, out: PageOut) {
        // Without the thread there are no commits either, and whoever needs one hears of it.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(Job::PageOut(out)));
    }
}

impl Drop for Persister {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the persister thread had panicked");
        }
    }
}

/// Bytes first, then their names: a crash between the two leaves unnamed bytes, never named garbage.
fn persist(store: &Store, durability: Durability, group: &[Commit]) -> Vec<Result<(), EngineError>> {
    let synced = group.iter().try_for_each(|commit| commit.sync.sync(durability));
    let all = synced.map_err(|error| EngineError::Storage(error.to_string())).and_then(|()| match group {
        [Commit { turn: None, step, .. }] => store
            .commit_pages(step.page_file, &step.pages, &step.removed)
            .map(|()| vec![Ok(())])
            .map_err(failed),
        _ => store.commit_steps(group.iter().map(|commit| commit.step.clone()).collect()).map_err(failed),
    });
    match all {
        Ok(each) => each.into_iter().map(|outcome| outcome.map_err(failed)).collect(),
        Err(error) => group.iter().map(|_| Err(error.clone())).collect(),
    }
}

fn failed(error: StoreError) -> EngineError {
    match error {
        StoreError::LeaseLost { .. } => EngineError::LeaseLost,
        StoreError::Full { .. } => EngineError::OutOfSpace(error.to_string()),
        other => EngineError::Storage(other.to_string()),
    }
}
