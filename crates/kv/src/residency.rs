//! Which bytes of the mapping are in RAM, reading them ahead, and giving them back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::file::MappedRange;
use crate::system;

/// Memory pages looked at in one `mincore` call; its answer is one byte for each.
const MINCORE_BATCH: usize = 16 << 10;

/// RAM that is to be given back, for a thread that may wait for the disk. A page that is used again meanwhile comes back with the
/// bytes it had.
#[derive(Debug)]
pub struct PageOut {
    pub(crate) ranges: Vec<MappedRange>,
    pub(crate) file: Arc<File>,
    pub(crate) path: PathBuf,
}

impl PageOut {
    pub fn carry_out(&self) {
        for range in &self.ranges {
            if let Err(error) = range.page_out(&self.file, false) {
                tracing::warn!(path = %self.path.display(), %error, "could not give back RAM of KV pages");
            }
        }
    }
}

/// Pages of a sequence that are to come into RAM, for threads that may wait for the disk.
#[derive(Debug)]
pub struct PageIn {
    /// In the order of the sequence, from its page `first` on.
    pages: Vec<MappedRange>,
    first: usize,
    file: Arc<File>,
    path: PathBuf,
    progress: Mutex<Progress>,
}

/// How far pages have been read.
#[derive(Debug)]
struct Progress {
    /// Those that nobody has begun to read.
    unread: Range<usize>,
    /// Those that somebody is reading.
    reading: Vec<usize>,
    /// Bytes of each that were not in RAM when that was last asked.
    missing: Vec<u64>,
    bytes_read: u64,
}

impl PageIn {
    /// What of a sequence's `pages` has to come from disk: all from the first that is not in RAM on.
    pub(crate) fn new(mut pages: Vec<MappedRange>, file: Arc<File>, path: PathBuf) -> PageIn {
        let mut missing = missing_bytes(&pages);
        let first = missing.iter().position(|bytes| *bytes > 0).unwrap_or(0);
        pages.drain(..first);
        missing.drain(..first);
        let progress = Progress { unread: 0..pages.len(), reading: Vec::new(), missing, bytes_read: 0 };
        PageIn { pages, first, file, path, progress: Mutex::new(progress) }
    }

    /// Looks again what is missing, just before it is read: others may have read it meanwhile.
    pub fn look_again(&self) {
        self.lock().missing = missing_bytes(&self.pages);
    }

    /// The sequence's first page that is read.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Pages that nobody has begun to read.
    pub fn unread(&self) -> usize {
        self.lock().unread.len()
    }

    /// Bytes that were not in RAM.
    pub fn missing_bytes(&self) -> u64 {
        self.lock().missing.iter().sum()
    }

    /// What came from disk so far.
    pub fn bytes_read(&self) -> u64 {
        self.lock().bytes_read
    }

    /// Reads the next page, as disks like it. False when none is left.
    pub fn read_first(&self) -> bool {
        self.read(Range::next)
    }

    /// Reads the last page that was not read: who computes the sequence meanwhile, from its beginning, meets what was read.
    /// False when none is left.
    pub fn read_last(&self) -> bool {
        self.read(Range::next_back)
    }

    fn read(&self, take: impl FnOnce(&mut Range<usize>) -> Option<usize>) -> bool {
        let mut progress = self.lock();
        let Some(index) = take(&mut progress.unread) else { return false };
        progress.reading.push(index);
        drop(progress);
        let outcome = self.pages[index].populate(&self.file);
        let mut progress = self.lock();
        progress.reading.retain(|reading| *reading != index);
        match outcome {
            Ok(()) => progress.bytes_read += progress.missing[index],
            // Attaching meets it again, and knows what to do about it.
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "could not read a KV page ahead");
            }
        }
        true
    }

    /// The sequence's first `pages` have been computed, and need not be read. Whether all that come after them have been.
    pub fn computed(&self, pages: usize) -> bool {
        let mut progress = self.lock();
        let computed = pages.saturating_sub(self.first);
        progress.unread.start = progress.unread.end.min(progress.unread.start.max(computed));
        progress.unread.is_empty() && progress.reading.iter().all(|reading| *reading < computed)
    }

    /// Nobody needs the rest any more.
    pub fn give_up(&self) {
        self.computed(usize::MAX);
    }

    /// What it guards is whole at any moment, also after a panic.
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn missing_bytes(pages: &[MappedRange]) -> Vec<u64> {
    pages.iter().map(MappedRange::missing_bytes).collect()
}

impl MappedRange {
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        assert!(self.offset + self.len <= self.extent.map.len());
        self.extent.map.as_mut_ptr().wrapping_add(self.offset)
    }

    /// The whole memory pages that the range lies in, and their bytes. A system may have larger ones than slots are aligned to.
    pub(crate) fn memory_pages(&self) -> (*mut u8, usize) {
        let before = self.as_ptr() as usize % rustix::param::page_size();
        (self.as_ptr().wrapping_sub(before), before + self.len)
    }

    /// Place of the range in the file.
    pub(crate) fn file_offset(&self) -> u64 {
        self.extent.file_offset + self.offset as u64
    }

    /// Bytes of the range that are in RAM (in the page cache, mapped or not). A kernel that cannot say counts as
    /// "nothing is", so that receipts rather claim a read too many than one too few.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let memory_page = rustix::param::page_size();
        let start = self.as_ptr() as usize;
        let end = start + self.len;
        let mut states = vec![0u8; MINCORE_BATCH.min(self.len.div_ceil(memory_page) + 1)];
        let mut resident = 0;
        let mut at = start - start % memory_page;
        while at < end {
            let len = (end - at).min(states.len() * memory_page);
            // SAFETY: `at..at + len` lies in memory pages that the extent maps, and `states` has a byte for each.
            if unsafe { libc::mincore(at as *mut _, len, states.as_mut_ptr().cast()) } != 0 {
                return 0;
            }
            for (index, state) in states[..len.div_ceil(memory_page)].iter().enumerate() {
                if state & 1 == 1 {
                    let page_start = (at + index * memory_page).max(start);
                    let page_end = (at + (index + 1) * memory_page).min(end);
                    resident += (page_end - page_start) as u64;
                }
            }
            at += len;
        }
        resident
    }

    pub(crate) fn missing_bytes(&self) -> u64 {
        self.len as u64 - self.resident_bytes()
    }

    /// Reads the whole range into RAM and maps it, in large reads.
    ///
    /// # Errors
    /// The disk's error when some of it cannot be read.
    pub(crate) fn populate(&self, file: &File) -> io::Result<()> {
        system::populate(self, file)
    }

    /// Gives the range's RAM back: from the process and, where the bytes are on disk already, from the page cache.
    /// Bytes that are not yet on disk are written first where `write_back` is set or the system does nothing less.
    pub(crate) fn page_out(&self, file: &File, write_back: bool) -> io::Result<()> {
        if write_back {
            self.sync()?;
        }
        system::page_out(self, file)
    }

    /// Returns when the system has given the range's bytes to the disk, which may still keep them in a cache: `system::sync` is
    /// what makes them durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.extent.map.flush_range(self.offset, self.len)
    }
}
