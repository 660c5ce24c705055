//! [`Store`]: the handle that the rest of the system holds.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rusqlite::Connection;

use crate::owner::{Job, Owner};
use crate::pages::{ClaimRow, PageRow, RemovedPage, StepCommit};
use crate::{StoreError, catalog, check};

/// What an acknowledged write survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Loss of power: every write waits for the disk, page bytes before the rows that name them.
    #[default]
    Power,
    /// The process's end, also by kill -9.
    Process,
    /// Nothing is promised; for benchmarks.
    None,
}

impl Durability {
    pub const ALL: [Durability; 3] = [Durability::Power, Durability::Process, Durability::None];

    pub fn name(self) -> &'static str {
        match self {
            Durability::Power => "power",
            Durability::Process => "process",
            Durability::None => "none",
        }
    }

    pub fn parse(text: &str) -> Option<Durability> {
        Durability::ALL.into_iter().find(|durability| durability.name() == text)
    }
}

/// The metadata database of one data directory. Cheap to clone; the last clone's end ends the thread.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    /// Unbounded, but never longer than the number of callers: each waits for its answer.
    jobs: Option<Arc<mpsc::Sender<Job>>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the metadata database's thread had panicked");
        }
    }
}

impl Store {
    /// Takes the directory's lock, opens or creates the database and its mirror, and mends one from the other.
    /// Errors: `Locked` when another process owns the directory, `Damaged` when neither file can be read.
    pub fn open(directory: &Path, durability: Durability) -> Result<Store, StoreError> {
        let owner = Owner::open(directory, durability)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let jobs = Arc::new(jobs);
        if owner.is_unchecked {
            // Weak: a check that lasts keeps no database open.
            let owner_of = Arc::downgrade(&jobs);
            let mend = move || {
                let verify: Job = Box::new(|owner| drop(owner.verify()));
                // A database that is closed is checked again when it is opened.
                owner_of.upgrade().map(|jobs| jobs.send(verify).ok());
            };
            check::beside(owner.paths(), mend)
                .map_err(|why| StoreError::file("cannot start the check of", directory, why))?;
        }
        let thread = std::thread::Builder::new()
            .name("dormouse-store".into())
            .spawn(move || owner.serve(queue))
            .map_err(|why| StoreError::file("cannot start the thread of", directory, why))?;
        Ok(Store { inner: Arc::new(Inner { jobs: Some(jobs), thread: Some(thread) }) })
    }

    /// Whether anybody serves requests still.
    pub fn is_alive(&self) -> bool {
        self.inner.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Writes the address that this server answers at into the lock file.
    pub async fn set_address(&self, address: String) -> Result<(), StoreError> {
        self.ask(move |owner, answer| answer(owner.set_address(address))).await
    }

    /// What was found damaged and mended, or could not be, since open; empty is well.
    pub async fn health(&self) -> Result<Vec<String>, StoreError> {
        self.ask(|owner, answer| answer(Ok(owner.health()))).await
    }

    /// Checks every row of the database and its mirror now, mends what it can, and answers what it found.
    pub async fn verify(&self) -> Result<Vec<String>, StoreError> {
        self.ask(|owner, answer| answer(Ok(owner.verify()))).await
    }

    /// Folds the logs into both files, closes them and releases the directory. Later calls are `Closed`.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.ask(|owner, answer| answer(owner.close())).await
    }

