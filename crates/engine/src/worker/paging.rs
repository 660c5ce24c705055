//! Who waits for pages from disk. The pager's threads read them while the engine computes for others; and where computing is
//! nearly as fast as the disk, for the one who waits, too: it computes its prompt from the beginning while the disk is read from
//! the end, until the two meet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse_kernels::PAGE_TOKENS;
use dormouse_kv::{Attached, PageIn, Realm};
use dormouse_models::TokenId;
use tokio::sync::oneshot;

use super::Worker;
use super::prompts::work;
use crate::pager::PagedIn;
use crate::turn::Waiting;
use crate::{EngineError, Miss, Receipt, TurnSpec};

/// A turn computes what the disk holds if that spares the disk this part of its pages.
const COMPUTED_LEAST: f64 = 0.25;

/// Pages that are being read, and for whom.
pub(super) struct Coming {
    id: u64,
    who: Who,
    pages: Wanted,
    since: Instant,
}

pub(super) enum Who {
    /// A turn that begins when they are there.
    Waiting { waiting: Box<Waiting>, queue_ms: f64 },
    /// The running turn of this name, which computes them meanwhile.
    Running(String),
    /// The paused turn of this name, which goes on when they are there.
    Paused(String),
    /// Somebody who wants them in RAM.
    Resume { realm: Realm, log: Vec<TokenId>, answer: oneshot::Sender<Result<Receipt, EngineError>> },
}

impl Coming {
    /// The turn that has not begun, and waits for them.
    pub fn waiting(&self) -> Option<&TurnSpec> {
        match &self.who {
            Who::Waiting { waiting, .. } => Some(&waiting.spec),
            _ => None,
        }
    }

    pub fn waiting_mut(&mut self) -> Option<&mut TurnSpec> {
        match &mut self.who {
            Who::Waiting { waiting, .. } => Some(&mut waiting.spec),
            _ => None,
        }
    }

    pub fn is_for_paused(&self, name: &str) -> bool {
        matches!(&self.who, Who::Paused(turn) if turn == name)
    }

    /// Tokens whose KV is not being read.
    pub fn from(&self) -> usize {
        self.pages.0.first() * PAGE_TOKENS
    }

    /// Nobody waits for them any more. The turn that has not begun, if there is one.
    pub fn give_up(self) -> Option<Waiting> {
        match self.who {
            Who::Waiting { waiting, .. } => Some(*waiting),
            Who::Running(_) | Who::Paused(_) => None,
            Who::Resume { answer, .. } => {
                let _ = answer.send(Err(EngineError::Stopped));
                None
            }
        }
    }
}

