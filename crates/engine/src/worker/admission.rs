//! Which turns run: taken from the queue, paused when their pages are needed, woken when there is room.

use std::cmp::Reverse;
use std::time::Instant;

use dormouse_kernels::PAGE_TOKENS;
use dormouse_kv::Found;
use dormouse_models::TokenId;

use super::Worker;
use super::paging::{Coming, Paged, Who};
use crate::turn::{Ending, Turn, Waiting};
use crate::{EngineError, Event, Miss, Receipt, Tier, TurnSpec};

/// Turns that hold pages at once; the others wait in the queue.
const RUNNING_MOST: usize = 64;

/// A turn whose pages others needed: its tokens are durable, its pages may still be there when it goes on.
pub(super) struct Paused {
    /// With an empty table, which keeps the session's claim.
    pub turn: Turn,
    since: Instant,
    pages: Back,
}

/// A paused turn's pages on their way back.
enum Back {
    NotAsked,
    Coming,
    There(Paged),
}

impl Worker {
    /// Gives pages to turns while there is room: to paused ones, and when there are none to waiting ones. Whether any got some.
    pub(super) fn admit(&mut self) -> bool {
        self.meet();
        let mut admitted = self.go_on();
        while self.state.paused.is_empty() && self.with_pages() < RUNNING_MOST {
            let Some(waiting) = self.next_waiting().and_then(|at| self.state.queue.remove(at)) else {
                break;
            };
            admitted = true;
            let spec = &waiting.spec;
            if spec.log.is_empty() || spec.log.len() > self.model.context() {
                let error =
                    EngineError::ContextOverflow { tokens: spec.log.len(), context: self.model.context() };
                self.outbox.put(&waiting.listener, Event::Failed(error));
                continue;
            }
            let queue_ms = waiting.since.elapsed().as_secs_f64() * 1e3;
            let found = self.pool.find(spec.realm, waiting.restorable());
            match self.pool.page_in(&found) {
                None => self.begin(waiting, found, queue_ms, Some(Paged::default())),
                Some(pages) if self.computes_meanwhile(&pages, found.tokens()) => {
                    let there = &waiting.restorable()[..pages.first() * PAGE_TOKENS];
                    let (turn, found) = (spec.turn.clone(), self.pool.find(spec.realm, there));
                    self.begin(waiting, found, queue_ms, None);
                    self.page_in(pages, Who::Running(turn));
                }
                Some(pages) => self.page_in(pages, Who::Waiting { waiting: Box::new(waiting), queue_ms }),
            }
        }
        admitted
    }

    /// Gives a turn the pages that were found for it. `paged`: what was read for that before; None where more is being read.
    pub(super) fn begin(&mut self, waiting: Waiting, found: Found, queue_ms: f64, paged: Option<Paged>) {
        let spec = &waiting.spec;
        let log = &waiting.restorable()[..found.tokens()];
        let (mut table, restored) = self.restore(spec.realm, log, found, paged.unwrap_or_default());
        self.pool.set_claim(&mut table, &spec.session, spec.claim);
        let lost = spec.known().saturating_sub(restored.restored_tokens);
        let evicted = || Miss::new("page_evicted", restored.restored_tokens);
        let miss = restored.miss.clone().or_else(|| (lost > 0 && paged.is_some()).then(evicted));
        let tier = if paged.is_none() { Tier::Disk } else { restored.tier };
        let session = spec.session.clone();
        let receipt = Receipt { session, recomputed_tokens: lost, queue_ms, miss, tier, ..restored };
        let stats = &mut self.state.stats;
        if paged.is_some() {
            stats.recomputed_tokens += lost as u64;
        }
        stats.restored_bytes_read += receipt.bytes_read;
        stats.admitted(&receipt);
        let turn = Turn::new(&self.model, &self.drafts, waiting, table, receipt);
        self.run_turn(turn);
    }

    /// The queue's next turn: interactive ones before background ones, then the tenant with the fewest turns running, then
    /// who has waited longest. A turn whose prompt begins as one that is being read waits until that beginning is there.
    fn next_waiting(&self) -> Option<usize> {
        let running = |waiting: &TurnSpec| {
            let running = self.state.running.iter().map(|turn| &turn.spec);
            let coming = self.state.coming.iter().filter_map(Coming::waiting);
            running.chain(coming).filter(|spec| spec.realm == waiting.realm).count()
        };
        let ready =
            self.state.queue.iter().enumerate().filter(|(_, waiting)| !self.is_being_read(&waiting.spec));
        let first =
            ready.min_by_key(|(at, waiting)| (Reverse(waiting.spec.priority), running(&waiting.spec), *at));
        first.map(|(at, _)| at)
    }

    /// Turns that hold pages, or wait for nothing but to read theirs.
    fn with_pages(&self) -> usize {
        self.state.running.len() + self.state.coming.iter().filter_map(Coming::waiting).count()
    }

