//! What a session remembers beside its tokens: items, turns and the event log. Positions count from 0 without gaps,
//! so a lost row is seen.

use rusqlite::{Connection, params};

use crate::checksum::RowChecksum;
use crate::sessions::SessionRow;
use crate::{StoreError, sessions};

/// One item (a message, as JSON) and the range of the token log that holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ItemRow {
    pub id: String,
    pub turn: Option<String>,
    pub token_start: usize,
    pub token_end: usize,
    pub created_ms: u64,
    /// JSON object.
    pub message: String,
}

/// One turn; its record (JSON) is the session crate's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TurnRow {
    pub id: String,
    /// Range of the token log that the turn generated. None once the log was tokenised anew; `output_end` is also
    /// None while the turn runs.
    pub output_start: Option<usize>,
    pub output_end: Option<usize>,
    pub created_ms: u64,
    pub record: String,
}

/// One line of a session's append-only log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    pub sequence: u64,
    pub kind: String,
    pub turn: Option<String>,
    pub created_ms: u64,
    /// JSON.
    pub data: String,
}

/// An event that has no sequence number yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewEvent {
    pub kind: String,
    pub turn: Option<String>,
    /// JSON.
    pub data: String,
}

impl ItemRow {
    fn checksum(&self, session: &str, position: usize) -> u32 {
        RowChecksum::of("items")
            .text(session)
            .number(position as i64)
            .text(&self.id)
            .optional(self.turn.as_deref())
            .number(self.token_start as i64)
            .number(self.token_end as i64)
            .number(self.created_ms as i64)
            .text(&self.message)
            .finish()
    }
}

impl TurnRow {
    fn checksum(&self, session: &str, position: usize) -> u32 {
        RowChecksum::of("turns")
            .text(session)
            .number(position as i64)
            .text(&self.id)
            .number(self.output_start.map_or(-1, |at| at as i64))
            .number(self.output_end.map_or(-1, |at| at as i64))
            .number(self.created_ms as i64)
            .text(&self.record)
            .finish()
    }
}

impl EventRow {
    fn checksum(&self, session: &str) -> u32 {
        RowChecksum::of("events")
            .text(session)
            .number(self.sequence as i64)
            .text(&self.kind)
            .optional(self.turn.as_deref())
            .number(self.created_ms as i64)
            .text(&self.data)
            .finish()
    }
}

fn missing(what: &str, session: &SessionRow, found: usize, expected: usize) -> StoreError {
    StoreError::Damaged(format!("session {} has {found} of {expected} {what}", session.id))
}

fn broken(what: &str, session: &SessionRow, position: usize) -> StoreError {
    StoreError::Damaged(format!("row {position} of the {what} of session {} fails its checksum", session.id))
}

/// All items in order.
pub(crate) fn items(db: &Connection, session: &SessionRow) -> Result<Vec<ItemRow>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT position, id, turn, token_start, token_end, created_ms, message, checksum FROM items
         WHERE session = ?1 ORDER BY position",
    )?;
    let mut rows = statement.query([&session.id])?;
    let mut found = Vec::with_capacity(session.items.min(1 << 16));
    while let Some(row) = rows.next()? {
        let item = ItemRow {
            id: row.get(1)?,
            turn: row.get(2)?,
            token_start: row.get(3)?,
            token_end: row.get(4)?,
            created_ms: row.get(5)?,
            message: row.get(6)?,
        };
        let position = found.len();
        if row.get::<_, usize>(0)? != position
            || item.checksum(&session.id, position) != row.get::<_, u32>(7)?
        {
            return Err(broken("items", session, position));
        }
        found.push(item);
    }
    match found.len() == session.items {
        true => Ok(found),
        false => Err(missing("items", session, found.len(), session.items)),
    }
}

/// Replaces the items from `position` on; `session.items` follows, the caller saves it.
pub(crate) fn put_items(
    db: &Connection,
    session: &mut SessionRow,
    position: usize,
    items: &[ItemRow],
) -> Result<(), StoreError> {
    if position > session.items {
        return Err(missing("items", session, session.items, position));
    }
    db.prepare_cached("DELETE FROM items WHERE session = ?1 AND position >= ?2")?
        .execute(params![session.id, position])?;
    let mut insert = db.prepare_cached(
        "INSERT INTO items (session, position, id, turn, token_start, token_end, created_ms, message, checksum)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?;
    for (index, item) in items.iter().enumerate() {
        let position = position + index;
        insert.execute(params![
            session.id,
            position,
            item.id,
            item.turn,
            item.token_start,
            item.token_end,
            item.created_ms,
            item.message,
            item.checksum(&session.id, position),
        ])?;
    }
    session.items = position + items.len();
    Ok(())
}

/// All turns in order.
pub(crate) fn turns(db: &Connection, session: &SessionRow) -> Result<Vec<TurnRow>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT position, id, output_start, output_end, created_ms, record, checksum FROM turns
         WHERE session = ?1 ORDER BY position",
    )?;
    let mut rows = statement.query([&session.id])?;
    let mut found = Vec::with_capacity(session.turns.min(1 << 16));
    while let Some(row) = rows.next()? {
        let turn = TurnRow {
            id: row.get(1)?,
            output_start: row.get(2)?,
            output_end: row.get(3)?,
            created_ms: row.get(4)?,
            record: row.get(5)?,
        };
        let position = found.len();
        if row.get::<_, usize>(0)? != position
            || turn.checksum(&session.id, position) != row.get::<_, u32>(6)?
        {
            return Err(broken("turns", session, position));
        }
        found.push(turn);
    }
    match found.len() == session.turns {
        true => Ok(found),
        false => Err(missing("turns", session, found.len(), session.turns)),
    }
}

