//! The pages as a tree, like commits: a page's place is its whole prefix, and the path to it is a block table.

use std::collections::HashMap;

use dormouse_kernels::PAGE_TOKENS;

use crate::identity::{Chain, PageId, Realm};
use crate::table::TableId;

/// What a page comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Nothing: it is a first page of the realm with this root.
    Root(PageId),
    /// The page in this slot.
    Page(u32),
}

/// One page. Nodes are named by the slot that holds their bytes.
#[derive(Debug)]
pub(crate) struct Node {
    /// The page before this one; none for a first page.
    pub(crate) parent: Option<u32>,
    /// Id of `parent`, or the realm's root.
    pub(crate) parent_id: PageId,
    /// Some once the page is sealed.
    pub(crate) id: Option<PageId>,
    /// The positions that hold KV, 1 to `PAGE_TOKENS`.
    pub(crate) tokens: Vec<u32>,
    pub(crate) children: Vec<u32>,
    /// Pages before this one.
    pub(crate) depth: u32,
    /// Live tables whose path includes this page.
    pub(crate) pins: u32,
    /// Sessions whose path ends here.
    pub(crate) claims: u32,
    /// Logical time of the last use. Of pages that no table uses, none is older than the pages after it.
    pub(crate) last_used: u64,
    /// The bytes were computed by this process or their checksum was found right since the file was opened.
    pub(crate) verified: bool,
    /// The bytes were read in one go since the file was opened or the page was parked.
    pub(crate) mapped: bool,
    /// The one table that may write the positions after `tokens`.
    pub(crate) writer: Option<TableId>,
    /// Positions covered by the catalog entry that commits count on; 0 for none.
    pub(crate) committed: usize,
    /// CRC-32C of those positions.
    pub(crate) checksum: u32,
    /// Most positions that any entry handed out ever covered. They are never written again, and the slot of a page
    /// with such an entry is free only when the catalog has forgotten it.
    pub(crate) named: usize,
    /// Positions that were handed out to be synced, or were on disk when the file was opened.
    pub(crate) synced: usize,
}

impl Node {
    pub(crate) fn is_sealed(&self) -> bool {
        self.tokens.len() == PAGE_TOKENS
    }

    /// Of its first token.
    pub(crate) fn position(&self) -> usize {
        self.depth as usize * PAGE_TOKENS
    }

    pub(crate) fn after(&self) -> After {
        self.parent.map_or(After::Root(self.parent_id), After::Page)
    }
}

/// The pages that hold a prefix of some tokens.
#[derive(Debug, Default)]
pub(crate) struct Path {
    pub(crate) slots: Vec<u32>,
    /// Tokens covered; the last page may hold more positions than are used of it.
    pub(crate) covered: usize,
}

#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) chain: Chain,
    /// By slot.
    nodes: Vec<Option<Node>>,
    /// By the root of their realm; none is empty.
    first_pages: HashMap<PageId, Vec<u32>>,
    sealed: HashMap<PageId, u32>,
    used: usize,
}

