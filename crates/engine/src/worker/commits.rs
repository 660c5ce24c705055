//! What turns gained, on its way to disk: commits sent and acknowledged, turns that are over and durable closed.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use dormouse_kv::Tail;
use dormouse_models::TokenId;
use dormouse_store::StepCommit;

use super::Worker;
use super::paging::Coming;
use crate::EngineError;
use crate::persist::{Acknowledgement, Commit};
use crate::turn::{COMMIT_INTERVAL, COMMIT_TOKENS, Turn};

impl Worker {
    /// Sends commits on their way and closes the turns that are over and durable. Whether there was anything to do.
    pub(super) fn persist(&mut self) -> bool {
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
                self.end_meeting(index);
                let turn = self.state.running.remove(index);
                self.pool.release(turn.close(&mut self.outbox));
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
            turn: turn.spec.turn.clone(),
            log_start: turn.durable,
            tokens: turn.log[turn.durable..].to_vec(),
            page_file: self.page_file,
            pages: pending.rows,
            removed: pending.removed,
            leaf_slot: pending.leaf_slot,
            kv_len: pending.kv_len,
            bytes_written: pending.bytes + (size_of::<TokenId>() * turn.uncommitted()) as u64,
            day: today(),
        };
        let turn = Some(turn.spec.turn.clone());
        Some(Commit { ticket: pending.ticket, sync: pending.sync, step, turn })
    }

    /// Tells the catalog of pages that were evicted, damaged or deleted, if there are any and it is not told already.
    pub(super) fn commit_removals(&mut self) -> Result<(), EngineError> {
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
    pub(super) fn acknowledge(&mut self, group: Vec<Acknowledgement>) {
        // Slots of removed pages become free below: who waits claims the pages that stand for them from here on.
        let coming = self.state.coming.iter_mut().filter_map(Coming::waiting_mut);
        for spec in self.state.queue.iter_mut().map(|waiting| &mut waiting.spec).chain(coming) {
            spec.claim = spec.claim.and_then(|slot| self.pool.successor(slot));
        }
        for done in group.iter().filter(|answer| answer.outcome.is_ok()) {
            self.pool.acknowledge(done.ticket);
            self.state.stats.commits += 1;
        }
        for (failed, error) in
            group.iter().rev().filter_map(|answer| Some((answer, answer.outcome.as_ref().err()?)))
        {
            tracing::error!(turn = failed.turn, "a commit failed: {error}");
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

    /// The catalog knows of every page that was given up, or cannot be told.
    pub(super) fn removals_are_settled(&mut self) -> bool {
        self.commit_removals().is_err() || !self.state.removals_in_flight
    }
}

/// The day, counted since the epoch; a clock that stands before it counts as the first.
fn today() -> u64 {
    const DAY_SECONDS: u64 = 24 * 3600;
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / DAY_SECONDS)
}
