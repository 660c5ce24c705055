//! Turns: begun, looked at, attached to, cancelled.

use std::sync::Arc;

use dormouse_answer::OutputFormat;
use dormouse_engine::{Engine, Grammar, Miss, Priority, Realm, TurnSpec};
use dormouse_store::{BeginTurn, History, ResponseRow, SessionRow, StoreError};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tracing::Span;

use crate::answers::shown;
use crate::api::*;
use crate::chain::Chain;
use crate::draft::Draft;
use crate::drive::Run;
use crate::grammar::grammar;
use crate::hub::Hub;
use crate::ids;
use crate::realms::realm;
use crate::records::{self, Frame, KnownItem, Settings, TurnRecord, decode, encode, message, new_event};
use crate::rendering::Prompt;
use crate::replay::{replay, replay_text};
use crate::request;
use crate::runtime::{Runtime, detached};
use crate::sessions::new_session;
use crate::truncation::is_left_out;

/// Plans that another writer overtook before they were carried out; then the session is simply busy.
pub(crate) const PLANNING_ATTEMPTS: usize = 3;

/// A turn to begin.
#[derive(Clone)]
pub(crate) struct Start {
    pub input: Vec<Message>,
    /// Instead of messages: the prompt's tokens, of a session that has none yet.
    pub raw: Option<Vec<u32>>,
    /// What the session must hold, where the input continues just that; else it counts as busy.
    pub known: Option<Known>,
    pub generation: Generation,
    pub background: bool,
    pub miss: Option<Miss>,
    pub cancel_when_left: bool,
    pub delete_after: bool,
    pub gate: Option<watch::Receiver<bool>>,
    /// What this turn's prompt begins with, in place of what the session's own do. The session's own come back with the
    /// next turn.
    pub frame: Option<Frame>,
    /// Take the place of the session's tools, from this turn on.
    pub tools: Option<Vec<Value>>,
    /// Where the prompt does not fit, the oldest messages are left out of it; else the turn is refused.
    pub truncate: bool,
    pub response: Option<NewResponse>,
}

/// The response that a turn is.
#[derive(Clone, Debug)]
pub(crate) struct NewResponse {
    pub id: String,
    pub created_ms: u64,
    /// JSON, the server's.
    pub record: String,
}

/// A conversation that a session's log holds in its first tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Known {
    pub tokens: usize,
    /// Of the chain after its last message.
    pub hash: [u8; 32],
}

impl Start {
    pub fn new(input: Vec<Message>, generation: Generation) -> Start {
        Start {
            input,
            raw: None,
            known: None,
            generation,
            background: false,
            miss: None,
            cancel_when_left: false,
            delete_after: false,
            gate: None,
            frame: None,
            tools: None,
            truncate: false,
            response: None,
        }
    }
}