    /// One transaction, blocking: for each step appends its tokens to its session's log, upserts its pages, deletes the
    /// removed ones (sessions whose path ended there fall back to the parent) and moves the session's leaf. When it
    /// returns, all of it is durable.
    /// Errors: a step that is refused changes nothing and does not stop the others: `LeaseLost` for a stale fence,
    /// `WrongPosition` when `log_start` is not the log's length, `SessionNotFound`. Any other error, as `Full`, is
    /// everybody's: nothing was changed.
    pub fn commit_steps(&self, steps: Vec<StepCommit>) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        self.write_blocking(move |db| {
            let commit = |step: &StepCommit| match catalog::commit_step(db, step) {
                Err(why) if why.is_refusal() => Ok(Err(why)),
                committed => committed.map(Ok),
            };
            steps.iter().map(commit).collect()
        })
    }

    /// Page rows without a session's step (removals after damage, eviction or a deleted session), blocking.
    pub fn commit_pages(
        &self,
        file: i64,
        rows: &[PageRow],
        removed: &[RemovedPage],
    ) -> Result<(), StoreError> {
        let (rows, removed) = (rows.to_vec(), removed.to_vec());
        self.write_blocking(move |db| catalog::commit_pages(db, file, &rows, &removed))
    }

    /// All committed pages of a page file, by slot; blocking.
    pub fn load_pages(&self, file: i64) -> Result<Vec<PageRow>, StoreError> {
        self.read_blocking(move |db| catalog::load_pages(db, file))
    }

    /// Where the paths of sessions end, those first that were not used for longest; blocking.
    pub fn claims(&self, file: i64) -> Result<Vec<ClaimRow>, StoreError> {
        self.read_blocking(move |db| catalog::claims(db, file))
    }

    /// Finds or creates the catalog's entry of a page file, blocking. `layout` describes the bytes of a page
    /// (JSON); when fingerprint, tenant or layout differ from the entry's, its rows and claims are dropped.
    pub fn page_file(
        &self,
        path: &Path,
        fingerprint: [u8; 32],
        tenant: &str,
        layout: &str,
    ) -> Result<i64, StoreError> {
        let (path, tenant, layout) = (path.display().to_string(), tenant.to_owned(), layout.to_owned());
        self.write_blocking(move |db| catalog::page_file(db, &path, &fingerprint, &tenant, &layout))
    }

    /// Drops all rows and claims of a page file that was set aside, blocking.
    pub fn forget_pages(&self, file: i64) -> Result<(), StoreError> {
        self.write_blocking(move |db| catalog::forget_pages(db, file))
    }

    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl Fn(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.ask(move |owner, answer| answer(owner.read(&query))).await
    }

    /// `change` runs once for the database and once for its mirror, so it must be a function of its captures.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        change: impl Fn(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.ask(move |owner, answer| owner.write(&change, answer)).await
    }

    pub(crate) fn read_blocking<T: Send + 'static>(
        &self,
        query: impl Fn(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.ask_blocking(move |owner, answer| answer(owner.read(&query)))
    }

    pub(crate) fn write_blocking<T: Send + 'static>(
        &self,
        change: impl Fn(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.ask_blocking(move |owner, answer| owner.write(&change, answer))
    }

    async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Owner, &mut dyn FnMut(Result<T, StoreError>)) + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        self.send(Box::new(move |owner| {
            let mut answer = Some(answer);
            job(owner, &mut |result| {
                // A caller that has gone away does not want its answer.
                answer.take().map(|answer| answer.send(result).ok());
            });
        }))?;
        answered.await.map_err(|_| StoreError::Panicked)?
    }

    fn ask_blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Owner, &mut dyn FnMut(Result<T, StoreError>)) + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Box::new(move |owner| {
            job(owner, &mut |result| {
                // A caller that has gone away does not want its answer.
                answer.try_send(result).ok();
            });
        }))?;
        answered.recv().map_err(|_| StoreError::Panicked)?
    }

    fn send(&self, job: Job) -> Result<(), StoreError> {
        self.inner.jobs.as_ref().ok_or(StoreError::Closed)?.send(job).map_err(|_| StoreError::Closed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn a_panic_in_one_request_leaves_the_database_to_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Durability::Process).unwrap();
        let add = |db: &Connection| db.execute("INSERT INTO meta (name, value) VALUES ('test', 1)", []);
        let asked = store.write(move |db| -> Result<(), StoreError> {
            add(db)?;
            panic!("a bug that a test put there")
        });
        assert!(matches!(asked.await, Err(StoreError::Panicked)));
        assert!(store.is_alive());
        assert_eq!(store.write(move |db| Ok(add(db)?)).await.unwrap(), 1, "the name was free");
        assert_eq!(store.verify().await.unwrap().len(), 1, "the bug is all there is to tell");
        store.close().await.unwrap();
    }
}
