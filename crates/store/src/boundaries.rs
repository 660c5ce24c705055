//! Where known conversations end: hash of a message chain → session and position of its token log.

use rusqlite::{Connection, params};

use crate::StoreError;
use crate::checksum::RowChecksum;

/// A place in a session's log at which a chain of messages ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Index into the hashes that were asked for.
    pub index: usize,
    pub session: String,
    pub position: usize,
}

/// Sessions looked at for one hash: forks of one conversation share its boundaries.
const CANDIDATES: usize = 16;

fn checksum(tenant: &str, hash: &[u8], session: &str, position: usize) -> u32 {
    RowChecksum::of("boundaries").text(tenant).bytes(hash).text(session).number(position as i64).finish()
}

pub(crate) fn put(
    db: &Connection,
    tenant: &str,
    session: &str,
    boundaries: &[([u8; 32], usize)],
) -> Result<(), StoreError> {
    let mut insert = db.prepare_cached(
        "INSERT INTO boundaries (tenant, hash, session, position, checksum) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (tenant, hash, session) DO UPDATE SET position = ?4, checksum = ?5",
    )?;
    for (hash, position) in boundaries {
        insert.execute(params![
            tenant,
            hash,
            session,
            position,
            checksum(tenant, hash, session, *position)
        ])?;
    }
    Ok(())
}

/// The places known for the last of `hashes` that is known at all.
pub(crate) fn find(db: &Connection, tenant: &str, hashes: &[[u8; 32]]) -> Result<Vec<Boundary>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT session, position, checksum FROM boundaries WHERE tenant = ?1 AND hash = ?2 ORDER BY session LIMIT ?3",
    )?;
    for (index, hash) in hashes.iter().enumerate().rev() {
        let mut rows = statement.query(params![tenant, hash, CANDIDATES])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let (session, position): (String, usize) = (row.get(0)?, row.get(1)?);
            if checksum(tenant, hash, &session, position) != row.get::<_, u32>(2)? {
                return Err(StoreError::Damaged(format!(
                    "a boundary of session {session} fails its checksum"
                )));
            }
            found.push(Boundary { index, session, position });
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// Drops the boundaries beyond `position`.
pub(crate) fn truncate(db: &Connection, session: &str, position: usize) -> Result<(), StoreError> {
    db.prepare_cached("DELETE FROM boundaries WHERE session = ?1 AND position > ?2")?
        .execute(params![session, position])?;
    Ok(())
}

/// A fork knows the boundaries of its source up to the place where it parts.
pub(crate) fn inherit(
    db: &Connection,
    tenant: &str,
    from: &str,
    to: &str,
    position: usize,
) -> Result<(), StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT hash, position FROM boundaries WHERE session = ?1 AND tenant = ?2 AND position <= ?3
         ORDER BY position, hash",
    )?;
    let known = statement
        .query_map(params![from, tenant, position], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<Vec<([u8; 32], usize)>, _>>()?;
    put(db, tenant, to, &known)
}

/// Checks every boundary.
pub(crate) fn check(db: &Connection) -> Result<(), StoreError> {
    let mut statement = db.prepare("SELECT tenant, hash, session, position, checksum FROM boundaries")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (tenant, hash, session): (String, Vec<u8>, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        if checksum(&tenant, &hash, &session, row.get(3)?) != row.get::<_, u32>(4)? {
            return Err(StoreError::Damaged(format!("a boundary of session {session} fails its checksum")));
        }
    }
    Ok(())
}
