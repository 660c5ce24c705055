//! Branches: a session forked or rewound at a place in its history.

use std::time::Instant;

use dormouse_engine::{Claim, Engine, Receipt, Tier};
use dormouse_store::{Cut, History, Leaf, NewSession, StoreError};
use serde_json::json;

use crate::api::*;
use crate::realms::realm;
use crate::records::{self, Settings, decode, encode, new_event};
use crate::runtime::{Runtime, detached};
use crate::turns::PLANNING_ATTEMPTS;
use crate::{cut, ids};

/// A place in a session's history, as it was found.
pub(crate) struct Past {
    pub session: String,
    pub place: Place,
    /// Of the conversation up to there (see [`Runtime::chain_of`]), where it must still be that.
    pub hash: Option<[u8; 32]>,
}

impl Runtime {
    /// A new session with the history of `session` up to `at` (its end when None; of a busy session, the place where
    /// its running turn begins). It shares every page; nothing is computed.
    pub async fn fork(
        &self,
        tenant: &Tenant,
        session: &str,
        at: Option<Place>,
        name: Option<String>,
    ) -> Result<(Session, Receipt), SessionError> {
        let began = Instant::now();
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        for _ in 0..PLANNING_ATTEMPTS {
            let (history, log) = self.inner.store.conversation(&id).await?;
            let settings: Settings = decode(&history.settings)?;
            let engine = self.inner.engine_of(&settings)?.clone();
            let cut = cut::at(&history, &log, engine.model().tokenizer(), at.as_ref(), "at")?;
            let (name, expires_ms) = (name.clone(), settings.expires_ms(ids::now_ms()));
            let branch = Branch { history, log, settings, engine, cut, name, implicit: false, expires_ms };
            if let Some(forked) = self.branch(tenant, branch, began).await? {
                return Ok(forked);
            }
        }
        Err(overtaken(id))
    }

    /// A hidden session with the history of `past`, its settings what `adapt` makes of the other's, and when it expires; None
    /// when the past is not there any more: its session was deleted, or rewound and continued otherwise. `param` is the field
    /// of the request that named the place.
    pub(crate) async fn fork_past(
        &self,
        tenant: &Tenant,
        past: &Past,
        param: &'static str,
        adapt: impl Fn(Settings) -> Result<(Settings, Option<u64>), SessionError>,
    ) -> Result<Option<String>, SessionError> {
        let began = Instant::now();
        for _ in 0..PLANNING_ATTEMPTS {
            let (history, log) = match self.inner.store.conversation(&past.session).await {
                Ok(found) => found,
                Err(StoreError::SessionNotFound(_)) => return Ok(None),
                Err(why) => return Err(why.into()),
            };
            if matches!(past.place, Place::Token(at) if at > log.len()) {
                return Ok(None);
            }
            let (settings, expires_ms) = adapt(decode(&history.settings)?)?;
            let engine = self.inner.engine_of(&settings)?.clone();
            let cut = cut::at(&history, &log, engine.model().tokenizer(), Some(&past.place), param)?;
            if let Some(hash) = past.hash
                && (cut.partial_item.is_some() || self.chain_of(tenant, &history, cut.items)? != hash)
            {
                return Ok(None);
            }
            let branch =
                Branch { history, log, settings, engine, cut, name: None, implicit: true, expires_ms };
            match self.branch(tenant, branch, began).await {
                Ok(Some((session, _))) => return Ok(Some(session.id)),
                Ok(None) => {}
                Err(SessionError::SessionNotFound(_)) => return Ok(None),
                Err(why) => return Err(why),
            }
        }
        Err(overtaken(past.session.clone()))
    }

    /// None when the source has moved on since the branch's history was read.
    async fn branch(
        &self,
        tenant: &Tenant,
        branch: Branch,
        began: Instant,
    ) -> Result<Option<(Session, Receipt)>, SessionError> {
        let (runtime, tenant) = (self.clone(), tenant.clone());
        detached(async move { runtime.branch_now(&tenant, branch, began).await }).await
    }