impl Runtime {
    /// Appends the input durably and starts generating. The turn lives on when the stream is dropped.
    pub async fn start_turn(
        &self,
        tenant: &Tenant,
        session: &str,
        request: TurnRequest,
    ) -> Result<TurnStream, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let TurnRequest { input, tools, generation, background } = request;
        let start = Start { tools, background, ..Start::new(input, generation) };
        Ok(self.begin(tenant, &id, start).await?.1)
    }

    pub async fn turn(&self, tenant: &Tenant, session: &str, turn: &str) -> Result<Turn, SessionError> {
        let turns = self.turns(tenant, session).await?;
        turns.into_iter().find(|it| it.id == turn).ok_or_else(|| SessionError::TurnNotFound(turn.to_owned()))
    }

    pub async fn turns(&self, tenant: &Tenant, session: &str) -> Result<Vec<Turn>, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let history = self.inner.store.history(&id).await?;
        let turn = |row| -> Result<Turn, SessionError> {
            let mut turn = records::turn(&id, row)?;
            if turn.status == TurnStatus::InProgress
                && let Some(hub) = self.inner.hub(&turn.id)
            {
                turn.output_text = hub.text();
            }
            Ok(turn)
        };
        history.turns.iter().map(turn).collect()
    }

    /// The turn's events after `starting_after` (all when None) and in any case a failure, at any age, also while it
    /// runs.
    pub async fn attach(
        &self,
        tenant: &Tenant,
        session: &str,
        turn: &str,
        starting_after: Option<u64>,
    ) -> Result<TurnStream, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let running = || self.inner.hub(turn).filter(|hub| hub.session == id);
        if let Some(hub) = running() {
            return Ok(stream(&hub, starting_after));
        }
        let (history, log) = self.inner.store.conversation(&id).await?;
        let row = history
            .turns
            .iter()
            .find(|row| row.id == turn)
            .ok_or_else(|| SessionError::TurnNotFound(turn.to_owned()))?;
        let record: TurnRecord = decode(&row.record)?;
        if record.status == TurnStatus::InProgress {
            // It may have been found again meanwhile.
            return match running() {
                Some(hub) => Ok(stream(&hub, starting_after)),
                None if self.inner.is_stopping() => Err(SessionError::Stopping),
                None => Err(SessionError::Internal(format!(
                    "turn '{turn}' was interrupted and waits for its model: start the server with it, or cancel the turn"
                ))),
            };
        }
        let settings: Settings = decode(&history.settings)?;
        let output = row.output_start.zip(row.output_end).and_then(|(start, end)| log.get(start..end));
        let whole = records::turn(&id, row)?;
        let output = record.output.as_deref().or(output);
        let engine =
            self.inner.engine_of(&settings).ok().filter(|engine| {
                settings.tokenizer == records::hex(&engine.model().tokenizer().fingerprint())
            });
        let events = match (output, engine) {
            (Some(output), Some(engine)) => replay(whole, output, engine, &record.generation.stop),
            _ => replay_text(whole),
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        for event in events {
            // As while it ran, the end is told in any case.
            if event.body.is_failure() || starting_after.is_none_or(|after| event.sequence_number > after) {
                // The receiver is in our hands.
                sender.send(event).ok();
            }
        }
        let answer_format = record.answer_format;
        Ok(TurnStream { session: id, turn: turn.to_owned(), answer_format, events: receiver })
    }

    /// Stops the turn; what was generated stays. Answers the turn as it then is.
    pub async fn cancel(&self, tenant: &Tenant, session: &str, turn: &str) -> Result<Turn, SessionError> {
        let found = self.turn(tenant, session, turn).await?;
        let hub = match self.inner.hub(turn) {
            Some(hub) => Some(hub),
            None if found.status == TurnStatus::InProgress => {
                self.cancel_stranded(&found.session, turn).await?
            }
            None => None,
        };
        let Some(hub) = hub else { return self.turn(tenant, session, turn).await };
        let mut events = hub.follow(None);
        hub.cancel();
        for engine in &self.inner.engines {
            engine.cancel(turn);
        }
        while events.recv().await.is_some() {}
        self.turn(tenant, session, turn).await
    }

    /// Takes the session's lease, makes the input durable, and hands the turn to its engine.
    pub(crate) async fn begin(
        &self,
        tenant: &Tenant,
        session: &str,
        start: Start,
    ) -> Result<(Arc<Hub>, TurnStream), SessionError> {
        let (runtime, tenant, session) = (self.clone(), tenant.clone(), session.to_owned());
        detached(async move {
            let hub = runtime.begin_now(&tenant, &session, start).await?;
            let events = stream(&hub, None);
            Ok((hub, events))
        })
        .await
    }

    async fn begin_now(
        &self,
        tenant: &Tenant,
        session: &str,
        start: Start,
    ) -> Result<Arc<Hub>, SessionError> {
        if start.input.is_empty() && start.raw.is_none() {
            return Err(SessionError::Invalid {
                param: "input".into(),
                message: "a turn needs at least one input message".into(),
            });
        }
        for _ in 0..PLANNING_ATTEMPTS {
            let _alive = self.inner.keep_alive()?;
            let (history, log) = self.inner.store.conversation(session).await?;
            if let Some(turn) = &history.session.active_turn {
                return Err(SessionError::Busy { session: session.to_owned(), turn: turn.clone() });
            }
            if let Some(known) = &start.known
                && (history.session.log_len != known.tokens
                    || self.chain_of(tenant, &history, history.items.len())? != known.hash)
            {
                break;
            }
            let plan = self.plan(history, log, start.clone()).await?;
            if let Some(hub) = self.carry_out(tenant, plan, start.clone()).await? {
                return Ok(hub);
            }
        }
        Err(SessionError::Busy { session: session.to_owned(), turn: "(another writer's)".into() })
    }

    /// A hidden session that begins with this turn; both are there, or neither.
    pub(crate) async fn begin_hidden(
        &self,
        tenant: &Tenant,
        settings: &Settings,
        start: Start,
    ) -> Result<(Arc<Hub>, TurnStream), SessionError> {
        let expires_ms = Some(ids::now_ms() + self.inner.options.implicit_ttl_seconds * 1000);
        let new = new_session(tenant, None, settings, expires_ms, true)?;
        let (runtime, tenant) = (self.clone(), tenant.clone());
        detached(async move {
            let _alive = runtime.inner.keep_alive()?;
            let mut plan = runtime.plan(new.history(), Vec::new(), start.clone()).await?;
            let session = new.id.clone();
            plan.change.new = Some(new);
            let hub = runtime.carry_out(&tenant, plan, start).await?;
            let hub = hub.ok_or_else(|| SessionError::Internal(format!("another writer found {session}")))?;
            let events = stream(&hub, None);
            Ok((hub, events))
        })
        .await
    }

    /// Makes a planned turn durable and runs it; None when another writer was faster. The engine computes meanwhile, but
    /// nobody hears of it before the turn is durable.
    async fn carry_out(
        &self,
        tenant: &Tenant,
        plan: Plan,
        start: Start,
    ) -> Result<Option<Arc<Hub>>, SessionError> {
        let _unregistered = self.inner.unregistered.read().await;
        let (change, cancel_when_left) = (plan.change.clone(), start.cancel_when_left);
        let mut run = plan.into_run(tenant, start);
        let hub = run.hub(cancel_when_left);
        let (submit, submitted) = run.early(&hub, &self.inner).unzip();
        let leased = |row: &SessionRow| submit.map_or((), |submit| submit(row));
        let row = match self.inner.store.begin_turn_early(change, leased).await {
            Ok(row) => row,
            Err(why) => {
                if let Some(submitted) = submitted {
                    submitted.take_back(&run.engine, &hub.turn).await;
                }
                return match why {
                    StoreError::LeaseLost { .. } => Ok(None),
                    why => Err(why.into()),
                };
            }
        };
        self.inner.changed(&row.id);
        run.lease(&row);
        self.drive(run, Arc::clone(&hub), submitted)?;
        Ok(Some(hub))
    }

    /// The hash of a session's conversation after its first `items`.
    pub(crate) fn chain_of(
        &self,
        tenant: &Tenant,
        history: &History,
        items: usize,
    ) -> Result<[u8; 32], SessionError> {
        let settings: Settings = decode(&history.settings)?;
        let mut chain = root_chain(tenant, self.inner.engine_of(&settings)?, &settings);
        let mut hash = [0; 32];
        if let Some(text) = &settings.instructions {
            hash = chain.add(&message("system", text));
        }
        for row in history.items.iter().take(items) {
            hash = chain.add(&KnownItem::from_row(row.clone())?.message);
        }
        Ok(hash)
    }

    /// What the turn will change, planned off the async threads where it may take long: a long conversation takes tens of
    /// milliseconds to render and tokenise.
    async fn plan(&self, history: History, log: Vec<u32>, start: Start) -> Result<Plan, SessionError> {
        let settings: Settings = decode(&history.settings)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        if is_short(&settings, &history, &log, &start) {
            return Plan::new(engine, settings, history, log, start);
        }
        let (request, span) = (request::current(), Span::current());
        let planned = tokio::task::spawn_blocking(move || {
            let plan = || Plan::new(engine, settings, history, log, start);
            span.in_scope(|| request::go_on_blocking(request, plan))
        })
        .await;
        planned.map_err(|why| SessionError::Internal(format!("planning the turn failed: {why}")))?
    }
}

