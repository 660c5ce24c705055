//! A running turn: from the engine's events to the hub, and at the end into the database.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dormouse_engine::{
    Engine, EngineError, Event, Finish, FinishReason, Listener, Miss, OutputText, Receipt, TokenOutput,
    TurnSpec,
};
use dormouse_store::{FinishTurn, SessionRow, StoreError, UpdateSession};
use serde_json::json;
use tokio::sync::{oneshot, watch};
use tracing::{Instrument, Span};

use crate::answers::{self, answer_message, shown};
use crate::api::*;
use crate::chain::Chain;
use crate::cut::text_of;
use crate::hub::Hub;
use crate::ids;
use crate::records::{self, KnownItem, Settings, TurnRecord, decode, encode, new_event};
use crate::request;
use crate::runtime::{Inner, Runtime};

/// How often a turn whose client may leave is looked after.
const LEFT_CHECK: Duration = Duration::from_millis(200);

/// How long to wait before a turn's end is offered to a full disk again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// A turn that is in the database, or about to be, and about to run.
pub(crate) struct Run {
    pub engine: Engine,
    pub spec: TurnSpec,
    pub record: TurnRecord,
    pub created_ms: u64,
    /// The conversation up to the turn's input.
    pub chain: Chain,
    /// (first token, message index) of each message of the prompt: tells the message of a miss.
    pub starts: Vec<usize>,
    /// What the caller knows of why the prompt is not restored whole.
    pub miss: Option<Miss>,
    /// Wait for this before the engine gets the turn.
    pub gate: Option<watch::Receiver<bool>>,
    /// The session's settings name the model that was interrupted, not the one that finishes the turn.
    pub adopts_model: bool,
}

/// Tells a turn's hub what the engine says, and the task that drives the turn only how it ended.
struct Hearing {
    hub: Arc<Hub>,
    engine: Engine,
    inner: Arc<Inner>,
    /// The turn says more of its prompt before it is in progress.
    scores: bool,
    /// Taken with the last event.
    rest: Mutex<Option<(Said, oneshot::Sender<Heard>)>>,
}

/// The output so far: tokens, and the text that they made certain.
#[derive(Default)]
struct Said {
    text: String,
    tokens: Vec<u32>,
}

/// A turn that the engine has, and will tell the end of.
pub(crate) struct Submitted(oneshot::Receiver<Heard>);

impl Submitted {
    /// Ends a turn that did not become durable, and waits until the engine has let go of its pages: whoever gives up its session,
    /// or begins its next turn, comes after it. A turn that the engine never got has ended.
    pub async fn take_back(self, engine: &Engine, turn: &str) {
        engine.cancel(turn);
        // How it ended is of no interest, and an engine that is gone says nothing.
        let _ = self.0.await;
    }
}

/// All that a turn said, and how it ended.
type Heard = (Said, Result<Finish, EngineError>);

impl Hearing {
    fn of(run: &Run, hub: &Arc<Hub>, inner: &Arc<Inner>) -> (Hearing, oneshot::Receiver<Heard>) {
        let (end, heard) = oneshot::channel();
        let rest = Mutex::new(Some((Said::default(), end)));
        let scores = run.spec.prompt_logprobs.is_some();
        let (hub, inner, engine) = (Arc::clone(hub), Arc::clone(inner), run.engine.clone());
        (Hearing { hub, engine, inner, scores, rest }, heard)
    }

    fn rest(&self) -> MutexGuard<'_, Option<(Said, oneshot::Sender<Heard>)>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn token(&self, output: TokenOutput) {
        let TokenOutput { index, token, text: delta, logprob } = output;
        if let Some((said, _)) = self.rest().as_mut() {
            said.text.push_str(&delta);
            said.tokens.push(token);
        }
        if !delta.is_empty() || logprob.is_some() {
            self.hub.publish(2 + index as u64, TurnEventBody::Delta { delta, token, logprob });
        }
        if was_left(&self.hub, &self.inner) {
            self.engine.cancel(&self.hub.turn);
        }
    }

    fn end(&self, how: Result<Finish, EngineError>) {
        if let Some((said, end)) = self.rest().take() {
            // The task is gone only with its runtime.
            let _ = end.send((said, how));
        }
    }
}

