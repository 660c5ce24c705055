//! After a start: interrupted turns go on by themselves, and sessions whose time is up are deleted.

use std::time::Duration;

use dormouse_engine::{Miss, TurnSpec};
use dormouse_store::{FinishTurn, SessionRow, TurnRow};
use serde_json::json;

use crate::api::*;
use crate::drive::Run;
use crate::ids;
use crate::records::{self, Settings, TurnRecord, decode, encode, message, new_event};
use crate::runtime::Runtime;
use crate::turns::{root_chain, spec};

/// Expired sessions deleted at one look.
const SWEEP_BATCH: usize = 64;

impl Runtime {
    /// Goes on with every turn that was in progress when the last process ended, and starts the sweeper. Answers the
    /// number of turns that go on.
    pub async fn recover(&self) -> Result<usize, SessionError> {
        let mut found = 0;
        for row in self.inner.store.interrupted_turns().await? {
            let session = row.id.clone();
            match self.go_on(row).await {
                Ok(true) => found += 1,
                Ok(false) => {}
                Err(why) => tracing::warn!(session, "an interrupted turn cannot go on: {why}"),
            }
        }
        self.start_sweeper();
        Ok(found)
    }

    async fn go_on(&self, row: SessionRow) -> Result<bool, SessionError> {
        let Some(turn) = row.active_turn.clone() else { return Ok(false) };
        if self.inner.hub(&turn).is_some() {
            return Ok(false);
        }
        let row = self.inner.store.take_over(&row.id).await?;
        let tenant = Tenant(row.tenant.clone());
        let (history, log) = self.inner.store.conversation(&row.id).await?;
        let settings: Settings = decode(&history.settings)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        let turn_row = history.turns.iter().find(|it| it.id == turn).cloned();
        let turn_row = turn_row.ok_or_else(|| SessionError::TurnNotFound(turn.clone()))?;
        let record: TurnRecord = decode(&turn_row.record)?;
        let model = engine.model();
        if settings.tokenizer != records::hex(&model.tokenizer().fingerprint()) {
            self.give_up(&row, turn_row, record).await?;
            return Ok(false);
        }
        let model_changed = settings.fingerprint != records::hex(&model.fingerprint());
        let items = records::items(history.items)?;
        let mut chain = root_chain(&tenant, &engine, &settings);
        let system = settings.instructions.as_deref().map(|text| message("system", text));
        for message in system.iter().chain(items.iter().map(|item| &item.message)) {
            chain.add(message);
        }
        let starts = items.iter().map(|item| item.token_start).collect();
        let durable = log.len();
        let orders = spec(&engine, &record, &row.id, &turn, row.fence, log);
        // A first token of the answer means that the whole prompt was computed.
        let begun = if durable > orders.output_start { durable - 1 } else { 0 };
        let covered = row.kv_len.max(records::computed(&history.turns)).max(begun).min(durable);
        let claim = row.leaf_slot.filter(|_| row.page_file == Some(engine.page_file()));
        let run = Run {
            spec: TurnSpec { covered, claim, ..orders },
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
        };
        // The engine publishes the durable output again from its first token, and sees whether it had already ended.
        self.drive(run, false)?;
        Ok(true)
    }

    /// The weights were replaced by a model with other tokens: half an answer cannot be continued in another language.
    async fn give_up(
        &self,
        row: &SessionRow,
        turn: TurnRow,
        mut record: TurnRecord,
    ) -> Result<(), SessionError> {
        let now_ms = ids::now_ms();
        let error =
            "the model's tokenizer was replaced while this turn was interrupted; send its input again";
        record.status = TurnStatus::Failed;
        record.error = Some(error.to_owned());
        record.completed_ms = Some(now_ms);
        let finish = FinishTurn {
            session: row.id.clone(),
            turn: turn.id.clone(),
            fence: row.fence,
            record: encode(&record)?,
            error: Some(error.to_owned()),
            expires_ms: row.expires_ms,
            events: vec![new_event("session.turn.failed", Some(&turn.id), json!({ "error": error }))],
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
        let expired = self.inner.store.expired_sessions(ids::now_ms(), SWEEP_BATCH).await?;
        let mut deleted = 0;
        for row in expired {
            match self.delete_by_id(&row.id).await {
                Ok(()) => deleted += 1,
                // Someone has just begun to use it.
                Err(SessionError::Busy { .. } | SessionError::SessionNotFound(_)) => {}
                Err(why) => return Err(why),
            }
        }
        Ok(deleted)
    }
}
