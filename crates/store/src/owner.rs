//! The thread that owns the database and its mirror.
//!
//! A change is committed to the primary (durable), its caller is answered, and then the mirror gets the same
//! change under the same sequence number. Whichever file is found damaged or behind is replaced by a copy of the
//! other; a damaged file is set aside under another name, never deleted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rusqlite::{Connection, TransactionBehavior};

use crate::lock::{DirectoryLock, Holder};
use crate::store::Durability;
use crate::{StoreError, check, files, schema};

pub(crate) type Job = Box<dyn FnOnce(&mut Owner) + Send>;

/// Up to this size both files are checked whole at every open, which takes tens of milliseconds; larger ones after it, on a
/// thread of their own. What is read is checked in any case.
const CHECK_AT_OPEN_BYTES: u64 = 1 << 20;

/// After a failed write to the mirror (a full disk, say), this many changes pass before it is rebuilt.
const MIRROR_RETRY_CHANGES: u32 = 64;

pub(crate) struct Owner {
    directory: PathBuf,
    durability: Durability,
    /// None once closed.
    lock: Option<DirectoryLock>,
    primary: Option<Connection>,
    /// None while it is behind and waits to be rebuilt.
    mirror: Option<Connection>,
    changes_until_rebuild: u32,
    /// Write transactions committed to the primary so far.
    sequence: i64,
    /// There is a file that was not checked whole.
    pub(crate) is_unchecked: bool,
    health: Vec<String>,
}

/// What was found at a database's path.
enum Found {
    Missing,
    Usable(Connection, i64),
    Damaged(String),
}

impl Owner {
    pub(crate) fn open(directory: &Path, durability: Durability) -> Result<Owner, StoreError> {
        std::fs::create_dir_all(directory)
            .map_err(|why| StoreError::file("cannot create", directory, why))?;
        let lock = DirectoryLock::take(directory)?;
        let mut owner = Owner {
            directory: directory.to_owned(),
            durability,
            lock: Some(lock),
            primary: None,
            mirror: None,
            changes_until_rebuild: 0,
            sequence: 0,
            is_unchecked: false,
            health: Vec::new(),
        };
        owner.open_both()?;
        Ok(owner)
    }

    fn primary_path(&self) -> PathBuf {
        self.directory.join(files::PRIMARY)
    }

    fn mirror_path(&self) -> PathBuf {
        self.directory.join(files::MIRROR)
    }

    fn open_primary(&self) -> Result<Connection, StoreError> {
        files::open(&self.primary_path(), files::waits_for_disk(self.durability))
    }

    fn open_both(&mut self) -> Result<(), StoreError> {
        let primary = self.find(&self.primary_path(), files::waits_for_disk(self.durability))?;
        let mirror = self.find(&self.mirror_path(), false)?;
        match (primary, mirror) {
            (Found::Missing, Found::Missing) => {
                self.primary = Some(self.open_primary()?);
                self.rebuild_mirror()
            }
            (Found::Usable(primary, sequence), Found::Usable(mirror, mirrored)) => {
                if sequence == mirrored {
                    (self.primary, self.mirror, self.sequence) = (Some(primary), Some(mirror), sequence);
                    return Ok(());
                }
                if sequence > mirrored {
                    // A crash between the two writes; the copy must not carry damage over.
                    drop(mirror);
                    (self.primary, self.sequence) = (Some(primary), sequence);
                    return match check::whole(self.primary()?) {
                        Ok(()) => self.rebuild_mirror(),
                        Err(why) if why.is_damage() => {
                            self.mirror = Some(files::open(&self.mirror_path(), false)?);
                            self.replace_primary(&why.to_string())
                        }
                        Err(why) => Err(why),
                    };
                }
                if let Err(why) = check::whole(&mirror) {
                    if !why.is_damage() {
                        return Err(why);
                    }
                    (self.primary, self.sequence) = (Some(primary), sequence);
                    self.set_mirror_aside(&format!("{why}; it had {} changes more", mirrored - sequence))?;
                    return self.rebuild_mirror();
                }
                drop(primary);
                self.mirror = Some(mirror);
                self.replace_primary(&format!("it lacks the last {} changes", mirrored - sequence))
            }
            (Found::Usable(primary, sequence), found) => {
                (self.primary, self.sequence) = (Some(primary), sequence);
                if let Found::Damaged(why) = found {
                    self.set_mirror_aside(&why)?;
                } else {
                    self.report("the mirror of the metadata database was missing; it was made anew".into());
                }
                self.rebuild_mirror()
            }
            (Found::Missing, Found::Usable(mirror, _)) => {
                self.mirror = Some(mirror);
                self.replace_primary("it was missing or empty")
            }
            (Found::Damaged(why), Found::Usable(mirror, _)) => {
                self.mirror = Some(mirror);
                self.replace_primary(&why)
            }
            (Found::Missing | Found::Damaged(_), Found::Damaged(why))
            | (Found::Damaged(why), Found::Missing) => {
                Err(StoreError::Damaged(format!("{} ({why})", self.directory.display())))
            }
        }
    }

