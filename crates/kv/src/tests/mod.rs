//! What the tests share: a small page, a catalog that only remembers, and KV whose every byte says where it belongs.

mod faults;
mod model;
mod scenarios;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dormouse_kernels::{KEY_GROUP, KvDtype, PAGE_TOKENS, PageLayout};
use dormouse_store::{ClaimRow, PageRow};
use tempfile::TempDir;

use crate::{
    Attached, BlockTable, Identity, KvError, Limits, OpenReport, PagePool, PendingCommit, Realm, Tail,
};

/// Four runs of 64 rows of 32 bytes: a page of 8 KiB, two memory pages.
const LAYOUT: PageLayout = PageLayout { layers: 2, kv_heads: 1, head_dim: 16, dtype: KvDtype::F16 };
const IDENTITY: Identity = Identity { fingerprint: [1; 32], tenant_salt: [2; 32] };

/// What the database would hold.
#[derive(Clone, Default)]
struct Catalog {
    rows: BTreeMap<u32, PageRow>,
    leaves: BTreeMap<usize, (Option<u32>, usize)>,
    pinned: BTreeSet<usize>,
}

fn name(session: usize) -> String {
    format!("session {session}")
}

impl Catalog {
    /// The transaction of a commit, in the order that the store has.
    fn apply(&mut self, commit: &PendingCommit, session: Option<usize>) {
        for page in &commit.removed {
            self.rows.remove(&page.slot);
            for (leaf, _) in self.leaves.values_mut().filter(|(leaf, _)| *leaf == Some(page.slot)) {
                *leaf = page.parent_slot;
            }
        }
        for row in &commit.rows {
            self.rows.insert(row.slot, row.clone());
        }
        if let Some(session) = session {
            self.leaves.insert(session, (commit.leaf_slot, commit.kv_len));
        }
    }

    fn claims(&self) -> Vec<ClaimRow> {
        let claim = |(session, (leaf, _)): (&usize, &(Option<u32>, usize))| {
            let pinned = self.pinned.contains(session);
            Some(ClaimRow { session: name(*session), leaf_slot: (*leaf)?, pinned })
        };
        self.leaves.iter().filter_map(claim).collect()
    }
}

struct Rig {
    folder: TempDir,
    catalog: Catalog,
    quota_slots: u64,
    ram_bytes: Option<u64>,
}