    async fn branch_now(
        &self,
        tenant: &Tenant,
        branch: Branch,
        began: Instant,
    ) -> Result<Option<(Session, Receipt)>, SessionError> {
        let Branch { history, mut log, mut settings, engine, cut, name, implicit, expires_ms } = branch;
        let _alive = self.inner.keep_alive()?;
        let source = history.session;
        let at = cut.tokens;
        log.truncate(at);
        let claim = claim(&engine, tenant, &settings, log).await?;
        settings.forked_from = Some(ForkedFrom { session: source.id.clone(), at });
        let data = json!({ "model": settings.model, "name": name, "forked_from": settings.forked_from });
        let new = NewSession {
            id: ids::mint("sess_")?,
            tenant: tenant.0.clone(),
            name,
            implicit,
            expires_ms,
            settings: encode(&settings)?,
            events: vec![new_event("session.created", None, data)],
            now_ms: ids::now_ms(),
        };
        let leaf = leaf(&engine, claim);
        let forked = self.inner.store.fork_session(&source.id, source.fence, cut, new, leaf).await;
        let row = match forked {
            Ok(row) => row,
            Err(why) => {
                engine.unclaim(claim.leaf_slot, false).await;
                return match why {
                    StoreError::LeaseLost { .. } => Ok(None),
                    why => Err(why.into()),
                };
            }
        };
        if settings.pinned {
            engine.keep(&row.id, claim.leaf_slot, true);
        }
        let receipt = Receipt {
            session: row.id.clone(),
            restored_tokens: claim.kv_len,
            tier: if claim.kv_len > 0 { Tier::Ram } else { Tier::None },
            restore_ms: began.elapsed().as_secs_f64() * 1000.0,
            exact: true,
            ..Receipt::default()
        };
        Ok(Some((self.inner.session(row, settings), receipt)))
    }

    /// Forgets what came after `to`; the event log stays and says so. A busy session is not rewound.
    pub async fn rewind(&self, tenant: &Tenant, session: &str, to: Place) -> Result<Session, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let runtime = self.clone();
        detached(async move {
            for _ in 0..PLANNING_ATTEMPTS {
                if let Some(rewound) = runtime.rewind_now(&id, &to).await? {
                    return Ok(rewound);
                }
            }
            Err(overtaken(id))
        })
        .await
    }

    /// None when the session has moved on since its history was read.
    async fn rewind_now(&self, id: &str, to: &Place) -> Result<Option<Session>, SessionError> {
        let _alive = self.inner.keep_alive()?;
        let (history, mut log) = self.inner.store.conversation(id).await?;
        if let Some(turn) = history.session.active_turn {
            return Err(SessionError::Busy { session: id.to_owned(), turn });
        }
        let settings: Settings = decode(&history.settings)?;
        let engine = self.inner.engine_of(&settings)?;
        let tenant = Tenant(history.session.tenant.clone());
        let cut = cut::at(&history, &log, engine.model().tokenizer(), Some(to), "to")?;
        let data = json!({ "tokens": cut.tokens, "tokens_before": log.len(), "turns_dropped": history.turns.len() - cut.turns });
        log.truncate(cut.tokens);
        let claim = claim(engine, &tenant, &settings, log).await?;
        let events = vec![new_event("session.rewound", None, data)];
        let (fence, leaf, now_ms) = (history.session.fence, leaf(engine, claim), ids::now_ms());
        let rewound = self.inner.store.rewind_session(id, fence, cut, leaf, events, now_ms).await;
        let row = match rewound {
            Ok(row) => row,
            Err(why) => {
                engine.unclaim(claim.leaf_slot, false).await;
                return match why {
                    StoreError::LeaseLost { .. } => Ok(None),
                    why => Err(why.into()),
                };
            }
        };
        if settings.pinned {
            engine.keep(id, claim.leaf_slot, true);
        }
        if history.session.page_file == Some(engine.page_file()) {
            engine.unclaim(history.session.leaf_slot, false).await;
        }
        self.inner.changed(id);
        Ok(Some(self.inner.session(row, settings)))
    }
}

fn overtaken(session: String) -> SessionError {
    SessionError::Busy { session, turn: "(another writer's)".into() }
}

/// A fork on its way.
pub(crate) struct Branch {
    pub history: History,
    pub log: Vec<u32>,
    pub settings: Settings,
    pub engine: Engine,
    pub cut: Cut,
    pub name: Option<String>,
    pub implicit: bool,
    pub expires_ms: Option<u64>,
}

/// Claims the pages of a log; of another tokenizer's log there are none.
async fn claim(
    engine: &Engine,
    tenant: &Tenant,
    settings: &Settings,
    log: Vec<u32>,
) -> Result<Claim, SessionError> {
    if settings.tokenizer != records::hex(&engine.model().tokenizer().fingerprint()) {
        return Ok(Claim { leaf_slot: None, kv_len: 0 });
    }
    Ok(engine.claim(realm(tenant, settings), log).await?)
}

fn leaf(engine: &Engine, claim: Claim) -> Leaf {
    Leaf { page_file: Some(engine.page_file()), slot: claim.leaf_slot, kv_len: claim.kv_len }
}
