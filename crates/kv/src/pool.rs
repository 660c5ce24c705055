//! The page pool: one page file, the tree of its pages, and who uses them. One thread owns it, so nothing is locked.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dormouse_kernels::{PAGE_TOKENS, PageLayout};
use dormouse_store::{ClaimRow, PageRow, RemovedPage};

use crate::bytes;
use crate::commit::InFlight;
use crate::file::{MappedRange, PageFile};
use crate::identity::{Chain, Realm};
use crate::rebuild::{OpenReport, rebuild};
use crate::residency::{PageIn, PageOut};
use crate::table::{BlockTable, TableId};
use crate::tree::{Path as TreePath, Tree};
use crate::{Identity, KvError};

/// What the pool may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes the page file may grow to. A file that is larger already is used as it is, but grows no more.
    pub quota_bytes: u64,
    /// Most bytes of RAM that pages keep which no live table uses. None: the operating system decides.
    pub ram_bytes: Option<u64>,
}

/// The KV pages of one fingerprint, each in its realm.
#[derive(Debug)]
pub struct PagePool {
    pub(crate) file: PageFile,
    pub(crate) tree: Tree,
    pub(crate) quota_slots: u32,
    ram_slots: Option<usize>,
    /// Slots that hold nothing and may be written.
    pub(crate) free: BTreeSet<u32>,
    /// Slots of removed pages that the catalog may still name, with the page that took their claims.
    pub(crate) awaiting: HashMap<u32, Option<u32>>,
    /// Removals for the next commit.
    pub(crate) removals: Vec<RemovedPage>,
    pub(crate) in_flight: VecDeque<InFlight>,
    /// Slots whose bytes changed otherwise than by a forward pass, or that nobody is about to read: what copies of them on a
    /// device must go for.
    pub(crate) changed: BTreeSet<u32>,
    /// Of live tables of sessions.
    pub(crate) table_claims: HashMap<TableId, TableClaim>,
    /// Sessions whose pages are the last to be evicted, with their leaves.
    pub(crate) kept: HashMap<String, Option<u32>>,
    pub(crate) cost_doubles_at: f64,
    pub(crate) poisoned: Arc<AtomicBool>,
    pub(crate) counters: Counters,
    pub(crate) next_ticket: u64,
    next_table: u64,
    pub(crate) clock: u64,
}

/// What a live table's session claims in the catalog.
#[derive(Debug)]
pub(crate) struct TableClaim {
    pub(crate) session: String,
    pub(crate) leaf: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) evictions: u64,
    pub(crate) evictions_disk_full: u64,
    pub(crate) purged: u64,
    pub(crate) copies_on_write: u64,
    pub(crate) deduplicated: u64,
    pub(crate) damaged: u64,
    pub(crate) bytes_committed: u64,
    pub(crate) paged_out: u64,
}

/// What [`PagePool::attach`] found.
#[derive(Debug)]
pub struct Attached {
    pub table: BlockTable,
    /// Tokens whose KV need not be computed: `table.len()`.
    pub restored: usize,
    /// Slots of pages that were found damaged, and removed with everything after them.
    pub damaged: Vec<u32>,
    /// Bytes that were not in RAM and had to be read.
    pub bytes_read: u64,
}

/// The pages that hold the longest prefix of some tokens that its realm knows, as they were when [`PagePool::find`] looked.
#[derive(Debug)]
pub struct Found {
    path: TreePath,
    bytes: u64,
    missing: u64,
}

impl Found {
    /// Tokens whose KV can be restored.
    pub fn tokens(&self) -> usize {
        self.path.covered
    }

    pub fn resident_bytes(&self) -> u64 {
        self.bytes - self.missing
    }

    /// Bytes that are not in RAM.
    pub fn missing_bytes(&self) -> u64 {
        self.missing
    }
}

/// What [`PagePool::verify_all`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    pub pages: usize,
    pub bytes: u64,
    /// Slots whose bytes cannot be read or do not have the checksum that the catalog names.
    pub damaged: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub slots_total: usize,
    /// Slots that the quota allows.
    pub slots_quota: usize,
    /// Slots that hold a page.
    pub slots_used: usize,
    pub slots_free: usize,
    /// Pages at which a session's path ends.
    pub slots_claimed: usize,
    /// Pages in use by live tables.
    pub slots_pinned: usize,
    /// Slots of removed pages that the catalog has not forgotten yet.
    pub slots_awaiting: usize,
    pub slot_bytes: u64,
    /// Since the pool was opened, as all counts below.
    pub evictions: u64,
    /// Of them, those because the disk was full; the others because the quota was.
    pub evictions_disk_full: u64,
    /// Pages that went with their session because nobody else used them.
    pub purged: u64,
    pub copies_on_write: u64,
    pub deduplicated: u64,
    pub damaged: u64,
    /// Bytes of the positions that commits named for the first time.
    pub bytes_committed: u64,
    /// Pages in RAM, as far as this process has asked for them, and those whose RAM was given back to stay within the budget.
    pub slots_in_ram: usize,
    pub paged_out: u64,
}

