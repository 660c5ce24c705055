//! What each tenant has used since the start, by model.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::api::Usage;

/// Of one tenant with one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub turns: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

#[derive(Debug, Default)]
pub(crate) struct TenantCounts(Mutex<BTreeMap<(String, String), Used>>);

impl TenantCounts {
    /// A turn is over.
    pub fn count(&self, tenant: &str, model: &str, usage: &Usage) {
        // Numbers are added one by one; a panic in between leaves them as good as they were.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let used = all.entry((tenant.to_owned(), model.to_owned())).or_default();
        used.turns += 1;
        used.prompt_tokens += usage.prompt_tokens as u64;
        used.cached_tokens += usage.cached_tokens as u64;
        used.output_tokens += usage.completion_tokens as u64;
    }

    /// By tenant and model.
    pub fn all(&self) -> BTreeMap<(String, String), Used> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
