//! A session's own row: who it belongs to, how long its log is, who may write it, and where its KV path ends.

use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::StoreError;
use crate::checksum::RowChecksum;

/// One session. Times are milliseconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionRow {
    pub id: String,
    pub tenant: String,
    /// A label, unique within the tenant.
    pub name: Option<String>,
    /// Made by a chat request for itself; hidden from lists unless asked for.
    pub implicit: bool,
    pub created_ms: u64,
    pub last_active_ms: u64,
    /// When the sweeper may delete it.
    pub expires_ms: Option<u64>,
    /// Fencing number of the present (or last) lease.
    pub fence: u64,
    pub active_turn: Option<String>,
    /// Why the last turn failed, if it did.
    pub error: Option<String>,
    /// Durable tokens in the log.
    pub log_len: usize,
    /// Rows of these kinds that the session has; a row that is missing is damage, and seen.
    pub items: usize,
    pub turns: usize,
    pub events: u64,
    pub page_file: Option<i64>,
    /// The slot of the last page of the session's path; derived data, as is `kv_len`.
    pub leaf_slot: Option<u32>,
    pub kv_len: usize,
    /// What its turns have written; a count that commits keep, not a part of the session's truth.
    pub bytes_written: u64,
    /// Its last item is an answer that calls tools and waits for their results. Derived data, in rows that are to be shown.
    pub waits: bool,
}

/// Which sessions a list is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusFilter {
    Idle,
    InProgress,
    Failed,
    /// Of a tool's result.
    Waiting,
}

impl SessionRow {
    fn checksum(&self) -> u32 {
        RowChecksum::of("sessions")
            .text(&self.id)
            .text(&self.tenant)
            .optional(self.name.as_deref())
            .number(i64::from(self.implicit))
            .number(self.created_ms as i64)
            .number(self.last_active_ms as i64)
            .number(self.expires_ms.map_or(-1, |at| at as i64))
            .number(self.fence as i64)
            .optional(self.active_turn.as_deref())
            .optional(self.error.as_deref())
            .number(self.log_len as i64)
            .number(self.items as i64)
            .number(self.turns as i64)
            .number(self.events as i64)
            .finish()
    }

    pub(crate) fn check_fence(&self, fence: u64) -> Result<(), StoreError> {
        match self.fence == fence {
            true => Ok(()),
            false => Err(StoreError::LeaseLost { session: self.id.clone(), fence, found: self.fence }),
        }
    }

    /// The fence alone does not name a writer: a lease that never became durable is given anew, to another turn.
    pub(crate) fn check_writer(&self, fence: u64, turn: &str) -> Result<(), StoreError> {
        self.check_fence(fence)?;
        match self.active_turn.as_deref() == Some(turn) {
            true => Ok(()),
            false => Err(StoreError::LeaseLost { session: self.id.clone(), fence, found: self.fence }),
        }
    }

    pub(crate) fn check_idle(&self) -> Result<(), StoreError> {
        match &self.active_turn {
            None => Ok(()),
            Some(turn) => Err(StoreError::Busy { session: self.id.clone(), turn: turn.clone() }),
        }
    }
}

/// The message of the last item, which the session crate writes as JSON, has calls. Most have not, and are not parsed.
const WAITS: &str = "EXISTS (SELECT 1 FROM items WHERE items.session = sessions.id
    AND items.position = sessions.items - 1 AND CASE WHEN instr(items.message, '\"tool_calls\"') = 0 THEN 0
    WHEN json_valid(items.message) THEN json_type(items.message, '$.message.tool_calls') = 'array' ELSE 0 END)";

const COLUMNS: &str =
    "id, tenant, name, implicit, created_ms, last_active_ms, expires_ms, fence, active_turn, error,
    log_len, items, turns, events, page_file, leaf_slot, kv_len, checksum, bytes_written";

fn parse(row: &Row<'_>) -> Result<SessionRow, StoreError> {
    let session = SessionRow {
        id: row.get(0)?,
        tenant: row.get(1)?,
        name: row.get(2)?,
        implicit: row.get(3)?,
        created_ms: row.get(4)?,
        last_active_ms: row.get(5)?,
        expires_ms: row.get(6)?,
        fence: row.get(7)?,
        active_turn: row.get(8)?,
        error: row.get(9)?,
        log_len: row.get(10)?,
        items: row.get(11)?,
        turns: row.get(12)?,
        events: row.get(13)?,
        page_file: row.get(14)?,
        leaf_slot: row.get(15)?,
        kv_len: row.get(16)?,
        bytes_written: row.get(18)?,
        waits: row.get(19)?,
    };
    if session.checksum() != row.get::<_, u32>(17)? {
        return Err(StoreError::Damaged(format!("the row of session '{}' fails its checksum", session.id)));
    }
    Ok(session)
}

