//! [`Store`]'s methods about sessions.

use std::cell::Cell;

use crate::boundaries::{self, Boundary};
use crate::changes::{self, BeginTurn, Cut, EditItems, FinishTurn, Leaf, NewSession, UpdateSession};
use crate::history::{self, EventRow, History, NewEvent};
use crate::sessions::{self, SessionRow, StatusFilter};
use crate::weights::{self, WeightsFile};
use crate::{Store, StoreError, tokens, written};

/// Sessions by status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCounts {
    pub in_progress: u64,
    pub failed: u64,
    pub idle: u64,
}

impl Store {
    /// Errors: `NameTaken`.
    pub async fn create_session(&self, new: NewSession) -> Result<SessionRow, StoreError> {
        self.write(move |db| changes::create(db, &new)).await
    }

    /// By id, else by name, within one tenant.
    pub async fn find_session(&self, tenant: &str, id_or_name: &str) -> Result<SessionRow, StoreError> {
        let (tenant, key) = (tenant.to_owned(), id_or_name.to_owned());
        self.read(move |db| sessions::find(db, &tenant, &key)).await
    }

    /// By id, whatever its tenant.
    pub async fn session(&self, id: &str) -> Result<SessionRow, StoreError> {
        let id = id.to_owned();
        self.read(move |db| sessions::show(db, &id)).await
    }

    pub async fn settings(&self, session: &str) -> Result<String, StoreError> {
        let session = session.to_owned();
        self.read(move |db| sessions::settings(db, &session)).await
    }

    /// A session's row, as of [`Store::session`], and its settings.
    pub async fn session_and_settings(&self, id: &str) -> Result<(SessionRow, String), StoreError> {
        let id = id.to_owned();
        self.read(move |db| Ok((sessions::show(db, &id)?, sessions::settings(db, &id)?))).await
    }

    /// Newest first, after the session `after`, at most `limit`, each with its settings.
    pub async fn list_sessions(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        status: Option<StatusFilter>,
        implicit: bool,
    ) -> Result<Vec<(SessionRow, String)>, StoreError> {
        let tenant = tenant.to_owned();
        self.read(move |db| {
            sessions::list(db, &tenant, after.as_deref(), limit, status, implicit)?
                .into_iter()
                .map(|row| {
                    let settings = sessions::settings(db, &row.id)?;
                    Ok((row, settings))
                })
                .collect()
        })
        .await
    }

    /// The session's row, settings, items and turns, of one moment.
    pub async fn history(&self, session: &str) -> Result<History, StoreError> {
        let session = session.to_owned();
        self.read(move |db| history::load(db, &session)).await
    }

    /// [`Store::history`] with the session's whole durable token log, of the same moment.
    pub async fn conversation(&self, session: &str) -> Result<(History, Vec<u32>), StoreError> {
        let session = session.to_owned();
        self.read(move |db| {
            let history = history::load(db, &session)?;
            let log = tokens::load(db, &session, history.session.log_len)?;
            Ok((history, log))
        })
        .await
    }

    /// The session's whole durable token log.
    pub async fn token_log(&self, session: &str) -> Result<Vec<u32>, StoreError> {
        let session = session.to_owned();
        self.read(move |db| tokens::load(db, &session, sessions::load(db, &session)?.log_len)).await
    }

    /// Events with sequence numbers from `sequence` on, at most `limit`.
    pub async fn events(
        &self,
        session: &str,
        sequence: u64,
        limit: usize,
    ) -> Result<Vec<EventRow>, StoreError> {
        let session = session.to_owned();
        self.read(move |db| history::events(db, &sessions::load(db, &session)?, sequence, limit)).await
    }

    /// Takes the session's lease (fence + 1) and makes the turn's input durable. Errors: `Busy`.
    pub async fn begin_turn(&self, turn: BeginTurn) -> Result<SessionRow, StoreError> {
        self.begin_turn_early(turn, |_| {}).await
    }

    /// As [`Store::begin_turn`]. `leased` hears on the database's thread, once, which lease the turn gets: the row with its
    /// fence, before the input. What the turn commits is taken after its input in any case, and refused where that did
    /// not become durable.
    pub async fn begin_turn_early(
        &self,
        turn: BeginTurn,
        leased: impl FnOnce(&SessionRow) + Send + 'static,
    ) -> Result<SessionRow, StoreError> {
        // The change runs again for the mirror.
        let leased = Cell::new(Some(leased));
        let tell = move |row: &SessionRow| leased.take().map_or((), |leased| leased(row));
        self.write(move |db| changes::begin_turn(db, &turn, &tell)).await
    }