/// Pages that are read as long as somebody wants them.
struct Wanted(Arc<PageIn>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// What was read for a table before it was made, and how long that took.
#[derive(Clone, Copy, Default)]
pub(super) struct Paged {
    pub bytes: u64,
    pub took: Duration,
}

impl Worker {
    /// Reads pages for somebody. A pager that is gone has told so: then all of this ends.
    pub(super) fn page_in(&mut self, pages: PageIn, who: Who) {
        let (id, pages) = (self.state.next_page_in, Arc::new(pages));
        self.state.next_page_in += 1;
        self.pager.send(id, Arc::clone(&pages), matches!(who, Who::Running(_)));
        self.state.coming.push(Coming { id, who, pages: Wanted(pages), since: Instant::now() });
    }

    /// Whether a turn should begin to compute these pages, which hold positions up to `end`, while they are read.
    pub(super) fn computes_meanwhile(&self, pages: &PageIn, end: usize) -> bool {
        let (disk, prompts) = (self.state.disk_pace.per_second(), self.state.pace.per_second());
        if disk == 0.0 || prompts == 0.0 {
            return false;
        }
        let (config, from) = (self.model.config(), pages.first() * PAGE_TOKENS);
        let reading = pages.missing_bytes() as f64 / disk;
        let computing = work(config, from, end - from, 0..config.layers) / prompts;
        // Where the two would meet.
        let computed = reading / (reading + computing);
        computed >= COMPUTED_LEAST && computed * pages.unread() as f64 >= 1.0
    }

    /// Pages are there.
    pub(super) fn paged_in(&mut self, paged: PagedIn) {
        if paged.bytes > 0 {
            self.state.disk_pace.observe(paged.bytes as f64, paged.took.as_secs_f64());
        }
        // Whoever asked for them may be gone.
        let Some(at) = self.state.coming.iter().position(|coming| coming.id == paged.id) else { return };
        if matches!(self.state.coming[at].who, Who::Running(_)) {
            // It sees for itself how far they are.
            return;
        }
        let Coming { who, since, .. } = self.state.coming.remove(at);
        let paged = Paged { bytes: paged.bytes, took: since.elapsed() };
        match who {
            Who::Waiting { waiting, queue_ms } => {
                let found = self.pool.find(waiting.spec.realm, waiting.restorable());
                self.begin(*waiting, found, queue_ms, Some(paged));
            }
            Who::Resume { realm, log, answer } => self.bring(realm, &log, paged, answer),
            Who::Paused(turn) => self.pages_are_back(&turn, paged),
            Who::Running(_) => {}
        }
    }

    /// Answers what bringing the pages of `log` into RAM took.
    pub(super) fn bring(
        &mut self,
        realm: Realm,
        log: &[TokenId],
        paged: Paged,
        answer: oneshot::Sender<Result<Receipt, EngineError>>,
    ) {
        let found = self.pool.find(realm, log);
        let (table, receipt) = self.restore(realm, log, found, paged);
        self.pool.release(table);
        // Nobody waiting is no error.
        let _ = answer.send(Ok(receipt));
    }

    /// Looks after the turns that compute what is being read: tells the pager how far they are, and when both have met goes on
    /// behind what was read.
    pub(super) fn meet(&mut self) {
        for index in 0..self.state.running.len() {
            let turn = &self.state.running[index];
            let Some(at) = self.meeting(index) else { continue };
            let met = self.state.coming[at].pages.0.computed(turn.table.len() / PAGE_TOKENS);
            if turn.ending.is_some() {
                self.end_meeting(index);
            } else if met && turn.in_flight.is_none() && !turn.is_pausing {
                self.go_on_behind(index);
                self.end_meeting(index);
            }
        }
    }

    /// The pages that a running turn is to meet.
    fn meeting(&self, index: usize) -> Option<usize> {
        let name = &self.state.running[index].spec.turn;
        let is_its = |coming: &Coming| matches!(&coming.who, Who::Running(turn) if turn == name);
        self.state.coming.iter().position(is_its)
    }

    /// Puts what was read behind what a turn has computed.
    fn go_on_behind(&mut self, index: usize) {
        let state = &mut self.state;
        let turn = &mut state.running[index];
        let log = &turn.log[..turn.log.len() - 1];
        let found = self.pool.find(turn.spec.realm, log);
        if found.tokens() <= turn.table.len() {
            return;
        }
        let Attached { table, restored, damaged, bytes_read } =
            self.pool.attach_found(turn.spec.realm, log, found);
        if !damaged.is_empty() {
            turn.receipt.miss = Some(Miss::new("page_damaged", restored));
        }
        turn.receipt.bytes_read += bytes_read;
        state.stats.restored_bytes_read += bytes_read;
        if restored <= turn.table.len() {
            return self.pool.release(table);
        }
        state.chunk.take_if(|chunk| chunk.belongs_to(turn));
        let gained = restored - turn.table.len();
        self.pool.truncate(&mut turn.table, 0);
        let old = std::mem::replace(&mut turn.table, table);
        self.pool.replace(old, &mut turn.table);
        turn.named = turn.table.len();
        turn.receipt.restored_tokens += gained;
        state.stats.restored_later(&turn.receipt, gained);
    }

    /// A turn computes no longer what is being read: the two have met, it has ended, or it gives up its pages. Its receipt
    /// says what came of it.
    pub(super) fn end_meeting(&mut self, index: usize) {
        let Some(at) = self.meeting(index) else { return };
        let coming = self.state.coming.remove(at);
        let turn = &mut self.state.running[index];
        let (here, covered) = (turn.table.len(), turn.spec.known());
        let goes_on = !turn.gives_up_pages();
        let receipt = &mut turn.receipt;
        if goes_on && here < covered && receipt.miss.is_none() {
            receipt.miss = Some(Miss::new("page_evicted", here));
        }
        let known = if goes_on { covered } else { covered.min(here) };
        receipt.recomputed_tokens = known.saturating_sub(receipt.restored_tokens);
        receipt.restore_ms += coming.since.elapsed().as_secs_f64() * 1e3;
        receipt.bytes_read += coming.pages.0.bytes_read();
        let stats = &mut self.state.stats;
        stats.restored_bytes_read += coming.pages.0.bytes_read();
        stats.recomputed_tokens += receipt.recomputed_tokens as u64;
    }
}
