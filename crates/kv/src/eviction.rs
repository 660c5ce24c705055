//! Which pages go when there is no room for more: those whose loss costs the least, weighed by how likely it is that somebody
//! asks for them again. All slots have one size, so that is also what they cost by the byte.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use crate::pool::PagePool;
use crate::tree::Node;

/// Slots that commits keep free ahead of need in a full file, so that turns seldom wait for a removal. Eight pages
/// are 512 tokens: more than a commit interval of any turn. At most an eighth of the file.
const FREE_AHEAD: u32 = 8;
/// How much likelier the pages of a session are used again than pages that only happen to be there: those must have been used
/// so many times as recently to be worth as much.
const CLAIMED: f64 = 8.0;

impl PagePool {
    /// What computing a token costs grows with its position: at this one it is twice what it is at the first.
    pub fn set_cost_doubles_at(&mut self, position: f64) {
        self.cost_doubles_at = position;
    }

    /// Keeps a few slots ready in a file that cannot grow.
    pub(crate) fn evict_ahead(&mut self) {
        if self.file.slots() >= self.quota_slots {
            // Nobody needs the room yet: not worth a page that is to be kept.
            self.evict(FREE_AHEAD.min(self.file.slots() / 8) as usize, false);
        }
    }

    /// Evicts pages until `count` slots are free or will be once the catalog has forgotten their pages; returns how
    /// many. Pages of live tables stay, and pages after which others come; those of kept sessions are the last to go.
    pub(crate) fn evict_until(&mut self, count: usize) -> usize {
        self.evict(count, true)
    }

    fn evict(&mut self, count: usize, kept_too: bool) -> usize {
        let mut wanted = count.saturating_sub(self.free.len() + self.awaiting_slots());
        if wanted == 0 {
            return 0;
        }
        let kept: HashSet<u32> = self.kept.values().copied().flatten().collect();
        let rank = |pool: &PagePool, slot: u32, is_kept: bool| {
            Reverse((is_kept, pool.worth(pool.tree.node(slot)).to_bits(), slot))
        };
        let evictable = self.tree.iter().filter(|(_, node)| is_evictable(node));
        let mut candidates: BinaryHeap<_> =
            evictable.map(|(slot, _)| rank(self, slot, kept.contains(&slot))).collect();
        let (mut evicted, mut of_kept) = (0, 0);
        while wanted > 0
            && let Some(Reverse((is_kept, _, slot))) = candidates.pop()
        {
            if is_kept && !kept_too {
                break;
            }
            let parent = self.tree.node(slot).parent;
            self.remove_page(slot, parent);
            if let Some(parent) = parent.filter(|parent| is_evictable(self.tree.node(*parent))) {
                // What was kept up to its leaf is kept up to the page before it.
                candidates.push(rank(self, parent, is_kept || kept.contains(&parent)));
            }
            self.counters.evictions += 1;
            of_kept += usize::from(is_kept);
            evicted += 1;
            wanted -= 1;
        }
        if of_kept > 0 {
            let path = self.path().display();
            tracing::warn!(pages = of_kept, %path, "the disk quota left no room but that of pinned sessions");
        }
        evicted
    }

    /// Cost of computing the page again × likelihood that somebody will want it, never negative. The longer a page was not
    /// used, the longer it will probably not be.
    fn worth(&self, node: &Node) -> f64 {
        let cost = node.tokens.len() as f64 * (1.0 + node.position() as f64 / self.cost_doubles_at);
        let unused = self.clock.saturating_sub(node.last_used) + 1;
        let likelihood = if node.claims > 0 { CLAIMED } else { 1.0 } / unused as f64;
        cost * likelihood
    }
}

fn is_evictable(node: &Node) -> bool {
    node.pins == 0 && node.children.is_empty()
}
