//! The token log: chunks of at most [`CHUNK_TOKENS`] token ids, each with its checksum.

use rusqlite::{Connection, params};

use crate::StoreError;
use crate::checksum::RowChecksum;

/// 2 KiB a chunk: appending a step rewrites one database page, and a log of 100k tokens has 200 rows.
const CHUNK_TOKENS: usize = 512;

pub(crate) fn encode(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<u32>, StoreError> {
    let (tokens, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(StoreError::Damaged(format!("{} bytes are not a list of token ids", bytes.len())));
    }
    Ok(tokens.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
}

fn checksum(session: &str, start: usize, blob: &[u8]) -> u32 {
    RowChecksum::of("session_tokens").text(session).number(start as i64).bytes(blob).finish()
}

/// All chunks from the one that holds `from` on, checked: (start, tokens).
fn chunks(db: &Connection, session: &str, from: usize) -> Result<Vec<(usize, Vec<u32>)>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT start, tokens, checksum FROM session_tokens WHERE session = ?1 AND start >= COALESCE(
             (SELECT MAX(start) FROM session_tokens WHERE session = ?1 AND start <= ?2), 0) ORDER BY start",
    )?;
    let mut rows = statement.query(params![session, from])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let (start, blob, sum): (usize, Vec<u8>, u32) = (row.get(0)?, row.get(1)?, row.get(2)?);
        if checksum(session, start, &blob) != sum {
            return Err(StoreError::Damaged(format!(
                "tokens of session {session} at {start} fail their checksum"
            )));
        }
        found.push((start, decode(&blob)?));
    }
    Ok(found)
}

fn put(db: &Connection, session: &str, start: usize, tokens: &[u32]) -> Result<(), StoreError> {
    let blob = encode(tokens);
    db.prepare_cached(
        "INSERT INTO session_tokens (session, start, tokens, checksum) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (session, start) DO UPDATE SET tokens = ?3, checksum = ?4",
    )?
    .execute(params![session, start, blob, checksum(session, start, &blob)])?;
    Ok(())
}

/// Appends at `length`, the log's present length.
pub(crate) fn append(
    db: &Connection,
    session: &str,
    length: usize,
    tokens: &[u32],
) -> Result<(), StoreError> {
    if tokens.is_empty() {
        return Ok(());
    }
    let last = match length {
        0 => None,
        _ => chunks(db, session, length - 1)?.pop(),
    };
    if last.as_ref().map_or(0, |(start, chunk)| start + chunk.len()) != length {
        return Err(StoreError::Damaged(format!(
            "the token log of session {session} does not end at {length}"
        )));
    }
    let mut rest = tokens;
    let mut at = length;
    if let Some((start, mut chunk)) = last
        && chunk.len() < CHUNK_TOKENS
    {
        let (head, tail) = rest.split_at(rest.len().min(CHUNK_TOKENS - chunk.len()));
        chunk.extend_from_slice(head);
        put(db, session, start, &chunk)?;
        at += head.len();
        rest = tail;
    }
    for chunk in rest.chunks(CHUNK_TOKENS) {
        put(db, session, at, chunk)?;
        at += chunk.len();
    }
    Ok(())
}

/// Keeps the first `length` tokens.
pub(crate) fn truncate(db: &Connection, session: &str, length: usize) -> Result<(), StoreError> {
    if let Some((start, chunk)) = chunks(db, session, length)?.into_iter().next()
        && start < length
        && start + chunk.len() > length
    {
        put(db, session, start, &chunk[..length - start])?;
    }
    db.prepare_cached("DELETE FROM session_tokens WHERE session = ?1 AND start >= ?2")?
        .execute(params![session, length])?;
    Ok(())
}

/// The whole log; its length must be `length`, as the session's own row says.
pub(crate) fn load(db: &Connection, session: &str, length: usize) -> Result<Vec<u32>, StoreError> {
    let mut log = Vec::with_capacity(length);
    for (start, chunk) in chunks(db, session, 0)? {
        if start != log.len() {
            return Err(StoreError::Damaged(format!(
                "the token log of session {session} has a gap at {start}"
            )));
        }
        log.extend(chunk);
    }
    if log.len() != length {
        return Err(StoreError::Damaged(format!(
            "the token log of session {session} has {} of {length} tokens",
            log.len()
        )));
    }
    Ok(log)
}
