//! KV pages: page files, the tree of pages, block tables, residency and quota.
//!
//! Keys and values live in memory-mapped page files from the moment they are computed (`docs/page-format.md` has the
//! bytes). Pages form a tree, like commits: a page's id names its whole prefix, so a sequence's block table is simply the path along its
//! tokens, shared by all sequences that begin alike. This crate knows no model and no database: it takes catalog rows
//! when a file is opened and gives out rows to be written at each commit.
//!
//! The way of a sequence: [`PagePool::attach`] restores what is known, then, again and again, [`PagePool::reserve`]
//! makes positions writable, the forward pass writes them, [`PagePool::advance`] says so and [`PagePool::commit`] names
//! them to the catalog; [`PagePool::release`] gives the table back.

mod bytes;
mod commit;
mod error;
mod eviction;
mod file;
mod header;
mod identity;
mod pool;
mod rebuild;
mod residency;
mod slots;
#[cfg_attr(target_vendor = "apple", path = "system/apple.rs")]
#[cfg_attr(not(target_vendor = "apple"), path = "system/linux.rs")]
mod system;
mod table;
#[cfg(test)]
mod tests;
mod tree;

pub use commit::{PendingCommit, SyncRange, Tail, Ticket};
pub use error::KvError;
pub use file::set_aside;
pub use identity::{Identity, Realm};
pub use pool::{Attached, Found, Limits, PagePool, Stats, VerifyReport};
pub use rebuild::OpenReport;
pub use residency::{PageIn, PageOut};
pub use system::drop_cache;
pub use table::{BlockTable, TableId};
