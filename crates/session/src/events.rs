//! A session's durable event log: `session.created`, `session.updated`, `session.rewound`, `session.retokenized`,
//! `session.turn.created`, `session.turn.completed`, `session.turn.cancelled`, `session.turn.failed`.

use tokio::sync::mpsc;

use crate::api::*;
use crate::records::session_event;
use crate::runtime::Runtime;

/// Events read from the database at once while following.
const BATCH: usize = 256;

impl Runtime {
    /// Events with a sequence number above `starting_after` (from the start when None), at most `limit`.
    pub async fn events(
        &self,
        tenant: &Tenant,
        session: &str,
        starting_after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<SessionEvent>, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        self.events_from(&id, starting_after.map_or(0, |after| after.saturating_add(1)), limit).await
    }

    /// The durable log from `starting_after` on, and then every event as it happens. Ends when the session is
    /// deleted or the server stops.
    pub async fn follow_events(
        &self,
        tenant: &Tenant,
        session: &str,
        starting_after: Option<u64>,
    ) -> Result<mpsc::UnboundedReceiver<SessionEvent>, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let mut changes = self.inner.watch(&id);
        let mut next = starting_after.map_or(0, |after| after.saturating_add(1));
        // A follower that does not read is cut off by its server's write timeout; until then it holds one log.
        let (sender, receiver) = mpsc::unbounded_channel();
        let runtime = self.clone();
        tokio::spawn(async move {
            loop {
                let events = match runtime.events_from(&id, next, BATCH).await {
                    Ok(events) => events,
                    Err(SessionError::SessionNotFound(_) | SessionError::Stopping) => return,
                    Err(why) => return tracing::warn!(session = id, "following events: {why}"),
                };
                let more = events.len() == BATCH;
                for event in events {
                    next = event.sequence_number + 1;
                    if sender.send(event).is_err() {
                        return;
                    }
                }
                if more {
                    continue;
                }
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(receiver)
    }

    async fn events_from(
        &self,
        id: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<SessionEvent>, SessionError> {
        self.inner.store.events(id, from, limit).await?.into_iter().map(session_event).collect()
    }
}
