//! The engine thread: `schedule → forward → sample → publish → persist`, until told to stop.

mod admission;
mod step;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use dormouse_kernels::Cpu;
use dormouse_kv::{PagePool, Realm, Tail};
use dormouse_models::decoder::Activations;
use dormouse_models::{Model, TokenId};
use dormouse_store::StepCommit;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::persist::{Acknowledgement, Commit, Persister};
use crate::speculation::DraftSource;
use crate::step_cost::StepCost;
use crate::turn::{COMMIT_INTERVAL, COMMIT_TOKENS, Ending, Turn, Waiting};
use crate::{Claim, EngineError, EngineStats, Event, FinishReason, Miss, Receipt, Tier, TurnSpec};
use admission::Paused;

/// What the engine thread is asked.
pub enum Command {
    Submit(Box<TurnSpec>, UnboundedSender<Event>, Instant),
    Cancel(String),
    Claim(Realm, Vec<TokenId>, oneshot::Sender<Result<Claim, EngineError>>),
    Unclaim {
        leaf_slot: u32,
        purge: bool,
    },
    Park(Realm, Vec<TokenId>, oneshot::Sender<u64>),
    Resume {
        realm: Realm,
        log: Vec<TokenId>,
        dry_run: bool,
        answer: oneshot::Sender<Receipt>,
    },
    Stats(oneshot::Sender<EngineStats>),
    /// The outcomes of commits that were handed over together, oldest first.
    Persisted(Vec<Acknowledgement>),
    Shutdown(oneshot::Sender<()>),
}

/// Everything the loop owns. One thread, so nothing here needs a lock.
pub struct Worker {
    pub model: Arc<Model>,
    pub cpu: Cpu,
    pub pool: PagePool,
    pub page_file: i64,
    pub persister: Persister,
    pub drafts: DraftSource,
    pub commands: mpsc::Receiver<Command>,
    /// Why the engine cannot serve any more, for those who ask about its health.
    pub trouble: Arc<Mutex<Option<String>>>,
    pub state: State,
}

#[derive(Default)]
pub struct State {
    queue: VecDeque<Waiting>,
    /// The turns that hold pages, those that have waited longest first.
    running: Vec<Turn>,
    /// Turns whose pages others needed, in the same order.
    paused: Vec<Paused>,
    /// Turns that ended and made room that no paused turn has taken yet.
    room: usize,
    /// When the running turns' gains were last sent to disk, all together.
    last_commit: Option<Instant>,
    /// A commit of removals alone is on its way, or the last one failed.
    removals_in_flight: bool,
    removals_failed: Option<EngineError>,
    /// Turn that the prefill budget is offered to first, so that it goes round.
    next_prefill: usize,
    /// Of steps that are mostly prompt.
    rows_per_second: f64,
    /// Of steps that are not.
    cost: StepCost,
    work: Activations,
    stats: EngineStats,
    stopping: Option<oneshot::Sender<()>>,
}

