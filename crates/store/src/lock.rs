//! One server per data directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::StoreError;

const LOCK_NAME: &str = "dormouse.lock";

/// Who owns a data directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// Where it answers, once it does: `http://HOST:PORT`.
    pub address: Option<String>,
}

/// The lock itself; the operating system releases it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    file: File,
}

impl DirectoryLock {
    pub(crate) fn take(directory: &Path) -> Result<DirectoryLock, StoreError> {
        let path = directory.join(LOCK_NAME);
        let mut file = open(&path)?;
        match try_for_a_moment(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = read(&mut file);
                return Err(StoreError::Locked {
                    directory: directory.to_owned(),
                    pid: holder.pid,
                    address: holder.address,
                });
            }
            Err(TryLockError::Error(why)) => return Err(StoreError::file("cannot lock", &path, why)),
        }
        let mut lock = DirectoryLock { file };
        lock.write(&Holder { pid: std::process::id(), address: None })?;
        Ok(lock)
    }

    pub(crate) fn write(&mut self, holder: &Holder) -> Result<(), StoreError> {
        let text = serde_json::to_string(holder).map_err(|why| StoreError::Database(why.to_string()))?;
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .and_then(|_| self.file.write_all(text.as_bytes()));
        written.map_err(|why| StoreError::file("cannot write", Path::new(LOCK_NAME), why))
    }
}

/// Someone who only asks for the holder has the lock for an instant.
fn try_for_a_moment(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
    file.try_lock()
}

/// The live process that owns `directory`, if one does.
pub fn holder(directory: &Path) -> Result<Option<Holder>, StoreError> {
    let path = directory.join(LOCK_NAME);
    if !path.exists() {
        return Ok(None);
    }
    let mut file = open(&path)?;
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(read(&mut file))),
        Err(TryLockError::Error(why)) => Err(StoreError::file("cannot lock", &path, why)),
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|why| StoreError::file("cannot open", path, why))
}

/// A holder that has not written its line yet, or a torn line, reads as process 0 without an address.
fn read(file: &mut File) -> Holder {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) => serde_json::from_str(&text).unwrap_or_default(),
        Err(_) => Holder::default(),
    }
}