/// Inserts or replaces the turn at `position`; `session.turns` follows, the caller saves it.
pub(crate) fn put_turn(
    db: &Connection,
    session: &mut SessionRow,
    position: usize,
    turn: &TurnRow,
) -> Result<(), StoreError> {
    if position > session.turns {
        return Err(missing("turns", session, session.turns, position));
    }
    db.prepare_cached(
        "INSERT INTO turns (session, position, id, output_start, output_end, created_ms, record, checksum)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT (session, position) DO UPDATE SET id = ?3, output_start = ?4, output_end = ?5, created_ms = ?6,
             record = ?7, checksum = ?8",
    )?
    .execute(params![
        session.id,
        position,
        turn.id,
        turn.output_start,
        turn.output_end,
        turn.created_ms,
        turn.record,
        turn.checksum(&session.id, position),
    ])?;
    session.turns = session.turns.max(position + 1);
    Ok(())
}

/// Keeps the first `count` turns; the caller saves the session.
pub(crate) fn truncate_turns(
    db: &Connection,
    session: &mut SessionRow,
    count: usize,
) -> Result<(), StoreError> {
    db.prepare_cached("DELETE FROM turns WHERE session = ?1 AND position >= ?2")?
        .execute(params![session.id, count])?;
    session.turns = session.turns.min(count);
    Ok(())
}

/// Events from `sequence` on, at most `limit`.
pub(crate) fn events(
    db: &Connection,
    session: &SessionRow,
    sequence: u64,
    limit: usize,
) -> Result<Vec<EventRow>, StoreError> {
    // The database's integers are signed, and no log is as long.
    let sequence = sequence.min(i64::MAX as u64);
    let mut statement = db.prepare_cached(
        "SELECT sequence, kind, turn, created_ms, data, checksum FROM events
         WHERE session = ?1 AND sequence >= ?2 ORDER BY sequence LIMIT ?3",
    )?;
    let mut rows = statement.query(params![session.id, sequence, limit])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let event = EventRow {
            sequence: row.get(0)?,
            kind: row.get(1)?,
            turn: row.get(2)?,
            created_ms: row.get(3)?,
            data: row.get(4)?,
        };
        let expected = sequence + found.len() as u64;
        if event.sequence != expected || event.checksum(&session.id) != row.get::<_, u32>(5)? {
            return Err(broken("events", session, expected as usize));
        }
        found.push(event);
    }
    let expected = session.events.saturating_sub(sequence).min(limit as u64) as usize;
    match found.len() == expected {
        true => Ok(found),
        false => Err(missing("events", session, found.len(), expected)),
    }
}

/// Reads every event in bounded memory.
pub(crate) fn check_events(db: &Connection, session: &SessionRow) -> Result<(), StoreError> {
    let mut sequence = 0;
    while sequence < session.events {
        sequence += events(db, session, sequence, 256)?.len() as u64;
    }
    events(db, session, sequence, 1).map(|_| ())
}

/// Appends to the event log; `session.events` follows, the caller saves it.
pub(crate) fn add_events(
    db: &Connection,
    session: &mut SessionRow,
    events: &[NewEvent],
    now_ms: u64,
) -> Result<(), StoreError> {
    let mut insert = db.prepare_cached(
        "INSERT INTO events (session, sequence, kind, turn, created_ms, data, checksum)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    for event in events {
        let row = EventRow {
            sequence: session.events,
            kind: event.kind.clone(),
            turn: event.turn.clone(),
            created_ms: now_ms,
            data: event.data.clone(),
        };
        insert.execute(params![
            session.id,
            row.sequence,
            row.kind,
            row.turn,
            row.created_ms,
            row.data,
            row.checksum(&session.id),
        ])?;
        session.events += 1;
    }
    Ok(())
}

/// Items and turns of one session with its row, read together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub session: SessionRow,
    pub settings: String,
    pub items: Vec<ItemRow>,
    pub turns: Vec<TurnRow>,
}

pub(crate) fn load(db: &Connection, id: &str) -> Result<History, StoreError> {
    let session = sessions::load(db, id)?;
    Ok(History {
        settings: sessions::settings(db, id)?,
        items: items(db, &session)?,
        turns: turns(db, &session)?,
        session,
    })
}
