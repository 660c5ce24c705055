//! Pages on their way from disk into RAM, on threads that may wait for the disk while the engine's computes for others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_kv::PageIn;

use crate::condition::{Condition, Work};
use crate::supervisor::Alarm;
use crate::worker::Command;

/// Reads under way at once, at most: more give a disk nothing more to do.
const READERS_MOST: usize = 4;

/// What became of pages that were to be read.
pub struct PagedIn {
    /// As they were handed over.
    pub id: u64,
    /// What came from disk, and how long that took once it began.
    pub bytes: u64,
    pub took: Duration,
}

/// What the thread is asked.
struct Job {
    id: u64,
    pages: Arc<PageIn>,
    /// Somebody computes their sequence meanwhile.
    meets: bool,
}

/// Reads the pages of one waiter after the other, in the order of asking.
pub struct Pager {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
}

impl Pager {
    /// `delay`: a fault that a test asks for, before every page.
    pub fn start(
        answers: mpsc::Sender<Command>,
        condition: Arc<Condition>,
        delay: Duration,
    ) -> std::io::Result<Pager> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = thread::Builder::new().name("dormouse-pager".into()).spawn(move || {
            let _alarm = Alarm(answers.clone(), "the thread that reads pages panicked");
            for job in queue {
                let begun = Instant::now();
                read(&job, &condition, delay, &stop);
                let paged = PagedIn { id: job.id, bytes: job.pages.bytes_read(), took: begun.elapsed() };
                if stop.load(Ordering::Relaxed) || answers.send(Command::PagedIn(paged)).is_err() {
                    return; // the engine is gone, and with it everyone who waits
                }
            }
        })?;
        Ok(Pager { jobs: Some(jobs), thread: Some(thread), stopping })
    }

    /// Asks for pages; `meets`: their sequence is computed meanwhile, from its beginning.
    pub fn send(&self, id: u64, pages: Arc<PageIn>, meets: bool) {
        // A thread that is gone has raised the alarm.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(Job { id, pages, meets }));
    }
}

/// Until all is read that anybody wants.
fn read(job: &Job, condition: &Condition, delay: Duration, stop: &AtomicBool) {
    let pages = &job.pages;
    pages.look_again();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let read = || {
        while !stop.load(Ordering::Relaxed) {
            // A slow disk is not a stuck one: the watch begins anew with each page.
            condition.pager.begin(Work::PageIn { pages: pages.unread() });
            thread::sleep(delay);
            if !(if job.meets { pages.read_last() } else { pages.read_first() }) {
                break;
            }
        }
    };
    thread::scope(|scope| {
        (1..cores.min(READERS_MOST).min(pages.unread())).for_each(|_| drop(scope.spawn(read)));
        read();
    });
    condition.pager.end();
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the pager thread had panicked");
        }
    }
}