impl Listener for Hearing {
    fn hear(&self, event: Event) {
        match event {
            Event::Started(_) if self.scores => {}
            Event::Started(_) => self.hub.publish(1, self.hub.in_progress(Vec::new())),
            Event::Prompt(logprobs) => self.hub.publish(1, self.hub.in_progress(logprobs)),
            Event::Token(output) => self.token(output),
            Event::Finished(finish) => self.end(Ok(finish)),
            Event::Failed(why) => self.end(Err(why)),
        }
    }
}

/// Whether a turn is to be cancelled because nobody waits for it. When the server stops, it leaves its clients.
fn was_left(hub: &Hub, inner: &Inner) -> bool {
    hub.cancel_when_left && hub.is_left() && !inner.is_stopping()
}

/// How a turn ended.
struct End {
    status: TurnStatus,
    reason: Option<FinishReason>,
    error: Option<(FailureCode, String)>,
    text: String,
    /// The end of `text`, which no event has told yet.
    rest: String,
    output: Vec<u32>,
    receipt: Option<Receipt>,
}

impl Runtime {
    /// Starts the task that drives a turn, which the engine has already where it is `submitted`. The turn's hub is registered
    /// when this returns.
    pub(crate) fn drive(
        &self,
        run: Run,
        hub: Arc<Hub>,
        submitted: Option<Submitted>,
    ) -> Result<(), SessionError> {
        let alive = self.inner.keep_alive()?;
        self.inner.add_hub(&hub);
        let span = Span::current();
        span.record("turn", hub.turn.as_str());
        let runtime = self.clone();
        let driving = async move {
            runtime.run(run, &hub, submitted).await;
            runtime.inner.remove_hub(&hub.turn);
            runtime.inner.changed(&hub.session);
            drop(alive);
        };
        tokio::spawn(request::go_on(request::current(), driving).instrument(span));
        Ok(())
    }

    async fn run(&self, mut run: Run, hub: &Arc<Hub>, submitted: Option<Submitted>) {
        let end = match self.listen(&mut run, hub, submitted).await {
            Ok(end) => end,
            Err(EngineError::Stopped) if self.inner.is_stopping() => return hub.abandon(),
            // Someone else drives the turn now, and tells its end.
            Err(EngineError::LeaseLost) => {
                tracing::warn!(turn = hub.turn, session = hub.session, "the session's lease moved on");
                return hub.abandon();
            }
            Err(why) => self.failed(&run, &why).await,
        };
        self.finish(run, end, hub).await;
    }

    /// Has the engine run the turn, which tells the hub, and waits for its end.
    async fn listen(
        &self,
        run: &mut Run,
        hub: &Arc<Hub>,
        submitted: Option<Submitted>,
    ) -> Result<End, EngineError> {
        let Submitted(end) = match submitted {
            Some(submitted) => submitted,
            None => {
                if let Some(mut gate) = run.gate.take() {
                    // An error means that the other turn is gone, which opens the gate as well.
                    gate.wait_for(|open| *open).await.ok();
                }
                // Pages of its path may have gone since its turn began: the catalog knows where that ends now.
                let row = self.inner.store.session(&run.spec.session).await;
                let row = row.map_err(|why| EngineError::Storage(why.to_string()))?;
                if row.fence == run.spec.fence {
                    run.lease(&row);
                }
                let (listener, end) = Hearing::of(run, hub, &self.inner);
                run.engine.submit(run.spec.clone(), listener)?;
                Submitted(end)
            }
        };
        if hub.is_cancelled() {
            run.engine.cancel(&hub.turn);
        }
        let (said, last) = self.wait(end, run, hub).await.ok_or(EngineError::Stopped)?;
        let finish = last?;
        let status = match finish.reason {
            FinishReason::Cancelled => TurnStatus::Cancelled,
            FinishReason::Stop | FinishReason::Length => TurnStatus::Completed,
        };
        Ok(End {
            status,
            reason: Some(finish.reason),
            error: None,
            text: said.text + &finish.text,
            rest: finish.text,
            output: said.tokens,
            receipt: Some(run.explain(finish.receipt)),
        })
    }

