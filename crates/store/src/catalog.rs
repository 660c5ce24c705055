//! The page catalog's queries: page files, their pages, and which sessions' paths end where.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, params};

use crate::pages::{ClaimRow, PageRow, RemovedPage, StepCommit};
use crate::{StoreError, sessions, tokens, written};

/// Positions of a sealed page (`dormouse_kernels::page::PAGE_TOKENS`): a leaf that goes takes at most these with it.
const PAGE_TOKENS: usize = 64;

/// Finds the page file of (path, fingerprint, tenant), or names it. A file that now belongs to another fingerprint
/// or tenant loses its rows: none of its pages can be used.
pub(crate) fn page_file(
    db: &Connection,
    path: &str,
    fingerprint: &[u8; 32],
    tenant: &str,
    layout: &str,
) -> Result<i64, StoreError> {
    let found = db
        .prepare_cached("SELECT id, fingerprint, tenant, layout FROM page_files WHERE path = ?1")?
        .query_row([path], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, Vec<u8>>(1)?,
                row.get::<_, String>(2)?,
                row.get::<_, String>(3)?,
            ))
        })
        .optional()?;
    let Some((id, old_fingerprint, old_tenant, old_layout)) = found else {
        db.execute(
            "INSERT INTO page_files (path, fingerprint, tenant, layout) VALUES (?1, ?2, ?3, ?4)",
            params![path, fingerprint, tenant, layout],
        )?;
        return Ok(db.last_insert_rowid());
    };
    if old_fingerprint != fingerprint || old_tenant != tenant || old_layout != layout {
        forget_pages(db, id)?;
        db.execute(
            "UPDATE page_files SET fingerprint = ?2, tenant = ?3, layout = ?4 WHERE id = ?1",
            params![id, fingerprint, tenant, layout],
        )?;
    }
    Ok(id)
}

/// Drops every page row and claim of a page file (it was set aside, or belongs to another model now).
pub(crate) fn forget_pages(db: &Connection, file: i64) -> Result<(), StoreError> {
    db.execute("DELETE FROM pages WHERE file = ?1", [file])?;
    db.execute("UPDATE sessions SET leaf_slot = NULL, kv_len = 0 WHERE page_file = ?1", [file])?;
    Ok(())
}

pub(crate) fn load_pages(db: &Connection, file: i64) -> Result<Vec<PageRow>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT slot, id, parent, tokens, checksum FROM pages WHERE file = ?1 ORDER BY slot",
    )?;
    let mut rows = statement.query([file])?;
    let mut pages = Vec::new();
    while let Some(row) = rows.next()? {
        pages.push(PageRow {
            slot: row.get(0)?,
            id: row.get(1)?,
            parent: row.get(2)?,
            tokens: tokens::decode(&row.get::<_, Vec<u8>>(3)?)?,
            checksum: row.get(4)?,
        });
    }
    Ok(pages)
}

pub(crate) fn claims(db: &Connection, file: i64) -> Result<Vec<ClaimRow>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT id, leaf_slot, CASE WHEN json_valid(settings) THEN settings ->> '$.pinned' END
         FROM sessions LEFT JOIN settings ON session = id
         WHERE page_file = ?1 AND leaf_slot IS NOT NULL ORDER BY last_active_ms, id",
    )?;
    let rows = statement.query_map([file], |row| {
        let pinned: Option<bool> = row.get(2)?;
        Ok(ClaimRow { session: row.get(0)?, leaf_slot: row.get(1)?, pinned: pinned == Some(true) })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Inserts or replaces `rows` and deletes `removed`, in that order of effect: a slot both removed and present in
/// `rows` holds the new row afterwards.
pub(crate) fn commit_pages(
    db: &Connection,
    file: i64,
    rows: &[PageRow],
    removed: &[RemovedPage],
) -> Result<(), StoreError> {
    remove(db, file, removed)?;
    let mut put = db.prepare_cached(
        "INSERT INTO pages (file, slot, id, parent, tokens, checksum) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (file, slot) DO UPDATE SET id = ?3, parent = ?4, tokens = ?5, checksum = ?6",
    )?;
    for row in rows {
        put.execute(params![file, row.slot, row.id, row.parent, tokens::encode(&row.tokens), row.checksum])?;
    }
    Ok(())
}

fn remove(db: &Connection, file: i64, removed: &[RemovedPage]) -> Result<(), StoreError> {
    if removed.is_empty() {
        return Ok(());
    }
    let parents: HashMap<u32, Option<u32>> =
        removed.iter().map(|page| (page.slot, page.parent_slot)).collect();
    let mut delete = db.prepare_cached("DELETE FROM pages WHERE file = ?1 AND slot = ?2")?;
    let mut sessions =
        db.prepare_cached("SELECT id, kv_len FROM sessions WHERE page_file = ?1 AND leaf_slot = ?2")?;
    let mut fall_back = db.prepare_cached("UPDATE sessions SET leaf_slot = ?2, kv_len = ?3 WHERE id = ?1")?;
    for page in removed {
        delete.execute(params![file, page.slot])?;
        // The nearest ancestor that stays, and how many pages of the path go with it (a list of removals is a
        // set of tree nodes, so the walk is at most as long as the list).
        let mut ancestor = page.parent_slot;
        let mut lost = 1;
        while let Some(next) = ancestor.and_then(|slot| parents.get(&slot)).filter(|_| lost < removed.len()) {
            ancestor = *next;
            lost += 1;
        }
        let claimants = sessions
            .query_map(params![file, page.slot], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, usize>(1)?))
            })?
            .collect::<Result<Vec<_>, _>>()?;
        for (session, kv_len) in claimants {
            let kept = kv_len.div_ceil(PAGE_TOKENS).saturating_sub(lost) * PAGE_TOKENS;
            let kept = if ancestor.is_some() { kept } else { 0 };
            fall_back.execute(params![session, ancestor, kept])?;
        }
    }
    Ok(())
}

/// One step of a turn: its tokens join the log, its pages the catalog, in one transaction.
pub(crate) fn commit_step(db: &Connection, step: &StepCommit) -> Result<(), StoreError> {
    let mut session = sessions::load(db, &step.session)?;
    session.check_writer(step.fence, &step.turn)?;
    if session.log_len != step.log_start {
        return Err(StoreError::WrongPosition {
            session: step.session.clone(),
            at: step.log_start,
            found: session.log_len,
        });
    }
    tokens::append(db, &step.session, session.log_len, &step.tokens)?;
    session.log_len += step.tokens.len();
    session.page_file = Some(step.page_file);
    session.leaf_slot = step.leaf_slot;
    session.kv_len = step.kv_len;
    // Before the removals, so that they see where this session's path ends now.
    sessions::save(db, &session)?;
    written::count(db, &step.session, step.day, step.bytes_written)?;
    commit_pages(db, step.page_file, &step.pages, &step.removed)
}
