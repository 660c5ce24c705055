//! Responses: turns with an id of their own, each at the end of a branch that nobody else continues.

use dormouse_engine::Miss;
use dormouse_store::ResponseRow;
use serde_json::{Map, Value};

use crate::api::*;
use crate::branches::Past;
use crate::draft::Draft;
use crate::records::{self, Frame, Settings, decode, encode};
use crate::runtime::{Runtime, detached};
use crate::turns::{NewResponse, Start};
use crate::{cut, ids};

/// How long a response is kept at least, unless it is deleted: OpenAI's thirty days.
const RESPONSE_TTL_SECONDS: u64 = 30 * 24 * 3600;

/// `POST /v1/responses`, already parsed.
#[derive(Clone, Debug)]
pub struct ResponseRequest {
    pub model: Option<String>,
    /// The system message, never that of an earlier response. A session that has its own is not without one.
    pub instructions: Option<String>,
    pub input: Vec<Message>,
    /// The response that this one follows: the branch begins behind its answer.
    pub previous: Option<String>,
    /// The session that the turn is appended to. Not together with `previous`.
    pub conversation: Option<String>,
    pub tools: Vec<Value>,
    /// See [`CreateSession::cache_salt`]. What the response follows keeps its own.
    pub cache_salt: Option<String>,
    pub generation: Generation,
    pub background: bool,
    /// False: the response has no id that anyone could ask for, and its session is deleted when it is complete.
    pub store: bool,
    /// Leave the oldest messages out of a prompt that does not fit, instead of refusing it.
    pub truncate: bool,
    /// What the response's object repeats of the request.
    pub record: Map<String, Value>,
}

impl ResponseRequest {
    fn frame(&self) -> Frame {
        Frame { instructions: self.instructions.clone(), tools: self.tools.clone() }
    }
}

/// What a response is, whatever has become of its turn.
#[derive(Clone, Debug)]
pub struct Response {
    pub id: String,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub record: Map<String, Value>,
    /// The model that answers.
    pub model: String,
}

/// Where a response goes on.
struct Ground {
    session: String,
    model: String,
    /// The session was made for the response.
    is_own: bool,
}

impl Runtime {
    /// Begins a response. Its turn goes on when the stream is dropped, if it is stored; else it is cancelled.
    /// Errors: `ResponseNotFound`, `SessionNotFound`; `Busy` when the conversation or the response that it follows is in
    /// progress; `ContextLengthExceeded`.
    pub async fn respond(
        &self,
        tenant: &Tenant,
        request: ResponseRequest,
    ) -> Result<(Response, TurnStream), SessionError> {
        let (runtime, tenant) = (self.clone(), tenant.clone());
        detached(async move { runtime.respond_now(&tenant, request).await }).await
    }

    async fn respond_now(
        &self,
        tenant: &Tenant,
        request: ResponseRequest,
    ) -> Result<(Response, TurnStream), SessionError> {
        let id = ids::mint("resp_")?;
        let created_ms = ids::now_ms();
        let (Ground { session, model, is_own }, start) = self.ground(tenant, &request).await?;
        let stored = NewResponse { id: id.clone(), created_ms, record: encode(&request.record)? };
        let start = Start { response: request.store.then_some(stored), ..start };
        match self.begin(tenant, &session, start).await {
            Ok((_, stream)) => {
                let created_at = created_ms / 1000;
                Ok((Response { id, created_at, record: request.record, model }, stream))
            }
            Err(why) => {
                // Nobody knows the session yet, so it must not stay.
                if is_own && let Err(left) = self.delete_by_id(&session).await {
                    tracing::warn!(session, "a session without a turn could not be deleted: {left}");
                }
                Err(why)
            }
        }
    }

    /// The session that the response's turn is appended to, and the turn.
    async fn ground(
        &self,
        tenant: &Tenant,
        request: &ResponseRequest,
    ) -> Result<(Ground, Start), SessionError> {
        let start = Start {
            background: request.background,
            truncate: request.truncate,
            // As with OpenAI: who leaves cancels what was not to go on in the background.
            cancel_when_left: !request.background,
            ..Start::new(request.input.clone(), request.generation.clone())
        };
        if let Some(conversation) = &request.conversation {
            let session = self.get(tenant, conversation).await?;
            let model = self.check_model(&session, request.model.as_deref()).await?;
            self.adopt(&session.id).await?;
            let start = Start { frame: Some(request.frame()), ..start };
            return Ok((Ground { session: session.id, model, is_own: false }, start));
        }
        let start = Start { delete_after: !request.store, ..start };
        let settings = self.response_settings(request)?;
        let follow = |past| self.follow(past, &settings);
        let own = |session| Ground { session, model: settings.model.clone(), is_own: true };
        if let Some(previous) = &request.previous {
            let row = self.response_row(tenant, previous).await?;
            let past = Past { session: row.session, place: Place::Turn(row.turn), hash: None };
            let Some(session) = self.fork_past(tenant, &past, "input", follow).await? else {
                return Err(SessionError::ResponseNotFound(previous.clone()));
            };
            return Ok((own(session), start));
        }
        // A client that sends its whole history: the tokens of its answers are known.
        if let Some((past, messages)) = self.known_past(tenant, &settings, &request.input).await?
            && let Some(session) = self.fork_past(tenant, &past, "input", follow).await?
        {
            let input = request.input[messages..].to_vec();
            return Ok((own(session), Start { input, ..start }));
        }
        let expires_ms = settings.expires_ms(ids::now_ms());
        let row = self.insert(tenant, None, &settings, expires_ms, true).await?;
        let miss = Miss { reason: "new_session".into(), at_token: 0, at_message: None };
        Ok((own(row.id), Start { miss: Some(miss), ..start }))
    }

