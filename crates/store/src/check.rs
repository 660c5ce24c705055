//! The check of a whole database: SQLite's own structure, and every row that bears truth.

use std::path::PathBuf;
use std::thread::JoinHandle;

use rusqlite::Connection;

use crate::{StoreError, boundaries, files, history, keys, responses, schema, sessions, tokens};

/// `Damaged` with what was found first, if anything is wrong.
pub(crate) fn whole(db: &Connection) -> Result<(), StoreError> {
    structure(db)?;
    for session in sessions::all(db)? {
        // Of one moment each: others may write meanwhile, and must not wait for all of it to fold their changes in.
        let moment = db.unchecked_transaction()?;
        let session = match sessions::load(&moment, &session.id) {
            Err(StoreError::SessionNotFound(_)) => continue,
            found => found?,
        };
        sessions::settings(&moment, &session.id)?;
        tokens::load(&moment, &session.id, session.log_len)?;
        history::items(&moment, &session)?;
        history::turns(&moment, &session)?;
        history::check_events(&moment, &session)?;
    }
    boundaries::check(db)?;
    responses::check(db)?;
    keys::all(db).map(|_| ())
}

/// Checks the files at `paths` on a thread of its own, beside the work on them, and calls `mend` if one is damaged.
pub(crate) fn beside(
    paths: [PathBuf; 2],
    mend: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("dormouse-check".into()).spawn(move || {
        // Whoever is answered meanwhile comes first. On Linux niceness belongs to a thread; elsewhere it would slow all of the
        // process down.
        #[cfg(target_os = "linux")]
        if let Err(error) = rustix::process::nice(19) {
            tracing::debug!(%error, "the check of the database takes as much time as others");
        }
        let damaged = paths.iter().any(|path| match files::open_beside(path).and_then(|db| whole(&db)) {
            Err(why) if why.is_damage() => true,
            Err(why) => {
                tracing::warn!(path = %path.display(), "the metadata database could not be checked: {why}");
                false
            }
            Ok(()) => false,
        });
        if damaged {
            mend();
        }
    })
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