    /// A turn before this one is computing whole pages that both need, or has them read from disk.
    fn is_being_read(&self, spec: &TurnSpec) -> bool {
        if spec.prompt_logprobs.is_some() {
            return false;
        }
        let wanted = &spec.log[..spec.log.len().saturating_sub(1)];
        let lacks = |realm, log: &[TokenId], there: usize| {
            let same = || wanted.iter().zip(log).take_while(|(a, b)| a == b).count();
            realm == spec.realm && there < same() / PAGE_TOKENS * PAGE_TOKENS
        };
        let computed = self.state.running.iter().any(|turn| {
            let goes_on = turn.ending.is_none() && turn.pending() > 1;
            goes_on && lacks(turn.spec.realm, &turn.log, turn.table.len())
        });
        let read = |coming: &Coming| {
            coming.waiting().is_some_and(|waiting| lacks(waiting.realm, &waiting.log, coming.from()))
        };
        computed || self.state.coming.iter().any(read)
    }

    /// Puts a turn among the running ones, at its age.
    fn run_turn(&mut self, turn: Turn) {
        let at = self.state.running.partition_point(|other| other.since() <= turn.since());
        self.state.running.insert(at, turn);
    }

    /// Takes a turn's pages, which are durable, for others.
    pub(super) fn pause(&mut self, index: usize) {
        self.end_meeting(index);
        let mut turn = self.state.running.remove(index);
        self.state.chunk.take_if(|chunk| chunk.belongs_to(&turn));
        self.pool.truncate(&mut turn.table, 0);
        turn.pause();
        tracing::debug!(turn = turn.spec.turn, "paused: its pages are needed");
        self.state.stats.pauses += 1;
        let at = self.state.paused.partition_point(|other| other.turn.since() <= turn.since());
        self.state.paused.insert(at, Paused { turn, since: Instant::now(), pages: Back::NotAsked });
    }

    /// Wakes paused turns, the oldest first: one for each turn that has ended, and one when nothing runs. Whether there were any.
    fn go_on(&mut self) -> bool {
        let mut woken = false;
        while let Some(oldest) = self.state.paused.first()
            && (self.state.room > 0 || self.state.running.is_empty())
        {
            if matches!(oldest.pages, Back::Coming) {
                break;
            }
            let (realm, log) = (oldest.turn.spec.realm, &oldest.turn.log[..oldest.turn.log.len() - 1]);
            let found = self.pool.find(realm, log);
            let paged = match oldest.pages {
                Back::There(paged) => paged,
                Back::NotAsked | Back::Coming => match self.pool.page_in(&found) {
                    None => Paged::default(),
                    Some(pages) => {
                        let who = Who::Paused(oldest.turn.spec.turn.clone());
                        self.state.paused[0].pages = Back::Coming;
                        self.page_in(pages, who);
                        break;
                    }
                },
            };
            self.state.room = self.state.room.saturating_sub(1);
            let mut turn = self.wake(0);
            let known = turn.log.len() - 1;
            let (table, restored) = self.restore(realm, &turn.log[..known], found, paged);
            let empty = std::mem::replace(&mut turn.table, table);
            self.pool.replace(empty, &mut turn.table);
            turn.named = turn.table.len();
            let lost = known - restored.restored_tokens;
            turn.receipt.recomputed_tokens += lost;
            let stats = &mut self.state.stats;
            stats.restored_tokens += restored.restored_tokens as u64;
            stats.recomputed_tokens += lost as u64;
            stats.restored_bytes_read += restored.bytes_read;
            self.run_turn(turn);
            woken = true;
        }
        if self.state.paused.is_empty() {
            self.state.room = 0;
        }
        woken
    }

    /// The pages of the paused turn of this name are there; it may have ended meanwhile.
    pub(super) fn pages_are_back(&mut self, turn: &str, paged: Paged) {
        if let Some(paused) = self.state.paused.iter_mut().find(|paused| paused.turn.spec.turn == turn) {
            paused.pages = Back::There(paged);
        }
    }

    /// A turn that was paused, without pages.
    fn wake(&mut self, at: usize) -> Turn {
        let Paused { mut turn, since, .. } = self.state.paused.remove(at);
        self.state.coming.retain(|coming| !coming.is_for_paused(&turn.spec.turn));
        turn.receipt.paused_ms += since.elapsed().as_secs_f64() * 1e3;
        turn
    }

    /// Ends a paused turn, if there is one of this name; those who wait for it hear of it at the loop's next round.
    pub(super) fn end_paused(&mut self, id: &str, ending: Ending) {
        if let Some(at) = self.state.paused.iter().position(|paused| paused.turn.spec.turn == id) {
            let mut turn = self.wake(at);
            turn.end(ending);
            self.run_turn(turn);
        }
    }

    /// Ends all paused turns.
    pub(super) fn end_all_paused(&mut self, ending: &Ending) {
        while !self.state.paused.is_empty() {
            let mut turn = self.wake(0);
            turn.end(ending.clone());
            self.run_turn(turn);
        }
    }
}
