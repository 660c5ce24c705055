//! What happens to a session, each as one transaction: it is created, a turn begins and ends, it is forked,
//! rewound, changed, deleted.

use rusqlite::{Connection, params};

use crate::history::{self, History, ItemRow, NewEvent, TurnRow};
use crate::responses::{self, ResponseRow};
use crate::sessions::{self, SessionRow};
use crate::{StoreError, boundaries, tokens};

/// A new session without tokens.
#[derive(Clone, Debug, Default)]
pub struct NewSession {
    pub id: String,
    pub tenant: String,
    pub name: Option<String>,
    pub implicit: bool,
    pub expires_ms: Option<u64>,
    /// JSON, the session crate's.
    pub settings: String,
    pub events: Vec<NewEvent>,
    pub now_ms: u64,
}

impl NewSession {
    /// What a turn is planned on that the session is to be created with.
    pub fn history(&self) -> History {
        History { session: self.row(), settings: self.settings.clone(), ..History::default() }
    }

    fn row(&self) -> SessionRow {
        SessionRow {
            id: self.id.clone(),
            tenant: self.tenant.clone(),
            name: self.name.clone(),
            implicit: self.implicit,
            created_ms: self.now_ms,
            last_active_ms: self.now_ms,
            expires_ms: self.expires_ms,
            ..SessionRow::default()
        }
    }
}

/// Items added to an idle session, or taken out of it, by hand. The log keeps its first `keep_tokens`; the items from
/// `keep_items` on are replaced by `items`, and get their tokens with the next turn.
#[derive(Clone, Debug, Default)]
pub struct EditItems {
    pub session: String,
    /// The session's fence when the caller read its history.
    pub fence: u64,
    pub keep_tokens: usize,
    pub keep_items: usize,
    pub items: Vec<ItemRow>,
    pub events: Vec<NewEvent>,
    pub now_ms: u64,
}

/// Where a session's KV path ends, as the engine has claimed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    pub page_file: Option<i64>,
    pub slot: Option<u32>,
    pub kv_len: usize,
}

/// The input of a turn. The log keeps its first `keep_tokens`, then gets `tokens`; the items from `keep_items` on are
/// replaced by `items`. Turns whose output does not stay lose their token ranges.
#[derive(Clone, Debug, Default)]
pub struct BeginTurn {
    pub session: String,
    /// The session is created with this, its first turn.
    pub new: Option<NewSession>,
    pub turn: String,
    /// The session's fence when the caller read its history: the turn was planned on that, and is refused with
    /// `LeaseLost` when another writer has been there since.
    pub fence: u64,
    pub keep_tokens: usize,
    pub tokens: Vec<u32>,
    pub keep_items: usize,
    pub items: Vec<ItemRow>,
    /// The log was tokenised anew from the start: earlier turns lose their token ranges.
    pub retokenized: bool,
    pub record: String,
    /// New settings of the session, if they change with the turn.
    pub settings: Option<String>,
    /// The response that the turn is, if it came through that door.
    pub response: Option<ResponseRow>,
    pub events: Vec<NewEvent>,
    pub now_ms: u64,
}

/// The end of a turn.
#[derive(Clone, Debug, Default)]
pub struct FinishTurn {
    pub session: String,
    pub turn: String,
    pub fence: u64,
    pub record: String,
    /// The answer.
    pub item: Option<ItemRow>,
    /// Hash of the conversation up to a position → that position.
    pub boundaries: Vec<([u8; 32], usize)>,
    /// Why the turn failed, if it did.
    pub error: Option<String>,
    pub expires_ms: Option<u64>,
    pub events: Vec<NewEvent>,
    pub now_ms: u64,
    /// The session goes with its turn; nothing of the above is kept.
    pub deletes: bool,
}

/// A place in a session's history: its first tokens, items and turns.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    pub tokens: usize,
    pub items: usize,
    /// What remains of the item that the cut goes through.
    pub partial_item: Option<ItemRow>,
    pub turns: usize,
}

pub(crate) fn create(db: &Connection, new: &NewSession) -> Result<SessionRow, StoreError> {
    if let Some(name) = &new.name {
        sessions::check_name(db, &new.tenant, name, &new.id)?;
    }
    let mut session = new.row();
    history::add_events(db, &mut session, &new.events, new.now_ms)?;
    sessions::put_settings(db, &session.id, &new.settings)?;
    sessions::save(db, &session)?;
    Ok(session)
}