    /// A session that is used as a conversation is its owner's, whoever made it: no response takes it along when it is
    /// deleted.
    async fn adopt(&self, session: &str) -> Result<(), SessionError> {
        if !self.inner.store.session(session).await?.implicit {
            return Ok(());
        }
        let now_ms = ids::now_ms();
        let change = dormouse_store::UpdateSession {
            implicit: Some(false),
            expires_ms: Some(self.inner.settings(session).await?.expires_ms(now_ms)),
            now_ms,
            ..dormouse_store::UpdateSession::default()
        };
        self.inner.store.update_session(session, change).await?;
        Ok(())
    }

    /// A conversation that holds no tokens yet takes the model of its first response; later ones are bound to it.
    /// Answers the model.
    async fn check_model(&self, session: &Session, model: Option<&str>) -> Result<String, SessionError> {
        let Some(model) = model.filter(|model| *model != session.model) else {
            return Ok(session.model.clone());
        };
        // An unknown model is told as such.
        self.inner.engine(Some(model))?;
        if session.tokens > 0 {
            return Err(SessionError::Invalid {
                param: "model".into(),
                message: format!(
                    "model: the conversation was begun with '{}', not with '{model}'",
                    session.model
                ),
            });
        }
        let mut settings = self.inner.settings(&session.id).await?;
        self.move_to(&mut settings, model)?;
        let change = dormouse_store::UpdateSession {
            settings: Some(encode(&settings)?),
            now_ms: ids::now_ms(),
            ..dormouse_store::UpdateSession::default()
        };
        self.inner.store.update_session(&session.id, change).await?;
        Ok(model.to_owned())
    }

    /// Makes a session another model's: its log is tokenised anew by the next turn.
    fn move_to(&self, settings: &mut Settings, model: &str) -> Result<(), SessionError> {
        let kv_dtype = self.inner.engine(Some(model))?.model().layout().dtype.name();
        settings.model = model.to_owned();
        settings.tokenizer = String::new();
        settings.kv_dtype = kv_dtype.to_owned();
        Ok(())
    }

    fn response_settings(&self, request: &ResponseRequest) -> Result<Settings, SessionError> {
        let ttl = if request.store { RESPONSE_TTL_SECONDS } else { self.inner.options.implicit_ttl_seconds };
        let create = CreateSession {
            instructions: request.instructions.clone(),
            tools: request.tools.clone(),
            cache_salt: request.cache_salt.clone(),
            seed: Some(request.generation.sampling.seed),
            ttl_seconds: Some(ttl),
            ..CreateSession::default()
        };
        self.new_settings(request.model.as_deref(), &create)
    }

    /// The longest beginning of the messages that a session holds in its log, and how many they are.
    async fn known_past(
        &self,
        tenant: &Tenant,
        settings: &Settings,
        input: &[Message],
    ) -> Result<Option<(Past, usize)>, SessionError> {
        let system = settings.instructions.as_deref().map(|text| records::message("system", text));
        let before = usize::from(system.is_some());
        let messages: Vec<Message> = system.into_iter().chain(input.iter().cloned()).collect();
        let Some(base) = self.longest_known(tenant, settings, &messages).await? else { return Ok(None) };
        let same_frame = match self.inner.settings(&base.session).await {
            Ok(found) => found.instructions == settings.instructions,
            // Deleted since.
            Err(SessionError::SessionNotFound(_)) => false,
            Err(why) => return Err(why),
        };
        if !same_frame || base.messages <= before {
            return Ok(None);
        }
        let (place, hash) = (Place::Token(base.known.tokens), Some(base.known.hash));
        Ok(Some((Past { session: base.session, place, hash }, base.messages - before)))
    }

    /// What a response's settings take over from those of the session that it goes on from.
    fn follow(&self, mut past: Settings, wanted: &Settings) -> Result<(Settings, Option<u64>), SessionError> {
        if past.model != wanted.model {
            self.move_to(&mut past, &wanted.model)?;
        }
        let (instructions, tools) = (wanted.instructions.clone(), wanted.tools.clone());
        let own = Some(Frame { instructions, tools });
        let (ttl_seconds, seed) = (wanted.ttl_seconds, wanted.seed);
        let settings = Settings { own, ttl_seconds, seed, pinned: false, metadata: Map::new(), ..past };
        let expires_ms = settings.expires_ms(ids::now_ms());
        Ok((settings, expires_ms))
    }

