//! What can go wrong with the metadata database.

use std::path::PathBuf;

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process owns the data directory.
    #[error(
        "the data directory {} is in use by process {pid}{}: stop it, or choose another --data-dir",
        .directory.display(),
        .address.as_ref().map(|at| format!(" (serving {at})")).unwrap_or_default()
    )]
    Locked { directory: PathBuf, pid: u32, address: Option<String> },
    #[error("no room to write the metadata database: free some disk space and try again ({0})")]
    Full(String),
    /// Neither the database nor its mirror holds an intact copy of what was asked for.
    #[error(
        "the metadata database is damaged: {0}; its mirror could not mend it, so restore both files from a backup"
    )]
    Damaged(String),
    #[error(
        "the metadata database was written by a newer Dormouse (schema {found}, this one knows {known}): upgrade"
    )]
    NewerSchema { found: i64, known: i64 },
    #[error("no session '{0}'")]
    SessionNotFound(String),
    #[error("session '{session}' is busy with turn '{turn}'")]
    Busy { session: String, turn: String },
    #[error("the name '{0}' belongs to another session")]
    NameTaken(String),
    #[error("no API key '{0}'")]
    KeyNotFound(String),
    #[error("the name '{0}' belongs to another API key: choose another, or revoke that key first")]
    KeyNameTaken(String),
    /// The writer's fencing number is not the session's any more.
    #[error("another writer took session '{session}' (fence {found}, this writer has {fence})")]
    LeaseLost { session: String, fence: u64, found: u64 },
    /// The caller's idea of the token log's length is not the log's.
    #[error("session '{session}' has {found} durable tokens, a write at {at} was refused")]
    WrongPosition { session: String, at: usize, found: usize },
    #[error("the metadata database is closed")]
    Closed,
    #[error("the metadata database met a bug at this request and changed nothing; the log says more")]
    Panicked,
    #[error("the metadata database failed: {0}")]
    Database(String),
    #[error("{what} {}: {why}", .path.display())]
    File { what: &'static str, path: PathBuf, why: String },
}

impl StoreError {
    /// The database's content cannot be trusted: the mirror is asked instead.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, StoreError::Damaged(_))
    }

    /// One session's step was refused before it changed anything; the others of its transaction go on.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            StoreError::LeaseLost { .. } | StoreError::WrongPosition { .. } | StoreError::SessionNotFound(_)
        )
    }

    pub(crate) fn file(what: &'static str, path: &std::path::Path, why: std::io::Error) -> StoreError {
        if why.kind() == std::io::ErrorKind::StorageFull {
            return StoreError::Full(format!("{what} {}", path.display()));
        }
        StoreError::File { what, path: path.to_owned(), why: why.to_string() }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        use rusqlite::{Error, ErrorCode};
        let text = error.to_string();
        match &error {
            Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DiskFull => StoreError::Full(text),
                ErrorCode::SystemIoFailure
                    if failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE =>
                {
                    StoreError::Full(text)
                }
                ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => StoreError::Damaged(text),
                // Only a damaged schema names tables or columns that are not there.
                ErrorCode::Unknown if text.contains("no such") || text.contains("malformed") => {
                    StoreError::Damaged(text)
                }
                _ => StoreError::Database(text),
            },
            Error::InvalidColumnType(..)
            | Error::IntegralValueOutOfRange(..)
            | Error::FromSqlConversionFailure(..)
            | Error::Utf8Error(..)
            | Error::SqlInputError { .. } => StoreError::Damaged(text),
            _ => StoreError::Database(text),
        }
    }
}
