//! [`Runtime`]: every operation on sessions, whichever door it came through.

use dormouse_engine::Receipt;

use crate::api::*;

/// All sessions of one data directory, and the models that advance them.
#[derive(Clone)]
pub struct Runtime {}

#[allow(unused_variables, clippy::todo)]
impl Runtime {
    pub fn models(&self) -> Vec<ModelCard> {
        todo!()
    }

    pub async fn create(&self, tenant: &Tenant, request: CreateSession) -> Result<Session, SessionError> {
        todo!()
    }

    pub async fn list(&self, tenant: &Tenant, query: ListSessions) -> Result<Page<Session>, SessionError> {
        todo!()
    }

    /// `session` is an id or a name, here and below.
    pub async fn get(&self, tenant: &Tenant, session: &str) -> Result<Session, SessionError> {
        todo!()
    }

    pub async fn update(&self, tenant: &Tenant, session: &str, change: UpdateSession) -> Result<Session, SessionError> {
        todo!()
    }

    pub async fn delete(&self, tenant: &Tenant, session: &str) -> Result<(), SessionError> {
        todo!()
    }

    pub async fn items(&self, tenant: &Tenant, session: &str) -> Result<Vec<Item>, SessionError> {
        todo!()
    }

    /// Appends the input durably and starts generating. The turn lives on when the stream is dropped.
    pub async fn start_turn(
        &self,
        tenant: &Tenant,
        session: &str,
        request: TurnRequest,
    ) -> Result<TurnStream, SessionError> {
        todo!()
    }

    pub async fn turn(&self, tenant: &Tenant, session: &str, turn: &str) -> Result<Turn, SessionError> {
        todo!()
    }

    pub async fn turns(&self, tenant: &Tenant, session: &str) -> Result<Vec<Turn>, SessionError> {
        todo!()
    }

    /// The turn's events after `starting_after` (all when None), at any age, also while it runs.
    pub async fn attach(
        &self,
        tenant: &Tenant,
        session: &str,
        turn: &str,
        starting_after: Option<u64>,
    ) -> Result<TurnStream, SessionError> {
        todo!()
    }

    /// Stops the turn; what was generated stays. Answers the turn as it then is.
    pub async fn cancel(&self, tenant: &Tenant, session: &str, turn: &str) -> Result<Turn, SessionError> {
        todo!()
    }

    pub async fn fork(
        &self,
        tenant: &Tenant,
        session: &str,
        at: Option<Place>,
        name: Option<String>,
    ) -> Result<(Session, Receipt), SessionError> {
        todo!()
    }

    pub async fn rewind(&self, tenant: &Tenant, session: &str, to: Place) -> Result<Session, SessionError> {
        todo!()
    }

    pub async fn park(&self, tenant: &Tenant, session: &str) -> Result<ParkReceipt, SessionError> {
        todo!()
    }

    pub async fn resume(&self, tenant: &Tenant, session: &str, dry_run: bool) -> Result<Receipt, SessionError> {
        todo!()
    }

    /// Events with a sequence number above `starting_after`; waits for the first of them when `follow`.
    pub async fn events(
        &self,
        tenant: &Tenant,
        session: &str,
        starting_after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<SessionEvent>, SessionError> {
        todo!()
    }

    /// The durable log from `starting_after` on, and then every event as it happens.
    pub async fn follow_events(
        &self,
        tenant: &Tenant,
        session: &str,
        starting_after: Option<u64>,
    ) -> Result<tokio::sync::mpsc::UnboundedReceiver<SessionEvent>, SessionError> {
        todo!()
    }

    /// A chat request: with `session` it is a turn of that session; without, the longest known beginning of the
    /// conversation is found by its messages and continued (or forked, where it has moved on). One stream per choice.
    /// Dropping the stream of a choice made without `session` cancels it.
    pub async fn chat(&self, tenant: &Tenant, request: ChatRequest) -> Result<Vec<TurnStream>, SessionError> {
        todo!()
    }

    /// The raw bytes of a token of this model (of the first loaded one when None); empty for an unknown token.
    pub fn token_bytes(&self, model: Option<&str>, token: u32) -> Vec<u8> {
        todo!()
    }

    /// Why the runtime cannot serve now, if it cannot.
    pub fn unhealthy(&self) -> Option<String> {
        todo!()
    }

    /// Prometheus text of everything the runtime and its engines count.
    pub fn metrics(&self) -> String {
        todo!()
    }

    /// Stops generating at the next step, commits what was generated, closes the database. Interrupted turns stay
    /// `in_progress` and are finished after the next start.
    pub async fn shutdown(&self) {
        todo!()
    }
}
