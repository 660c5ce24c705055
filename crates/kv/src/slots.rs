//! Where slots come from and go to: growth, removal, and the claims of sessions.

use std::collections::VecDeque;

use dormouse_store::RemovedPage;

use crate::KvError;
use crate::identity::Realm;
use crate::pool::{PagePool, TableClaim};
use crate::table::BlockTable;

impl PagePool {
    /// Takes `count` free slots, the first ones after `neighbour` if they are free: pages of one sequence that lie
    /// side by side are read and synced in one go.
    pub(crate) fn take_slots(
        &mut self,
        count: usize,
        neighbour: Option<u32>,
    ) -> Result<VecDeque<u32>, KvError> {
        if self.free.len() < count {
            self.make_room(count)?;
        }
        let mut taken = VecDeque::with_capacity(count);
        let mut after = neighbour;
        while taken.len() < count {
            let next = after.and_then(|slot| self.free.range(slot + 1..).next().copied());
            let slot = next.or_else(|| self.free.first().copied()).expect("room was made");
            self.free.remove(&slot);
            taken.push_back(slot);
            after = Some(slot);
        }
        Ok(taken)
    }

    pub(crate) fn free_slot(&mut self, slot: u32) {
        assert!(!self.tree.contains(slot) && !self.awaiting.contains_key(&slot));
        let new = self.free.insert(slot);
        assert!(new, "slot {slot} was free already");
        self.changed.insert(slot);
    }

    fn make_room(&mut self, count: usize) -> Result<(), KvError> {
        let mut disk_full = None;
        while self.free.len() < count && self.file.slots() < self.quota_slots {
            if let Err(error) = self.grow(count - self.free.len()) {
                match error {
                    KvError::NoSpace { .. } => disk_full = Some(error),
                    other => return Err(other),
                }
                break;
            }
        }
        if self.free.len() >= count {
            return Ok(());
        }
        // Evicting for a request that can never be met would empty the cache for nothing.
        let slots = self.file.slots() as usize;
        let pinned = self.tree.iter().filter(|(_, node)| node.pins > 0).count();
        let evictable = self.tree.len() - pinned;
        if self.free.len() + self.awaiting_slots() + evictable < count {
            let quota_slots = self.quota_slots as usize;
            return Err(disk_full.unwrap_or(KvError::Full { needed: count, slots, quota_slots, pinned }));
        }
        let evicted = self.evict_until(count);
        if disk_full.is_some() {
            self.counters.evictions_disk_full += evicted as u64;
        }
        if self.free.len() >= count {
            Ok(())
        } else {
            Err(KvError::AwaitingRemovals { needed: count, evicted })
        }
    }

    /// Grows the file by an extent, or by `least` slots where the disk has no room for more.
    fn grow(&mut self, least: usize) -> Result<(), KvError> {
        let first = self.file.slots();
        let allowed = self.quota_slots - first;
        let extent = self.file.slots_per_extent().min(allowed);
        let least = u32::try_from(least).unwrap_or(u32::MAX).min(extent);
        match self.file.grow(extent) {
            Err(KvError::NoSpace { .. }) if least < extent => self.file.grow(least)?,
            result => result?,
        }
        // The catalog may still name slots that a cut file has lost and now has again.
        let new = (first..self.file.slots()).filter(|slot| !self.awaiting.contains_key(slot));
        self.free.extend(new);
        Ok(())
    }

    /// Slots that will be free when the catalog has forgotten their pages.
    pub(crate) fn awaiting_slots(&self) -> usize {
        self.awaiting.keys().filter(|slot| **slot < self.file.slots()).count()
    }

    /// Takes an unused page out of the tree; its claims go to `heir`. Its slot is free at once if the catalog never
    /// heard of it, and otherwise when the removal is acknowledged.
    pub(crate) fn remove_page(&mut self, slot: u32, heir: Option<u32>) {
        assert_ne!(heir, Some(slot));
        let node = self.tree.remove(slot);
        if let Some(heir) = heir {
            self.tree.node_mut(heir).claims += node.claims;
        }
        let of_tables = self.table_claims.values_mut().map(|claim| &mut claim.leaf);
        for leaf in of_tables.chain(self.kept.values_mut()).filter(|leaf| **leaf == Some(slot)) {
            *leaf = heir;
        }
        for other in self.awaiting.values_mut().filter(|other| **other == Some(slot)) {
            *other = heir;
        }
        if node.named > 0 {
            self.awaiting.insert(slot, heir);
            self.removals.push(RemovedPage { slot, parent_slot: heir });
        } else {
            self.free_slot(slot);
        }
    }