    /// What the turn said and how it ended; None when the engine went away. Meanwhile a turn that nobody waits for any more is
    /// cancelled, also one that says nothing for a while.
    async fn wait(&self, mut end: oneshot::Receiver<Heard>, run: &Run, hub: &Hub) -> Option<Heard> {
        if !hub.cancel_when_left {
            return end.await.ok();
        }
        loop {
            match tokio::time::timeout(LEFT_CHECK, &mut end).await {
                Ok(heard) => return heard.ok(),
                Err(_) if was_left(hub, &self.inner) => run.engine.cancel(&hub.turn),
                Err(_) => {}
            }
        }
    }

    /// The end of a turn that the engine gave up: what is in the log stays.
    async fn failed(&self, run: &Run, why: &EngineError) -> End {
        let tokens = match self.inner.store.token_log(&run.spec.session).await {
            Ok(log) => log.get(run.spec.output_start..).unwrap_or_default().to_vec(),
            Err(unread) => {
                tracing::warn!(turn = run.spec.turn, "cannot read what a failed turn generated: {unread}");
                Vec::new()
            }
        };
        let mut output = OutputText::new(run.engine.model().tokenizer(), &run.spec.stop, &run.spec.shown);
        let told: String = tokens.iter().map(|token| output.push(*token).0).collect();
        let rest = output.finish();
        End {
            status: TurnStatus::Failed,
            reason: None,
            error: Some((
                match why {
                    EngineError::OutOfSpace(_) => FailureCode::OutOfSpace,
                    _ => FailureCode::TurnFailed,
                },
                why.to_string(),
            )),
            text: told + &rest,
            rest,
            output: tokens,
            receipt: None,
        }
    }

    /// Makes the turn's end durable, then tells it.
    async fn finish(&self, mut run: Run, end: End, hub: &Hub) {
        let now_ms = ids::now_ms();
        let rest = end.output.last().copied().filter(|_| !end.rest.is_empty()).zip(Some(end.rest.clone()));
        let change = match self.finish_turn_change(&mut run, end, now_ms).await {
            Ok(change) => change,
            Err(why) => return self.finish_failed(&run, hub, &why),
        };
        let mut told = false;
        let row = loop {
            match self.inner.store.finish_turn(change.clone()).await {
                Ok(row) => break row,
                Err(why @ StoreError::Full(_)) if !self.inner.is_stopping() => {
                    if !told {
                        tracing::warn!(turn = hub.turn, "the end of the turn waits for room: {why}");
                        self.finish_failed(&run, hub, &why.into());
                        told = true;
                    }
                    tokio::time::sleep(FULL_RETRY).await;
                }
                Err(_) if self.inner.is_stopping() => return hub.abandon(),
                Err(why) => {
                    tracing::error!(turn = hub.turn, "the end of the turn could not be recorded: {why}");
                    if !told {
                        self.finish_failed(&run, hub, &why.into());
                    }
                    return;
                }
            }
        };
        if run.record.delete_after {
            self.forget(&row, !run.record.keep_pages).await;
        } else if run.adopts_model
            && let Err(why) = self.adopt_model(&run).await
        {
            // The next turn says `model_changed` once more.
            tracing::warn!(session = hub.session, "the session's model could not be recorded: {why}");
        }
        if told {
            return;
        }
        let turn = Box::new(records::turn_of(&hub.session, &hub.turn, run.created_ms, run.record));
        let last = turn.last_number();
        // Before the last event, so that whoever has seen it finds the session idle.
        self.inner.remove_hub(&hub.turn);
        // Only now: a turn whose end was not recorded goes on after the next start, and its tokens take this number.
        if let Some((token, delta)) = rest {
            hub.publish_rest(last - 1, TurnEventBody::Delta { delta, token, logprob: None });
        }
        let body = match turn.status {
            TurnStatus::Cancelled => TurnEventBody::Cancelled { turn },
            TurnStatus::Failed => TurnEventBody::Failed { turn },
            TurnStatus::Completed | TurnStatus::InProgress => TurnEventBody::Completed { turn },
        };
        hub.publish(last, body);
    }

