//! The engine thread: `schedule → forward → sample → publish → persist`, until told to stop.

mod admission;
mod commits;
mod paging;
mod prompts;
mod step;

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dormouse_kv::{BlockTable, Found, Limits, PagePool, Realm};
use dormouse_models::{Backend, Model, TokenId};
use tokio::sync::oneshot;

use crate::condition::{Condition, Work};
use crate::faults::Faults;
use crate::outbox::Outbox;
use crate::pager::{PagedIn, Pager};
use crate::persist::{Acknowledgement, Persister};
use crate::sampler::Sampler;
use crate::speculation::DraftSource;
use crate::step_cost::{Pace, StepCost};
use crate::turn::{COMMIT_INTERVAL, Ending, Turn, Waiting};
use crate::{Claim, EngineError, EngineStats, Event, FinishReason, Listener, Miss, Receipt, Tier, TurnSpec};
use admission::Paused;
use paging::{Coming, Paged, Who};
use step::Slice;

/// What the engine thread is asked.
pub enum Command {
    Submit(Box<TurnSpec>, Arc<dyn Listener>, Instant),
    Cancel(String),
    Claim(Realm, Vec<TokenId>, oneshot::Sender<Result<Claim, EngineError>>),
    Unclaim {
        leaf_slot: u32,
        purge: bool,
    },
    /// A session whose pages are the last to be evicted, and where its path ends.
    Keep(String, Option<u32>),
    LetGo(String),
    Park(Realm, Vec<TokenId>, oneshot::Sender<u64>),
    Resume {
        realm: Realm,
        log: Vec<TokenId>,
        dry_run: bool,
        answer: oneshot::Sender<Result<Receipt, EngineError>>,
    },
    Stats(oneshot::Sender<EngineStats>),
    /// What pages may take from now on.
    Limit(Limits),
    /// The outcomes of commits that were handed over together, oldest first, and how long they took.
    Persisted(Vec<Acknowledgement>, Duration),
    PagedIn(PagedIn),
    /// A thread that the engine cannot do without has panicked.
    Broken(&'static str),
    Shutdown(oneshot::Sender<()>),
}

/// Everything the loop owns. One thread, so nothing here needs a lock.
pub struct Worker {
    model: Arc<Model>,
    backend: Backend,
    pool: PagePool,
    page_file: i64,
    persister: Persister,
    pager: Pager,
    drafts: DraftSource,
    sampler: Sampler,
    commands: mpsc::Receiver<Command>,
    /// What those know who do not wait for this thread.
    condition: Arc<Condition>,
    faults: Faults,
    /// As they were set while the engine ran.
    limits: Option<Limits>,
    outbox: Outbox,
    state: State,
}

/// What of a worker outlives a panic.
pub struct Parts {
    pub model: Arc<Model>,
    pub backend: Backend,
    pub page_file: i64,
    pub drafts: DraftSource,
    pub stats: EngineStats,
    pub limits: Option<Limits>,
    pub outbox: Outbox,
    /// Who waits for the engine's end.
    pub stopping: Option<oneshot::Sender<()>>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Waiting>,
    /// The turns that hold pages, those that have waited longest first.
    running: Vec<Turn>,
    /// Turns whose pages others needed, in the same order.
    paused: Vec<Paused>,
    /// Pages that are being read from disk, and how many times they were asked for.
    coming: Vec<Coming>,
    next_page_in: u64,
    /// Turns that ended and made room that no paused turn has taken yet.
    room: usize,
    /// When the running turns' gains were last sent to disk, all together.
    last_commit: Option<Instant>,
    /// A commit of removals alone is on its way, or the last one failed.
    removals_in_flight: bool,
    removals_failed: Option<EngineError>,
    /// Of steps without prompts, of prompts, and of reading pages.
    cost: StepCost,
    pace: Pace,
    /// What a long prompt's last chunk left of what a step may spend on it beside turns that decode, in the decoder's measure: a
    /// layer at most, and below 0 where it took more.
    unspent: f64,
    disk_pace: Pace,
    /// The last step could not be computed, and health says so.
    has_failed: bool,
    /// A piece of a prompt that is between two layers.
    chunk: Option<prompts::Chunk>,
    stats: EngineStats,
    stopping: Option<oneshot::Sender<()>>,
}

impl Worker {
    pub fn new(
        parts: Parts,
        mut pool: PagePool,
        (persister, pager): (Persister, Pager),
        commands: mpsc::Receiver<Command>,
        condition: Arc<Condition>,
        faults: Faults,
    ) -> Worker {
        let Parts { model, backend, page_file, drafts, stats, limits, outbox, stopping } = parts;
        let state = State { stats, stopping, ..State::default() };
        let sampler = Sampler::new(backend.cpu());
        pool.set_cost_doubles_at(prompts::cost_doubles_at(model.config(), model.context()));
        Worker {
            model,
            backend,
            pool,
            page_file,
            persister,
            pager,
            drafts,
            sampler,
            commands,
            condition,
            faults,
            limits,
            outbox,
            state,
        }
    }

