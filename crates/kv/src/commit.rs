//! Commits: what the catalog must be told, and making the bytes durable before it is told.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dormouse_store::{Durability, PageRow, RemovedPage};

use crate::file::MappedRange;
use crate::pool::PagePool;
use crate::table::{BlockTable, TableId};
use crate::{KvError, system};

/// What a commit does with a table's last page while that may still grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Its entry is written, its bytes stay to be synced when the page is sealed or the table ends. After a power cut its
    /// checksum tells whether they were written by then; if not, this page is computed again. Syncing a page at every few
    /// positions would write it to disk as often, and take the memory mapping from under the threads that compute.
    Named,
    /// It is synced as sealed pages are.
    Synced,
}

/// Names a commit until it is acknowledged or withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A commit on its way. The order that keeps the catalog true: [`SyncRange::sync`], then the database transaction, then
/// [`PagePool::acknowledge`]; or [`PagePool::withdraw`] if either of the first two failed. Several may be on their way,
/// and their transactions happen in the order of their tickets.
#[derive(Debug)]
pub struct PendingCommit {
    pub ticket: Ticket,
    /// Entries to insert or, for open pages that grew, to replace.
    pub rows: Vec<PageRow>,
    /// Entries to delete, in this order.
    pub removed: Vec<RemovedPage>,
    /// The table's last page.
    pub leaf_slot: Option<u32>,
    /// The table's length.
    pub kv_len: usize,
    /// Of the positions that the catalog hears of for the first time.
    pub bytes: u64,
    pub sync: SyncRange,
}

/// The bytes that a commit names, for a thread that may wait for the disk.
#[derive(Debug)]
pub struct SyncRange {
    pub(crate) ranges: Vec<MappedRange>,
    file: Arc<File>,
    path: PathBuf,
    poisoned: Arc<AtomicBool>,
}

/// What must be undone or finished when a commit's fate is known.
#[derive(Debug)]
pub(crate) struct InFlight {
    ticket: Ticket,
    slots: Vec<u32>,
    removed: Vec<RemovedPage>,
    claim: Option<ClaimMove>,
}

/// A session's claim that a commit moved from one leaf to another.
#[derive(Clone, Copy, Debug)]
struct ClaimMove {
    table: TableId,
    from: Option<u32>,
    to: Option<u32>,
}

impl SyncRange {
    /// Returns when the commit's page bytes survive what `durability` says.
    ///
    /// # Errors
    /// `Io` if the disk failed: the pool is poisoned then, because which bytes reached the disk is unknown and asking
    /// again would not tell. `Poisoned` after that.
    pub fn sync(&self, durability: Durability) -> Result<(), KvError> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(KvError::Poisoned { path: self.path.clone() });
        }
        if durability != Durability::Power || self.ranges.is_empty() {
            return Ok(());
        }
        system::sync(&self.file, &self.ranges).map_err(|source| {
            self.poisoned.store(true, Ordering::Release);
            KvError::io("sync", &self.path)(source)
        })
    }
}

impl PagePool {
    /// Names what the catalog does not know yet of the table's pages, and all removals since the last commit. A
    /// session's claim moves to the table's last page. `tail` says whether the last page is synced before it is sealed.
    ///
    /// # Errors
    /// `Poisoned` after a failed sync.
    pub fn commit(&mut self, table: &mut BlockTable, tail: Tail) -> Result<PendingCommit, KvError> {
        self.check_poison()?;
        let before = self.counters.bytes_committed;
        let rows = self.name_pages(table);
        let bytes = self.counters.bytes_committed - before;
        let unsynced = self.take_unsynced(table, tail);
        let leaf_slot = table.nodes.last().copied();
        let claim = self.table_claims.get(&table.id);
        let claim = claim.map(|claim| ClaimMove { table: table.id, from: claim.leaf, to: leaf_slot });
        if let Some(claim) = claim {
            self.set_leaf(claim.table, claim.to);
            self.move_claim(claim.from, claim.to);
        }
        self.evict_ahead();
        let pending = self.send(rows, unsynced, claim, leaf_slot, table.len);
        Ok(PendingCommit { bytes, ..pending })
    }