/// Rows for changes to work on: `waits` is not looked for.
fn select(
    db: &Connection,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<SessionRow>, StoreError> {
    query(db, "0", condition, values)
}

/// Rows to be shown. To find out what a session waits for takes reading its last item, which may be long.
fn look(
    db: &Connection,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<SessionRow>, StoreError> {
    query(db, WAITS, condition, values)
}

fn query(
    db: &Connection,
    waits: &str,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<SessionRow>, StoreError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT {COLUMNS}, {waits} FROM sessions WHERE {condition}"))?;
    let mut rows = statement.query(values)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(parse(row)?);
    }
    Ok(found)
}

pub(crate) fn load(db: &Connection, id: &str) -> Result<SessionRow, StoreError> {
    select(db, "id = ?1", &[&id])?.pop().ok_or_else(|| StoreError::SessionNotFound(id.to_owned()))
}

/// As [`load`], to be shown.
pub(crate) fn show(db: &Connection, id: &str) -> Result<SessionRow, StoreError> {
    look(db, "id = ?1", &[&id])?.pop().ok_or_else(|| StoreError::SessionNotFound(id.to_owned()))
}

/// By id, else by name, within one tenant.
pub(crate) fn find(db: &Connection, tenant: &str, id_or_name: &str) -> Result<SessionRow, StoreError> {
    look(db, "tenant = ?1 AND (id = ?2 OR name = ?2) ORDER BY id = ?2", &[&tenant, &id_or_name])?
        .pop()
        .ok_or_else(|| StoreError::SessionNotFound(id_or_name.to_owned()))
}

/// Newest first, after the session `after` if given.
pub(crate) fn list(
    db: &Connection,
    tenant: &str,
    after: Option<&str>,
    limit: usize,
    status: Option<StatusFilter>,
    implicit: bool,
) -> Result<Vec<SessionRow>, StoreError> {
    let status = match status {
        None => "1 = 1".to_owned(),
        Some(StatusFilter::Idle) => format!("active_turn IS NULL AND error IS NULL AND NOT {WAITS}"),
        Some(StatusFilter::InProgress) => "active_turn IS NOT NULL".to_owned(),
        Some(StatusFilter::Failed) => "active_turn IS NULL AND error IS NOT NULL".to_owned(),
        Some(StatusFilter::Waiting) => format!("active_turn IS NULL AND error IS NULL AND {WAITS}"),
    };
    let (created, id) = match after {
        Some(after) => {
            let row = find(db, tenant, after)?;
            (row.created_ms, row.id)
        }
        None => (i64::MAX as u64, String::new()),
    };
    let which = if implicit { "tenant = ?1" } else { "tenant = ?1 AND implicit = 0" };
    look(db, &format!("{which} AND {status} AND {NEWEST_FIRST}"), &[&tenant, &created, &id, &limit])
}

/// A page of a list.
const NEWEST_FIRST: &str = "(created_ms, id) < (?2, ?3) ORDER BY created_ms DESC, id DESC LIMIT ?4";

/// Sessions with a turn in progress: what a start after a crash goes on with.
pub(crate) fn interrupted(db: &Connection) -> Result<Vec<SessionRow>, StoreError> {
    select(db, "active_turn IS NOT NULL ORDER BY last_active_ms, id", &[])
}

/// Idle sessions whose time is up.
pub(crate) fn expired(db: &Connection, now_ms: u64, limit: usize) -> Result<Vec<SessionRow>, StoreError> {
    select(db, EXPIRED, &[&now_ms, &limit])
}

const EXPIRED: &str =
    "expires_ms IS NOT NULL AND expires_ms <= ?1 AND active_turn IS NULL ORDER BY expires_ms LIMIT ?2";

/// Every session, for a check of the whole database.
pub(crate) fn all(db: &Connection) -> Result<Vec<SessionRow>, StoreError> {
    select(db, "1 = 1 ORDER BY id", &[])
}

/// (in progress, failed, idle).
pub(crate) fn counts(db: &Connection) -> Result<(u64, u64, u64), StoreError> {
    Ok(db.query_row(
        "SELECT COUNT(*) FILTER (WHERE active_turn IS NOT NULL),
                COUNT(*) FILTER (WHERE active_turn IS NULL AND error IS NOT NULL),
                COUNT(*) FILTER (WHERE active_turn IS NULL AND error IS NULL) FROM sessions",
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?)
}

/// Inserts or replaces the session's row, but for the count of what an existing one has written. A name of another
/// session is `NameTaken`.
pub(crate) fn save(db: &Connection, session: &SessionRow) -> Result<(), StoreError> {
    let values = params![
        session.id,
        session.tenant,
        session.name,
        session.implicit,
        session.created_ms,
        session.last_active_ms,
        session.expires_ms,
        session.fence,
        session.active_turn,
        session.error,
        session.log_len,
        session.items,
        session.turns,
        session.events,
        session.page_file,
        session.leaf_slot,
        session.kv_len,
        session.checksum(),
        session.bytes_written,
    ];
    db.prepare_cached(&format!(
        "INSERT INTO sessions ({COLUMNS})
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)
         ON CONFLICT (id) DO UPDATE SET tenant = ?2, name = ?3, implicit = ?4, created_ms = ?5, last_active_ms = ?6,
             expires_ms = ?7, fence = ?8, active_turn = ?9, error = ?10, log_len = ?11, items = ?12, turns = ?13,
             events = ?14, page_file = ?15, leaf_slot = ?16, kv_len = ?17, checksum = ?18"
    ))?
    .execute(values)?;
    Ok(())
}

pub(crate) fn check_name(db: &Connection, tenant: &str, name: &str, own_id: &str) -> Result<(), StoreError> {
    let taken = select(db, "tenant = ?1 AND name = ?2 AND id <> ?3", &[&tenant, &name, &own_id])?;
    match taken.is_empty() {
        true => Ok(()),
        false => Err(StoreError::NameTaken(name.to_owned())),
    }
}

pub(crate) fn put_settings(db: &Connection, session: &str, settings: &str) -> Result<(), StoreError> {
    db.prepare_cached(
        "INSERT INTO settings (session, settings, checksum) VALUES (?1, ?2, ?3)
         ON CONFLICT (session) DO UPDATE SET settings = ?2, checksum = ?3",
    )?
    .execute(params![session, settings, settings_checksum(session, settings)])?;
    Ok(())
}

pub(crate) fn settings(db: &Connection, session: &str) -> Result<String, StoreError> {
    let found = db
        .prepare_cached("SELECT settings, checksum FROM settings WHERE session = ?1")?
        .query_row([session], |row| Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?)))
        .optional()?;
    match found {
        Some((settings, sum)) if sum == settings_checksum(session, &settings) => Ok(settings),
        _ => Err(StoreError::Damaged(format!(
            "the settings of session {session} are missing or fail their checksum"
        ))),
    }
}

fn settings_checksum(session: &str, settings: &str) -> u32 {
    RowChecksum::of("settings").text(session).text(settings).finish()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::schema;

    #[test]
    fn lists_and_sweeps_read_no_more_sessions_than_they_answer() {
        let mut db = Connection::open_in_memory().unwrap();
        schema::migrate(&mut db).unwrap();
        let list = format!("tenant = ?1 AND implicit = 0 AND {NEWEST_FIRST}");
        for (condition, values, index) in [(EXPIRED, 2, "session_ends"), (list.as_str(), 4, "session_times")]
        {
            let sql = format!("EXPLAIN QUERY PLAN SELECT {COLUMNS} FROM sessions WHERE {condition}");
            let mut statement = db.prepare(&sql).unwrap();
            let nothing = vec![0; values];
            let plan =
                statement.query_map(rusqlite::params_from_iter(nothing), |row| row.get::<_, String>(3));
            let plan: Vec<String> = plan.unwrap().map(|line| line.unwrap()).collect();
            assert_eq!(plan.len(), 1, "nothing is sorted: {plan:?}");
            assert!(plan[0].starts_with("SEARCH sessions USING") && plan[0].contains(index), "{plan:?}");
        }
    }
}