    /// Only after the turn has reported the change: until then a second crash must not forget it.
    async fn adopt_model(&self, run: &Run) -> Result<(), SessionError> {
        let mut settings = self.inner.settings(&run.spec.session).await?;
        settings.fingerprint = records::hex(&run.engine.model().fingerprint());
        let settings = Some(encode(&settings)?);
        let change = UpdateSession { settings, now_ms: ids::now_ms(), ..UpdateSession::default() };
        self.inner.store.update_session(&run.spec.session, change).await?;
        Ok(())
    }

    async fn finish_turn_change(
        &self,
        run: &mut Run,
        end: End,
        now_ms: u64,
    ) -> Result<FinishTurn, SessionError> {
        let spec = &run.spec;
        let prompt_tokens = spec.output_start;
        let cached_tokens =
            end.receipt.as_ref().map_or(0, |receipt| receipt.restored_tokens.min(prompt_tokens));
        let tokenizer = run.engine.model().tokenizer();
        let record = &mut run.record;
        record.status = end.status;
        record.finish_reason = end.reason;
        (record.error_code, record.error) = end.error.unzip();
        record.completed_ms = Some(now_ms);
        record.usage = Usage {
            prompt_tokens,
            completion_tokens: end.output.len(),
            total_tokens: prompt_tokens + end.output.len(),
            cached_tokens,
            reasoning_tokens: answers::reasoning_tokens(
                &end.output,
                tokenizer,
                &record.generation.stop,
                &record.answer_format,
            ),
        };
        record.receipt = end.receipt;
        record.output_text = end.text;
        let log_end = prompt_tokens + end.output.len();
        // The log holds more than was said: from the next turn on the model sees what the client saw.
        let cut_short = !record.generation.stop.is_empty()
            && text_of(&end.output, tokenizer, &shown(tokenizer, &record.answer_format))
                != record.output_text;
        let item = match end.output.len() {
            0 => None,
            _ => Some(KnownItem {
                id: ids::item_of(&spec.turn),
                turn: Some(spec.turn.clone()),
                message: answer_message(&spec.turn, &record.answer_format, &record.output_text),
                generated: !cut_short,
                token_start: prompt_tokens,
                token_end: log_end,
                created_ms: now_ms,
            }),
        };
        record.output = (cut_short || record.keep_output).then_some(end.output);
        let mut boundaries = Vec::new();
        // A session that goes at once is nobody's beginning.
        if let Some(item) = item.as_ref().filter(|_| !record.delete_after) {
            boundaries.push((run.chain.add(&item.message), log_end));
        }
        let (row, settings) = self.inner.store.session_and_settings(&spec.session).await?;
        let settings: Settings = decode(&settings)?;
        self.inner.tenants.count(&row.tenant, &run.engine.model().name, &record.usage);
        let expires_ms = match row.implicit {
            true => {
                let ttl_seconds = settings.ttl_seconds.unwrap_or(self.inner.options.implicit_ttl_seconds);
                Some(now_ms + ttl_seconds * 1000)
            }
            false => settings.expires_ms(now_ms),
        };
        let kind = match record.status {
            TurnStatus::Cancelled => "session.turn.cancelled",
            TurnStatus::Failed => "session.turn.failed",
            TurnStatus::Completed | TurnStatus::InProgress => "session.turn.completed",
        };
        let data = json!({
            "finish_reason": record.finish_reason, "error": record.error, "usage": record.usage,
            "dormouse": record.receipt, "item": item.as_ref().map(|item| &item.id),
        });
        Ok(FinishTurn {
            session: spec.session.clone(),
            turn: spec.turn.clone(),
            fence: spec.fence,
            record: encode(record)?,
            item: item.map(|item| item.to_row()).transpose()?,
            boundaries,
            error: record.error.clone(),
            expires_ms,
            events: vec![new_event(kind, Some(&spec.turn), data)],
            now_ms,
            deletes: record.delete_after,
        })
    }

