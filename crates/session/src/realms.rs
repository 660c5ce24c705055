//! Who shares computed pages with whom: the sessions of one tenant, or those of them that have the same cache salt.

use dormouse_engine::Realm;

use crate::api::Tenant;
use crate::records::Settings;

/// The realm of a session's pages. The default tenant's is the page file's own, which was there before the others.
pub(crate) fn realm(tenant: &Tenant, settings: &Settings) -> Realm {
    match settings.cache_salt.as_deref() {
        Some(salt) => Realm::named(&[&tenant.0, salt]),
        None if *tenant == Tenant::default() => Realm::default(),
        None => Realm::named(&[&tenant.0]),
    }
}
