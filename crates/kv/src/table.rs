//! Block tables: the pages of one sequence, and how they come to hold more or fewer positions.

use std::collections::VecDeque;

use dormouse_kernels::{PAGE_TOKENS, PagePtr};

use crate::identity::PageId;
use crate::pool::PagePool;
use crate::tree::After;
use crate::{KvError, bytes};

/// Names a live table inside its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableId(pub(crate) u64);

/// The pages of one sequence, pinned: the path from the tree's root along its tokens, then reserved empty pages.
///
/// Give it back with [`PagePool::release`]; a table that is merely dropped keeps its pages pinned until the file is
/// opened again.
#[derive(Debug)]
#[must_use = "a dropped table keeps its pages pinned; release it"]
pub struct BlockTable {
    pub(crate) id: TableId,
    /// Of its realm.
    pub(crate) root: PageId,
    /// Pages that hold positions `0..len`, in order.
    pub(crate) nodes: Vec<u32>,
    /// Slots for the positions after them, in no tree yet.
    pub(crate) blanks: VecDeque<u32>,
    pub(crate) len: usize,
}

impl BlockTable {
    /// No other table of its pool has had it.
    pub fn id(&self) -> TableId {
        self.id
    }

    /// Positions that hold KV.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions used of the last page, if that page is not full.
    fn partial(&self) -> Option<(u32, usize)> {
        let used = self.len % PAGE_TOKENS;
        let last = *self.nodes.last()?;
        (used != 0).then_some((last, used))
    }

    fn check(&self) {
        assert_eq!(self.nodes.len(), self.len.div_ceil(PAGE_TOKENS), "a table's pages fit its length");
    }
}

impl PagePool {
    /// Adds the addresses of the table's pages to `pointers`, in order, reserved ones included. They are valid while
    /// the pool lives. Only positions that [`PagePool::reserve`] made writable for this table may be written.
    pub fn page_ptrs(&self, table: &BlockTable, pointers: &mut Vec<PagePtr>) {
        table.check();
        pointers.extend(table.nodes.iter().chain(&table.blanks).map(|slot| self.page_ptr(*slot)));
    }

    fn page_ptr(&self, slot: u32) -> PagePtr {
        // SAFETY: a mapped slot holds `page_bytes` aligned bytes and never moves; positions that others may read are
        // never made writable for a table, and a table has one owner.
        unsafe { PagePtr::new(self.file.slot_ptr(slot)) }
    }