impl Tree {
    pub(crate) fn new(chain: Chain) -> Tree {
        Tree { chain, nodes: Vec::new(), first_pages: HashMap::new(), sealed: HashMap::new(), used: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    pub(crate) fn contains(&self, slot: u32) -> bool {
        self.nodes.get(slot as usize).is_some_and(Option::is_some)
    }

    /// The page in `slot`, which must exist: tables and parents only name pages that do.
    pub(crate) fn node(&self, slot: u32) -> &Node {
        match self.nodes.get(slot as usize) {
            Some(Some(node)) => node,
            _ => panic!("slot {slot} holds no page"),
        }
    }

    pub(crate) fn node_mut(&mut self, slot: u32) -> &mut Node {
        match self.nodes.get_mut(slot as usize) {
            Some(Some(node)) => node,
            _ => panic!("slot {slot} holds no page"),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(slot, node)| Some((slot as u32, node.as_ref()?)))
    }

    /// Id that the pages at this place have as their parent id.
    pub(crate) fn id_after(&self, after: After) -> PageId {
        match after {
            After::Root(root) => root,
            After::Page(slot) => self.node(slot).id.expect("only sealed pages have pages after them"),
        }
    }

    /// The id of a page in its present state, sealed or open.
    pub(crate) fn current_id(&self, slot: u32) -> PageId {
        let node = self.node(slot);
        node.id.unwrap_or_else(|| self.chain.child(node.parent_id, &node.tokens))
    }

    /// The sealed page that holds exactly `tokens` at this place.
    pub(crate) fn find_sealed(&self, after: After, tokens: &[u32]) -> Option<u32> {
        let slot = *self.sealed.get(&self.chain.child(self.id_after(after), tokens))?;
        let node = self.node(slot);
        (node.after() == after && node.tokens == tokens).then_some(slot)
    }

    /// Puts a page that nobody uses yet into the tree.
    pub(crate) fn insert(&mut self, slot: u32, after: After, tokens: Vec<u32>) -> &mut Node {
        assert!((1..=PAGE_TOKENS).contains(&tokens.len()), "a page of {} tokens", tokens.len());
        assert!(!self.contains(slot), "slot {slot} is in use");
        let parent_id = self.id_after(after);
        let sealed = tokens.len() == PAGE_TOKENS;
        let (parent, depth) = match after {
            After::Root(root) => {
                self.first_pages.entry(root).or_default().push(slot);
                (None, 0)
            }
            After::Page(parent) => {
                let before = self.node_mut(parent);
                before.children.push(slot);
                (Some(parent), before.depth + 1)
            }
        };
        let index = slot as usize;
        if self.nodes.len() <= index {
            self.nodes.resize_with(index + 1, || None);
        }
        self.nodes[index] = Some(Node {
            parent,
            parent_id,
            id: None,
            tokens,
            children: Vec::new(),
            depth,
            pins: 0,
            claims: 0,
            last_used: 0,
            verified: false,
            mapped: false,
            writer: None,
            committed: 0,
            checksum: 0,
            named: 0,
            synced: 0,
        });
        self.used += 1;
        if sealed {
            self.seal(slot);
        }
        self.node_mut(slot)
    }

    /// Appends tokens to an open page and seals it when that fills it.
    pub(crate) fn append(&mut self, slot: u32, tokens: &[u32]) {
        let node = self.node_mut(slot);
        assert!(!node.is_sealed() && node.tokens.len() + tokens.len() <= PAGE_TOKENS);
        node.tokens.extend_from_slice(tokens);
        if node.is_sealed() {
            self.seal(slot);
        }
    }

    fn seal(&mut self, slot: u32) {
        let id = self.current_id(slot);
        let node = self.node_mut(slot);
        assert!(node.is_sealed() && node.id.is_none());
        node.id = Some(id);
        let twin = self.sealed.insert(id, slot);
        assert!(twin.is_none(), "two sealed pages hold the same tokens");
    }

    /// Takes a page without pages after it out of the tree.
    pub(crate) fn remove(&mut self, slot: u32) -> Node {
        let node = self.nodes[slot as usize].take().expect("only present pages are removed");
        assert!(node.children.is_empty() && node.pins == 0, "slot {slot} is still in use");
        if let Some(id) = node.id {
            self.sealed.remove(&id);
        }
        match node.after() {
            After::Page(parent) => self.node_mut(parent).children.retain(|sibling| *sibling != slot),
            After::Root(root) => {
                let siblings = self.first_pages.entry(root).or_default();
                siblings.retain(|sibling| *sibling != slot);
                if siblings.is_empty() {
                    self.first_pages.remove(&root);
                }
            }
        }
        self.used -= 1;
        node
    }

    /// The page in `slot` and all after it, every page before its parent.
    pub(crate) fn subtree(&self, slot: u32) -> Vec<u32> {
        let mut slots = vec![slot];
        let mut at = 0;
        while at < slots.len() {
            slots.extend_from_slice(&self.node(slots[at]).children);
            at += 1;
        }
        slots.reverse();
        slots
    }

    /// The longest prefix of `tokens` that the realm knows: sealed pages, then as much as matches of one more page.
    pub(crate) fn walk(&self, realm: Realm, tokens: &[u32]) -> Path {
        let mut path = Path::default();
        let mut last = After::Root(self.chain.root(realm));
        while let Some(page) = tokens.get(path.covered..path.covered + PAGE_TOKENS) {
            let Some(slot) = self.find_sealed(last, page) else { break };
            path.slots.push(slot);
            path.covered += PAGE_TOKENS;
            last = After::Page(slot);
        }
        let rest = &tokens[path.covered..];
        let next_pages = match last {
            After::Root(root) => self.first_pages.get(&root).map_or(&[][..], Vec::as_slice),
            After::Page(slot) => &self.node(slot).children,
        };
        // Of equal matches, the one that can be continued in place saves a copy.
        let best = next_pages
            .iter()
            .map(|slot| {
                let node = self.node(*slot);
                let matching = node.tokens.iter().zip(rest).take_while(|(own, other)| own == other).count();
                let continues = matching == node.tokens.len() && node.writer.is_none();
                (matching, continues, *slot)
            })
            .max();
        if let Some((matching, _, slot)) = best.filter(|(matching, ..)| *matching > 0) {
            path.slots.push(slot);
            path.covered += matching;
        }
        path
    }
}
