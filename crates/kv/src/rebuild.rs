//! The tree as the catalog describes it, with everything that does not fit left out.

use std::collections::HashMap;

use dormouse_kernels::PAGE_TOKENS;
use dormouse_store::{PageRow, RemovedPage};

use crate::identity::{Chain, PageId};
use crate::tree::{After, Tree};

/// What opening a page file found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// There was no file; a new one was made.
    pub created: bool,
    /// Pages in the tree.
    pub pages: usize,
    /// Catalog entries whose parent is missing or was dropped.
    pub dropped_orphans: usize,
    /// Catalog entries whose id, length or slot contradicts their tokens or another entry.
    pub dropped_mismatched: usize,
    /// Catalog entries whose slot lies beyond the end of the file.
    pub dropped_beyond_end: usize,
}

pub(crate) struct Rebuilt {
    pub(crate) tree: Tree,
    pub(crate) removed: Vec<RemovedPage>,
    pub(crate) report: OpenReport,
}

pub(crate) fn rebuild(chain: Chain, slots: u32, rows: Vec<PageRow>) -> Rebuilt {
    let mut tree = Tree::new(chain);
    let mut report = OpenReport::default();
    let mut by_parent: HashMap<PageId, Vec<PageRow>> = HashMap::new();
    for row in rows {
        by_parent.entry(PageId(row.parent)).or_default().push(row);
    }

    let mut dropped = Vec::new();
    let mut places: Vec<After> =
        by_parent.keys().copied().filter(|id| tree.chain.is_root(*id)).map(After::Root).collect();
    while let Some(place) = places.pop() {
        let parent = match place {
            After::Root(_) => None,
            After::Page(slot) => Some(slot),
        };
        for row in by_parent.remove(&tree.id_after(place)).unwrap_or_default() {
            if row.slot >= slots {
                report.dropped_beyond_end += 1;
                dropped.push((row, parent));
            } else if fits(&tree, place, &row) {
                let sealed = row.tokens.len() == PAGE_TOKENS;
                let node = tree.insert(row.slot, place, row.tokens);
                node.committed = node.tokens.len();
                node.named = node.committed;
                // An open tail may have been named before its bytes were synced.
                node.synced = if sealed { PAGE_TOKENS } else { 0 };
                node.checksum = row.checksum;
                if sealed {
                    places.push(After::Page(row.slot));
                }
            } else {
                report.dropped_mismatched += 1;
                dropped.push((row, parent));
            }
        }
    }

    let mut removed = Vec::new();
    while let Some((row, heir)) = dropped.pop() {
        for child in by_parent.remove(&PageId(row.id)).unwrap_or_default() {
            report.dropped_orphans += 1;
            dropped.push((child, heir));
        }
        removed.push(RemovedPage { slot: row.slot, parent_slot: heir });
    }
    for orphan in by_parent.into_values().flatten() {
        report.dropped_orphans += 1;
        removed.push(RemovedPage { slot: orphan.slot, parent_slot: None });
    }
    // A slot named twice belongs to the entry that fitted.
    removed.retain(|page| !tree.contains(page.slot));
    report.pages = tree.len();
    Rebuilt { tree, removed, report }
}

fn fits(tree: &Tree, place: After, row: &PageRow) -> bool {
    (1..=PAGE_TOKENS).contains(&row.tokens.len())
        && !tree.contains(row.slot)
        && tree.chain.child(tree.id_after(place), &row.tokens).0 == row.id
        && tree.find_sealed(place, &row.tokens).is_none()
}