    /// The tokens that the prompt of this response would have.
    pub async fn count_input(
        &self,
        tenant: &Tenant,
        request: ResponseRequest,
    ) -> Result<usize, SessionError> {
        let mut settings = self.response_settings(&request)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        let past = match (&request.previous, &request.conversation) {
            (Some(previous), _) => {
                let row = self.response_row(tenant, previous).await?;
                Some((row.session, Some(Place::Turn(row.turn))))
            }
            (None, Some(conversation)) => Some((self.get(tenant, conversation).await?.id, None)),
            (None, None) => None,
        };
        let (mut items, mut log) = (Vec::new(), Vec::new());
        let frame = request.frame();
        let mut turn_frame = None;
        if let Some((session, place)) = past {
            let (history, tokens) = self.inner.store.conversation(&session).await?;
            let cut = cut::at(&history, &tokens, engine.model().tokenizer(), place.as_ref(), "input")?;
            let model = settings.model;
            settings = decode(&history.settings)?;
            if settings.model != model {
                self.move_to(&mut settings, &model)?;
            }
            match request.conversation {
                Some(_) => turn_frame = Some(frame),
                None => settings.own = Some(frame),
            }
            (items, log) = (records::items(history.items)?, tokens);
            items.truncate(cut.items);
            log.truncate(cut.tokens);
        }
        let start = Start {
            frame: turn_frame,
            truncate: request.truncate,
            ..Start::new(request.input, request.generation)
        };
        let counted = tokio::task::spawn_blocking(move || {
            Draft::new(&engine, &mut settings, &items, &log, &start).map(|draft| draft.prompt.len())
        });
        counted
            .await
            .map_err(|why| SessionError::Internal(format!("counting the input's tokens failed: {why}")))?
    }

    async fn response_row(&self, tenant: &Tenant, id: &str) -> Result<ResponseRow, SessionError> {
        let found = self.inner.store.response(&tenant.0, id).await?;
        found.ok_or_else(|| SessionError::ResponseNotFound(id.to_owned()))
    }

    pub async fn response(&self, tenant: &Tenant, id: &str) -> Result<(Response, Turn), SessionError> {
        let row = self.response_row(tenant, id).await?;
        let turn = match self.turn(tenant, &row.session, &row.turn).await {
            Err(SessionError::SessionNotFound(_) | SessionError::TurnNotFound(_)) => {
                return Err(SessionError::ResponseNotFound(id.to_owned()));
            }
            turn => turn?,
        };
        let model = self.inner.settings(&row.session).await?.model;
        let record = decode(&row.record)?;
        Ok((Response { id: row.id, created_at: row.created_ms / 1000, record, model }, turn))
    }

    /// The response, and its turn's events from the first on.
    pub async fn attach_response(
        &self,
        tenant: &Tenant,
        id: &str,
    ) -> Result<(Response, TurnStream), SessionError> {
        let (response, turn) = self.response(tenant, id).await?;
        let stream = self.attach(tenant, &turn.session, &turn.id, None).await?;
        Ok((response, stream))
    }

    /// Stops a response; what was generated stays. Answers it as it then is.
    pub async fn cancel_response(&self, tenant: &Tenant, id: &str) -> Result<(Response, Turn), SessionError> {
        let row = self.response_row(tenant, id).await?;
        self.cancel(tenant, &row.session, &row.turn).await?;
        self.response(tenant, id).await
    }

    /// Stops the response if it is in progress, and forgets it, with its session where that was made for it. Responses
    /// that follow it have its history and keep it; what it added to a conversation stays there.
    pub async fn delete_response(&self, tenant: &Tenant, id: &str) -> Result<(), SessionError> {
        let row = self.response_row(tenant, id).await?;
        let session = self.inner.store.session(&row.session).await?;
        if session.implicit {
            if session.active_turn.as_deref() == Some(&row.turn) {
                self.cancel(tenant, &row.session, &row.turn).await?;
            }
            return match self.delete_by_id(&row.session).await {
                // Deleted by someone else.
                Err(SessionError::SessionNotFound(_)) => Ok(()),
                deleted => deleted,
            };
        }
        self.inner.store.delete_response(&tenant.0, id).await?;
        Ok(())
    }

    /// The items that the response was generated from, oldest first.
    pub async fn response_input(&self, tenant: &Tenant, id: &str) -> Result<Vec<Item>, SessionError> {
        let row = self.response_row(tenant, id).await?;
        let mut items = self.items(tenant, &row.session).await?;
        let answer = ids::item_of(&row.turn);
        let last = items.iter().rposition(|item| item.turn.as_deref() == Some(&row.turn));
        items.truncate(last.map_or(0, |last| last + 1));
        items.retain(|item| item.id != answer);
        Ok(items)
    }

    /// An item of any of the tenant's sessions.
    pub async fn find_item(&self, tenant: &Tenant, id: &str) -> Result<Option<Item>, SessionError> {
        let row = self.inner.store.find_item(&tenant.0, id).await?;
        Ok(row.map(records::KnownItem::from_row).transpose()?.map(records::KnownItem::into_api))
    }
}