/// Whether a turn is planned sooner than another thread is woken to do it: a short conversation in free text.
fn is_short(settings: &Settings, history: &History, log: &[u32], start: &Start) -> bool {
    const TEXT_MOST: usize = 4 << 10;
    const BYTES_A_TOKEN: usize = 4;
    // Of messages that have a role and a text, and nothing else.
    let text = |message: &Message| {
        let text = message.get("content").filter(|_| message.len() == 2)?.as_str()?;
        Some(text.len())
    };
    let new = start.input.iter().try_fold(0, |sum, message| Some(sum + text(message)?));
    let known: usize = history.items.iter().map(|row| row.message.len()).sum();
    let instructions = settings.instructions.as_ref().map_or(0, String::len);
    let is_free = start.generation.format == OutputFormat::Text
        && settings.tools.is_empty()
        && settings.own.is_none()
        && start.tools.is_none()
        && start.frame.is_none();
    let is_small = |new: usize| {
        let text = new + known + instructions + BYTES_A_TOKEN * log.len();
        text <= TEXT_MOST && history.items.len() + start.input.len() <= 16
    };
    is_free && new.is_some_and(is_small)
}

/// A turn on paper.
struct Plan {
    engine: Engine,
    settings: Settings,
    change: BeginTurn,
    record: TurnRecord,
    grammar: Option<Arc<Grammar>>,
    messages: Vec<Message>,
    log: Vec<u32>,
    covered: usize,
    starts: Vec<usize>,
    /// Why the tokens of the log are not those that it had.
    miss: Option<Miss>,
    model_changed: bool,
}