    /// The pages whose bytes changed since this was last asked, otherwise than by their table's owner, or that are parked or
    /// free now: whoever keeps copies of pages lets go of theirs.
    pub fn take_changed(&mut self) -> Vec<PagePtr> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|slot| self.page_ptr(slot)).collect()
    }

    /// Makes positions `len..len + more` writable for this table alone. A last page that others may use, or that
    /// holds other tokens after this table's, is copied first.
    ///
    /// # Errors
    /// `Full` or `NoSpace` when there is no room and nothing to evict; `AwaitingRemovals` when room was made that the
    /// catalog must hear of first: commit the removals, acknowledge them, and try again. The table is unchanged then.
    pub fn reserve(&mut self, table: &mut BlockTable, more: usize) -> Result<(), KvError> {
        table.check();
        let pages = (table.len + more).div_ceil(PAGE_TOKENS);
        let new_pages = pages.saturating_sub(table.nodes.len() + table.blanks.len());
        let partial = table.partial().filter(|_| more > 0);
        let copies = partial.filter(|(slot, used)| !self.is_writable(*slot, *used, table.id));
        let neighbour = table.blanks.back().or(table.nodes.last()).copied();
        let mut slots = self.take_slots(new_pages + usize::from(copies.is_some()), neighbour)?;

        if let Some((shared, used)) = copies {
            let own = slots.pop_front().expect("one more slot was taken for the copy");
            self.copy_on_write(table, shared, own, used);
        } else if let Some((slot, _)) = partial {
            self.tree.node_mut(slot).writer = Some(table.id);
        }
        table.blanks.append(&mut slots);
        Ok(())
    }

    fn is_writable(&self, slot: u32, used: usize, by: TableId) -> bool {
        let node = self.tree.node(slot);
        !node.is_sealed() && node.tokens.len() == used && node.writer.is_none_or(|writer| writer == by)
    }

    fn copy_on_write(&mut self, table: &mut BlockTable, shared: u32, own: u32, used: usize) {
        assert_ne!(shared, own);
        let node = self.tree.node(shared);
        assert!(node.verified && node.pins > 0 && used <= node.tokens.len());
        let (place, tokens) = (node.after(), node.tokens[..used].to_vec());
        let (from, to) = (self.file.slot_ptr(shared), self.file.slot_ptr(own));
        // SAFETY: both slots are mapped and different; `own` was free until now, so nobody else knows it, and the
        // positions `..used` of `shared` are held by a page and therefore never written.
        unsafe { bytes::copy_rows(self.file.layout(), from, to, used) };
        self.changed.insert(own);
        let last_used = self.tick();
        let copy = self.tree.insert(own, place, tokens);
        (copy.verified, copy.mapped, copy.pins, copy.last_used) = (true, true, 1, last_used);
        copy.writer = Some(table.id);
        self.unpin(shared, table.id, last_used);
        *table.nodes.last_mut().expect("a partial page is a page") = own;
        self.counters.copies_on_write += 1;
    }

    /// Says that the KV of `tokens` has been written at the table's next positions, which must have been reserved.
    /// A page that fills is sealed; where the same sealed page exists already, that one is used and ours given up.
    pub fn advance(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        let mut rest = tokens;
        while !rest.is_empty() {
            let used = table.len % PAGE_TOKENS;
            let (page, after) = rest.split_at(rest.len().min(PAGE_TOKENS - used));
            if used == 0 {
                self.begin_page(table, page);
            } else {
                self.continue_page(table, used, page);
            }
            table.len += page.len();
            rest = after;
        }
        table.check();
    }

    fn begin_page(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        let slot = table.blanks.pop_front().expect("positions are reserved before they are advanced over");
        let place = table.nodes.last().map_or(After::Root(table.root), |slot| After::Page(*slot));
        let sealed = tokens.len() == PAGE_TOKENS;
        if sealed && let Some(twin) = self.usable_twin(place, tokens, slot) {
            self.tree.node_mut(twin).pins += 1;
            self.free_slot(slot);
            table.nodes.push(twin);
            self.counters.deduplicated += 1;
            return;
        }
        let last_used = self.tick();
        let node = self.tree.insert(slot, place, tokens.to_vec());
        (node.verified, node.mapped, node.pins, node.last_used) = (true, true, 1, last_used);
        node.writer = (!sealed).then_some(table.id);
        table.nodes.push(slot);
    }

    fn continue_page(&mut self, table: &mut BlockTable, used: usize, tokens: &[u32]) {
        let slot = *table.nodes.last().expect("a partial page is a page");
        let node = self.tree.node(slot);
        assert_eq!(node.writer, Some(table.id), "positions are reserved before they are advanced over");
        assert_eq!(node.tokens.len(), used);
        let sealed = used + tokens.len() == PAGE_TOKENS;
        if sealed {
            let (parent, place) = (node.parent, node.after());
            let whole = [&node.tokens, tokens].concat();
            if let Some(twin) = self.usable_twin(place, &whole, slot) {
                self.tree.node_mut(twin).pins += 1;
                *table.nodes.last_mut().expect("a partial page is a page") = twin;
                let now = self.tick();
                self.unpin(slot, table.id, now);
                // If others use our page or the catalog names it, it stays as it was: open, with the tokens before
                // these. Were it removed before the twin's commit, a crash in between would lose both.
                let own = self.tree.node(slot);
                if own.pins == 0 && own.named == 0 {
                    self.remove_page(slot, parent);
                }
                self.counters.deduplicated += 1;
                return;
            }
        }
        self.tree.append(slot, tokens);
        if sealed {
            self.tree.node_mut(slot).writer = None;
        }
    }

    /// Shortens a live table to `len` positions (a rewind, or drafts that were refused). Pages that only this table
    /// used and that the catalog does not name are dropped; others stay for whoever asks for their tokens again.
    pub fn truncate(&mut self, table: &mut BlockTable, len: usize) {
        assert!(len <= table.len, "cannot truncate {} positions to {len}", table.len);
        let now = self.tick();
        while table.nodes.len() > len.div_ceil(PAGE_TOKENS) {
            let Some(slot) = table.nodes.pop() else { break };
            self.unpin(slot, table.id, now);
            let node = self.tree.node(slot);
            if node.named == 0 && node.pins == 0 && node.claims == 0 && node.children.is_empty() {
                let parent = node.parent;
                self.remove_page(slot, parent);
            }
        }
        table.len = len;
        if let Some((slot, used)) = table.partial() {
            let node = self.tree.node_mut(slot);
            if node.writer == Some(table.id) {
                if node.pins == 1 {
                    node.tokens.truncate(used.max(node.named));
                }
                if node.tokens.len() != used {
                    node.writer = None;
                }
            }
        }
        table.check();
    }

    /// Gives `old` back; `table` takes its place as the table of a session, with its claim.
    pub fn replace(&mut self, old: BlockTable, table: &mut BlockTable) {
        if let Some(claim) = self.table_claims.remove(&old.id) {
            self.table_claims.insert(table.id, claim);
        }
        self.release(old);
    }

    /// Gives a table back: its reserved slots become free, its pages stay as cache until their room is needed. Pages
    /// that were never committed stay, too: they hold what their tokens say, and are lost with the process at worst.
    pub fn release(&mut self, table: BlockTable) {
        table.check();
        let now = self.tick();
        for slot in table.nodes {
            self.unpin(slot, table.id, now);
        }
        for slot in table.blanks {
            self.free_slot(slot);
        }
        self.table_claims.remove(&table.id);
    }

    fn unpin(&mut self, slot: u32, by: TableId, now: u64) {
        let node = self.tree.node_mut(slot);
        assert!(node.pins > 0, "slot {slot} was not pinned");
        node.pins -= 1;
        node.last_used = now;
        if node.writer == Some(by) {
            node.writer = None;
        }
    }

    /// A sealed page of the same tokens that may be used instead of `own`, which was just computed. Where it is not in RAM, its
    /// bytes come from there and not from disk.
    fn usable_twin(&mut self, place: After, tokens: &[u32], own: u32) -> Option<u32> {
        let twin = self.tree.find_sealed(place, tokens)?;
        let missing = self.file.ranges([twin])[0].missing_bytes() > 0;
        if missing && self.rewrite(twin, own) {
            return Some(twin);
        }
        if !self.tree.node(twin).verified {
            let unreadable = self.load(&[twin], missing);
            if !unreadable.is_empty() || !self.verify(twin) {
                self.cut(twin);
                return None;
            }
        }
        Some(twin)
    }

    /// Writes a page's bytes over those of its committed twin on disk, if they are the same ones.
    fn rewrite(&mut self, twin: u32, own: u32) -> bool {
        let node = self.tree.node(twin);
        let (committed, expected) = (node.committed, node.checksum);
        // SAFETY: `own` is mapped, and its table is done with writing it: all of its positions are computed.
        let found = unsafe { bytes::checksum(self.file.layout(), self.file.slot_ptr(own), PAGE_TOKENS) };
        let same = committed == PAGE_TOKENS && found == expected;
        if !same || self.file.copy_slot(own, twin).is_err() {
            // It is read, as if nobody had computed it; whatever is wrong shows there.
            return false;
        }
        self.changed.insert(twin);
        let node = self.tree.node_mut(twin);
        (node.verified, node.mapped) = (true, true);
        true
    }
}