/// Takes the session's lease for a turn, and makes its input durable. Answers the row with the new fence; `leased` hears it
/// before anything else is done.
pub(crate) fn begin_turn(
    db: &Connection,
    turn: &BeginTurn,
    leased: impl FnOnce(&SessionRow),
) -> Result<SessionRow, StoreError> {
    let mut session = match &turn.new {
        Some(new) => create(db, new)?,
        None => sessions::load(db, &turn.session)?,
    };
    session.check_idle()?;
    session.check_fence(turn.fence)?;
    if turn.keep_tokens > session.log_len {
        return Err(StoreError::WrongPosition {
            session: session.id,
            at: turn.keep_tokens,
            found: session.log_len,
        });
    }
    session.fence += 1;
    session.active_turn = Some(turn.turn.clone());
    leased(&session);
    let replaces = turn.keep_tokens < session.log_len;
    if replaces {
        tokens::truncate(db, &session.id, turn.keep_tokens)?;
        boundaries::truncate(db, &session.id, turn.keep_tokens)?;
    }
    tokens::append(db, &session.id, turn.keep_tokens, &turn.tokens)?;
    session.log_len = turn.keep_tokens + turn.tokens.len();
    session.kv_len = session.kv_len.min(turn.keep_tokens);
    if turn.retokenized {
        forget_outputs(db, &mut session, 0)?;
    } else if replaces {
        forget_outputs(db, &mut session, turn.keep_tokens)?;
    }
    history::put_items(db, &mut session, turn.keep_items, &turn.items)?;
    let row = TurnRow {
        id: turn.turn.clone(),
        output_start: Some(session.log_len),
        output_end: None,
        created_ms: turn.now_ms,
        record: turn.record.clone(),
    };
    let position = session.turns;
    history::put_turn(db, &mut session, position, &row)?;
    history::add_events(db, &mut session, &turn.events, turn.now_ms)?;
    if let Some(settings) = &turn.settings {
        sessions::put_settings(db, &session.id, settings)?;
    }
    if let Some(response) = &turn.response {
        responses::put(db, response)?;
    }
    session.error = None;
    session.last_active_ms = turn.now_ms;
    sessions::save(db, &session)?;
    Ok(session)
}

/// Takes the ranges of the turns whose output does not lie within the first `keep_tokens`.
fn forget_outputs(db: &Connection, session: &mut SessionRow, keep_tokens: usize) -> Result<(), StoreError> {
    for (position, mut turn) in history::turns(db, session)?.into_iter().enumerate() {
        if turn.output_end.is_some_and(|end| end > keep_tokens) {
            (turn.output_start, turn.output_end) = (None, None);
            history::put_turn(db, session, position, &turn)?;
        }
    }
    Ok(())
}

/// Gives a session whose turn was interrupted a new writer. Answers the row with the new fence.
pub(crate) fn take_over(db: &Connection, id: &str) -> Result<SessionRow, StoreError> {
    let mut session = sessions::load(db, id)?;
    session.fence += 1;
    sessions::save(db, &session)?;
    Ok(session)
}

/// Ends the active turn and gives its lease back.
pub(crate) fn finish_turn(db: &Connection, turn: &FinishTurn) -> Result<SessionRow, StoreError> {
    let mut session = sessions::load(db, &turn.session)?;
    session.check_writer(turn.fence, &turn.turn)?;
    if turn.deletes {
        session.active_turn = None;
        remove(db, &session.id)?;
        return Ok(session);
    }
    let Some((position, mut row)) =
        history::turns(db, &session)?.into_iter().enumerate().rev().find(|(_, row)| row.id == turn.turn)
    else {
        return Err(StoreError::Damaged(format!("turn {} of session {} is missing", turn.turn, session.id)));
    };
    row.output_end = Some(session.log_len);
    row.record.clone_from(&turn.record);
    history::put_turn(db, &mut session, position, &row)?;
    if let Some(item) = &turn.item {
        let position = session.items;
        history::put_items(db, &mut session, position, std::slice::from_ref(item))?;
    }
    boundaries::put(db, &session.tenant, &session.id, &turn.boundaries)?;
    history::add_events(db, &mut session, &turn.events, turn.now_ms)?;
    session.active_turn = None;
    session.error.clone_from(&turn.error);
    session.expires_ms = turn.expires_ms;
    session.last_active_ms = turn.now_ms;
    sessions::save(db, &session)?;
    Ok(session)
}

/// A new session with the history of `source` up to `cut`, which was found when the source had this `fence`.
pub(crate) fn fork(
    db: &Connection,
    source: &str,
    fence: u64,
    cut: &Cut,
    new: &NewSession,
    leaf: Leaf,
) -> Result<SessionRow, StoreError> {
    let source = sessions::load(db, source)?;
    source.check_fence(fence)?;
    let mut log = tokens::load(db, &source.id, source.log_len)?;
    let (mut items, mut turns) = (history::items(db, &source)?, history::turns(db, &source)?);
    if cut.tokens > log.len() || cut.items > items.len() || cut.turns > turns.len() {
        return Err(StoreError::WrongPosition { session: source.id, at: cut.tokens, found: log.len() });
    }
    log.truncate(cut.tokens);
    items.truncate(cut.items);
    items.extend(cut.partial_item.clone());
    turns.truncate(cut.turns);
    let mut session = create(db, new)?;
    tokens::append(db, &session.id, 0, &log)?;
    session.log_len = log.len();
    history::put_items(db, &mut session, 0, &items)?;
    for (position, turn) in turns.iter().enumerate() {
        history::put_turn(db, &mut session, position, turn)?;
    }
    boundaries::inherit(db, &session.tenant, &source.id, &session.id, cut.tokens)?;
    set_leaf(&mut session, leaf);
    sessions::save(db, &session)?;
    sessions::show(db, &session.id)
}