impl Plan {
    fn new(
        engine: Engine,
        mut settings: Settings,
        history: History,
        log: Vec<u32>,
        start: Start,
    ) -> Result<Plan, SessionError> {
        let model = engine.model();
        let (tokenizer, context) = (model.tokenizer(), model.context());
        let vocabulary = tokenizer.vocab_size();
        let biases = &start.generation.sampling.logit_bias;
        if let Some((token, _)) = biases.iter().find(|(token, _)| *token as usize >= vocabulary) {
            return Err(SessionError::Invalid {
                param: "logit_bias".into(),
                message: format!(
                    "logit_bias: there is no token {token}, the model's tokens are 0 to {}",
                    vocabulary - 1
                ),
            });
        }
        let known = records::items(history.items)?;
        let model_changed = settings.fingerprint != records::hex(&model.fingerprint());
        let Draft { system, prompt, answer_format, begin, rewritten, reframed } =
            Draft::new(&engine, &mut settings, &known, &log, &start)?;
        let grammar = grammar(&engine, &settings.tools, &start.generation, &answer_format)?;
        let prompt_tokens = prompt.len();
        // A prompt that is only to be scored needs no room behind it.
        let answers = usize::from(start.generation.max_tokens != Some(0));
        if prompt_tokens + answers > context {
            return Err(SessionError::ContextLengthExceeded {
                context,
                tokens: prompt_tokens,
                or_more: false,
            });
        }
        let turn = ids::mint("turn_")?;
        let now_ms = ids::now_ms();
        let input_items = start.input.iter().map(|message| {
            Ok(KnownItem {
                id: ids::mint("item_")?,
                turn: Some(turn.clone()),
                message: message.clone(),
                generated: false,
                token_start: 0,
                token_end: 0,
                created_ms: now_ms,
            })
        });
        let input_items = input_items.collect::<Result<Vec<KnownItem>, SessionError>>()?;
        let all: Vec<KnownItem> = known.into_iter().chain(input_items).collect();
        let shown = |(index, item): &(usize, &KnownItem)| !is_left_out(*index, &item.message, begin);
        let shown = all.iter().enumerate().filter(shown).map(|(_, item)| item.message.clone());
        let messages: Vec<Message> = system.into_iter().chain(shown).collect();
        let Prompt { keep_tokens, tokens, keep_items, ranges, .. } = prompt;
        let mut starts: Vec<usize> = all[..keep_items].iter().map(|item| item.token_start).collect();
        starts.extend(ranges.iter().map(|(start, _)| *start));
        let mut rows = Vec::with_capacity(ranges.len());
        let mut ranges = ranges.into_iter();
        for (index, mut item) in all.into_iter().enumerate().skip(keep_items) {
            let range = if is_left_out(index, &item.message, begin) { None } else { ranges.next() };
            (item.token_start, item.token_end) = range.unwrap_or_default();
            // Tokenised from its text, it is as exact as any input.
            item.generated = false;
            rows.push(item.to_row()?);
        }
        let record = TurnRecord {
            status: TurnStatus::InProgress,
            background: start.background,
            generation: start.generation,
            input_start: keep_tokens,
            delete_after: start.delete_after,
            keep_pages: start.raw.is_some(),
            keep_output: start.response.is_some(),
            completed_ms: None,
            finish_reason: None,
            error: None,
            error_code: None,
            output_text: String::new(),
            answer_format,
            output: None,
            usage: Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() },
            receipt: None,
        };
        settings.tokenizer = records::hex(&tokenizer.fingerprint());
        settings.fingerprint = records::hex(&model.fingerprint());
        let mut events = Vec::new();
        let rewritten_reason = rewritten.filter(|_| !log.is_empty());
        let retokenized = rewritten_reason.is_some();
        if let Some(reason) = rewritten_reason {
            let data = json!({ "reason": reason, "tokens_before": log.len(), "tokens": prompt_tokens });
            events.push(new_event("session.retokenized", Some(&turn), data));
        }
        let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
        events.push(new_event("session.turn.created", Some(&turn), json!({ "items": ids })));
        let computed = history.session.kv_len.max(records::computed(&history.turns));
        let covered = if retokenized { 0 } else { computed.min(keep_tokens) };
        let mut log = log;
        log.truncate(keep_tokens);
        log.extend_from_slice(&tokens);
        let response = start.response.map(|response| ResponseRow {
            id: response.id,
            tenant: history.session.tenant.clone(),
            session: history.session.id.clone(),
            turn: turn.clone(),
            created_ms: response.created_ms,
            record: response.record,
        });
        let change = BeginTurn {
            session: history.session.id,
            new: None,
            turn,
            fence: history.session.fence,
            keep_tokens,
            tokens,
            keep_items,
            items: rows,
            retokenized,
            record: encode(&record)?,
            settings: (model_changed || reframed).then(|| encode(&settings)).transpose()?,
            response,
            events,
            now_ms,
        };
        let miss = rewritten_reason.map(|reason| Miss {
            reason: if model_changed { "model_changed" } else { reason }.into(),
            at_token: 0,
            at_message: None,
        });
        Ok(Plan {
            engine,
            settings,
            change,
            record,
            grammar,
            messages,
            log,
            covered,
            starts,
            miss,
            model_changed,
        })
    }

    /// The turn, which has no lease yet.
    fn into_run(self, tenant: &Tenant, start: Start) -> Run {
        let mut chain = root_chain(tenant, &self.engine, &self.settings);
        for message in &self.messages {
            chain.add(message);
        }
        let changed = Miss { reason: "model_changed".into(), at_token: 0, at_message: None };
        let miss = if self.model_changed { Some(changed) } else { self.miss.or(start.miss) };
        let (session, turn, realm) = (&self.change.session, &self.change.turn, realm(tenant, &self.settings));
        let spec = spec(&self.engine, &self.record, session, turn, self.log, realm);
        let (covered, grammar, pinned) = (self.covered, self.grammar, self.settings.pinned);
        let spec = TurnSpec { covered, pinned, grammar, ..spec };
        Run {
            engine: self.engine,
            spec,
            record: self.record,
            created_ms: self.change.now_ms,
            chain,
            starts: self.starts,
            miss,
            gate: start.gate,
            adopts_model: false,
        }
    }
}