    /// A commit of the removals alone; `None` if there are none.
    ///
    /// # Errors
    /// `Poisoned` after a failed sync.
    pub fn commit_removals(&mut self) -> Result<Option<PendingCommit>, KvError> {
        self.check_poison()?;
        if self.removals.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.send(Vec::new(), Vec::new(), None, None, 0)))
    }

    /// Says that the commit's transaction is durable: slots of its removed pages become free.
    pub fn acknowledge(&mut self, ticket: Ticket) {
        let Some(done) = self.finish(ticket) else { return };
        for page in done.removed {
            self.awaiting.remove(&page.slot);
            if page.slot < self.file.slots() {
                self.free_slot(page.slot);
            }
        }
    }

    /// Says that the commit's transaction did not happen: its rows and removals go into the next ones, and the claim
    /// it moved goes back. Of several commits, withdraw the newest first.
    pub fn withdraw(&mut self, ticket: Ticket) {
        let Some(mut failed) = self.finish(ticket) else { return };
        for slot in failed.slots {
            if self.tree.contains(slot) {
                let node = self.tree.node_mut(slot);
                (node.committed, node.synced) = (0, 0);
            }
        }
        failed.removed.append(&mut self.removals);
        self.removals = failed.removed;
        if let Some(claim) = failed.claim {
            let from = claim.from.and_then(|slot| self.successor(slot));
            self.move_claim(claim.to, from);
            self.set_leaf(claim.table, from);
        }
    }

    /// Whether a sync failed since the file was opened.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    fn check_poison(&self) -> Result<(), KvError> {
        if self.is_poisoned() { Err(KvError::Poisoned { path: self.path().to_path_buf() }) } else { Ok(()) }
    }

    fn name_pages(&mut self, table: &BlockTable) -> Vec<PageRow> {
        let mut rows = Vec::new();
        for slot in table.nodes.iter().copied() {
            let node = self.tree.node(slot);
            let (positions, already) = (node.tokens.len(), node.committed);
            if positions == already {
                continue;
            }
            assert!(node.verified && already < positions);
            let checksum = self.checksum(slot, positions);
            let (id, tokens) = (self.tree.current_id(slot).0, node.tokens.clone());
            rows.push(PageRow { slot, id, parent: node.parent_id.0, tokens, checksum });
            let new_positions = positions.saturating_sub(node.named);
            self.counters.bytes_committed += (new_positions * self.file.layout().token_bytes()) as u64;
            let node = self.tree.node_mut(slot);
            (node.committed, node.checksum) = (positions, checksum);
            node.named = node.named.max(positions);
        }
        rows
    }

    /// The pages of the table whose bytes this commit has to sync.
    fn take_unsynced(&mut self, table: &BlockTable, tail: Tail) -> Vec<u32> {
        let mut slots = Vec::new();
        for slot in table.nodes.iter().copied() {
            let node = self.tree.node_mut(slot);
            if node.synced < node.committed && (node.is_sealed() || tail == Tail::Synced) {
                node.synced = node.committed;
                slots.push(slot);
            }
        }
        slots
    }

    /// Where the path of a live table's session ends now.
    pub(crate) fn set_leaf(&mut self, table: TableId, leaf: Option<u32>) {
        let Some(claim) = self.table_claims.get_mut(&table) else { return };
        claim.leaf = leaf;
        if let Some(kept) = self.kept.get_mut(&claim.session) {
            *kept = leaf;
        }
    }

    fn move_claim(&mut self, from: Option<u32>, to: Option<u32>) {
        if let Some(to) = to {
            self.tree.node_mut(to).claims += 1;
        }
        if let Some(from) = from {
            self.unclaim(from, false);
        }
    }

    fn send(
        &mut self,
        rows: Vec<PageRow>,
        unsynced: Vec<u32>,
        claim: Option<ClaimMove>,
        leaf_slot: Option<u32>,
        kv_len: usize,
    ) -> PendingCommit {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let mut removed = std::mem::take(&mut self.removals);
        for page in &mut removed {
            // The page that was to take the claims may have been removed since.
            page.parent_slot = self.awaiting.get(&page.slot).copied().flatten();
        }
        let slots: Vec<u32> = rows.iter().map(|row| row.slot).chain(unsynced.iter().copied()).collect();
        let sync = SyncRange {
            ranges: self.file.ranges(unsynced),
            file: Arc::clone(&self.file.file),
            path: self.path().to_path_buf(),
            poisoned: Arc::clone(&self.poisoned),
        };
        self.in_flight.push_back(InFlight { ticket, slots, removed: removed.clone(), claim });
        PendingCommit { ticket, rows, removed, leaf_slot, kv_len, bytes: 0, sync }
    }

    fn finish(&mut self, ticket: Ticket) -> Option<InFlight> {
        let index = self.in_flight.iter().position(|commit| commit.ticket == ticket)?;
        self.in_flight.remove(index)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_failed_sync_poisons_every_later_one() {
        // A pipe cannot be synced, so this fails as a broken disk would.
        let (_reader, writer) = std::io::pipe().unwrap();
        let poisoned = Arc::new(AtomicBool::new(false));
        let directory = tempfile::tempdir().unwrap();
        let identity = crate::Identity { fingerprint: [1; 32], tenant_salt: [2; 32] };
        let layout = dormouse_kernels::PageLayout {
            layers: 1,
            kv_heads: 1,
            head_dim: 32,
            dtype: dormouse_kernels::KvDtype::F16,
        };
        let (mut file, _) =
            crate::file::PageFile::open(&directory.path().join("pages"), identity, layout).unwrap();
        file.grow(16).unwrap();
        let sync = SyncRange {
            ranges: file.ranges((0..16).step_by(2)),
            file: Arc::new(File::from(OwnedFd::from(writer))),
            path: PathBuf::from("pages"),
            poisoned: Arc::clone(&poisoned),
        };
        assert_eq!(sync.ranges.len(), 8, "so many that it is the file that is synced");
        sync.sync(Durability::Process).unwrap();
        assert!(matches!(sync.sync(Durability::Power), Err(KvError::Io { action: "sync", .. })));
        assert!(poisoned.load(Ordering::Acquire));
        assert!(matches!(sync.sync(Durability::Process), Err(KvError::Poisoned { .. })));
    }
}
