//! Page identity: which KV a page holds, as a BLAKE3 chain over everything KV depends on.

use blake3::Hasher;

const ROOT_DOMAIN: &str = "dormouse kv page v1 root";
const REALM_DOMAIN: &str = "dormouse kv realm v1";
const REALM_ROOT_DOMAIN: &str = "dormouse kv page v1 realm root";
const PAGE_DOMAIN: &str = "dormouse kv page v1";

/// Whose pages a file holds: KV is shared only inside one tenant, and only where the fingerprint agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Identity of weights, architecture and rope settings, KV dtype and page layout.
    pub fingerprint: [u8; 32],
    /// Random bytes of the tenant, so that ids tell nothing to another tenant.
    pub tenant_salt: [u8; 32],
}

/// Who shares pages with whom: those who name the same realm, and nobody else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Realm(
    /// None: the file's first and only one, until there are others.
    Option<[u8; 32]>,
);

impl Realm {
    /// The realm with these names, in this order.
    pub fn named(names: &[&str]) -> Realm {
        let mut hasher = Hasher::new_derive_key(REALM_DOMAIN);
        for name in names {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        }
        Realm(Some(*hasher.finalize().as_bytes()))
    }
}

/// Names the tokens of a page and of its whole prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageId(pub(crate) [u8; 32]);

/// Computes ids; keeps the hasher whose domain key is already derived.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    root: PageId,
    /// Knows the file's salt and fingerprint.
    realms: Hasher,
    page: Hasher,
}

/// A realm's root id is half a name and half the proof that it is a root of this file.
const HALF: usize = 16;

impl Chain {
    pub(crate) fn new(identity: &Identity) -> Chain {
        let mut root = Hasher::new_derive_key(ROOT_DOMAIN);
        root.update(&identity.tenant_salt).update(&identity.fingerprint);
        let mut realms = Hasher::new_derive_key(REALM_ROOT_DOMAIN);
        realms.update(&identity.tenant_salt).update(&identity.fingerprint);
        let root = PageId(*root.finalize().as_bytes());
        Chain { root, realms, page: Hasher::new_derive_key(PAGE_DOMAIN) }
    }

    /// The id that a realm's first pages have as their parent. Nobody without the file's salt can find two realms of one
    /// root, or a page with a root's id.
    pub(crate) fn root(&self, realm: Realm) -> PageId {
        let Some(name) = realm.0 else { return self.root };
        let mut id = [0; 32];
        id[..HALF].copy_from_slice(&self.half(b"name", &name));
        let proof = self.half(b"root", &id[..HALF]);
        id[HALF..].copy_from_slice(&proof);
        PageId(id)
    }

    /// Whether an id is the root of some realm, whichever.
    pub(crate) fn is_root(&self, id: PageId) -> bool {
        id == self.root || id.0[HALF..] == self.half(b"root", &id.0[..HALF])
    }

    fn half(&self, purpose: &[u8; 4], bytes: &[u8]) -> [u8; HALF] {
        let mut half = [0; HALF];
        let hash = self.realms.clone().update(purpose).update(bytes).finalize();
        half.copy_from_slice(&hash.as_bytes()[..HALF]);
        half
    }

    /// Id of the page that holds `tokens` after the prefix that `parent` names.
    pub(crate) fn child(&self, parent: PageId, tokens: &[u32]) -> PageId {
        let mut hasher = self.page.clone();
        hasher.update(&parent.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        PageId(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_when_any_part_of_the_identity_or_the_prefix_differs() {
        let identity = Identity { fingerprint: [1; 32], tenant_salt: [2; 32] };
        let chain = Chain::new(&identity);
        let other_model = Chain::new(&Identity { fingerprint: [3; 32], ..identity });
        let other_file = Chain::new(&Identity { tenant_salt: [3; 32], ..identity });
        let (own, ann) = (Realm::default(), Realm::named(&["ann"]));
        let root = chain.root(own);
        let ids = [
            root,
            other_model.root(own),
            other_file.root(own),
            chain.root(ann),
            other_model.root(ann),
            other_file.root(ann),
            chain.root(Realm::named(&["ann", ""])),
            chain.root(Realm::named(&["an", "n"])),
            chain.child(root, &[1, 2]),
            chain.child(root, &[1]),
            chain.child(chain.child(root, &[1]), &[2]),
            chain.child(other_file.root(own), &[1, 2]),
            chain.child(chain.root(ann), &[1, 2]),
        ];
        for (index, id) in ids.iter().enumerate() {
            assert!(!ids[index + 1..].contains(id));
        }
        assert_eq!(chain.child(root, &[7]), Chain::new(&identity).child(root, &[7]));
    }

    #[test]
    fn a_root_is_known_as_one_by_its_own_file_alone() {
        let identity = Identity { fingerprint: [1; 32], tenant_salt: [2; 32] };
        let chain = Chain::new(&identity);
        let other = Chain::new(&Identity { tenant_salt: [3; 32], ..identity });
        for realm in [Realm::default(), Realm::named(&["ann"])] {
            let root = chain.root(realm);
            assert!(chain.is_root(root) && !other.is_root(root));
            assert!(!chain.is_root(chain.child(root, &[1])));
        }
    }
}