    /// Removes a damaged page and all pages after it; false if a live table uses one of them.
    pub(crate) fn cut(&mut self, slot: u32) -> bool {
        let subtree = self.tree.subtree(slot);
        self.counters.damaged += 1;
        if subtree.iter().any(|slot| self.tree.node(*slot).pins > 0) {
            return false;
        }
        let heir = self.tree.node(slot).parent;
        for slot in subtree {
            self.remove_page(slot, heir);
        }
        true
    }

    /// The page that stands for `slot`: itself, or the page that took its claims when it was removed. That is known until the
    /// commit that tells the catalog of the removal is acknowledged; after it the slot may be another page's.
    pub fn successor(&self, slot: u32) -> Option<u32> {
        if self.tree.contains(slot) { Some(slot) } else { self.awaiting.get(&slot).copied().flatten() }
    }

    /// Says that one more session's path ends at `leaf_slot`.
    ///
    /// # Errors
    /// `UnknownPage` if there is and was no page in that slot.
    pub fn claim(&mut self, leaf_slot: u32) -> Result<(), KvError> {
        match self.successor(leaf_slot) {
            Some(slot) => self.tree.node_mut(slot).claims += 1,
            None if self.awaiting.contains_key(&leaf_slot) => {}
            None => return Err(KvError::UnknownPage { path: self.path().to_path_buf(), slot: leaf_slot }),
        }
        Ok(())
    }

    /// Says that a session's path ends at `leaf_slot` no more. With `purge`, pages that nobody else uses are removed,
    /// from the leaf upwards. A slot whose page is gone is no error: there is nothing left to give up.
    pub fn unclaim(&mut self, leaf_slot: u32, purge: bool) {
        let mut at = self.successor(leaf_slot);
        if let Some(slot) = at {
            let node = self.tree.node_mut(slot);
            node.claims = node.claims.saturating_sub(1);
        }
        while purge && let Some(slot) = at {
            let node = self.tree.node(slot);
            if !node.children.is_empty() || node.pins > 0 || node.claims > 0 {
                break;
            }
            at = node.parent;
            self.remove_page(slot, at);
            self.counters.purged += 1;
        }
    }

    /// Makes `table` the table of a session that claims `leaf` in the catalog. [`PagePool::commit`] moves the claim.
    pub fn set_claim(&mut self, table: &mut BlockTable, session: &str, leaf: Option<u32>) {
        let leaf = leaf.and_then(|slot| self.successor(slot));
        self.table_claims.insert(table.id, TableClaim { session: session.to_owned(), leaf });
        // Who kept the session may have looked before its last commit.
        self.set_leaf(table.id, leaf);
    }

    /// Keeps the pages of a session, whose path ends at `leaf`, until there are no others to evict.
    pub fn keep(&mut self, session: &str, leaf: Option<u32>) {
        // A live table's claim may have moved since the caller looked.
        let live = self.table_claims.values().find(|claim| claim.session == session);
        let leaf = live.map_or(leaf, |claim| claim.leaf).and_then(|slot| self.successor(slot));
        self.kept.insert(session.to_owned(), leaf);
    }

    /// Takes back [`PagePool::keep`].
    pub fn let_go(&mut self, session: &str) {
        self.kept.remove(session);
    }

    /// The last committed page on the realm's path of `tokens`, and how many of them the path up to it covers.
    pub fn leaf_of(&self, realm: Realm, tokens: &[u32]) -> (Option<u32>, usize) {
        let (mut leaf, mut kv_len) = (None, 0);
        let path = self.tree.walk(realm, tokens);
        for slot in path.slots {
            let node = self.tree.node(slot);
            if node.committed == 0 {
                break;
            }
            leaf = Some(slot);
            kv_len = path.covered.min(kv_len + node.committed);
        }
        (leaf, kv_len)
    }
}