    fn find(&mut self, path: &Path, wait_for_disk: bool) -> Result<Found, StoreError> {
        let bytes = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(why) => return Err(StoreError::file("cannot read", path, why)),
        };
        // A crash just after creation, or a file that lost everything: SQLite would take it for a new database.
        if bytes == 0 {
            return Ok(Found::Missing);
        }
        let opened = files::open(path, wait_for_disk).and_then(|connection| {
            match bytes <= CHECK_AT_OPEN_BYTES {
                true => check::whole(&connection)?,
                false => self.is_unchecked = true,
            }
            let sequence = schema::sequence(&connection)?;
            Ok((connection, sequence))
        });
        match opened {
            Ok((connection, sequence)) => Ok(Found::Usable(connection, sequence)),
            Err(why) if why.is_damage() => Ok(Found::Damaged(why.to_string())),
            Err(why) => Err(why),
        }
    }

    /// Runs jobs until the last handle is gone.
    pub(crate) fn serve(mut self, queue: mpsc::Receiver<Job>) {
        for job in queue {
            // Whoever asked is told by its answer's end; the others must not lose their database.
            if catch_unwind(AssertUnwindSafe(|| job(&mut self))).is_err() && !self.recover() {
                return;
            }
        }
    }

    /// After a panic in a job: its transaction was rolled back on the way, but the mirror may lack a change. False where there
    /// is no database any more.
    fn recover(&mut self) -> bool {
        self.report("a request to the metadata database met a bug; the log says where".into());
        if self.primary.is_none() && self.lock.is_some() {
            self.primary = self.open_primary().ok();
        }
        match self.primary().and_then(schema::sequence) {
            Ok(sequence) => self.sequence = sequence,
            // Once it is closed there is nothing to recover.
            Err(_) => return self.lock.is_none(),
        }
        let sequence = self.sequence;
        let is_behind = |mirror: &mut Connection| !schema::sequence(mirror).is_ok_and(|at| at == sequence);
        if self.mirror.take_if(is_behind).is_some() {
            self.changes_until_rebuild = 1;
        }
        true
    }

    pub(crate) fn set_address(&mut self, address: String) -> Result<(), StoreError> {
        let holder = Holder { pid: std::process::id(), address: Some(address) };
        self.lock.as_mut().ok_or(StoreError::Closed)?.write(&holder)
    }

    pub(crate) fn health(&self) -> Vec<String> {
        self.health.clone()
    }

    pub(crate) fn read<T>(
        &mut self,
        query: &dyn Fn(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match query(self.primary()?) {
            Err(why) if why.is_damage() && self.heal(&why) => query(self.primary()?),
            result => result,
        }
    }

    /// Answers as soon as the change is durable; the mirror follows.
    pub(crate) fn write<T>(
        &mut self,
        change: &dyn Fn(&Connection) -> Result<T, StoreError>,
        answer: &mut dyn FnMut(Result<T, StoreError>),
    ) {
        let result = match self.commit(change) {
            Err(why) if why.is_damage() && self.heal(&why) => self.commit(change),
            result => result,
        };
        let committed = result.is_ok();
        answer(result);
        if committed {
            self.follow(change);
        }
    }

    fn commit<T>(&mut self, change: &dyn Fn(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let next = self.sequence + 1;
        let result = transact(self.primary.as_mut().ok_or(StoreError::Closed)?, change, next)?;
        self.sequence = next;
        Ok(result)
    }

    /// Applies to the mirror what the primary has just committed.
    fn follow<T>(&mut self, change: &dyn Fn(&Connection) -> Result<T, StoreError>) {
        let Some(mirror) = self.mirror.as_mut() else {
            self.changes_until_rebuild = self.changes_until_rebuild.saturating_sub(1);
            // The old mirror may be all that is whole: a damaged primary must not take its place.
            if self.changes_until_rebuild == 0
                && let Err(why) = self.primary().and_then(check::whole).and_then(|()| self.rebuild_mirror())
            {
                self.changes_until_rebuild = MIRROR_RETRY_CHANGES;
                tracing::warn!("the metadata database's mirror is still behind: {why}");
            }
            return;
        };
        if let Err(why) = transact(mirror, change, self.sequence) {
            self.mirror = None;
            self.changes_until_rebuild = MIRROR_RETRY_CHANGES;
            self.report(format!(
                "the mirror of the metadata database is behind and will be made anew: {why}"
            ));
        }
    }

    /// Replaces the primary by its mirror because of `why`. False when the mirror cannot be trusted either.
    fn heal(&mut self, why: &StoreError) -> bool {
        let Some(mirror) = self.mirror.as_ref() else {
            self.report(format!("{why}; the mirror is behind, so nothing was mended"));
            return false;
        };
        let trusted = check::whole(mirror).and_then(|()| schema::sequence(mirror)).and_then(|mirrored| {
            match mirrored == self.sequence {
                true => Ok(()),
                false => Err(StoreError::Damaged(format!("it has {mirrored} of {} changes", self.sequence))),
            }
        });
        if let Err(mirror_why) = trusted {
            self.report(format!("{why}; the mirror cannot mend it: {mirror_why}"));
            return false;
        }
        match self.replace_primary(&why.to_string()) {
            Ok(()) => true,
            Err(failed) => {
                self.report(format!("{why}; replacing it by its mirror failed: {failed}"));
                false
            }
        }
    }

    /// Sets the primary aside, if it is there, and puts a copy of the mirror in its place.
    fn replace_primary(&mut self, why: &str) -> Result<(), StoreError> {
        let was_open = self.primary.take().is_some();
        let path = self.primary_path();
        let aside = match files::set_aside(&path) {
            Ok(aside) => aside,
            Err(failed) => {
                self.primary = if was_open { self.open_primary().ok() } else { None };
                return Err(failed);
            }
        };
        let mirror = self.mirror.as_ref().ok_or(StoreError::Closed)?;
        let sequence = schema::sequence(mirror)?;
        let copied = files::copy(mirror, &path);
        if let Err(failed) = copied {
            // The damaged file may still serve what is intact in it.
            if aside.exists() {
                files::put_back(&aside, &path)?;
                self.primary = Some(self.open_primary()?);
            }
            return Err(failed);
        }
        self.sequence = sequence;
        self.primary = Some(self.open_primary()?);
        self.report(format!(
            "the metadata database {} was replaced by its mirror ({why}); the old file is {}",
            path.display(),
            aside.display()
        ));
        Ok(())
    }

    fn set_mirror_aside(&mut self, why: &str) -> Result<(), StoreError> {
        self.mirror = None;
        let aside = files::set_aside(&self.mirror_path())?;
        self.report(format!(
            "the mirror of the metadata database was damaged ({why}); it is now {}, and was made anew",
            aside.display()
        ));
        Ok(())
    }

    /// The two files, for a check beside the work on them.
    pub(crate) fn paths(&self) -> [PathBuf; 2] {
        [self.primary_path(), self.mirror_path()]
    }

    /// Puts a copy of the primary in the mirror's place.
    fn rebuild_mirror(&mut self) -> Result<(), StoreError> {
        self.mirror = None;
        let path = self.mirror_path();
        files::remove(&path)?;
        files::copy(self.primary()?, &path)?;
        self.mirror = Some(files::open(&path, false)?);
        Ok(())
    }

    /// Checks both files whole and mends what can be mended; answers everything found since open.
    pub(crate) fn verify(&mut self) -> Vec<String> {
        let checked = self.primary().and_then(check::whole);
        if let Err(why) = checked {
            if !why.is_damage() || !self.heal(&why) {
                self.report(format!("the metadata database could not be checked or mended: {why}"));
            }
            return self.health();
        }
        let damaged = self.mirror.as_ref().and_then(|mirror| check::whole(mirror).err());
        if let Some(why) = damaged
            && let Err(failed) = self.set_mirror_aside(&why.to_string()).and_then(|()| self.rebuild_mirror())
        {
            self.report(format!("the mirror of the metadata database could not be made anew: {failed}"));
        }
        self.health()
    }

    pub(crate) fn close(&mut self) -> Result<(), StoreError> {
        let primary = self.primary.take().ok_or(StoreError::Closed)?;
        for connection in [Some(primary), self.mirror.take()].into_iter().flatten() {
            connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
            connection.close().map_err(|(_, why)| StoreError::from(why))?;
        }
        self.lock = None;
        Ok(())
    }

    fn primary(&self) -> Result<&Connection, StoreError> {
        self.primary.as_ref().ok_or(StoreError::Closed)
    }

    fn report(&mut self, line: String) {
        tracing::warn!("{line}");
        self.health.push(line);
    }
}

fn transact<T>(
    connection: &mut Connection,
    change: &dyn Fn(&Connection) -> Result<T, StoreError>,
    sequence: i64,
) -> Result<T, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let result = change(&transaction)?;
    schema::set_sequence(&transaction, sequence)?;
    transaction.commit()?;
    Ok(result)
}
