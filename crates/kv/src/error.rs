//! What can go wrong with a page file, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of page files and the page pool. Losing a page file never loses content: [`KvError::is_recoverable`] says
/// whether [`set_aside`](crate::set_aside) and a fresh file (KV is then computed again from the tokens) is the answer.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    #[error("could not {action} the page file {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} is not a Dormouse page file (wrong magic); set it aside and start again, KV is recomputed"
    )]
    NotAPageFile { path: PathBuf },
    #[error(
        "the page file {path} is cut off: {bytes} bytes, its header alone takes {header_bytes}; \
         set it aside and start again, KV is recomputed"
    )]
    Truncated { path: PathBuf, bytes: u64, header_bytes: u64 },
    #[error(
        "the page file {path} has format version {found}, this build reads version {supported}; \
         set it aside (or run the build that wrote it), KV is recomputed"
    )]
    Version { path: PathBuf, found: u32, supported: u32 },
    #[error(
        "the header of the page file {path} is damaged (checksum {found:08x}, expected {expected:08x}); \
         set it aside and start again, KV is recomputed"
    )]
    HeaderChecksum { path: PathBuf, found: u32, expected: u32 },
    #[error(
        "the page file {path} belongs to another {what}; its pages cannot be used here: set it aside, KV is recomputed"
    )]
    OtherIdentity { path: PathBuf, what: &'static str },
    #[error("another process uses the page file {path}; stop it, or choose another data directory")]
    Locked { path: PathBuf },
    #[error(
        "the page layout has no bytes or too many ({page_bytes} bytes a page); check the model's description"
    )]
    Layout { page_bytes: usize },
    #[error(
        "no room for {needed} more KV pages: {slots} slots (quota {quota_slots}), {pinned} in use by running turns; \
         raise the disk quota or run fewer turns at once"
    )]
    Full { needed: usize, slots: usize, quota_slots: usize, pinned: usize },
    /// Room was made by evicting pages, but their slots may be written only after the catalog forgot them.
    #[error(
        "{evicted} pages were evicted to make room for {needed}; commit their removal (`commit_removals`), \
         acknowledge it and try again"
    )]
    AwaitingRemovals { needed: usize, evicted: usize },
    #[error(
        "the disk is full: the page file {path} could not grow by {bytes} bytes; free space or lower the quota"
    )]
    NoSpace { path: PathBuf, bytes: u64 },
    #[error(
        "an earlier write to the page file {path} failed; nothing more is committed to it until it is reopened and \
         checked: restart"
    )]
    Poisoned { path: PathBuf },
    #[error(
        "the page file {path} has no page in slot {slot}; look the session's leaf up again from its tokens"
    )]
    UnknownPage { path: PathBuf, slot: u32 },
}

impl KvError {
    /// Whether setting the file aside and starting a fresh one mends this, at the cost of computing KV again.
    pub fn is_recoverable(&self) -> bool {
        matches!(
            self,
            KvError::NotAPageFile { .. }
                | KvError::Truncated { .. }
                | KvError::Version { .. }
                | KvError::HeaderChecksum { .. }
                | KvError::OtherIdentity { .. }
        )
    }

    /// A `map_err` adapter: `KvError::io("open", path)`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KvError {
        let path = path.to_path_buf();
        move |source| KvError::Io { action, path, source }
    }
}
