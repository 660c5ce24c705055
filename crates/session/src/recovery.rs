//! After a start: interrupted turns go on by themselves, and sessions whose time is up are deleted.

use std::sync::Arc;
use std::time::Duration;

use dormouse_engine::{FinishReason, Miss, TurnSpec};
use dormouse_store::{FinishTurn, SessionRow, TurnRow};
use serde_json::json;

use crate::api::*;
use crate::drive::Run;
use crate::grammar::grammar;
use crate::hub::Hub;
use crate::ids;
use crate::realms::realm;
use crate::records::{self, Settings, TurnRecord, decode, encode, message, new_event};
use crate::runtime::Runtime;
use crate::turns::{root_chain, spec};

/// Expired sessions read at once.
const SWEEP_BATCH: usize = 64;

impl Runtime {
    /// Goes on with every turn that was in progress when the last process ended, and starts the sweeper. Answers the
    /// number of turns that go on.
    pub async fn recover(&self) -> Result<usize, SessionError> {
        let mut found = 0;
        for row in self.inner.store.interrupted_turns().await? {
            let session = row.id;
            match self.go_on(&session).await {
                Ok(true) => found += 1,
                Ok(false) => {}
                Err(why) => tracing::warn!(session, "an interrupted turn cannot go on: {why}"),
            }
        }
        self.start_sweeper();
        Ok(found)
    }

    /// Drives a session's turn that is in progress and that nobody drives; false when there is none such.
    async fn go_on(&self, session: &str) -> Result<bool, SessionError> {
        let _alone = self.inner.unregistered.write().await;
        let row = self.inner.store.session(session).await?;
        let Some(turn) = row.active_turn.filter(|turn| self.inner.hub(turn).is_none()) else {
            return Ok(false);
        };
        let row = self.inner.store.take_over(session).await?;
        let tenant = Tenant(row.tenant.clone());
        let (history, log) = self.inner.store.conversation(&row.id).await?;
        let settings: Settings = decode(&history.settings)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        let turn_row = history.turns.iter().find(|it| it.id == turn).cloned();
        let turn_row = turn_row.ok_or_else(|| SessionError::TurnNotFound(turn.clone()))?;
        let model = engine.model();
        if settings.tokenizer != records::hex(&model.tokenizer().fingerprint()) {
            let error =
                "the model's tokenizer was replaced while this turn was interrupted; send its input again";
            self.give_up(&row, turn_row, log.len(), TurnStatus::Failed, Some(error)).await?;
            return Ok(false);
        }
        let record: TurnRecord = decode(&turn_row.record)?;
        let model_changed = settings.fingerprint != records::hex(&model.fingerprint());
        let items = records::items(history.items)?;
        let mut chain = root_chain(&tenant, &engine, &settings);
        let system = settings.instructions.as_deref().map(|text| message("system", text));
        for message in system.iter().chain(items.iter().map(|item| &item.message)) {
            chain.add(message);
        }
        let starts = items.iter().map(|item| item.token_start).collect();
        let durable = log.len();
        let realm = realm(&tenant, &settings);
        let grammar = {
            let (engine, tools) = (engine.clone(), settings.tools.clone());
            let (generation, format) = (record.generation.clone(), record.answer_format.clone());
            let compiled =
                tokio::task::spawn_blocking(move || grammar(&engine, &tools, &generation, &format));
            compiled
                .await
                .map_err(|why| SessionError::Internal(format!("compiling the grammar failed: {why}")))?
        };
        let grammar = match grammar {
            Ok(grammar) => grammar,
            Err(why) => {
                let error =
                    format!("the form of this turn's answer cannot be promised by this version: {why}");
                self.give_up(&row, turn_row, log.len(), TurnStatus::Failed, Some(&error)).await?;
                return Ok(false);
            }
        };
        let orders = spec(&engine, &record, &row.id, &turn, log, realm);
        // A first token of the answer means that the whole prompt was computed.
        let begun = if durable > orders.output_start { durable - 1 } else { 0 };
        let covered = row.kv_len.max(records::computed(&history.turns)).max(begun).min(durable);
        let mut run = Run {
            spec: TurnSpec { covered, pinned: settings.pinned, grammar, ..orders },
            engine,
            record,
            created_ms: turn_row.created_ms,
            chain,
            starts,
            miss: model_changed.then(|| Miss {
                reason: "model_changed".into(),
                at_token: 0,
                at_message: None,
            }),
            gate: None,
            adopts_model: model_changed,
        };
        // The engine publishes the durable output again from its first token, and sees whether it had already ended.
        run.lease(&row);
        let hub = run.hub(false);
        self.drive(run, hub, None)?;
        Ok(true)
    }

