//! Hashes of weights files, remembered by what the file system says of the file, so that a start does not read them.

use rusqlite::{Connection, OptionalExtension, params};

use crate::StoreError;

/// What tells one state of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightsFile {
    pub path: String,
    pub bytes: u64,
    pub modified_ns: i64,
    pub changed_ns: i64,
    pub inode: u64,
}

pub(crate) fn find(db: &Connection, file: &WeightsFile) -> Result<Option<[u8; 32]>, StoreError> {
    let found = db
        .prepare_cached(
            "SELECT hash FROM weights
             WHERE path = ?1 AND bytes = ?2 AND modified_ns = ?3 AND changed_ns = ?4 AND inode = ?5",
        )?
        .query_row(
            params![file.path, file.bytes, file.modified_ns, file.changed_ns, file.inode.cast_signed()],
            |row| row.get(0),
        )
        .optional()?;
    Ok(found)
}

pub(crate) fn put(db: &Connection, file: &WeightsFile, hash: &[u8; 32]) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO weights (path, bytes, modified_ns, changed_ns, inode, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (path) DO UPDATE SET bytes = ?2, modified_ns = ?3, changed_ns = ?4, inode = ?5, hash = ?6",
        params![file.path, file.bytes, file.modified_ns, file.changed_ns, file.inode.cast_signed(), hash],
    )?;
    Ok(())
}
