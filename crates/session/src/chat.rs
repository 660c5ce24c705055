//! Chat requests: a turn of a named session, or the longest known beginning of a conversation that its client sends
//! whole, continued.

use std::sync::Arc;
use std::time::Instant;

use dormouse_engine::Miss;
use dormouse_store::Cut;

use crate::api::*;
use crate::branches::Branch;
use crate::hub::Hub;
use crate::records::{Settings, decode};
use crate::runtime::{Runtime, detached};
use crate::turns::{Start, root_chain};
use crate::{cut, ids};

/// Where a conversation goes on.
#[derive(Clone)]
struct Base {
    session: String,
    /// Tokens of that session's log that hold the known messages.
    position: usize,
    /// The session ends there, and belongs to nobody else.
    continuable: bool,
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
        let id = match self.get(tenant, session).await {
            Ok(session) => session.id,
            Err(SessionError::SessionNotFound(_)) if !session.starts_with("sess_") => {
                let new = CreateSession {
                    model: request.model,
                    name: Some(session.to_owned()),
                    tools: request.tools,
                    ..CreateSession::default()
                };
                match self.create(tenant, new).await {
                    Ok(session) => session.id,
                    // Another request has just created it.
                    Err(SessionError::NameTaken(_)) => self.get(tenant, session).await?.id,
                    Err(why) => return Err(why),
                }
            }
            Err(why) => return Err(why),
        };
        Ok(self.begin(tenant, &id, Start::new(request.messages, request.generation)).await?.1)
    }

    async fn chat_whole(
        &self,
        tenant: &Tenant,
        request: ChatRequest,
    ) -> Result<Vec<TurnStream>, SessionError> {
        let create = CreateSession { tools: request.tools.clone(), ..CreateSession::default() };
        let settings = self.new_settings(request.model.as_deref(), &create)?;
        let (known, base) = self.longest_known(tenant, &settings, &request.messages).await?;
        let mut streams: Vec<TurnStream> = Vec::with_capacity(request.n);
        let mut first: Option<Arc<Hub>> = None;
        for choice in 0..request.n.max(1) {
            let mut generation = request.generation.clone();
            generation.sampling.seed = ids::choice_seed(generation.sampling.seed, choice);
            let mut start = Start::new(request.messages[known..].to_vec(), generation);
            start.cancel_when_left = true;
            start.delete_after = !request.store;
            start.miss = miss(&request.messages, known);
            // The other choices find the prompt's pages, once the first has computed them.
            start.gate = first.as_ref().map(|hub| hub.warm());
            let begun =
                self.begin_choice(tenant, &settings, base.clone(), choice, request.store, start).await;
            match begun {
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
        settings: &Settings,
        base: Option<Base>,
        choice: usize,
        store: bool,
        start: Start,
    ) -> Result<(Arc<Hub>, TurnStream), SessionError> {
        if let Some(base) = base.as_ref().filter(|base| base.continuable && choice == 0 && store) {
            match self.begin(tenant, &base.session, start.clone()).await {
                // Another request was faster: part from it.
                Err(SessionError::Busy { .. } | SessionError::SessionNotFound(_)) => {}
                begun => return begun,
            }
        }
        let expires_ms = Some(ids::now_ms() + self.inner.options.implicit_ttl_seconds * 1000);
        let session = match base {
            Some(base) => self.fork_at(tenant, &base, expires_ms).await?,
            None => self.insert(tenant, None, settings, expires_ms, true).await?.id,
        };
        match self.begin(tenant, &session, start).await {
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

    async fn fork_at(
        &self,
        tenant: &Tenant,
        base: &Base,
        expires_ms: Option<u64>,
    ) -> Result<String, SessionError> {
        let began = Instant::now();
        let (history, log) = self.inner.store.conversation(&base.session).await?;
        let settings: Settings = decode(&history.settings)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        let place = Place::Token(base.position);
        let cut: Cut = cut::at(&history, &log, engine.model().tokenizer(), Some(&place), "messages")?;
        let branch = Branch { history, log, settings, engine, cut, name: None, implicit: true, expires_ms };
        Ok(self.branch(tenant, branch, began).await?.0.id)
    }

    /// The number of leading messages whose tokens a session's log holds, and that place. At least one message
    /// stays, to be answered.
    async fn longest_known(
        &self,
        tenant: &Tenant,
        settings: &Settings,
        messages: &[Message],
    ) -> Result<(usize, Option<Base>), SessionError> {
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
            return Ok((0, None));
        }
        let mut best: Option<(usize, Base)> = None;
        for boundary in self.inner.store.find_boundaries(&tenant.0, hashes).await? {
            let row = self.inner.store.session(&boundary.session).await?;
            if boundary.position > row.log_len {
                continue;
            }
            let continuable = row.implicit && row.active_turn.is_none() && row.log_len == boundary.position;
            let base = Base { session: row.id, position: boundary.position, continuable };
            if best.as_ref().is_none_or(|(_, best)| continuable && !best.continuable) {
                best = Some((counts[boundary.index], base));
            }
        }
        Ok(best.map_or((0, None), |(count, base)| (count, Some(base))))
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
mod tests {
    use super::*;
    use crate::records::message;

    #[test]
    fn a_history_with_unknown_answers_is_a_miss_with_a_reason() {
        let (user, answer) = (message("user", "hi"), message("assistant", "Hello!"));
        let reason = |messages: &[Message], known| miss(messages, known).map(|miss| miss.reason);
        assert_eq!(reason(std::slice::from_ref(&user), 0).as_deref(), Some("new_session"));
        let whole = [user.clone(), answer.clone(), user.clone()];
        assert_eq!(reason(&whole, 0).as_deref(), Some("prefix_differs"));
        assert_eq!(reason(&whole, 2), None);
        let longer = [user.clone(), answer.clone(), user.clone(), answer, user];
        assert_eq!(reason(&longer, 2).as_deref(), Some("prefix_differs"));
    }
}
