//! Sessions as objects: created, listed, shown, changed, deleted.

use dormouse_store::{NewSession, SessionRow, StatusFilter};
use serde_json::json;

use crate::api::*;
use crate::ids;
use crate::records::{self, Settings, decode, encode, new_event};
use crate::runtime::{Runtime, detached};

impl Runtime {
    pub async fn create(&self, tenant: &Tenant, request: CreateSession) -> Result<Session, SessionError> {
        let settings = self.new_settings(request.model.as_deref(), &request)?;
        let now_ms = ids::now_ms();
        let expires_ms = settings.expires_ms(now_ms);
        let row = self.insert(tenant, request.name, &settings, expires_ms, false).await?;
        Ok(self.inner.session(row, settings))
    }

    pub async fn list(&self, tenant: &Tenant, query: ListSessions) -> Result<Page<Session>, SessionError> {
        let limit = query.limit.clamp(1, 100);
        let status = match query.status {
            None => None,
            Some(SessionStatus::Idle) => Some(StatusFilter::Idle),
            Some(SessionStatus::InProgress) => Some(StatusFilter::InProgress),
            Some(SessionStatus::Failed) => Some(StatusFilter::Failed),
            Some(SessionStatus::RequiresAction) => Some(StatusFilter::Waiting),
        };
        let store = &self.inner.store;
        let mut rows = store.list_sessions(&tenant.0, query.after, limit + 1, status, query.implicit).await?;
        let has_more = rows.len() > limit;
        rows.truncate(limit);
        let session = |(row, settings): (SessionRow, String)| Ok(self.inner.session(row, decode(&settings)?));
        Ok(Page { data: rows.into_iter().map(session).collect::<Result<_, SessionError>>()?, has_more })
    }

    /// `session` is an id or a name, here and below.
    pub async fn get(&self, tenant: &Tenant, session: &str) -> Result<Session, SessionError> {
        let row = self.inner.store.find_session(&tenant.0, session).await?;
        let settings = self.inner.settings(&row.id).await?;
        Ok(self.inner.session(row, settings))
    }

    pub async fn update(
        &self,
        tenant: &Tenant,
        session: &str,
        change: UpdateSession,
    ) -> Result<Session, SessionError> {
        let (runtime, tenant, session) = (self.clone(), tenant.clone(), session.to_owned());
        detached(async move { runtime.update_now(&tenant, &session, change).await }).await
    }

    async fn update_now(
        &self,
        tenant: &Tenant,
        session: &str,
        change: UpdateSession,
    ) -> Result<Session, SessionError> {
        let row = self.inner.store.find_session(&tenant.0, session).await?;
        let mut settings = self.inner.settings(&row.id).await?;
        let data = json!({
            "name": change.name.is_some(), "metadata": change.metadata.is_some(),
            "ttl_seconds": change.ttl_seconds.is_some(), "pinned": change.pinned.is_some(),
        });
        settings.metadata = change.metadata.unwrap_or(settings.metadata);
        settings.ttl_seconds = change.ttl_seconds.unwrap_or(settings.ttl_seconds);
        settings.pinned = change.pinned.unwrap_or(settings.pinned);
        let now_ms = ids::now_ms();
        // A session that is named, pinned or given a time to live is its owner's, whoever made it.
        let adopted = row.implicit
            && (matches!(change.name, Some(Some(_))) || change.ttl_seconds.is_some() || settings.pinned);
        let expires_ms = match row.implicit && !adopted {
            true => row.expires_ms,
            false => settings.expires_ms(now_ms),
        };
        let change = dormouse_store::UpdateSession {
            name: change.name,
            settings: Some(encode(&settings)?),
            expires_ms: Some(expires_ms),
            implicit: adopted.then_some(false),
            events: vec![new_event("session.updated", None, data)],
            now_ms,
        };
        let row = self.inner.store.update_session(&row.id, change).await?;
        // Also where its first turn has not committed yet, and names no page file. A model that is not here knows at its start.
        if let Ok(engine) = self.inner.engine_of(&settings) {
            let leaf = row.leaf_slot.filter(|_| row.page_file == Some(engine.page_file()));
            engine.keep(&row.id, leaf, settings.pinned);
        }
        self.inner.changed(&row.id);
        Ok(self.inner.session(row, settings))
    }

