//! KV pages. (signatures; bodies follow)
mod error;
pub use error::KvError;
use dormouse_kernels::PageLayout;
use dormouse_store::{PageRow, RemovedPage};
use std::path::{Path, PathBuf};
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity { pub fingerprint: [u8; 32], pub tenant_salt: [u8; 32] }
#[derive(Clone, Copy, Debug)]
pub struct Limits { pub quota_bytes: u64 }
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability { #[default] Power, Process, None }
/// What opening found.
#[derive(Clone, Debug, Default)]
pub struct OpenReport { pub created: bool, pub pages: usize, pub dropped_orphans: usize, pub dropped_mismatched: usize, pub dropped_beyond_end: usize }
#[derive(Debug)]
pub struct BlockTable { len: usize }
impl BlockTable { pub fn len(&self) -> usize { self.len } pub fn is_empty(&self) -> bool { self.len == 0 } }
#[derive(Debug)]
pub struct Attached { pub table: BlockTable, pub restored: usize, pub damaged: Vec<u32>, pub bytes_read: u64, pub from_disk: bool }
#[derive(Clone, Copy, Debug, Default)]
pub struct Probe { pub tokens: usize, pub resident_bytes: u64, pub non_resident_bytes: u64 }
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);
#[derive(Debug)]
pub struct PendingCommit { pub ticket: Ticket, pub rows: Vec<PageRow>, pub removed: Vec<RemovedPage>, pub leaf_slot: Option<u32>, pub kv_len: usize, pub sync: SyncRange }
#[derive(Debug)]
pub struct SyncRange(());
impl SyncRange { pub fn sync(&self, _durability: Durability) -> Result<(), KvError> { unimplemented!() } }
#[derive(Clone, Debug, Default)]
pub struct VerifyReport { pub pages: usize, pub bytes: u64, pub damaged: Vec<u32> }
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats { pub slots_total: usize, pub slots_quota: usize, pub slots_used: usize, pub slots_free: usize, pub slots_claimed: usize, pub slots_pinned: usize, pub slots_awaiting: usize, pub slot_bytes: u64, pub evictions: u64, pub copies_on_write: u64, pub deduplicated: u64, pub damaged: u64, pub bytes_committed: u64 }
#[derive(Debug)]
pub struct PagePool(());
#[allow(unused_variables)]
impl PagePool {
    pub fn open(path: &Path, identity: Identity, layout: PageLayout, limits: Limits, rows: Vec<PageRow>, claims: Vec<(u32, u32)>) -> Result<(PagePool, OpenReport), KvError> { unimplemented!() }
    pub fn path(&self) -> &Path { unimplemented!() }
    pub fn layout(&self) -> &PageLayout { unimplemented!() }
    pub fn attach(&mut self, tokens: &[u32]) -> Attached { unimplemented!() }
    pub fn probe(&self, tokens: &[u32]) -> Probe { unimplemented!() }
    /// Clears `pointers` and fills it with the addresses of the table's pages, reserved ones included.
    pub fn page_ptrs(&self, table: &BlockTable, pointers: &mut Vec<*mut u8>) { unimplemented!() }
    /// On `KvError::AwaitingRemovals`: `commit_removals`, write it to the catalog, `acknowledge`, try again.
    pub fn reserve(&mut self, table: &mut BlockTable, more: usize) -> Result<(), KvError> { unimplemented!() }
    pub fn advance(&mut self, table: &mut BlockTable, tokens: &[u32]) { unimplemented!() }
    pub fn truncate(&mut self, table: &mut BlockTable, len: usize) { unimplemented!() }
    pub fn release(&mut self, table: BlockTable) { unimplemented!() }
    pub fn commit(&mut self, table: &mut BlockTable) -> Result<PendingCommit, KvError> { unimplemented!() }
    /// None when there is nothing to remove.
    pub fn commit_removals(&mut self) -> Result<Option<PendingCommit>, KvError> { unimplemented!() }
    pub fn acknowledge(&mut self, ticket: Ticket) { unimplemented!() }
    /// The catalog refused this commit: its rows and removals go into the next one.
    pub fn withdraw(&mut self, ticket: Ticket) { unimplemented!() }
    /// Makes this the table of a session whose catalog row claims `leaf`; commits then move the claim.
    pub fn set_claim(&mut self, table: &mut BlockTable, leaf: Option<u32>) { unimplemented!() }
    pub fn claim(&mut self, leaf_slot: u32) -> Result<(), KvError> { unimplemented!() }
    pub fn unclaim(&mut self, leaf_slot: u32, purge: bool) { unimplemented!() }
    pub fn leaf_of(&self, tokens: &[u32]) -> (Option<u32>, usize) { unimplemented!() }
    /// Bytes of RAM given back.
    pub fn park(&mut self, tokens: &[u32]) -> u64 { unimplemented!() }
    pub fn prefetch(&self, tokens: &[u32]) { unimplemented!() }
    pub fn verify_all(&self) -> VerifyReport { unimplemented!() }
    pub fn stats(&self) -> Stats { unimplemented!() }
    pub fn is_poisoned(&self) -> bool { unimplemented!() }
}
/// Renames the file to `NAME.damaged-N` and says where it went.
pub fn set_aside(path: &Path) -> Result<PathBuf, KvError> { let _ = path; unimplemented!() }