impl Rig {
    fn new(quota_slots: u64) -> Rig {
        Rig {
            folder: tempfile::tempdir().unwrap(),
            catalog: Catalog::default(),
            quota_slots,
            ram_bytes: None,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("pages.kv")
    }

    /// Its file system keeps all files in RAM: there is no disk to give pages to.
    fn is_in_ram(&self) -> bool {
        rustix::fs::statfs(self.folder.path()).unwrap().f_type == 0x0102_1994
    }

    fn try_open(&self) -> Result<(PagePool, OpenReport), KvError> {
        let limits =
            Limits { quota_bytes: self.quota_slots * LAYOUT.page_bytes() as u64, ram_bytes: self.ram_bytes };
        let rows = self.catalog.rows.values().cloned().collect();
        PagePool::open(&self.path(), IDENTITY, LAYOUT, limits, rows, self.catalog.claims())
    }

    fn open(&self) -> PagePool {
        self.try_open().unwrap().0
    }

    /// A commit that succeeds at once.
    fn commit(
        &mut self,
        pool: &mut PagePool,
        table: &mut BlockTable,
        session: Option<usize>,
    ) -> PendingCommit {
        let commit = pool.commit(table, Tail::Synced).unwrap();
        commit.sync.sync(dormouse_store::Durability::Power).unwrap();
        self.catalog.apply(&commit, session);
        pool.acknowledge(commit.ticket);
        commit
    }

    fn commit_removals(&mut self, pool: &mut PagePool) {
        if let Some(commit) = pool.commit_removals().unwrap() {
            self.catalog.apply(&commit, None);
            pool.acknowledge(commit.ticket);
        }
    }

    /// Computes and commits the KV of `tokens` for a session and gives the table back.
    fn fill(&mut self, pool: &mut PagePool, tokens: &[u32], session: usize) -> PendingCommit {
        let mut table = attach(pool, tokens).table;
        let leaf = self.catalog.leaves.get(&session).and_then(|(leaf, _)| *leaf);
        pool.set_claim(&mut table, &name(session), leaf);
        compute(pool, &mut table, tokens).unwrap();
        let commit = self.commit(pool, &mut table, Some(session));
        pool.release(table);
        commit
    }
}

/// The KV row that position `tokens.len() - 1` after these tokens must have in `run`, one word of it.
fn word(prefix: u64, run: usize) -> [u8; 8] {
    (prefix.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ (run as u64 + 1)).to_le_bytes()
}

/// A hash of every prefix of `tokens`, as KV depends on it. Here it differs from realm to realm as well, so that one
/// realm's pages are wrong in another.
fn prefixes(table: &BlockTable, tokens: &[u32]) -> impl Iterator<Item = u64> {
    let mut root = [0; 8];
    root.copy_from_slice(&table.root.0[..8]);
    tokens.iter().scan(u64::from_le_bytes(root), |hash: &mut u64, token| {
        *hash = (*hash ^ u64::from(*token)).wrapping_mul(0x100_0000_01b3).rotate_left(23);
        Some(*hash)
    })
}

/// Where a page has the bytes of one of its positions in `run`, in the order of its row.
fn row(position: usize, run: usize) -> impl Iterator<Item = usize> {
    let (start, bytes) = (run * LAYOUT.head_bytes(), LAYOUT.row_bytes());
    let (group, lane) = (position / KEY_GROUP, position % KEY_GROUP);
    let turned = LAYOUT.key_parts().flat_map(move |(offset, part)| {
        let at = start + group * KEY_GROUP * bytes + offset + lane * part;
        at..at + part
    });
    let plain = start + position * bytes..start + (position + 1) * bytes;
    let is_keys = (run / LAYOUT.kv_heads).is_multiple_of(2);
    turned.filter(move |_| is_keys).chain(plain.filter(move |_| !is_keys))
}

/// What the forward pass does: reserves, writes and advances until the table holds the KV of `tokens`.
fn compute(pool: &mut PagePool, table: &mut BlockTable, tokens: &[u32]) -> Result<(), KvError> {
    let start = table.len();
    pool.reserve(table, tokens.len() - start)?;
    let mut pages = Vec::new();
    pool.page_ptrs(table, &mut pages);
    for (position, prefix) in prefixes(table, tokens).enumerate().skip(start) {
        for run in 0..LAYOUT.runs() {
            let page = pages[position / PAGE_TOKENS].as_ptr();
            for (at, byte) in row(position % PAGE_TOKENS, run).zip(word(prefix, run).into_iter().cycle()) {
                // SAFETY: the position is reserved for this table, so its rows are mapped and nobody else's.
                unsafe { page.add(at).write(byte) };
            }
        }
    }
    pool.advance(table, &tokens[start..]);
    assert_eq!(table.len(), tokens.len());
    Ok(())
}

/// Reads every row of every position of the table and compares it with what its tokens say.
fn check(pool: &PagePool, table: &BlockTable, tokens: &[u32]) {
    let mut pages = Vec::new();
    pool.page_ptrs(table, &mut pages);
    for (position, prefix) in prefixes(table, &tokens[..table.len()]).enumerate() {
        for run in 0..LAYOUT.runs() {
            let page = pages[position / PAGE_TOKENS].as_ptr();
            for (at, byte) in row(position % PAGE_TOKENS, run).zip(word(prefix, run).into_iter().cycle()) {
                // SAFETY: the position is held by the table's pages, which are mapped and immutable.
                let found = unsafe { page.add(at).read() };
                assert_eq!(found, byte, "position {position} run {run} of {:?}", table.nodes);
            }
        }
    }
}

/// Attaches and checks what was restored.
fn attach(pool: &mut PagePool, tokens: &[u32]) -> Attached {
    attach_in(Realm::default(), pool, tokens)
}

fn attach_in(realm: Realm, pool: &mut PagePool, tokens: &[u32]) -> Attached {
    let attached = pool.attach(realm, tokens);
    assert_eq!(attached.restored, attached.table.len());
    assert!(attached.restored <= tokens.len());
    check(pool, &attached.table, tokens);
    attached
}

/// Every slot is in exactly one place, counts agree with what they count, and the catalog's view can be rebuilt.
fn check_pool(pool: &PagePool, tables: &[&BlockTable]) {
    let total = pool.file.slots();
    let mut places = vec![0; total as usize];
    for slot in &pool.free {
        places[*slot as usize] += 1;
    }
    for slot in pool.awaiting.keys().filter(|slot| **slot < total) {
        places[*slot as usize] += 1;
    }
    for slot in tables.iter().flat_map(|table| &table.blanks) {
        places[*slot as usize] += 1;
    }
    for (slot, node) in pool.tree.iter() {
        places[slot as usize] += 1;
        let pins = tables.iter().filter(|table| table.nodes.contains(&slot)).count();
        assert_eq!(node.pins as usize, pins, "pins of slot {slot}");
        assert!(node.committed <= node.tokens.len() && node.committed <= node.named);
        assert!(node.children.is_empty() || node.is_sealed());
        if let Some(parent) = node.parent {
            assert!(pool.tree.node(parent).children.contains(&slot));
            assert!(pool.tree.node(parent).pins > 0 || pool.tree.node(parent).last_used >= node.last_used);
            assert!(pool.tree.node(parent).pins >= node.pins);
        }
        if let Some(writer) = node.writer {
            assert!(tables.iter().any(|table| table.id == writer && table.nodes.last() == Some(&slot)));
        }
    }
    assert!(places.iter().all(|count| *count == 1), "places of the slots: {places:?}");
    assert!(pool.kept.values().flatten().all(|slot| pool.tree.contains(*slot)));
    for claim in pool.table_claims.values() {
        assert!(pool.kept.get(&claim.session).is_none_or(|kept| *kept == claim.leaf));
    }
}
