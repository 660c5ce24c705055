//! A small fixed pool of compute threads: they spin for a moment between parallel regions, then park.
//!
//! A decode step opens some 150 regions of a few microseconds each; waking a parked thread costs more than such a
//! region does, so threads stay awake through a step and sleep only when the engine is idle.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::{self, JoinHandle, Thread};

/// Rounds of `spin_loop` before a waiting thread parks: some tens of microseconds.
const SPIN_ROUNDS: u32 = 20_000;

type Task = dyn Fn(usize) + Sync;

/// What a thread shares with the others, on cache lines of its own (processors fetch them in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Share {
    /// The tasks of the open region that are first this thread's to take: bits 0..32 hold the next one, bits 32..64 their
    /// end. One word, so that taking a task and knowing that it exists are one atomic step.
    tasks: AtomicU64,
    /// Tasks that this thread has ever done. Only it writes here.
    done: AtomicU64,
    parked: AtomicBool,
}

impl Share {
    fn open(&self, tasks: Range<usize>) {
        self.tasks.store((tasks.end as u64) << 32 | tasks.start as u64, Ordering::SeqCst);
    }

    fn has_task(&self) -> bool {
        let tasks = self.tasks.load(Ordering::SeqCst);
        (tasks & u64::from(u32::MAX)) < tasks >> 32
    }

    /// A task of the region that is open now. The region stays open until the task is reported done.
    fn take(&self) -> Option<usize> {
        if !self.has_task() {
            return None;
        }
        let tasks = self.tasks.fetch_add(1, Ordering::AcqRel);
        let next = tasks & u64::from(u32::MAX);
        (next < tasks >> 32).then_some(next as usize)
    }
}

struct Shared {
    /// One of each thread, the caller of `run` last.
    shares: Vec<Share>,
    /// The open region's body. Written while no region is open, read only by holders of one of its tasks.
    body: UnsafeCell<Option<*const Task>>,
    stop: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: `body` is guarded by the protocol above; everything else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `body` is only dereferenced while `Pool::run`, which borrows the body, has not returned.
unsafe impl Send for Shared {}

impl Shared {
    /// Runs tasks of the open region until none is left to take: a thread's own, then the others'.
    fn work(&self, own: usize) {
        let threads = self.shares.len();
        for victim in (0..threads).map(|step| &self.shares[(own + step) % threads]) {
            while let Some(task) = victim.take() {
                // SAFETY: holding a task of the open region, so `run` has published `body` before opening it (Release by
                // the SeqCst store, Acquire by `take`) and does not return before this task is counted as done.
                let body = unsafe { &*(*self.body.get()).expect("an open region has a body") };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(task))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                let done = &self.shares[own].done;
                done.store(done.load(Ordering::Relaxed) + 1, Ordering::Release);
            }
        }
    }

    /// Tasks that all threads have ever done.
    fn done(&self) -> u64 {
        self.shares.iter().map(|share| share.done.load(Ordering::Acquire)).sum()
    }

    fn worker(&self, index: usize) {
        let own = &self.shares[index];
        loop {
            let mut spins = 0;
            while !own.has_task() {
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                spins += 1;
                if spins < SPIN_ROUNDS {
                    std::hint::spin_loop();
                    continue;
                }
                own.parked.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                // `run` opens the region, then looks at `parked`; here it is the other way round: one of both sees.
                if !own.has_task() && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                own.parked.store(false, Ordering::SeqCst);
                spins = 0;
            }
            self.work(index);
        }
    }
}

/// The pool. One thread at a time may open regions (`run` takes `&self` but is not re-entrant).
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
    running: AtomicBool,
}

impl Pool {
    /// A pool of `threads` threads, the caller of `run` counted in.
    pub fn new(threads: usize) -> Pool {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            shares: (0..=workers).map(|_| Share::default()).collect(),
            body: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let handles: Vec<JoinHandle<()>> = (0..workers)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                // A machine that refuses another thread computes with the ones it gave.
                thread::Builder::new()
                    .name(format!("dormouse-cpu-{}", index + 1))
                    .spawn(move || shared.worker(index))
                    .ok()
            })
            .collect();
        let threads = handles.iter().map(|handle| handle.thread().clone()).collect();
        Pool { shared, threads, handles, running: AtomicBool::new(false) }
    }

    /// Threads that compute, the caller's counted in.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `body(0)` … `body(tasks - 1)` on all threads and returns when all are done. Each thread begins with a run of
    /// neighbours of its own, and takes from the others' when it has done those. Which thread runs which task is left open:
    /// bodies must not depend on it.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        assert!(tasks <= u32::MAX as usize / 2, "too many tasks in one region");
        if tasks <= 1 || self.threads.is_empty() {
            (0..tasks).for_each(body);
            return;
        }
        assert!(!self.running.swap(true, Ordering::Acquire), "Pool::run is not re-entrant");
        let shared = &*self.shared;
        // SAFETY: no region is open, so no other thread reads `body`. The lifetime is erased, but `run` outlives all use.
        unsafe {
            *shared.body.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(body))
        };
        let (caller, done) = (self.threads.len(), shared.done() + tasks as u64);
        for (thread, share) in shared.shares.iter().enumerate() {
            share.open(thread * tasks / (caller + 1)..(thread + 1) * tasks / (caller + 1));
        }
        fence(Ordering::SeqCst);
        for (share, thread) in shared.shares.iter().zip(&self.threads) {
            if share.parked.load(Ordering::SeqCst) && share.parked.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        shared.work(caller);
        while shared.done() < done {
            std::hint::spin_loop();
        }
        self.running.store(false, Ordering::Release);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute task panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // A worker catches its tasks' panics, so there is nothing left that joining could report.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_task_of_every_region_runs_exactly_once() {
        let pool = Pool::new(3);
        for region in 0..2_000 {
            let counts: Vec<AtomicUsize> = (0..region % 70).map(|_| AtomicUsize::new(0)).collect();
            pool.run(counts.len(), &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "region {region}");
            if region % 500 == 0 {
                thread::sleep(std::time::Duration::from_millis(30)); // long enough that the workers park
            }
        }
    }

    #[test]
    fn a_panicking_task_panics_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|task| assert!(task != 5, "on purpose"));
        }));
        assert!(outcome.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(8, &|task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
