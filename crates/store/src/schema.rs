//! The tables, and how older databases become newer ones.

use rusqlite::{Connection, OptionalExtension};

use crate::StoreError;

/// Each entry takes a database from its index to its index + 1.
const MIGRATIONS: &[&str] = &[
    r"
CREATE TABLE page_files (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    fingerprint BLOB NOT NULL,
    tenant TEXT NOT NULL,
    layout TEXT NOT NULL
) STRICT;
CREATE TABLE pages (
    file INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    id BLOB NOT NULL,
    parent BLOB NOT NULL,
    tokens BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (file, slot)
) STRICT, WITHOUT ROWID;
CREATE TABLE sessions (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT,
    implicit INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    last_active_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    fence INTEGER NOT NULL,
    active_turn TEXT,
    error TEXT,
    log_len INTEGER NOT NULL,
    items INTEGER NOT NULL,
    turns INTEGER NOT NULL,
    events INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    page_file INTEGER,
    leaf_slot INTEGER,
    kv_len INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX session_names ON sessions (tenant, name) WHERE name IS NOT NULL;
CREATE INDEX session_leaves ON sessions (page_file, leaf_slot) WHERE leaf_slot IS NOT NULL;
CREATE TABLE settings (
    session TEXT NOT NULL PRIMARY KEY,
    settings TEXT NOT NULL,
    checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE session_tokens (
    session TEXT NOT NULL,
    start INTEGER NOT NULL,
    tokens BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (session, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE items (
    session TEXT NOT NULL,
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    turn TEXT,
    token_start INTEGER NOT NULL,
    token_end INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    message TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (session, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE turns (
    session TEXT NOT NULL,
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    output_start INTEGER,
    output_end INTEGER,
    created_ms INTEGER NOT NULL,
    record TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (session, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    session TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,
    turn TEXT,
    created_ms INTEGER NOT NULL,
    data TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (session, sequence)
) STRICT, WITHOUT ROWID;
CREATE TABLE boundaries (
    tenant TEXT NOT NULL,
    hash BLOB NOT NULL,
    session TEXT NOT NULL,
    position INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (tenant, hash, session)
) STRICT, WITHOUT ROWID;
CREATE INDEX boundary_sessions ON boundaries (session, position);
CREATE TABLE weights (
    path TEXT NOT NULL PRIMARY KEY,
    bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    changed_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT, WITHOUT ROWID;
",
    r"
CREATE TABLE responses (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL,
    session TEXT NOT NULL,
    turn TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    record TEXT NOT NULL,
    checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX response_sessions ON responses (session);
CREATE INDEX item_ids ON items (id);
",
    r"
CREATE TABLE api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    scopes TEXT NOT NULL,
    hash BLOB NOT NULL,
    requests_per_minute INTEGER,
    concurrency INTEGER,
    created_ms INTEGER NOT NULL,
    revoked_ms INTEGER,
    checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX api_key_names ON api_keys (name) WHERE revoked_ms IS NULL;
",
    r"
ALTER TABLE sessions ADD COLUMN bytes_written INTEGER NOT NULL DEFAULT 0;
",
    r"
CREATE INDEX session_times ON sessions (tenant, implicit, created_ms);
CREATE INDEX session_ends ON sessions (expires_ms) WHERE expires_ms IS NOT NULL;
",
];

/// Brings the database up to date; a new file gets every table.
pub(crate) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER NOT NULL PRIMARY KEY) STRICT;
         CREATE TABLE IF NOT EXISTS meta (name TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL) STRICT;",
    )?;
    let known = MIGRATIONS.len() as i64;
    let found: i64 =
        transaction.query_row("SELECT COALESCE(MAX(version), 0) FROM migrations", [], |row| row.get(0))?;
    if found > known {
        return Err(StoreError::NewerSchema { found, known });
    }
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(usize::try_from(found).unwrap_or(0)) {
        transaction.execute_batch(sql)?;
        transaction.execute("INSERT INTO migrations (version) VALUES (?1)", [step as i64 + 1])?;
    }
    transaction.commit()?;
    Ok(())
}

/// Number of write transactions that this database has seen.
pub(crate) fn sequence(connection: &Connection) -> Result<i64, StoreError> {
    let found = connection
        .prepare_cached("SELECT value FROM meta WHERE name = 'sequence'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(found.unwrap_or(0))
}

pub(crate) fn set_sequence(connection: &Connection, sequence: i64) -> Result<(), StoreError> {
    connection
        .prepare_cached("INSERT INTO meta (name, value) VALUES ('sequence', ?1) ON CONFLICT (name) DO UPDATE SET value = ?1")?
        .execute([sequence])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_of_any_earlier_version_becomes_the_newest() {
        for version in 0..MIGRATIONS.len() {
            let mut db = Connection::open_in_memory().unwrap();
            db.execute_batch("CREATE TABLE migrations (version INTEGER NOT NULL PRIMARY KEY) STRICT;")
                .unwrap();
            for (step, sql) in MIGRATIONS[..version].iter().enumerate() {
                db.execute_batch(sql).unwrap();
                db.execute("INSERT INTO migrations (version) VALUES (?1)", [step as i64 + 1]).unwrap();
            }
            migrate(&mut db).unwrap();
            db.query_row("SELECT COUNT(*) FROM responses", [], |_| Ok(())).unwrap();
            assert_eq!(sequence(&db).unwrap(), 0);
        }
    }
}
