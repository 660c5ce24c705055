//! How the engine is, for those who must not wait for its thread: health and the watchdog ask here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a thread may be at that can take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A forward pass over this many rows.
    Step { rows: usize },
    /// Finding, reading and checking pages.
    Pages,
    /// Making this many turns' gains durable.
    Commit { turns: usize },
    /// Reading a page from disk, with so many to be read after it.
    PageIn { pages: usize },
}

impl Work {
    fn encode(self) -> u64 {
        match self {
            Work::Step { rows } => (rows as u64) << 2,
            Work::Pages => 1,
            Work::Commit { turns } => (turns as u64) << 2 | 2,
            Work::PageIn { pages } => (pages as u64) << 2 | 3,
        }
    }

    fn decode(code: u64) -> Work {
        let count = (code >> 2) as usize;
        match code & 3 {
            0 => Work::Step { rows: count },
            1 => Work::Pages,
            2 => Work::Commit { turns: count },
            _ => Work::PageIn { pages: count },
        }
    }

    fn describe(self) -> String {
        match self {
            Work::Step { rows } => format!("a step of {rows} rows"),
            Work::Pages => "looking after KV pages".into(),
            Work::Commit { turns } => format!("a commit of {turns} turns"),
            Work::PageIn { pages } => format!("reading a KV page from disk, of {pages},"),
        }
    }
}

/// What one thread is at, and since when. Written without a lock, because that happens in every step.
pub(crate) struct Pulse {
    epoch: Instant,
    work: AtomicU64,
    /// Microseconds after the epoch, at least 1; 0 while there is nothing to do.
    since: AtomicU64,
}

/// Work that lasts too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overdue {
    work: Work,
    /// Tells this piece of work from the next one.
    pub since: u64,
    pub lasted: Duration,
}

impl std::fmt::Display for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has lasted {:.0} s", self.work.describe(), self.lasted.as_secs_f64())
    }
}

impl Pulse {
    fn new() -> Pulse {
        Pulse { epoch: Instant::now(), work: AtomicU64::new(0), since: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    pub fn begin(&self, work: Work) {
        self.work.store(work.encode(), Ordering::Relaxed);
        self.since.store(self.now().max(1), Ordering::Release);
    }

    pub fn end(&self) {
        self.since.store(0, Ordering::Release);
    }

    /// What the thread is at, if it has been for `limit`.
    pub fn overdue(&self, limit: Duration) -> Option<Overdue> {
        let since = self.since.load(Ordering::Acquire);
        let lasted = Duration::from_micros(self.now().saturating_sub(since));
        let work = Work::decode(self.work.load(Ordering::Relaxed));
        (since > 0 && lasted >= limit).then_some(Overdue { work, since, lasted })
    }
}

/// How an engine is. Shared by its threads and its handles.
pub(crate) struct Condition {
    /// Why it cannot serve, if it cannot.
    trouble: Mutex<Option<String>>,
    /// Of the engine thread, of the one that writes commits, and of those that read pages.
    pub engine: Pulse,
    pub disk: Pulse,
    pub pager: Pulse,
    stuck_after_ms: AtomicU64,
    /// How often it was started again, and how often work lasted too long.
    pub restarts: AtomicU64,
    pub stuck: AtomicU64,
}

impl Condition {
    pub fn new(stuck_after: Duration) -> Condition {
        let condition = Condition {
            trouble: Mutex::default(),
            engine: Pulse::new(),
            disk: Pulse::new(),
            pager: Pulse::new(),
            stuck_after_ms: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
            stuck: AtomicU64::new(0),
        };
        condition.set_stuck_after(stuck_after);
        condition
    }

    pub fn stuck_after(&self) -> Duration {
        Duration::from_millis(self.stuck_after_ms.load(Ordering::Relaxed))
    }

    pub fn set_stuck_after(&self, limit: Duration) {
        self.stuck_after_ms.store(limit.as_millis() as u64, Ordering::Relaxed);
    }

    /// Notes why the engine cannot serve, unless something was wrong before. Whether it was noted.
    pub fn complain(&self, what: &str) -> bool {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = trouble.is_none();
        trouble.get_or_insert_with(|| what.to_owned());
        is_new
    }

    /// What is wrong from now on, whatever was before.
    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Why the engine cannot serve now, if it cannot.
    pub fn unhealthy(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let limit = self.stuck_after();
        let overdue =
            || [&self.engine, &self.disk, &self.pager].iter().find_map(|pulse| pulse.overdue(limit));
        trouble
            .or_else(|| overdue().map(|overdue| format!("{overdue}, the limit is {} s", limit.as_secs_f64())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_lasts_too_long_is_named_until_it_ends() {
        let condition = Condition::new(Duration::ZERO);
        assert_eq!(condition.unhealthy(), None);
        condition.engine.begin(Work::Step { rows: 12 });
        assert_eq!(condition.unhealthy().unwrap(), "a step of 12 rows has lasted 0 s, the limit is 0 s");
        condition.engine.end();
        condition.disk.begin(Work::Commit { turns: 3 });
        assert!(condition.unhealthy().unwrap().starts_with("a commit of 3 turns has lasted"));
        condition.set_stuck_after(Duration::from_secs(3600));
        assert_eq!(condition.unhealthy(), None);
        condition.disk.end();
        condition.engine.begin(Work::Pages);
        assert_eq!(condition.unhealthy(), None);
        condition.engine.end();
        condition.set_stuck_after(Duration::ZERO);
        condition.pager.begin(Work::PageIn { pages: 7 });
        assert!(condition.unhealthy().unwrap().starts_with("reading a KV page from disk, of 7, has lasted"));
    }

    #[test]
    fn the_first_trouble_is_the_one_that_is_told() {
        let condition = Condition::new(Duration::from_secs(30));
        assert!(condition.complain("the disk failed"));
        assert!(!condition.complain("a commit failed"));
        assert_eq!(condition.unhealthy().unwrap(), "the disk failed");
        condition.set_trouble(None);
        assert_eq!(condition.unhealthy(), None);
    }
}
