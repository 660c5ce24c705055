//! The page catalog: which slot of which page file holds the KV of which tokens.

/// One page as the catalog knows it. Rows are written in the transaction that also appends the tokens they hold,
/// after the page's bytes are on disk, and never before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRow {
    /// Slot in the page file.
    pub slot: u32,
    /// BLAKE3 chain over (domain, tenant salt, fingerprint, parent id, token ids).
    pub id: [u8; 32],
    /// Id of the page before this one; the page file's root id for a first page.
    pub parent: [u8; 32],
    /// The positions' token ids, 1 to `PAGE_TOKENS` of them; fewer than `PAGE_TOKENS` for an open tail page.
    pub tokens: Vec<u32>,
    /// CRC-32C of the KV bytes of exactly those positions.
    pub checksum: u32,
}

/// Where a session's path ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimRow {
    pub session: String,
    pub leaf_slot: u32,
    /// As its settings say.
    pub pinned: bool,
}

/// A page that gives its slot back. Sessions that claim it fall back to `parent_slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemovedPage {
    pub slot: u32,
    pub parent_slot: Option<u32>,
}

/// What one turn gained since its last commit: one transaction. The page bytes are already durable.
#[derive(Clone, Debug, Default)]
pub struct StepCommit {
    pub session: String,
    /// The writer's fencing number and its turn; the commit is refused with `LeaseLost` if the session's are others.
    pub fence: u64,
    pub turn: String,
    /// Position in the session's token log of the first of `tokens`; equals the log's durable length.
    pub log_start: usize,
    pub tokens: Vec<u32>,
    /// The page file these rows belong to (`Store::page_file`).
    pub page_file: i64,
    /// Rows to insert or, for an open tail that grew, to replace (by slot).
    pub pages: Vec<PageRow>,
    pub removed: Vec<RemovedPage>,
    /// The slot of the last page of the session's path after this commit.
    pub leaf_slot: Option<u32>,
    /// Positions of the token log whose KV is held by the path that ends at `leaf_slot`.
    pub kv_len: usize,
    /// What the commit writes, counted for its session and for this day since the epoch.
    pub bytes_written: u64,
    pub day: u64,
}