    pub fn model_name(&self) -> String {
        self.model.name.clone()
    }

    /// Until it is told to stop.
    pub fn run(&mut self) {
        let mut progress = false;
        loop {
            self.take_commands(progress);
            if self.state.stopping.is_some() && self.state.running.is_empty() && self.removals_are_settled() {
                break;
            }
            self.condition.engine.begin(Work::Pages);
            let admitted = self.admit();
            if admitted {
                self.tell_listeners();
            }
            let step = self.schedule();
            self.backend.forget(&self.pool.take_changed());
            if !step.is_empty() {
                let begun = Instant::now();
                let rows = step.iter().map(Slice::all_rows).sum();
                self.condition.engine.begin(Work::Step { rows });
                let computed = self.forward(&step);
                self.faults.strike(self.state.stats.steps, self.backend.cpu());
                if computed {
                    self.sample(&step);
                }
                self.tell_listeners();
                if computed {
                    let took = begun.elapsed();
                    self.learn(&step, took);
                    self.measure_step(rows, took);
                }
            }
            let persisted = self.persist();
            self.tell_listeners();
            self.condition.engine.end();
            progress = admitted || !step.is_empty() || persisted;
        }
    }

    /// Sends off what turns have said.
    fn tell_listeners(&mut self) {
        for turn in &mut self.state.running {
            turn.tell(&mut self.outbox);
        }
        self.outbox.send();
    }

    fn measure_step(&mut self, rows: usize, took: Duration) {
        let measured = &mut self.state.stats.distributions;
        measured.step_rows.observe(rows as f64);
        measured.step_seconds.observe(took.as_secs_f64());
    }

    /// After [`Worker::run`]: whoever waits for the end finds the page file closed.
    pub fn close(self) {
        let Worker { pool, persister, pager, state, mut outbox, .. } = self;
        outbox.send();
        drop((persister, pager));
        drop(pool);
        if let Some(answer) = state.stopping {
            let _ = answer.send(());
        }
    }

    /// After a panic: every turn fails, and what was on its way to disk arrives there first, because their ends are read from
    /// it. The page file is closed; what it held unnamed is lost, as after a crash of the process.
    pub fn give_up(self) -> Parts {
        let Worker {
            model,
            mut backend,
            pool,
            page_file,
            persister,
            pager,
            drafts,
            commands,
            limits,
            mut outbox,
            mut state,
            ..
        } = self;
        drop((persister, pager));
        let mut fail = |waiting: Waiting| {
            outbox.put(&waiting.listener, Event::Failed(EngineError::Restarted));
        };
        for command in commands.try_iter() {
            match command {
                Command::Submit(spec, listener, since) => fail(Waiting { spec: *spec, listener, since }),
                Command::Shutdown(answer) => state.stopping = Some(answer),
                // Whoever waits for an answer sees that none comes; claims are counted anew from the catalog.
                _ => {}
            }
        }
        state.queue.drain(..).chain(state.coming.drain(..).filter_map(Coming::give_up)).for_each(fail);
        for mut turn in state.running.into_iter().chain(state.paused.into_iter().map(|paused| paused.turn)) {
            turn.fail_commit(EngineError::Restarted);
            drop(turn.close(&mut outbox));
        }
        outbox.send();
        drop(pool);
        backend.forget_all();
        Parts {
            model,
            backend,
            page_file,
            drafts,
            stats: state.stats,
            limits,
            outbox,
            stopping: state.stopping,
        }
    }

