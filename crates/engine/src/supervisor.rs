//! The engine thread's keeper: what a broken invariant takes down is built again, as a start of the process does it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use dormouse_kv::PagePool;
use dormouse_store::{Durability, Store};

use crate::EngineError;
use crate::condition::Condition;
use crate::faults::Faults;
use crate::pager::Pager;
use crate::persist::Persister;
use crate::worker::{Command, Parts, Worker};

/// Opens the page file and its catalog, as a start does, or says why that cannot be.
pub type Reopen = Box<dyn Fn() -> Result<PagePool, String> + Send>;

/// An engine that panics more often than `RESTARTS_MOST` times within `RESTARTS_WITHIN` stays down: what breaks it is not a
/// request that came once.
const RESTARTS_MOST: usize = 3;
const RESTARTS_WITHIN: Duration = Duration::from_secs(60);

/// Where commands go: to the engine thread's present incarnation.
pub(crate) struct Line(Mutex<Option<mpsc::Sender<Command>>>);

impl Line {
    /// A line, and its other end.
    pub fn new() -> (Line, mpsc::Receiver<Command>) {
        let (sender, inbox) = mpsc::channel();
        (Line(Mutex::new(Some(sender))), inbox)
    }

    pub fn send(&self, command: Command) -> Result<(), EngineError> {
        self.sender().ok_or(EngineError::Stopped)?.send(command).map_err(|_| EngineError::Stopped)
    }

    /// There is an engine, or will be again.
    pub fn is_open(&self) -> bool {
        self.sender().is_some()
    }

    fn sender(&self) -> Option<mpsc::Sender<Command>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is sent from now on is for the next incarnation.
    fn renew(&self) -> mpsc::Receiver<Command> {
        let (sender, inbox) = mpsc::channel();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        inbox
    }

    fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Runs the engine, on the engine thread.
pub(crate) struct Supervisor {
    pub store: Store,
    pub durability: Durability,
    pub reopen: Option<Reopen>,
    pub faults: Faults,
    pub line: Arc<Line>,
    pub condition: Arc<Condition>,
}

/// Why there is no engine any more.
enum End {
    /// It was told to stop.
    Stopped,
    Down(String),
}

impl Supervisor {
    /// The threads that wait for the disk, for the present incarnation.
    pub fn disk_threads(&self) -> Result<(Persister, Pager), String> {
        let answers = self.line.sender().ok_or("the engine has stopped")?;
        let condition = || Arc::clone(&self.condition);
        let faults = &self.faults;
        let persister = Persister::start(
            self.store.clone(),
            self.durability,
            answers.clone(),
            condition(),
            faults.commit_delay,
        )
        .map_err(|why| format!("the thread that writes commits cannot be started: {why}"))?;
        let pager = Pager::start(answers, condition(), faults.page_in_delay)
            .map_err(|why| format!("the thread that reads pages cannot be started: {why}"))?;
        Ok((persister, pager))
    }

    /// Until the engine is told to stop, or cannot be kept up.
    pub fn run(self, mut worker: Worker) {
        let notice = Notice(&self);
        let mut panics = VecDeque::new();
        let end = loop {
            // What a panic may have left half changed is not looked at again: the turns are told, the rest is dropped.
            if catch_unwind(AssertUnwindSafe(|| worker.run())).is_ok() {
                worker.close();
                break End::Stopped;
            }
            match self.restart(worker, &mut panics) {
                Ok(next) => worker = next,
                Err(end) => break end,
            }
        };
        if let End::Down(why) = end {
            tracing::error!("{why}");
            self.condition.set_trouble(Some(why));
        }
        drop(notice);
    }

    fn restart(&self, broken: Worker, panics: &mut VecDeque<Instant>) -> Result<Worker, End> {
        let model = broken.model_name();
        self.condition.set_trouble(Some("the engine thread panicked and is being started again".into()));
        tracing::error!(model, "the engine thread panicked; its turns fail, and it is started again");
        let commands = self.line.renew();
        let Parts { model: weights, backend, page_file, drafts, stats, limits, outbox, stopping } =
            broken.give_up();
        self.condition.engine.end();
        self.condition.disk.end();
        self.condition.pager.end();
        if let Some(answer) = stopping {
            // Nobody waiting is no error.
            let _ = answer.send(());
            return Err(End::Stopped);
        }
        panics.push_back(Instant::now());
        panics.retain(|at: &Instant| at.elapsed() < RESTARTS_WITHIN);
        if panics.len() > RESTARTS_MOST {
            return Err(End::Down(format!(
                "the engine thread panicked {} times within {} s and stays down; look at the log and restart the server",
                panics.len(),
                RESTARTS_WITHIN.as_secs()
            )));
        }
        let down = |why: String| {
            End::Down(format!(
                "the engine thread panicked and cannot be started again: {why}; restart the server"
            ))
        };
        let reopen = self.reopen.as_ref().ok_or_else(|| down("nobody said how".into()))?;
        let mut pool = reopen().map_err(down)?;
        if let Some(limits) = limits {
            pool.set_limits(limits);
        }
        let disk = self.disk_threads().map_err(down)?;
        let parts =
            Parts { model: weights, backend, page_file, drafts, stats, limits, outbox, stopping: None };
        let condition = Arc::clone(&self.condition);
        let next = Worker::new(parts, pool, disk, commands, condition, self.faults.clone());
        self.condition.restarts.fetch_add(1, Ordering::Relaxed);
        self.condition.set_trouble(None);
        tracing::warn!(model, "the engine was started again");
        Ok(next)
    }
}

/// Held by a thread that the engine cannot do without: tells it of a panic, as whoever waits for that thread would wait for ever.
pub(crate) struct Alarm(pub mpsc::Sender<Command>, pub &'static str);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // An engine that is gone waits for nothing.
            let _ = self.0.send(Command::Broken(self.1));
        }
    }
}

/// Notes the end of the engine thread, however it comes.
struct Notice<'a>(&'a Supervisor);

impl Drop for Notice<'_> {
    fn drop(&mut self) {
        self.0.line.close();
        let how = if std::thread::panicking() { "panicked" } else { "stopped" };
        self.0.condition.complain(&format!("the engine thread has {how}; restart the server"));
    }
}
