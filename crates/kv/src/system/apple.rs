//! What a page file asks of macOS. It compiles; nobody has run it yet.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use memmap2::{Advice, Mmap};
use rustix::io::Errno;
use rustix::mm::MsyncFlags;

use crate::file::MappedRange;

/// Read at once where only the page cache is to have the bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Makes the file, which is `end` bytes long, `bytes` longer, on disk space that is its own.
///
/// Not `rustix::fs::fallocate`, which asks for `end + bytes` beyond the end: as much again as the whole file.
pub(crate) fn reserve(file: &File, end: u64, bytes: u64) -> Result<(), Errno> {
    let length = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::FBIG);
    let wanted = libc::fstore_t {
        fst_flags: libc::F_ALLOCATEALL,
        fst_posmode: libc::F_PEOFPOSMODE,
        fst_offset: 0,
        fst_length: length(bytes)?,
        fst_bytesalloc: 0,
    };
    let new_end = end.checked_add(bytes).ok_or(Errno::FBIG)?;
    length(new_end)?;
    // SAFETY: the descriptor is open, and F_PREALLOCATE takes an `fstore_t`, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PREALLOCATE, &wanted) } == -1 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    rustix::fs::ftruncate(file, new_end)
}

/// Returns when the ranges of `file` survive a power cut.
///
/// Here `msync` ends when the drive has the bytes, in a cache that a power cut empties. Only F_FULLFSYNC, which `sync_data` is
/// on this system, empties it to the disk, and that in turn does not look for what was written to mappings. So it takes both,
/// as in LMDB (`mdb_env_sync0`).
pub(crate) fn sync(file: &File, ranges: &[MappedRange]) -> io::Result<()> {
    ranges.iter().try_for_each(MappedRange::sync)?;
    file.sync_data()
}

/// Reads a range into RAM. No advice waits for the disk and tells of its errors, so the bytes are read once, into the page cache,
/// which is what is mapped.
pub(crate) fn populate(range: &MappedRange, file: &File) -> io::Result<()> {
    if range.missing_bytes() == 0 {
        return Ok(());
    }
    range.extent.map.advise_range(Advice::WillNeed, range.offset, range.len)?;
    let mut chunk = vec![0; CHUNK_BYTES.min(range.len)];
    let mut done = 0;
    while done < range.len {
        let part = &mut chunk[..CHUNK_BYTES.min(range.len - done)];
        file.read_exact_at(part, range.file_offset() + done as u64)?;
        done += part.len();
    }
    Ok(())
}

/// Takes a range from the process and from the page cache. MS_INVALIDATE is the one thing that does, and without MS_SYNC it would
/// throw away bytes that are not on disk yet: so they are always written first.
pub(crate) fn page_out(range: &MappedRange, _file: &File) -> io::Result<()> {
    let (start, len) = range.memory_pages();
    // SAFETY: the memory is mapped; with MS_SYNC, its bytes come back from the file as they were.
    unsafe { rustix::mm::msync(start.cast(), len, MsyncFlags::SYNC | MsyncFlags::INVALIDATE)? };
    Ok(())
}

/// Drops what the page cache has of a file's bytes; those that are not on disk yet are written first.
///
/// # Errors
/// The system's.
pub fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: the bytes are never looked at, whatever others do to the file meanwhile.
    let map = unsafe { Mmap::map(file)? };
    // SAFETY: as in `page_out`.
    unsafe {
        rustix::mm::msync(
            map.as_ptr().cast_mut().cast(),
            map.len(),
            MsyncFlags::SYNC | MsyncFlags::INVALIDATE,
        )?
    };
    Ok(())
}
