//! Chat requests: a turn of a named session, or the longest known beginning of a conversation that its client sends
//! whole, continued.

use std::sync::Arc;

use dormouse_engine::Miss;
use dormouse_store::StoreError;

use crate::api::*;
use crate::branches::Past;
use crate::hub::Hub;
use crate::ids;
use crate::records::Settings;
use crate::runtime::{Runtime, detached};
use crate::turns::{Known, Start, root_chain};

/// Where a conversation goes on.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub session: String,
    /// Leading messages of the request that the session holds.
    pub messages: usize,
    pub known: Known,
    /// The session ends there, and belongs to nobody else.
    continuable: bool,
}

/// What the choices of a request have in common.
struct Whole {
    settings: Settings,
    messages: Vec<Message>,
    base: Option<Base>,
    store: bool,
}

impl Whole {
    /// `start` with the messages that are new after `base`, in a session that holds just that.
    fn after(&self, base: Option<&Base>, start: &Start) -> Start {
        let known = base.map_or(0, |base| base.messages);
        Start {
            input: self.messages[known..].to_vec(),
            known: base.map(|base| base.known),
            miss: miss(&self.messages, known),
            ..start.clone()
        }
    }
}

impl Runtime {
    /// A chat request: with `session` it is a turn of that session; without, the longest known beginning of the
    /// conversation is found by its messages and continued (or forked, where it has moved on). One stream per choice.
    /// Dropping the stream of a choice made without `session` cancels it.
    pub async fn chat(&self, tenant: &Tenant, request: ChatRequest) -> Result<Vec<TurnStream>, SessionError> {
        if request.messages.is_empty() {
            return Err(SessionError::Invalid {
                param: "messages".into(),
                message: "a chat request needs at least one message".into(),
            });
        }
        match request.session.clone() {
            Some(session) => Ok(vec![self.chat_in(tenant, &session, request).await?]),
            None => {
                let (runtime, tenant) = (self.clone(), tenant.clone());
                detached(async move { runtime.chat_whole(&tenant, request).await }).await
            }
        }
    }

    async fn chat_in(
        &self,
        tenant: &Tenant,
        session: &str,
        request: ChatRequest,
    ) -> Result<TurnStream, SessionError> {
        let mut is_new = false;
        let id = match self.get(tenant, session).await {
            Ok(session) => session.id,
            Err(SessionError::SessionNotFound(_)) if !session.starts_with("sess_") => {
                let new = CreateSession {
                    model: request.model,
                    name: Some(session.to_owned()),
                    tools: request.tools.clone().unwrap_or_default(),
                    cache_salt: request.cache_salt,
                    ..CreateSession::default()
                };
                match self.create(tenant, new).await {
                    Ok(session) => {
                        is_new = true;
                        session.id
                    }
                    // Another request has just created it.
                    Err(SessionError::NameTaken(_)) => self.get(tenant, session).await?.id,
                    Err(why) => return Err(why),
                }
            }
            Err(why) => return Err(why),
        };
        let start = Start { tools: request.tools, ..Start::new(request.messages, request.generation) };
        match self.begin(tenant, &id, start).await {
            Ok((_, events)) => Ok(events),
            Err(why) => {
                // A request that is refused leaves nothing; unless another has found the session meanwhile.
                if is_new && let Err(left) = self.delete_by_id(&id).await {
                    tracing::warn!(session = id, "a session without a turn could not be deleted: {left}");
                }
                Err(why)
            }
        }
    }

    async fn chat_whole(
        &self,
        tenant: &Tenant,
        request: ChatRequest,
    ) -> Result<Vec<TurnStream>, SessionError> {
        let create = CreateSession {
            tools: request.tools.clone().unwrap_or_default(),
            cache_salt: request.cache_salt.clone(),
            ..CreateSession::default()
        };
        let settings = self.new_settings(request.model.as_deref(), &create)?;
        let base = self.longest_known(tenant, &settings, &request.messages).await?;
        let whole = Whole { settings, messages: request.messages, base, store: request.store };
        let mut streams: Vec<TurnStream> = Vec::with_capacity(request.n);
        let mut first: Option<Arc<Hub>> = None;
        for choice in 0..request.n.max(1) {
            let mut generation = request.generation.clone();
            generation.sampling.seed = ids::choice_seed(generation.sampling.seed, choice);
            let mut start = Start::new(Vec::new(), generation);
            start.cancel_when_left = true;
            start.delete_after = !request.store;
            // The other choices find the prompt's pages, once the first has computed them.
            start.gate = first.as_ref().map(|hub| hub.warm());
            match self.begin_choice(tenant, &whole, choice, start).await {
                Ok((hub, events)) => {
                    streams.push(events);
                    first.get_or_insert(hub);
                }
                // Dropping the choices begun so far cancels them.
                Err(why) => return Err(why),
            }
        }
        Ok(streams)
    }