    /// Tells the followers that the turn's end could not be recorded. The database still has it in progress, and the
    /// next start finishes it.
    fn finish_failed(&self, run: &Run, hub: &Hub, why: &SessionError) {
        let mut record = run.record.clone();
        record.status = TurnStatus::Failed;
        record.error_code = Some(match why {
            SessionError::OutOfSpace(_) => FailureCode::OutOfSpace,
            _ => FailureCode::TurnFailed,
        });
        record.error = Some(format!("the end of this turn could not be recorded yet: {why}"));
        let turn = Box::new(records::turn_of(&hub.session, &hub.turn, run.created_ms, record));
        hub.publish(turn.last_number(), TurnEventBody::Failed { turn });
    }
}

impl Run {
    pub fn hub(&self, cancel_when_left: bool) -> Arc<Hub> {
        let (spec, format) = (&self.spec, self.record.answer_format.clone());
        Arc::new(Hub::new(&spec.session, &spec.turn, format, cancel_when_left))
    }

    /// The turn runs under the lease that its session's row tells of, and goes on from the path there.
    pub fn lease(&mut self, row: &SessionRow) {
        lease(&mut self.spec, &self.engine, row);
    }

    /// What hands the turn to the engine when it has its lease; the engine computes while the input becomes durable. None
    /// where the turn has to wait for another.
    pub fn early(
        &self,
        hub: &Arc<Hub>,
        inner: &Arc<Inner>,
    ) -> Option<(impl FnOnce(&SessionRow) + Send + 'static + use<>, Submitted)> {
        if self.gate.is_some() {
            return None;
        }
        let (listener, end) = Hearing::of(self, hub, inner);
        let (engine, mut spec) = (self.engine.clone(), self.spec.clone());
        let submit = move |row: &SessionRow| {
            lease(&mut spec, &engine, row);
            // An engine that is gone drops the listener, and that is heard.
            let _ = engine.submit(spec, listener);
        };
        Some((submit, Submitted(end)))
    }

    /// Adds to the engine's receipt what only the caller knows: why known messages were not found, and the message
    /// at which the restored tokens end.
    fn explain(&self, mut receipt: Receipt) -> Receipt {
        if self.miss.as_ref().is_some_and(|miss| miss.reason == "model_changed") {
            // The uninterrupted run would have gone on under the model that is no longer there.
            receipt.exact = false;
        }
        // The last prompt token is always computed: its logits are what is sampled from.
        if receipt.restored_tokens + 1 >= self.spec.output_start {
            return receipt;
        }
        if let Some(known) = &self.miss {
            let found = receipt
                .miss
                .get_or_insert_with(|| Miss { at_token: receipt.restored_tokens, ..known.clone() });
            if known.reason == "model_changed" {
                found.reason.clone_from(&known.reason);
            }
            found.at_message = found.at_message.or(known.at_message);
        }
        if let Some(miss) = &mut receipt.miss
            && miss.at_message.is_none()
        {
            miss.at_message = self.starts.iter().rposition(|start| *start <= miss.at_token);
        }
        receipt
    }
}

fn lease(spec: &mut TurnSpec, engine: &Engine, row: &SessionRow) {
    spec.fence = row.fence;
    // A path in another model's page file is of no use here.
    spec.claim = row.leaf_slot.filter(|_| row.page_file == Some(engine.page_file()));
}

impl Inner {
    /// The engine with the model of a session's settings.
    pub fn engine_of(&self, settings: &records::Settings) -> Result<&Engine, SessionError> {
        self.engine(Some(&settings.model))
    }
}
