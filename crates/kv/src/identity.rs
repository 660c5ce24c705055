//! Page identity: which KV a page holds, as a BLAKE3 chain over everything KV depends on.

use blake3::Hasher;

const ROOT_DOMAIN: &str = "dormouse kv page v1 root";
const PAGE_DOMAIN: &str = "dormouse kv page v1";

/// Whose pages a file holds: KV is shared only inside one tenant, and only where the fingerprint agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Identity of weights, architecture and rope settings, KV dtype and page layout.
    pub fingerprint: [u8; 32],
    /// Random bytes of the tenant, so that ids tell nothing to another tenant.
    pub tenant_salt: [u8; 32],
}

/// Names the tokens of a page and of its whole prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageId(pub(crate) [u8; 32]);

/// Computes ids; keeps the hasher whose domain key is already derived.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    root: PageId,
    page: Hasher,
}

impl Chain {
    pub(crate) fn new(identity: &Identity) -> Chain {
        let mut root = Hasher::new_derive_key(ROOT_DOMAIN);
        root.update(&identity.tenant_salt).update(&identity.fingerprint);
        Chain { root: PageId(*root.finalize().as_bytes()), page: Hasher::new_derive_key(PAGE_DOMAIN) }
    }

    /// The id that first pages have as their parent.
    pub(crate) fn root(&self) -> PageId {
        self.root
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
        let other_tenant = Chain::new(&Identity { tenant_salt: [3; 32], ..identity });
        let ids = [
            chain.root(),
            other_model.root(),
            other_tenant.root(),
            chain.child(chain.root(), &[1, 2]),
            chain.child(chain.root(), &[1]),
            chain.child(chain.child(chain.root(), &[1]), &[2]),
            chain.child(other_tenant.root(), &[1, 2]),
        ];
        for (index, id) in ids.iter().enumerate() {
            assert!(!ids[index + 1..].contains(id));
        }
        assert_eq!(chain.child(chain.root(), &[7]), Chain::new(&identity).child(chain.root(), &[7]));
    }
}