    /// Stops a turn that is in progress and that nobody drives: it goes on for that, or ends as it is in the log where
    /// it cannot, because its model is not served any more.
    pub(crate) async fn cancel_stranded(
        &self,
        session: &str,
        turn: &str,
    ) -> Result<Option<Arc<Hub>>, SessionError> {
        let why = match self.go_on(session).await {
            Ok(_) => return Ok(self.inner.hub(turn)),
            Err(why @ (SessionError::Stopping | SessionError::SessionNotFound(_))) => return Err(why),
            Err(why) => why,
        };
        tracing::warn!(session, turn, "an interrupted turn is cancelled where it stopped: {why}");
        let _alone = self.inner.unregistered.write().await;
        let history = self.inner.store.history(session).await?;
        let row = history.turns.into_iter().find(|row| row.id == turn);
        if let Some(row) = row.filter(|_| history.session.active_turn.as_deref() == Some(turn))
            && self.inner.hub(turn).is_none()
        {
            let session = self.inner.store.take_over(session).await?;
            self.give_up(&session, row, session.log_len, TurnStatus::Cancelled, None).await?;
            self.inner.changed(&session.id);
        }
        Ok(None)
    }

    /// Ends a turn without its model: its tokens stay in the log until the next turn, but have no text.
    async fn give_up(
        &self,
        row: &SessionRow,
        turn: TurnRow,
        log_len: usize,
        status: TurnStatus,
        error: Option<&str>,
    ) -> Result<(), SessionError> {
        let now_ms = ids::now_ms();
        let mut record: TurnRecord = decode(&turn.record)?;
        let kind = match status {
            TurnStatus::Cancelled => "session.turn.cancelled",
            _ => "session.turn.failed",
        };
        record.status = status;
        record.finish_reason = (status == TurnStatus::Cancelled).then_some(FinishReason::Cancelled);
        record.error = error.map(str::to_owned);
        record.error_code = error.map(|_| FailureCode::TurnFailed);
        record.completed_ms = Some(now_ms);
        record.usage.completion_tokens = log_len.saturating_sub(record.usage.prompt_tokens);
        record.usage.total_tokens = record.usage.prompt_tokens + record.usage.completion_tokens;
        let data =
            json!({ "finish_reason": record.finish_reason, "error": record.error, "usage": record.usage });
        let finish = FinishTurn {
            session: row.id.clone(),
            turn: turn.id.clone(),
            fence: row.fence,
            record: encode(&record)?,
            error: record.error,
            expires_ms: row.expires_ms,
            events: vec![new_event(kind, Some(&turn.id), data)],
            now_ms,
            ..FinishTurn::default()
        };
        self.inner.store.finish_turn(finish).await?;
        Ok(())
    }

    fn start_sweeper(&self) {
        // Weak: the sweeper must not keep a runtime that everyone has dropped.
        let (inner, every) =
            (std::sync::Arc::downgrade(&self.inner), self.inner.options.sweep_seconds.max(1));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(every)).await;
                let Some(inner) = inner.upgrade() else { return };
                if inner.is_stopping() {
                    return;
                }
                let runtime = Runtime { inner };
                if let Err(why) = runtime.sweep().await {
                    tracing::warn!("looking for expired sessions: {why}");
                }
            }
        });
    }

    /// Deletes idle sessions whose time is up; answers how many.
    pub async fn sweep(&self) -> Result<usize, SessionError> {
        let mut deleted = 0;
        loop {
            let expired = self.inner.store.expired_sessions(ids::now_ms(), SWEEP_BATCH).await?;
            let (found, before) = (expired.len(), deleted);
            for row in expired {
                match self.delete_by_id(&row.id).await {
                    Ok(()) => deleted += 1,
                    // Someone has just begun to use it.
                    Err(SessionError::Busy { .. } | SessionError::SessionNotFound(_)) => {}
                    Err(why) => return Err(why),
                }
            }
            if found < SWEEP_BATCH || deleted == before || self.inner.is_stopping() {
                return Ok(deleted);
            }
        }
    }
}
