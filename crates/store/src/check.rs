//! The check of a whole database: SQLite's own structure, and every row that bears truth.

use rusqlite::Connection;

use crate::{StoreError, boundaries, history, keys, responses, schema, sessions, tokens};

/// `Damaged` with what was found first, if anything is wrong.
pub(crate) fn whole(db: &Connection) -> Result<(), StoreError> {
    structure(db)?;
    for session in sessions::all(db)? {
        sessions::settings(db, &session.id)?;
        tokens::load(db, &session.id, session.log_len)?;
        history::items(db, &session)?;
        history::turns(db, &session)?;
        history::check_events(db, &session)?;
    }
    boundaries::check(db)?;
    responses::check(db)?;
    keys::all(db).map(|_| ())
}

fn structure(db: &Connection) -> Result<(), StoreError> {
    let mut statement = db.prepare("PRAGMA integrity_check(3)")?;
    let lines = statement.query_map([], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    if lines != ["ok"] {
        return Err(StoreError::Damaged(lines.join("; ")));
    }
    let mut model = Connection::open_in_memory()?;
    schema::migrate(&mut model)?;
    match declared(db)? == declared(&model)? {
        true => Ok(()),
        false => Err(StoreError::Damaged("its tables are not declared as they should be".into())),
    }
}

fn declared(db: &Connection) -> Result<Vec<(String, String, Option<String>)>, StoreError> {
    let mut statement = db.prepare("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
