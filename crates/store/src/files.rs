//! The files of a data directory's database: opening, setting aside, copying.

use std::fs::File;
use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::store::Durability;
use crate::{StoreError, schema};

pub(crate) const PRIMARY: &str = "dormouse.db";
pub(crate) const MIRROR: &str = "dormouse-mirror.db";

/// SQLite keeps a database in up to three files.
const SUFFIXES: [&str; 3] = ["", "-wal", "-shm"];

/// Opens a database file, creates or migrates its tables. A database that cannot be trusted is `Damaged`.
pub(crate) fn open(path: &Path, wait_for_disk: bool) -> Result<Connection, StoreError> {
    let mut connection = Connection::open(path)?;
    connection.set_prepared_statement_cache_capacity(128);
    // Without it SQLite plans a statement anew for every other value that is bound to it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // 4 MiB of page cache a file. A damaged cell is reported where it is read rather than used.
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA cell_size_check = ON; PRAGMA foreign_keys = OFF; PRAGMA cache_size = -4096;
         PRAGMA journal_size_limit = 16777216; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF;",
    )?;
    connection.execute_batch(match wait_for_disk {
        true => "PRAGMA synchronous = FULL; PRAGMA fullfsync = ON;",
        false => "PRAGMA synchronous = NORMAL;",
    })?;
    schema::migrate(&mut connection)?;
    Ok(connection)
}

/// Opens a database that another connection works on, to look at one moment of it.
pub(crate) fn open_beside(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.execute_batch("PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF;")?;
    Ok(connection)
}

pub(crate) fn waits_for_disk(durability: Durability) -> bool {
    durability == Durability::Power
}

/// Renames a database's files to the first free `NAME.damaged-N`, so that nothing is ever deleted. Answers the name.
pub(crate) fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let aside = (1..)
        .map(|number| with_suffix(path, &format!(".damaged-{number}")))
        .find(|aside| !SUFFIXES.iter().any(|suffix| with_suffix(aside, suffix).exists()))
        .unwrap_or_else(|| with_suffix(path, ".damaged"));
    rename(path, &aside, "cannot set aside")?;
    Ok(aside)
}

/// Gives a database that was set aside its name again, with all that it has not folded in.
pub(crate) fn put_back(aside: &Path, path: &Path) -> Result<(), StoreError> {
    rename(aside, path, "cannot put back")
}

fn rename(from: &Path, to: &Path, failure: &'static str) -> Result<(), StoreError> {
    for suffix in SUFFIXES {
        let from = with_suffix(from, suffix);
        if from.exists() {
            std::fs::rename(&from, with_suffix(to, suffix))
                .map_err(|why| StoreError::file(failure, &from, why))?;
        }
    }
    Ok(())
}

/// Copies a whole database into a new file at `to`, which must not exist; atomic and durable.
pub(crate) fn copy(from: &Connection, to: &Path) -> Result<(), StoreError> {
    let unfinished = with_suffix(to, ".new");
    remove(&unfinished)?;
    from.backup("main", &unfinished, None::<fn(rusqlite::backup::Progress)>)?;
    let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
    sync(&unfinished).map_err(|why| StoreError::file("cannot flush", &unfinished, why))?;
    std::fs::rename(&unfinished, to).map_err(|why| StoreError::file("cannot rename", &unfinished, why))?;
    sync_directory(to.parent().unwrap_or(Path::new(".")))
}

/// Deletes a database that is known to be no more than an older copy of another.
pub(crate) fn remove(path: &Path) -> Result<(), StoreError> {
    for suffix in SUFFIXES {
        let path = with_suffix(path, suffix);
        if path.exists() {
            std::fs::remove_file(&path).map_err(|why| StoreError::file("cannot remove", &path, why))?;
        }
    }
    Ok(())
}

fn sync_directory(directory: &Path) -> Result<(), StoreError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|why| StoreError::file("cannot flush", directory, why))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
