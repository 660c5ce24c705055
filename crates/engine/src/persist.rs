//! The last step of the loop, on a thread of its own: page bytes to disk, then the transaction that names them.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use dormouse_kv::{SyncRange, Ticket};
use dormouse_store::{Durability, StepCommit, Store, StoreError};

use crate::EngineError;
use crate::worker::Command;

/// One commit on its way to disk.
pub struct Commit {
    pub ticket: Ticket,
    pub sync: SyncRange,
    pub step: StepCommit,
    /// The turn that waits for it; None for removals alone.
    pub turn: Option<String>,
}

/// The outcome of a [`Commit`].
pub struct Acknowledgement {
    pub ticket: Ticket,
    pub turn: Option<String>,
    /// Durable length of the session's token log.
    pub log_len: usize,
    pub outcome: Result<(), EngineError>,
}

pub struct Persister {
    commits: Option<mpsc::Sender<Commit>>,
    thread: Option<JoinHandle<()>>,
}

impl Persister {
    pub fn start(
        store: Store,
        durability: Durability,
        answers: mpsc::Sender<Command>,
    ) -> std::io::Result<Persister> {
        // Unbounded, but never longer than the running turns and one: each has at most one commit under way.
        let (commits, queue) = mpsc::channel::<Commit>();
        let thread = thread::Builder::new().name("dormouse-persist".into()).spawn(move || {
            for commit in queue {
                let outcome = persist(&store, durability, &commit);
                let answer = Acknowledgement {
                    ticket: commit.ticket,
                    turn: commit.turn,
                    log_len: commit.step.log_start + commit.step.tokens.len(),
                    outcome,
                };
                if answers.send(Command::Persisted(answer)).is_err() {
                    return; // the engine is gone, and with it everyone who waits
                }
            }
        })?;
        Ok(Persister { commits: Some(commits), thread: Some(thread) })
    }

    /// Hands the commit over. False when the thread is gone.
    pub fn send(&self, commit: Commit) -> bool {
        self.commits.as_ref().is_some_and(|commits| commits.send(commit).is_ok())
    }
}

impl Drop for Persister {
    fn drop(&mut self) {
        self.commits = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the persister thread had panicked");
        }
    }
}

/// Bytes first, then their names: a crash between the two leaves unnamed bytes, never named garbage.
fn persist(store: &Store, durability: Durability, commit: &Commit) -> Result<(), EngineError> {
    commit.sync.sync(durability).map_err(|error| EngineError::Storage(error.to_string()))?;
    let step = &commit.step;
    let outcome = match commit.turn {
        Some(_) => store.commit_step(step),
        None => store.commit_pages(step.page_file, &step.pages, &step.removed),
    };
    outcome.map_err(|error| match error {
        StoreError::LeaseLost { .. } => EngineError::LeaseLost,
        StoreError::Full { .. } => EngineError::OutOfSpace(error.to_string()),
        other => EngineError::Storage(other.to_string()),
    })
}
