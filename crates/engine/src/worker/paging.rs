//! Who waits for pages from disk. The pager's threads read them while the engine computes for others; and where computing is
//! nearly as fast as the disk, for the one who waits, too: it computes its prompt from the beginning while the disk is read from
//! the end, until the two meet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse_kernels::PAGE_TOKENS;
use dormouse_kv::{PageIn, Realm};
use dormouse_models::TokenId;
use tokio::sync::oneshot;

use super::Worker;
use super::prompts::work;
use crate::Receipt;
use crate::pager::PagedIn;
use crate::turn::Waiting;

/// A turn computes what the disk holds if that spares the disk this part of its pages.
const COMPUTED_LEAST: f64 = 0.25;

/// Pages that are being read, and for whom.
pub(super) struct Coming {
    id: u64,
    who: Who,
    pages: Wanted,
    since: Instant,
    /// Bytes that came from disk, once all that was wanted has.
    came: Option<u64>,
}

pub(super) enum Who {
    /// A turn that begins when they are there.
    Waiting { waiting: Box<Waiting>, queue_ms: f64 },
    /// The turn of this name, which computes them meanwhile.
    Running(String),
    /// Somebody who wants them in RAM.
    Resume { realm: Realm, log: Vec<TokenId>, answer: oneshot::Sender<Receipt> },
}

impl Coming {
    /// The turn of this name has not begun, and waits for them.
    pub fn waits(&self, name: &str) -> bool {
        matches!(&self.who, Who::Waiting { waiting, .. } if waiting.spec.turn == name)
    }

    /// The turn that has not begun, if there is one; nobody else waits any more.
    pub fn waiting(self) -> Option<Waiting> {
        match self.who {
            Who::Waiting { waiting, .. } => Some(*waiting),
            _ => None,
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
        self.state.coming.push(Coming { id, who, pages: Wanted(pages), since: Instant::now(), came: None });
    }

    /// Whether a turn should begin to compute these pages, which hold positions up to `end`, while they are read.
    pub(super) fn computes_meanwhile(&self, pages: &PageIn, end: usize) -> bool {
        let (disk, prompts) = (self.state.disk_pace.per_second(), self.state.pace.per_second());
        if disk == 0.0 || prompts == 0.0 {
            return false;
        }
        let (decoder, from) = (self.model.decoder(), pages.first() * PAGE_TOKENS);
        let reading = pages.missing_bytes() as f64 / disk;
        let computing = work(decoder, from, end - from, 0..decoder.config().layers) / prompts;
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
        if let Who::Running(_) = self.state.coming[at].who {
            self.state.coming[at].came = Some(paged.bytes);
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
            Who::Running(_) => {}
        }
    }

    /// Answers what bringing the pages of `log` into RAM took.
    pub(super) fn bring(
        &mut self,
        realm: Realm,
        log: &[TokenId],
        paged: Paged,
        answer: oneshot::Sender<Receipt>,
    ) {
        let found = self.pool.find(realm, log);
        let (table, receipt) = self.restore(realm, log, found, paged);
        self.pool.release(table);
        // Nobody waiting is no error.
        let _ = answer.send(receipt);
    }

    /// Looks after the turns that compute what is being read: tells the pager how far they are, and when both have met goes on
    /// behind what was read.
    pub(super) fn meet(&mut self) {
        let mut at = 0;
        while at < self.state.coming.len() {
            let coming = &self.state.coming[at];
            let Who::Running(name) = &coming.who else {
                at += 1;
                continue;
            };
            let turn = self.state.running.iter().position(|turn| turn.spec.turn == *name);
            let Some(index) = turn else {
                // Paused: it begins again with what is there then.
                self.state.coming.remove(at);
                continue;
            };
            let turn = &self.state.running[index];
            coming.pages.0.computed(turn.table.len() / PAGE_TOKENS);
            if turn.gives_up_pages() || coming.came.is_some() && turn.in_flight.is_none() {
                let coming = self.state.coming.remove(at);
                self.go_on_behind(index, &coming);
            } else {
                at += 1;
            }
        }
    }

    fn go_on_behind(&mut self, index: usize, coming: &Coming) {
        let state = &mut self.state;
        let turn = &mut state.running[index];
        let log = &turn.log[..turn.log.len() - 1];
        let found = self.pool.find(turn.spec.realm, log);
        let gained = found.tokens().saturating_sub(turn.table.len());
        if coming.came.is_some() && !turn.gives_up_pages() && gained > 0 {
            state.chunk.take_if(|chunk| chunk.belongs_to(turn));
            let attached = self.pool.attach_found(turn.spec.realm, log, found);
            let gained = attached.restored.saturating_sub(turn.table.len());
            self.pool.truncate(&mut turn.table, 0);
            let old = std::mem::replace(&mut turn.table, attached.table);
            self.pool.replace(old, &mut turn.table);
            turn.named = turn.table.len();
            turn.receipt.restored_tokens += gained;
            turn.receipt.recomputed_tokens = turn.receipt.recomputed_tokens.saturating_sub(gained);
            turn.receipt.restore_ms += coming.since.elapsed().as_secs_f64() * 1e3;
            state.stats.restored_later(&turn.receipt, gained);
        }
        let (receipt, bytes) = (&mut turn.receipt, coming.came.unwrap_or(0));
        receipt.bytes_read += bytes;
        // It may have ended before it computed them all.
        receipt.recomputed_tokens = receipt.recomputed_tokens.min(turn.table.len() - receipt.restored_tokens);
        state.stats.restored_bytes_read += bytes;
        state.stats.recomputed_tokens += receipt.recomputed_tokens as u64;
    }
}