    /// Also the session's pages, where nobody else uses them. A busy session is not deleted.
    pub async fn delete(&self, tenant: &Tenant, session: &str) -> Result<(), SessionError> {
        let row = self.inner.store.find_session(&tenant.0, session).await?;
        self.delete_by_id(&row.id).await
    }

    pub async fn items(&self, tenant: &Tenant, session: &str) -> Result<Vec<Item>, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let history = self.inner.store.history(&id).await?;
        Ok(records::items(history.items)?.into_iter().map(records::KnownItem::into_api).collect())
    }

    pub(crate) async fn delete_by_id(&self, id: &str) -> Result<(), SessionError> {
        self.delete_with(id, true).await
    }

    /// With `purge`, the pages go too, where nobody else uses them.
    pub(crate) async fn delete_with(&self, id: &str, purge: bool) -> Result<(), SessionError> {
        let (runtime, id) = (self.clone(), id.to_owned());
        detached(async move {
            let row = runtime.inner.store.delete_session(&id).await?;
            runtime.forget(&row, purge).await;
            Ok(())
        })
        .await
    }

    /// Lets go of what a session had that is deleted.
    pub(crate) async fn forget(&self, row: &SessionRow, purge: bool) {
        for engine in &self.inner.engines {
            engine.keep(&row.id, None, false);
        }
        if let Some(engine) = self.inner.engine_of_file(row.page_file) {
            engine.unclaim(row.leaf_slot, purge).await;
        }
        self.inner.forget_watchers(&row.id);
    }

    pub(crate) fn new_settings(
        &self,
        model: Option<&str>,
        request: &CreateSession,
    ) -> Result<Settings, SessionError> {
        let model = self.inner.engine(model)?.model();
        let kv_dtype = model.layout().dtype.name();
        if let Some(asked) = request.kv_dtype.as_deref().filter(|asked| *asked != kv_dtype) {
            return Err(SessionError::Invalid {
                param: "kv_dtype".into(),
                message: format!(
                    "model '{}' keeps its KV as {kv_dtype}, not {asked}: start the server with --kv-dtype {asked}",
                    model.name
                ),
            });
        }
        Ok(Settings {
            model: model.name.clone(),
            tokenizer: records::hex(&model.tokenizer().fingerprint()),
            fingerprint: records::hex(&model.fingerprint()),
            instructions: request.instructions.clone(),
            tools: request.tools.clone(),
            own: None,
            metadata: request.metadata.clone(),
            seed: request.seed.map_or_else(ids::random_seed, Ok)?,
            kv_dtype: kv_dtype.to_owned(),
            ttl_seconds: request.ttl_seconds,
            pinned: request.pinned,
            forked_from: None,
            cache_salt: request.cache_salt.clone(),
        })
    }

    pub(crate) async fn insert(
        &self,
        tenant: &Tenant,
        name: Option<String>,
        settings: &Settings,
        expires_ms: Option<u64>,
        implicit: bool,
    ) -> Result<SessionRow, SessionError> {
        let new = new_session(tenant, name, settings, expires_ms, implicit)?;
        Ok(self.inner.store.create_session(new).await?)
    }
}

/// A session of these settings, to be created.
pub(crate) fn new_session(
    tenant: &Tenant,
    name: Option<String>,
    settings: &Settings,
    expires_ms: Option<u64>,
    implicit: bool,
) -> Result<NewSession, SessionError> {
    let data = json!({ "model": settings.model, "name": name, "implicit": implicit });
    Ok(NewSession {
        id: ids::mint("sess_")?,
        tenant: tenant.0.clone(),
        name,
        implicit,
        expires_ms,
        settings: encode(settings)?,
        events: vec![new_event("session.created", None, data)],
        now_ms: ids::now_ms(),
    })
}