impl PagePool {
    /// Opens or creates the page file at `path` and rebuilds the tree from the catalog's `rows`. `claims` says where
    /// sessions' paths end, those first that were not used for longest.
    ///
    /// # Errors
    /// As the page file's header says ([`KvError::is_recoverable`]: set the file aside and open again), `Locked`, `Io`.
    pub fn open(
        path: &Path,
        identity: Identity,
        layout: PageLayout,
        limits: Limits,
        rows: Vec<PageRow>,
        claims: Vec<ClaimRow>,
    ) -> Result<(PagePool, OpenReport), KvError> {
        let (file, created) = PageFile::open(path, identity, layout)?;
        let rebuilt = rebuild(Chain::new(&identity), file.slots(), rows);
        let quota_slots = limits.quota_bytes / file.slot_bytes() as u64;
        let mut pool = PagePool {
            tree: rebuilt.tree,
            quota_slots: u32::try_from(quota_slots).unwrap_or(u32::MAX),
            ram_slots: limits.ram_bytes.map(|bytes| (bytes / file.slot_bytes() as u64) as usize),
            free: BTreeSet::new(),
            awaiting: rebuilt.removed.iter().map(|page| (page.slot, page.parent_slot)).collect(),
            removals: rebuilt.removed,
            in_flight: VecDeque::new(),
            table_claims: HashMap::new(),
            changed: BTreeSet::new(),
            kept: HashMap::new(),
            cost_doubles_at: f64::INFINITY,
            poisoned: Arc::new(AtomicBool::new(false)),
            counters: Counters::default(),
            next_ticket: 1,
            next_table: 1,
            clock: 0,
            file,
        };
        pool.free = (0..pool.file.slots())
            .filter(|slot| !pool.tree.contains(*slot) && !pool.awaiting.contains_key(slot))
            .collect();
        for claim in claims {
            pool.take_up(claim);
        }
        Ok((pool, OpenReport { created, ..rebuilt.report }))
    }

    /// A session whose path ends at a page, and which was used after all before it.
    fn take_up(&mut self, claim: ClaimRow) {
        let leaf = self.successor(claim.leaf_slot);
        if claim.pinned {
            self.kept.insert(claim.session, leaf);
        }
        if let Some(leaf) = leaf {
            self.tree.node_mut(leaf).claims += 1;
        }
        let now = self.tick();
        let mut at = leaf;
        while let Some(slot) = at {
            let node = self.tree.node_mut(slot);
            node.last_used = now;
            at = node.parent;
        }
    }