impl Worker {
    pub fn run(mut self) {
        let mut progress = false;
        loop {
            self.take_commands(progress);
            if self.state.stopping.is_some() && self.state.running.is_empty() && self.removals_are_settled() {
                break;
            }
            let admitted = self.admit();
            let step = self.schedule();
            if !step.is_empty() {
                let begun = Instant::now();
                self.forward(&step);
                self.sample(&step);
                self.learn(&step, begun.elapsed());
            }
            let persisted = self.persist();
            progress = admitted || !step.is_empty() || persisted;
        }
        // Whoever waits for the end may now find the page file closed.
        let Worker { pool, persister, state, .. } = self;
        drop(persister);
        drop(pool);
        if let Some(answer) = state.stopping {
            let _ = answer.send(());
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

    /// The catalog knows of every page that was given up, or cannot be told.
    fn removals_are_settled(&mut self) -> bool {
        self.commit_removals().is_err() || !self.state.removals_in_flight
    }

    fn obey(&mut self, command: Command) {
        // An answer that nobody waits for any more is no error.
        match command {
            Command::Submit(spec, events, since) => {
                if self.state.stopping.is_some() {
                    let _ = events.send(Event::Failed(EngineError::Stopped));
                    return;
                }
                let waiting = Waiting { spec: *spec, events, since };
                let after =
                    self.state.queue.iter().rposition(|other| other.spec.priority >= waiting.spec.priority);
                self.state.queue.insert(after.map_or(0, |at| at + 1), waiting);
            }
            Command::Cancel(id) => self.cancel(&id),
            Command::Claim(realm, log, answer) => {
                let _ = answer.send(self.claim(realm, &log));
            }
            Command::Unclaim { leaf_slot, purge } => self.pool.unclaim(leaf_slot, purge),
            Command::Park(realm, log, answer) => {
                let _ = answer.send(self.pool.park(realm, &log));
            }
            Command::Resume { realm, log, dry_run, answer } => {
                let receipt = if dry_run {
                    self.estimate(realm, &log)
                } else {
                    let (table, receipt) = self.restore(realm, &log);
                    self.pool.release(table);
                    receipt
                };
                let _ = answer.send(receipt);
            }
            Command::Stats(answer) => {
                let state = &self.state;
                let _ = answer.send(EngineStats {
                    running: state.running.len(),
                    paused: state.paused.len(),
                    waiting: state.queue.len(),
                    kv: self.pool.stats(),
                    ..state.stats.clone()
                });
            }
            Command::Persisted(group) => self.acknowledge(group),
            Command::Shutdown(answer) => self.stop(answer),
        }
    }

    fn stop(&mut self, answer: oneshot::Sender<()>) {
        self.state.stopping = Some(answer);
        for waiting in self.state.queue.drain(..) {
            let _ = waiting.events.send(Event::Failed(EngineError::Stopped));
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
        } else if let Some(at) = self.state.queue.iter().position(|waiting| waiting.spec.turn == id)
            && let Some(waiting) = self.state.queue.remove(at)
        {
            // It never ran: it ends with what its log already held.
            let receipt =
                Receipt { session: waiting.spec.session.clone(), exact: true, ..Receipt::default() };
            let (table, _) = self.restore(waiting.spec.realm, &[]);
            let mut turn = Turn::new(&self.model, &self.drafts, waiting, table, receipt);
            turn.end(Ending::Finish(FinishReason::Cancelled));
            self.state.running.push(turn);
        }
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
        /// Bytes per second of a modest solid-state disk.
        const DISK_RATE: f64 = 1e9;
        let probe = self.pool.probe(realm, log);
        Receipt {
            restored_tokens: probe.tokens,
            tier: tier(probe.tokens, probe.non_resident_bytes > 0),
            restore_ms: probe.non_resident_bytes as f64 / DISK_RATE * 1e3,
            bytes_read: probe.non_resident_bytes,
            exact: true,
            ..Receipt::default()
        }
    }

    /// Maps and checks the pages of this log. The table's pages stay pinned until the caller releases it.
    fn restore(&mut self, realm: Realm, log: &[TokenId]) -> (dormouse_kv::BlockTable, Receipt) {
        let begun = Instant::now();
        let attached = self.pool.attach(realm, log);
        let receipt = Receipt {
            restored_tokens: attached.restored,
            tier: tier(attached.restored, attached.from_disk),
            restore_ms: begun.elapsed().as_secs_f64() * 1e3,
            bytes_read: attached.bytes_read,
            exact: true,
            miss: (!attached.damaged.is_empty()).then(|| Miss {
                reason: "page_damaged".into(),
                at_token: attached.restored,
                at_message: None,
            }),
            ..Receipt::default()
        };
        (attached.table, receipt)
    }

    fn in_trouble(&self, what: String) -> EngineError {
        if let Ok(mut trouble) = self.trouble.lock()
            && trouble.is_none()
        {
            tracing::error!("{what}");
            *trouble = Some(what.clone());
        }
        EngineError::Storage(what)
    }

    /// Sends commits on their way and closes the turns that are over and durable. Whether there was anything to do.
    fn persist(&mut self) -> bool {
        let many = self.state.running.iter().any(|turn| turn.uncommitted() >= COMMIT_TOKENS);
        let interval = if many { COMMIT_INTERVAL / 4 } else { COMMIT_INTERVAL };
        let all_are_due = self.state.last_commit.is_none_or(|at| at.elapsed() >= interval);
        let is_due = |turn: &Turn| turn.can_commit() && (all_are_due || turn.gives_up_pages());
        let due: Vec<usize> =
            (0..self.state.running.len()).filter(|index| is_due(&self.state.running[*index])).collect();
        let mut did = !due.is_empty();
        if did && all_are_due {
            self.state.last_commit = Some(Instant::now());
        }
        let group: Vec<Commit> = due.into_iter().filter_map(|index| self.commit(index)).collect();
        if !group.is_empty() {
            self.send(group);
        }
        let mut index = 0;
        while index < self.state.running.len() {
            let turn = &self.state.running[index];
            if turn.is_over() {
                let turn = self.state.running.remove(index);
                self.pool.release(turn.close());
                self.state.room += 1;
                if let Some(out) = self.pool.over_budget() {
                    self.persister.page_out(out);
                }
                did = true;
            } else if turn.can_pause() {
                self.pause(index);
                did = true;
            } else {
                index += 1;
            }
        }
        // Running turns' own commits carry removals along. A failure is noted, and told to the next who needs room.
        if self.state.running.is_empty() && self.commit_removals().is_err() {
            did = false;
        }
        did
    }

    /// The commit of what a turn gained; none, and the turn fails, when there can be none any more.
    fn commit(&mut self, index: usize) -> Option<Commit> {
        let turn = &mut self.state.running[index];
        let tail = if turn.gives_up_pages() { Tail::Synced } else { Tail::Named };
        let pending = match self.pool.commit(&mut turn.table, tail) {
            Ok(pending) => pending,
            Err(error) => {
                let failure = self.in_trouble(error.to_string());
                self.state.running[index].fail_commit(failure);
                return None;
            }
        };
        turn.in_flight = Some(pending.ticket);
        turn.named = pending.kv_len;
        turn.tail_is_synced = tail == Tail::Synced;
        let step = StepCommit {
            session: turn.spec.session.clone(),
            fence: turn.spec.fence,
            log_start: turn.durable,
            tokens: turn.log[turn.durable..].to_vec(),
            page_file: self.page_file,
            pages: pending.rows,
            removed: pending.removed,
            leaf_slot: pending.leaf_slot,
            kv_len: pending.kv_len,
        };
        let turn = Some(turn.spec.turn.clone());
        Some(Commit { ticket: pending.ticket, sync: pending.sync, step, turn })
    }

    /// Tells the catalog of pages that were evicted, damaged or deleted, if there are any and it is not told already.
    fn commit_removals(&mut self) -> Result<(), EngineError> {
        if self.state.removals_in_flight {
            return Ok(());
        }
        let pending = match self.pool.commit_removals() {
            Ok(None) => return Ok(()),
            Ok(Some(pending)) => pending,
            Err(error) => return Err(self.in_trouble(error.to_string())),
        };
        let step = StepCommit {
            page_file: self.page_file,
            pages: pending.rows,
            removed: pending.removed,
            ..StepCommit::default()
        };
        self.state.removals_in_flight = true;
        self.send(vec![Commit { ticket: pending.ticket, sync: pending.sync, step, turn: None }]);
        Ok(())
    }

    fn send(&mut self, group: Vec<Commit>) {
        if let Err(group) = self.persister.send(group) {
            let failure = self.in_trouble("the thread that writes commits has stopped; restart".into());
            self.acknowledge(group.into_iter().map(|commit| commit.answer(Err(failure.clone()))).collect());
        }
    }

    /// Of commits that failed together, the newest is withdrawn first: each gives back what it took over.
    fn acknowledge(&mut self, group: Vec<Acknowledgement>) {
        for done in group.iter().filter(|answer| answer.outcome.is_ok()) {
            self.pool.acknowledge(done.ticket);
            self.state.stats.commits += 1;
        }
        for (failed, error) in
            group.iter().rev().filter_map(|answer| Some((answer, answer.outcome.as_ref().err()?)))
        {
            tracing::error!("a commit failed: {error}");
            self.pool.withdraw(failed.ticket);
            self.state.stats.commit_failures += 1;
        }
        for answer in group {
            self.tell(answer);
        }
    }

    fn tell(&mut self, answer: Acknowledgement) {
        let Some(id) = answer.turn else {
            self.state.removals_in_flight = false;
            self.state.removals_failed = answer.outcome.err();
            return;
        };
        let Some(turn) = self.state.running.iter_mut().find(|turn| turn.spec.turn == id) else { return };
        turn.in_flight = None;
        match answer.outcome {
            Ok(()) => turn.durable = answer.log_len,
            Err(error) => turn.fail_commit(error),
        }
    }
}

fn tier(restored: usize, from_disk: bool) -> Tier {
    match (restored, from_disk) {
        (0, _) => Tier::None,
        (_, true) => Tier::Disk,
        (_, false) => Tier::Ram,
    }
}