    /// A new fence for a session whose turn was interrupted: whoever still writes is shut out.
    pub async fn take_over(&self, session: &str) -> Result<SessionRow, StoreError> {
        let session = session.to_owned();
        self.write(move |db| changes::take_over(db, &session)).await
    }

    /// Ends the active turn. Errors: `LeaseLost` when the turn is not the writer's any more.
    pub async fn finish_turn(&self, turn: FinishTurn) -> Result<SessionRow, StoreError> {
        self.write(move |db| changes::finish_turn(db, &turn)).await
    }

    /// A new session with the history of `source` up to `cut`; also of a busy source, up to its durable tokens. `fence`
    /// is the source's when `cut` was found. Errors: `LeaseLost` when a turn has begun or a rewind come since.
    pub async fn fork_session(
        &self,
        source: &str,
        fence: u64,
        cut: Cut,
        new: NewSession,
        leaf: Leaf,
    ) -> Result<SessionRow, StoreError> {
        let source = source.to_owned();
        self.write(move |db| changes::fork(db, &source, fence, &cut, &new, leaf)).await
    }

    /// Drops what the session's history has beyond `cut`. Errors: `Busy`; `LeaseLost` as for a fork.
    pub async fn rewind_session(
        &self,
        session: &str,
        fence: u64,
        cut: Cut,
        leaf: Leaf,
        events: Vec<NewEvent>,
        now_ms: u64,
    ) -> Result<SessionRow, StoreError> {
        let session = session.to_owned();
        self.write(move |db| changes::rewind(db, &session, fence, &cut, leaf, &events, now_ms)).await
    }

    /// Errors: `Busy`; `LeaseLost` as for a fork.
    pub async fn edit_items(&self, edit: EditItems) -> Result<SessionRow, StoreError> {
        self.write(move |db| changes::edit_items(db, &edit)).await
    }

    /// Errors: `NameTaken`.
    pub async fn update_session(
        &self,
        session: &str,
        change: UpdateSession,
    ) -> Result<SessionRow, StoreError> {
        let session = session.to_owned();
        self.write(move |db| changes::update(db, &session, &change)).await
    }

    /// Deletes an idle session and answers its last row, so that its pages can be unclaimed. Errors: `Busy`.
    pub async fn delete_session(&self, session: &str) -> Result<SessionRow, StoreError> {
        let session = session.to_owned();
        self.write(move |db| changes::delete(db, &session)).await
    }

    /// Sessions whose turn was in progress when the database was last closed or killed, longest waiting first.
    pub async fn interrupted_turns(&self) -> Result<Vec<SessionRow>, StoreError> {
        self.read(sessions::interrupted).await
    }

    /// Idle sessions whose time is up.
    pub async fn expired_sessions(&self, now_ms: u64, limit: usize) -> Result<Vec<SessionRow>, StoreError> {
        self.read(move |db| sessions::expired(db, now_ms, limit)).await
    }

    /// What turns have written on each of the days from `first_day` on, counted since the epoch; days without are left out.
    pub async fn written_bytes(&self, first_day: u64) -> Result<Vec<(u64, u64)>, StoreError> {
        self.read(move |db| written::by_day(db, first_day)).await
    }

    pub async fn session_counts(&self) -> Result<SessionCounts, StoreError> {
        let (in_progress, failed, idle) = self.read(sessions::counts).await?;
        Ok(SessionCounts { in_progress, failed, idle })
    }

    /// The places where the longest known conversation among `hashes` (shortest first) ends; empty when none is.
    pub async fn find_boundaries(
        &self,
        tenant: &str,
        hashes: Vec<[u8; 32]>,
    ) -> Result<Vec<Boundary>, StoreError> {
        let tenant = tenant.to_owned();
        self.read(move |db| boundaries::find(db, &tenant, &hashes)).await
    }

    /// The hash remembered for exactly this state of a weights file, blocking.
    pub fn weights_hash(&self, file: &WeightsFile) -> Result<Option<[u8; 32]>, StoreError> {
        let file = file.clone();
        self.read_blocking(move |db| weights::find(db, &file))
    }

    /// Remembers a weights file's hash, blocking.
    pub fn remember_weights(&self, file: &WeightsFile, hash: [u8; 32]) -> Result<(), StoreError> {
        let file = file.clone();
        self.write_blocking(move |db| weights::put(db, &file, &hash))
    }
}
