//! What a page file asks of Linux.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;

use memmap2::{Advice, UncheckedAdvice};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::file::MappedRange;

/// With more ranges than this, one `fdatasync` of the file is cheaper: every `msync` waits for the disk's cache.
const MOST_RANGES_TO_SYNC: usize = 4;

/// Makes the file, which is `end` bytes long, `bytes` longer, on disk space that is its own.
pub(crate) fn reserve(file: &File, end: u64, bytes: u64) -> Result<(), Errno> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), end, bytes)
}

/// Returns when the ranges of `file` survive a power cut.
pub(crate) fn sync(file: &File, ranges: &[MappedRange]) -> io::Result<()> {
    // A range at a time leaves alone the pages that other turns are writing just now.
    if ranges.len() <= MOST_RANGES_TO_SYNC {
        ranges.iter().try_for_each(MappedRange::sync)
    } else {
        file.sync_data()
    }
}

/// Reads a range into RAM, and maps it.
pub(crate) fn populate(range: &MappedRange, _file: &File) -> io::Result<()> {
    let advise = |advice| range.extent.map.advise_range(advice, range.offset, range.len);
    match advise(Advice::PopulateRead) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {} // before Linux 5.14
        result => return result,
    }
    advise(Advice::WillNeed)
}

/// Takes a range from the process and, where its bytes are on disk already, from the page cache.
pub(crate) fn page_out(range: &MappedRange, file: &File) -> io::Result<()> {
    let (start, len) = range.memory_pages();
    // SAFETY: the memory is mapped; the advice changes where its bytes are, never what they are.
    let advised = unsafe { rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxPageOut) };
    match advised {
        Ok(()) | Err(Errno::INVAL) => {} // before Linux 5.4, or pages that cannot move
        Err(errno) => return Err(errno.into()),
    }
    // PAGEOUT sees only what this process has mapped. Unmapping the rest lets the page cache drop it, too.
    // SAFETY: in a shared file mapping, dropped pages come back from the file with the bytes they had.
    unsafe {
        range.extent.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.offset, range.len)?;
    }
    let len = NonZeroU64::new(range.len as u64);
    rustix::fs::fadvise(file, range.file_offset(), len, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Drops what the page cache has of a file's bytes that are on disk.
///
/// # Errors
/// The system's.
pub fn drop_cache(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}