    /// Takes every command that is there. After a round without progress it sleeps for the next one: whatever the
    /// running turns wait for arrives as a command, and what is due with time is looked at in between.
    fn take_commands(&mut self, progress: bool) {
        if !progress {
            let command = if self.state.running.is_empty() {
                self.commands.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            } else {
                self.commands.recv_timeout(COMMIT_INTERVAL)
            };
            match command {
                Ok(command) => self.obey(command),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                // The persister's end is the last: it ends with us.
                Err(mpsc::RecvTimeoutError::Disconnected) => self.stop(oneshot::channel().0),
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        self.condition.engine.begin(Work::Pages);
        self.carry_out(command);
        self.condition.engine.end();
    }

    fn carry_out(&mut self, command: Command) {
        // An answer that nobody waits for any more is no error.
        match command {
            Command::Submit(spec, listener, since) => {
                if self.state.stopping.is_some() {
                    self.outbox.put(&listener, Event::Failed(EngineError::Stopped));
                    return;
                }
                // Here and not when its turn comes: by then its owner may have said otherwise.
                if spec.pinned {
                    self.pool.keep(&spec.session, spec.claim);
                }
                let waiting = Waiting { spec: *spec, listener, since };
                let after =
                    self.state.queue.iter().rposition(|other| other.spec.priority >= waiting.spec.priority);
                self.state.queue.insert(after.map_or(0, |at| at + 1), waiting);
            }
            Command::Cancel(id) => self.cancel(&id),
            Command::Claim(realm, log, answer) => {
                let _ = answer.send(self.claim(realm, &log));
            }
            Command::Unclaim { leaf_slot, purge } => self.pool.unclaim(leaf_slot, purge),
            Command::Keep(session, leaf) => self.pool.keep(&session, leaf),
            Command::LetGo(session) => self.pool.let_go(&session),
            Command::Park(realm, log, answer) => {
                let _ = answer.send(self.pool.park(realm, &log));
            }
            Command::Resume { realm, log, dry_run: true, answer } => {
                let _ = answer.send(Ok(self.estimate(realm, &log)));
            }
            Command::Resume { answer, .. } if self.state.stopping.is_some() => {
                let _ = answer.send(Err(EngineError::Stopped));
            }
            Command::Resume { realm, log, dry_run: false, answer } => {
                let found = self.pool.find(realm, &log);
                match self.pool.page_in(&found) {
                    Some(pages) => self.page_in(pages, Who::Resume { realm, log, answer }),
                    None => self.bring(realm, &log, Paged::default(), answer),
                }
            }
            Command::Stats(answer) => {
                let state = &self.state;
                let _ = answer.send(EngineStats {
                    running: state.running.len(),
                    paused: state.paused.len(),
                    waiting: state.queue.len(),
                    paging_in: state.coming.len(),
                    disk_bytes_per_second: state.disk_pace.per_second(),
                    kv: self.pool.stats(),
                    ..state.stats.clone()
                });
            }
            Command::Limit(limits) => {
                self.limits = Some(limits);
                self.pool.set_limits(limits);
            }
            Command::Persisted(group, took) => {
                self.state.stats.distributions.commit_seconds.observe(took.as_secs_f64());
                self.acknowledge(group);
            }
            Command::PagedIn(paged) => self.paged_in(paged),
            // What broke there cannot be mended here: the supervisor builds all of it again.
            Command::Broken(what) => panic!("{what}"),
            Command::Shutdown(answer) => self.stop(answer),
        }
    }

    fn stop(&mut self, answer: oneshot::Sender<()>) {
        self.state.stopping = Some(answer);
        let coming: Vec<Waiting> = self.state.coming.drain(..).filter_map(Coming::give_up).collect();
        for waiting in self.state.queue.drain(..).chain(coming) {
            self.outbox.put(&waiting.listener, Event::Failed(EngineError::Stopped));
        }
        self.end_all_paused(&Ending::Fail(EngineError::Stopped));
        for turn in &mut self.state.running {
            turn.end(Ending::Fail(EngineError::Stopped));
        }
    }

    fn cancel(&mut self, id: &str) {
        self.end_paused(id, Ending::Finish(FinishReason::Cancelled));
        if let Some(turn) = self.state.running.iter_mut().find(|turn| turn.spec.turn == id) {
            turn.end(Ending::Finish(FinishReason::Cancelled));
        } else if let Some(waiting) = self.take_waiting(id) {
            // It never ran: it ends with what its log already held.
            let receipt =
                Receipt { session: waiting.spec.session.clone(), exact: true, ..Receipt::default() };
            let table = self.pool.attach(waiting.spec.realm, &[]).table;
            let mut turn = Turn::new(&self.model, &self.drafts, waiting, table, receipt);
            turn.end(Ending::Finish(FinishReason::Cancelled));
            self.state.running.push(turn);
        }
    }

    /// A turn that has no pages yet.
    fn take_waiting(&mut self, id: &str) -> Option<Waiting> {
        if let Some(at) = self.state.queue.iter().position(|waiting| waiting.spec.turn == id) {
            return self.state.queue.remove(at);
        }
        let waits = |coming: &Coming| coming.waiting().is_some_and(|spec| spec.turn == id);
        let at = self.state.coming.iter().position(waits)?;
        self.state.coming.remove(at).give_up()
    }

    fn claim(&mut self, realm: Realm, log: &[TokenId]) -> Result<Claim, EngineError> {
        let (leaf_slot, kv_len) = self.pool.leaf_of(realm, log);
        if let Some(slot) = leaf_slot {
            self.pool.claim(slot).map_err(|error| EngineError::Storage(error.to_string()))?;
        }
        Ok(Claim { leaf_slot, kv_len })
    }

    /// What restoring this log would find and read.
    fn estimate(&self, realm: Realm, log: &[TokenId]) -> Receipt {
        /// Bytes per second of a modest solid-state disk, before this one's were measured.
        const DISK_RATE: f64 = 1e9;
        let found = self.pool.find(realm, log);
        let measured = self.state.disk_pace.per_second();
        let rate = if measured > 0.0 { measured } else { DISK_RATE };
        Receipt {
            restored_tokens: found.tokens(),
            tier: tier(found.tokens(), found.missing_bytes() > 0),
            restore_ms: found.missing_bytes() as f64 / rate * 1e3,
            bytes_read: found.missing_bytes(),
            exact: true,
            ..Receipt::default()
        }
    }

    /// Maps and checks the pages that were found of this log. The table's pages stay pinned until the caller releases it.
    fn restore(
        &mut self,
        realm: Realm,
        log: &[TokenId],
        found: Found,
        paged: Paged,
    ) -> (BlockTable, Receipt) {
        let begun = Instant::now();
        let attached = self.pool.attach_found(realm, log, found);
        let took = (begun.elapsed() + paged.took).as_secs_f64();
        if attached.restored > 0 {
            self.state.stats.distributions.restore_seconds.observe(took);
        }
        let bytes_read = attached.bytes_read + paged.bytes;
        let receipt = Receipt {
            restored_tokens: attached.restored,
            tier: tier(attached.restored, bytes_read > 0),
            restore_ms: took * 1e3,
            bytes_read,
            exact: true,
            miss: (!attached.damaged.is_empty()).then(|| Miss::new("page_damaged", attached.restored)),
            ..Receipt::default()
        };
        (attached.table, receipt)
    }

    fn in_trouble(&self, what: String) -> EngineError {
        if self.condition.complain(&what) {
            tracing::error!("{what}");
        }
        EngineError::Storage(what)
    }
}

fn tier(restored: usize, from_disk: bool) -> Tier {
    match (restored, from_disk) {
        (0, _) => Tier::None,
        (_, true) => Tier::Disk,
        (_, false) => Tier::Ram,
    }
}