/// The engine's orders for a turn with this record, which [`Run::lease`] completes. `record.usage.prompt_tokens` tells where
/// its output begins.
pub(crate) fn spec(
    engine: &Engine,
    record: &TurnRecord,
    session: &str,
    turn: &str,
    log: Vec<u32>,
    realm: Realm,
) -> TurnSpec {
    let generation = &record.generation;
    let output_start = record.usage.prompt_tokens;
    let room = engine.model().context().saturating_sub(output_start);
    TurnSpec {
        realm,
        session: session.to_owned(),
        turn: turn.to_owned(),
        fence: 0,
        log,
        output_start,
        covered: 0,
        claim: None,
        pinned: false,
        sampling: generation.sampling.clone(),
        prompt_logprobs: generation.prompt_logprobs,
        max_tokens: generation.max_tokens.map_or(room, |most| most.min(room)),
        stop: generation.stop.clone(),
        shown: shown(engine.model().tokenizer(), &record.answer_format),
        grammar: None,
        ignore_eos: generation.ignore_eos,
        priority: if record.background { Priority::Background } else { Priority::Interactive },
    }
}

/// The chain of a session's conversation, before its first message.
pub(crate) fn root_chain(tenant: &Tenant, engine: &Engine, settings: &Settings) -> Chain {
    let template = blake3::hash(engine.model().template().source().as_bytes());
    let chain = Chain::new(tenant, &engine.model().fingerprint(), template.as_bytes(), &settings.tools);
    settings.cache_salt.iter().fold(chain, |chain, salt| chain.salted(salt))
}

pub(crate) fn stream(hub: &Arc<Hub>, starting_after: Option<u64>) -> TurnStream {
    TurnStream {
        session: hub.session.clone(),
        turn: hub.turn.clone(),
        answer_format: hub.answer_format.clone(),
        events: hub.follow(starting_after),
    }
}