    /// What the pool may take from now on. A file that is larger already is used as it is, but grows no more.
    pub fn set_limits(&mut self, limits: Limits) {
        let slot_bytes = self.file.slot_bytes() as u64;
        self.quota_slots = u32::try_from(limits.quota_bytes / slot_bytes).unwrap_or(u32::MAX);
        self.ram_slots = limits.ram_bytes.map(|bytes| (bytes / slot_bytes) as usize);
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn layout(&self) -> &PageLayout {
        self.file.layout()
    }

    /// Looks for the pages that hold the longest prefix of `tokens` that the realm knows, without reading any. They cover
    /// `tokens.len()` positions at most: pass what may be restored.
    pub fn find(&self, realm: Realm, tokens: &[u32]) -> Found {
        let path = self.tree.walk(realm, tokens);
        let ranges = self.file.ranges(path.slots.iter().copied());
        let bytes = ranges.iter().map(|range| range.len as u64).sum();
        Found { missing: bytes - resident_bytes(&ranges), bytes, path }
    }

    /// What is to be read before [`PagePool::attach`] finds it all in RAM; None when it would now.
    pub fn page_in(&self, found: &Found) -> Option<PageIn> {
        if found.missing == 0 {
            return None;
        }
        let pages = found.path.slots.iter().flat_map(|slot| self.file.ranges([*slot])).collect();
        Some(PageIn::new(pages, Arc::clone(&self.file.file), self.path().to_path_buf()))
    }

    /// Makes a table of the pages that hold the longest prefix of `tokens` that the realm knows, all of them read,
    /// checked and pinned.
    pub fn attach(&mut self, realm: Realm, tokens: &[u32]) -> Attached {
        let found = self.find(realm, tokens);
        self.attach_found(realm, tokens, found)
    }

    /// [`PagePool::attach`] of what was just found; nothing was changed in between.
    pub fn attach_found(&mut self, realm: Realm, tokens: &[u32], found: Found) -> Attached {
        let (mut damaged, mut bytes_read) = (Vec::new(), 0);
        let Found { mut path, mut missing, .. } = found;
        loop {
            let unreadable = self.load(&path.slots, missing > 0);
            bytes_read += missing;
            self.verify_together(&path.slots, &unreadable);
            let bad = path.slots.iter().position(|slot| unreadable.contains(slot) || !self.verify(*slot));
            let Some(index) = bad else { break };
            damaged.push(path.slots[index]);
            if !self.cut(path.slots[index]) {
                // A live table checked this page before the disk failed; it cannot be removed under it.
                path.slots.truncate(index);
                path.covered = index * PAGE_TOKENS;
                break;
            }
            Found { path, missing, .. } = self.find(realm, tokens);
        }
        let now = self.tick();
        for slot in &path.slots {
            let node = self.tree.node_mut(*slot);
            assert!(node.verified, "only checked pages are used");
            node.pins += 1;
            node.last_used = now;
        }
        assert!(path.covered <= tokens.len());
        let id = TableId(self.next_table);
        self.next_table += 1;
        let root = self.tree.chain.root(realm);
        let table = BlockTable { id, root, nodes: path.slots, blanks: VecDeque::new(), len: path.covered };
        Attached { restored: table.len, table, damaged, bytes_read }
    }

    /// Gives back the RAM of the pages of `tokens` that no live table uses and returns how many bytes that were.
    /// The pages themselves stay as they are.
    pub fn park(&mut self, realm: Realm, tokens: &[u32]) -> u64 {
        let mut slots = self.tree.walk(realm, tokens).slots;
        slots.retain(|slot| self.tree.node(*slot).pins == 0);
        for slot in &slots {
            self.tree.node_mut(*slot).mapped = false;
        }
        self.changed.extend(&slots);
        let ranges = self.file.ranges(slots);
        let before = resident_bytes(&ranges);
        let mut after = before;
        // Pages that are on disk already, as after power-durable commits, go at once; others are written first.
        for write_back in [false, true] {
            if after == 0 {
                break;
            }
            for range in &ranges {
                if let Err(error) = range.page_out(&self.file.file, write_back) {
                    tracing::warn!(path = %self.path().display(), %error, "could not give back RAM of KV pages");
                    if write_back {
                        self.poison();
                    }
                }
            }
            after = resident_bytes(&ranges);
        }
        before.saturating_sub(after)
    }

    /// The RAM to give back so that what is left fits the budget: that of the pages which were not used for longest, and which
    /// no live table uses. None when it fits already.
    pub fn over_budget(&mut self) -> Option<PageOut> {
        let most = self.ram_slots?;
        let mapped = self.tree.iter().filter(|(_, node)| node.mapped).count();
        if mapped <= most {
            return None;
        }
        let idle = self.tree.iter().filter(|(_, node)| node.mapped && node.pins == 0);
        let mut oldest: Vec<(u64, u32)> = idle.map(|(slot, node)| (node.last_used, slot)).collect();
        oldest.sort_unstable();
        // A little more, so that it is not the same again for the next page.
        oldest.truncate(mapped - most + most / 16);
        for (_, slot) in &oldest {
            self.tree.node_mut(*slot).mapped = false;
        }
        self.counters.paged_out += oldest.len() as u64;
        let ranges = self.file.ranges(oldest.into_iter().map(|(_, slot)| slot));
        let out = PageOut { ranges, file: Arc::clone(&self.file.file), path: self.path().to_path_buf() };
        (!out.ranges.is_empty()).then_some(out)
    }

    /// Reads every committed page and compares its checksum. Changes nothing: [`PagePool::attach`] is what removes
    /// damaged pages.
    pub fn verify_all(&self) -> VerifyReport {
        let mut report = VerifyReport::default();
        for (slot, node) in self.tree.iter().filter(|(_, node)| node.committed > 0) {
            report.pages += 1;
            report.bytes += (node.committed * self.layout().token_bytes()) as u64;
            let readable =
                self.file.ranges([slot]).iter().all(|range| range.populate(&self.file.file).is_ok());
            if !readable || self.checksum(slot, node.committed) != node.checksum {
                report.damaged.push(slot);
            }
        }
        report
    }

    pub fn stats(&self) -> Stats {
        let count =
            |test: fn(&crate::tree::Node) -> bool| self.tree.iter().filter(|(_, node)| test(node)).count();
        Stats {
            slots_total: self.file.slots() as usize,
            slots_quota: self.quota_slots as usize,
            slots_used: self.tree.len(),
            slots_free: self.free.len(),
            slots_claimed: count(|node| node.claims > 0),
            slots_pinned: count(|node| node.pins > 0),
            slots_awaiting: self.awaiting.len(),
            slot_bytes: self.file.slot_bytes() as u64,
            evictions: self.counters.evictions,
            evictions_disk_full: self.counters.evictions_disk_full,
            purged: self.counters.purged,
            copies_on_write: self.counters.copies_on_write,
            deduplicated: self.counters.deduplicated,
            damaged: self.counters.damaged,
            bytes_committed: self.counters.bytes_committed,
            slots_in_ram: count(|node| node.mapped),
            paged_out: self.counters.paged_out,
        }
    }

    /// The next logical time.
    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Reads pages in large reads: all of them where some are not in RAM, else those that were not used since the file was
    /// opened. The slots of those that cannot be read.
    pub(crate) fn load(&mut self, slots: &[u32], some_are_missing: bool) -> Vec<u32> {
        let is_wanted = |slot: &u32| some_are_missing || !self.tree.node(*slot).mapped;
        let wanted: Vec<u32> = slots.iter().copied().filter(is_wanted).collect();
        let mut unreadable = Vec::new();
        let pages = &self.file;
        let failed = in_parallel(&wanted, |slots| {
            pages.ranges(slots.iter().copied()).iter().any(|range| range.populate(&pages.file).is_err())
        })
        .contains(&true);
        for slot in wanted {
            if failed
                && let Some(error) =
                    pages.ranges([slot]).iter().find_map(|range| range.populate(&pages.file).err())
            {
                tracing::error!(path = %self.path().display(), slot, %error, "could not read a KV page");
                unreadable.push(slot);
            } else {
                self.tree.node_mut(slot).mapped = true;
            }
        }
        unreadable
    }

    /// Compares the checksums of many pages at once; what is wrong is left for [`PagePool::verify`] to report.
    fn verify_together(&mut self, slots: &[u32], unreadable: &[u32]) {
        let unchecked = |slot: &u32| !self.tree.node(*slot).verified && !unreadable.contains(slot);
        let wanted: Vec<u32> = slots.iter().copied().filter(unchecked).collect();
        let right = |slot: &u32| {
            let node = self.tree.node(*slot);
            node.committed == node.tokens.len() && self.checksum(*slot, node.committed) == node.checksum
        };
        let right = in_parallel(&wanted, |slots| slots.iter().copied().filter(right).collect::<Vec<u32>>());
        for slot in right.into_iter().flatten() {
            self.tree.node_mut(slot).verified = true;
        }
    }

    /// Whether the page may be used; its checksum is compared the first time that is asked.
    pub(crate) fn verify(&mut self, slot: u32) -> bool {
        let node = self.tree.node(slot);
        if !node.verified {
            assert_eq!(node.committed, node.tokens.len(), "unchecked pages are as the catalog names them");
            let found = self.checksum(slot, node.committed);
            if found != node.checksum {
                let (path, expected) = (self.path().display(), node.checksum);
                if node.is_sealed() {
                    tracing::error!(%path, slot, found, expected, "a KV page is damaged");
                } else {
                    tracing::error!(%path, slot, found, expected, "an open KV page is damaged, or power went before it was synced");
                }
                return false;
            }
            self.tree.node_mut(slot).verified = true;
        }
        true
    }

    /// CRC-32C of the first `positions` of a page.
    pub(crate) fn checksum(&self, slot: u32, positions: usize) -> u32 {
        assert!(positions <= self.tree.node(slot).tokens.len());
        // SAFETY: the slot is mapped, and positions that a page holds are never written again.
        unsafe { bytes::checksum(self.file.layout(), self.file.slot_ptr(slot), positions) }
    }
}

/// Calls `work` on pieces of `slots` on as many threads as there are cores, when there is enough of it: a resumed
/// session's first token waits for this, and nothing else computes meanwhile.
fn in_parallel<T: Send>(slots: &[u32], work: impl Fn(&[u32]) -> T + Sync) -> Vec<T> {
    /// Pages that outweigh starting a thread.
    const PIECE_LEAST: usize = 8;
    // To ask for the cores takes longer than a few pages do.
    let piece = match slots.len() <= PIECE_LEAST {
        true => PIECE_LEAST,
        false => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
            slots.len().div_ceil(threads).max(PIECE_LEAST)
        }
    };
    let mut pieces = slots.chunks(piece);
    let Some(first) = pieces.next() else { return Vec::new() };
    std::thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = pieces.map(|piece| scope.spawn(move || work(piece))).collect();
        let mut results = vec![work(first)];
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

fn resident_bytes(ranges: &[MappedRange]) -> u64 {
    ranges.iter().map(MappedRange::resident_bytes).sum()
}