    async fn begin_choice(
        &self,
        tenant: &Tenant,
        whole: &Whole,
        choice: usize,
        start: Start,
    ) -> Result<(Arc<Hub>, TurnStream), SessionError> {
        if let Some(base) = whole.base.as_ref().filter(|base| base.continuable && choice == 0 && whole.store)
        {
            match self.begin(tenant, &base.session, whole.after(Some(base), &start)).await {
                // Another request was faster: part from it.
                Err(SessionError::Busy { .. } | SessionError::SessionNotFound(_)) => {}
                begun => return begun,
            }
        }
        let forked = match &whole.base {
            Some(base) => self.fork_at(tenant, base).await?.map(|id| (id, base)),
            None => None,
        };
        let Some((session, base)) = forked else {
            return self.begin_hidden(tenant, &whole.settings, whole.after(None, &start)).await;
        };
        match self.begin(tenant, &session, whole.after(Some(base), &start)).await {
            Ok(begun) => Ok(begun),
            Err(why) => {
                // Nobody knows the session yet, so it must not stay.
                if let Err(left) = self.delete_by_id(&session).await {
                    tracing::warn!(session, "a session without a turn could not be deleted: {left}");
                }
                Err(why)
            }
        }
    }

    /// A session that begins with what `base` held when it was found; None when it does not any more.
    async fn fork_at(&self, tenant: &Tenant, base: &Base) -> Result<Option<String>, SessionError> {
        let expires_ms = Some(ids::now_ms() + self.inner.options.implicit_ttl_seconds * 1000);
        let past = Past {
            session: base.session.clone(),
            place: Place::Token(base.known.tokens),
            hash: Some(base.known.hash),
        };
        // What the conversation was found to begin with is the branch's own.
        let adapt = |settings| Ok((Settings { own: None, ..settings }, expires_ms));
        match self.fork_past(tenant, &past, "messages", adapt).await {
            // It is written to without end: the conversation begins anew.
            Err(SessionError::Busy { .. }) => Ok(None),
            forked => forked,
        }
    }

    /// The most leading messages whose tokens a session's log holds, and that place. At least one message stays, to be
    /// answered.
    pub(crate) async fn longest_known(
        &self,
        tenant: &Tenant,
        settings: &Settings,
        messages: &[Message],
    ) -> Result<Option<Base>, SessionError> {
        let engine = self.inner.engine_of(settings)?;
        let mut chain = root_chain(tenant, engine, settings);
        let (mut hashes, mut counts) = (Vec::new(), Vec::new());
        for (index, message) in messages[..messages.len() - 1].iter().enumerate() {
            let hash = chain.add(message);
            if is_answer(message) {
                hashes.push(hash);
                counts.push(index + 1);
            }
        }
        if hashes.is_empty() {
            return Ok(None);
        }
        let mut best: Option<Base> = None;
        for boundary in self.inner.store.find_boundaries(&tenant.0, hashes.clone()).await? {
            let row = match self.inner.store.session(&boundary.session).await {
                Ok(row) => row,
                // Deleted since.
                Err(StoreError::SessionNotFound(_)) => continue,
                Err(why) => return Err(why.into()),
            };
            if boundary.position > row.log_len {
                continue;
            }
            // A response's session ends with its answer.
            let continuable = row.implicit
                && row.active_turn.is_none()
                && row.log_len == boundary.position
                && !self.inner.store.has_responses(&row.id).await?;
            if best.as_ref().is_none_or(|best| continuable && !best.continuable) {
                let known = Known { tokens: boundary.position, hash: hashes[boundary.index] };
                let messages = counts[boundary.index];
                best = Some(Base { session: row.id, messages, known, continuable });
            }
        }
        Ok(best)
    }
}

fn is_answer(message: &Message) -> bool {
    message.get("role").and_then(serde_json::Value::as_str) == Some("assistant")
}

/// Why the history that a client sent is not all known: None when it is, up to its last answer.
fn miss(messages: &[Message], known: usize) -> Option<Miss> {
    let answers = messages[known..].iter().filter(|message| is_answer(message)).count();
    let reason = match (known, answers) {
        (0, 0) => "new_session",
        (_, 0) => return None,
        _ => "prefix_differs",
    };
    Some(Miss { reason: reason.into(), at_token: 0, at_message: None })
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