/// Errors: `Busy`; `LeaseLost` when another writer has been there since.
pub(crate) fn edit_items(db: &Connection, edit: &EditItems) -> Result<SessionRow, StoreError> {
    let mut session = sessions::load(db, &edit.session)?;
    session.check_idle()?;
    session.check_fence(edit.fence)?;
    if edit.keep_tokens > session.log_len {
        return Err(StoreError::WrongPosition {
            session: session.id,
            at: edit.keep_tokens,
            found: session.log_len,
        });
    }
    if edit.keep_tokens < session.log_len {
        tokens::truncate(db, &session.id, edit.keep_tokens)?;
        boundaries::truncate(db, &session.id, edit.keep_tokens)?;
        session.log_len = edit.keep_tokens;
        session.kv_len = session.kv_len.min(edit.keep_tokens);
        forget_outputs(db, &mut session, edit.keep_tokens)?;
    }
    history::put_items(db, &mut session, edit.keep_items, &edit.items)?;
    history::add_events(db, &mut session, &edit.events, edit.now_ms)?;
    // Whoever planned a turn on the history as it was must read it again.
    session.fence += 1;
    session.last_active_ms = edit.now_ms;
    sessions::save(db, &session)?;
    sessions::show(db, &session.id)
}

/// Drops what a session's history has beyond `cut`, which was found at this `fence`; its events stay, and say so.
pub(crate) fn rewind(
    db: &Connection,
    id: &str,
    fence: u64,
    cut: &Cut,
    leaf: Leaf,
    events: &[NewEvent],
    now_ms: u64,
) -> Result<SessionRow, StoreError> {
    let mut session = sessions::load(db, id)?;
    session.check_idle()?;
    session.check_fence(fence)?;
    if cut.tokens > session.log_len {
        return Err(StoreError::WrongPosition {
            session: session.id,
            at: cut.tokens,
            found: session.log_len,
        });
    }
    tokens::truncate(db, id, cut.tokens)?;
    session.log_len = cut.tokens;
    let partial: Vec<ItemRow> = cut.partial_item.iter().cloned().collect();
    history::put_items(db, &mut session, cut.items, &partial)?;
    history::truncate_turns(db, &mut session, cut.turns)?;
    responses::forget_lost_turns(db, id)?;
    boundaries::truncate(db, id, cut.tokens)?;
    history::add_events(db, &mut session, events, now_ms)?;
    set_leaf(&mut session, leaf);
    // Whoever planned a turn on the longer history must read it again.
    session.fence += 1;
    session.error = None;
    session.last_active_ms = now_ms;
    sessions::save(db, &session)?;
    sessions::show(db, &session.id)
}

fn set_leaf(session: &mut SessionRow, leaf: Leaf) {
    session.page_file = leaf.page_file.or(session.page_file);
    session.leaf_slot = leaf.slot;
    session.kv_len = leaf.kv_len.min(session.log_len);
}

/// A change to a session's labels and settings. Absent fields stay.
#[derive(Clone, Debug, Default)]
pub struct UpdateSession {
    pub name: Option<Option<String>>,
    pub settings: Option<String>,
    pub expires_ms: Option<Option<u64>>,
    pub implicit: Option<bool>,
    pub events: Vec<NewEvent>,
    pub now_ms: u64,
}

pub(crate) fn update(db: &Connection, id: &str, change: &UpdateSession) -> Result<SessionRow, StoreError> {
    let mut session = sessions::show(db, id)?;
    if let Some(name) = &change.name {
        if let Some(name) = name {
            sessions::check_name(db, &session.tenant, name, id)?;
        }
        session.name.clone_from(name);
    }
    if let Some(settings) = &change.settings {
        sessions::put_settings(db, id, settings)?;
    }
    session.expires_ms = change.expires_ms.unwrap_or(session.expires_ms);
    session.implicit = change.implicit.unwrap_or(session.implicit);
    history::add_events(db, &mut session, &change.events, change.now_ms)?;
    sessions::save(db, &session)?;
    Ok(session)
}

/// Deletes an idle session and all it has. Answers its last row.
pub(crate) fn delete(db: &Connection, id: &str) -> Result<SessionRow, StoreError> {
    let session = sessions::load(db, id)?;
    session.check_idle()?;
    remove(db, id)?;
    Ok(session)
}

fn remove(db: &Connection, id: &str) -> Result<(), StoreError> {
    for table in ["session_tokens", "items", "turns", "events", "boundaries", "settings", "responses"] {
        db.prepare_cached(&format!("DELETE FROM {table} WHERE session = ?1"))?.execute([id])?;
    }
    db.prepare_cached("DELETE FROM sessions WHERE id = ?1")?.execute(params![id])?;
    Ok(())
}
