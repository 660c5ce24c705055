//! The page file: opening, locking, growing by extents, and where a slot's bytes are mapped.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::header::{HEADER_BYTES, Header};
use crate::{Identity, KvError, system};
use dormouse_kernels::PageLayout;

/// A part of the file that was mapped in one piece. It is never unmapped or moved while anything refers to it.
#[derive(Debug)]
pub(crate) struct Extent {
    first_slot: u32,
    slots: u32,
    pub(crate) file_offset: u64,
    pub(crate) map: MmapRaw,
}

/// Consecutive bytes of one extent: some slots that lie side by side.
#[derive(Clone, Debug)]
pub(crate) struct MappedRange {
    pub(crate) extent: Arc<Extent>,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

#[derive(Debug)]
pub(crate) struct PageFile {
    pub(crate) file: Arc<File>,
    path: PathBuf,
    header: Header,
    extents: Vec<Arc<Extent>>,
    slots: u32,
}

impl PageFile {
    /// Opens the file at `path`, or creates it where there is none; the flag says whether it was created.
    ///
    /// # Errors
    /// `Locked` when another process has it; the header's errors; `Truncated`; `Io`.
    pub(crate) fn open(
        path: &Path,
        identity: Identity,
        layout: PageLayout,
    ) -> Result<(PageFile, bool), KvError> {
        let header = Header::new(identity, layout)?;
        let (mut file, created) = match open_existing(path) {
            Ok(file) => (file, false),
            Err(error) if error.kind() == ErrorKind::NotFound => (create(path, &header)?, true),
            Err(source) => return Err(KvError::io("open", path)(source)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(KvError::Locked { path: path.to_path_buf() }),
            Err(errno) => return Err(KvError::io("lock", path)(errno.into())),
        }
        let bytes = file.metadata().map_err(KvError::io("read the size of", path))?.len();
        if bytes < HEADER_BYTES as u64 {
            let path = path.to_path_buf();
            return Err(KvError::Truncated { path, bytes, header_bytes: HEADER_BYTES as u64 });
        }
        let mut head = [0; HEADER_BYTES];
        file.read_exact(&mut head).map_err(KvError::io("read the header of", path))?;
        header.check(&head, path)?;

        // A file whose length is no whole number of slots was cut: what is left of the last slot is not mapped.
        let slots = (bytes - HEADER_BYTES as u64) / header.slot_bytes as u64;
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        let mut page_file = PageFile {
            file: Arc::new(file),
            path: path.to_path_buf(),
            header,
            extents: Vec::new(),
            slots: 0,
        };
        if slots > 0 {
            page_file.map(slots)?;
        }
        Ok((page_file, created))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn layout(&self) -> &PageLayout {
        &self.header.layout
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.header.slot_bytes
    }

    pub(crate) fn slots_per_extent(&self) -> u32 {
        self.header.slots_per_extent
    }

    /// Slots that exist in the file and are mapped.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Reserves disk space for `more` slots and maps them.
    ///
    /// # Errors
    /// `NoSpace` when the disk is full (the file keeps its length), `Io` otherwise.
    pub(crate) fn grow(&mut self, more: u32) -> Result<(), KvError> {
        debug_assert!(more > 0);
        let end = self.offset_of(self.slots);
        let bytes = u64::from(more) * self.header.slot_bytes as u64;
        if let Err(errno) = system::reserve(&self.file, end, bytes) {
            // Some file systems keep what they could reserve before they failed.
            self.file.set_len(end).map_err(KvError::io("shrink", &self.path))?;
            return Err(match errno {
                Errno::NOSPC | Errno::DQUOT | Errno::FBIG => {
                    KvError::NoSpace { path: self.path.clone(), bytes }
                }
                errno => KvError::io("reserve space in", &self.path)(errno.into()),
            });
        }
        self.map(more)
    }

    /// Address of a slot; valid for `slot_bytes` until the file is dropped, whatever is mapped after it.
    pub(crate) fn slot_ptr(&self, slot: u32) -> *mut u8 {
        let extent = self.extent_of(slot);
        let offset = (slot - extent.first_slot) as usize * self.header.slot_bytes;
        assert!(offset + self.header.slot_bytes <= extent.map.len(), "slot {slot} ends outside its extent");
        extent.map.as_mut_ptr().wrapping_add(offset)
    }

    /// Writes one slot's bytes to another's place in the file without reading what was there; mappings show them at once.
    pub(crate) fn copy_slot(&self, from: u32, to: u32) -> std::io::Result<()> {
        assert_ne!(from, to);
        // SAFETY: the slot is mapped, and nobody writes it while the pool is borrowed.
        let bytes = unsafe { std::slice::from_raw_parts(self.slot_ptr(from), self.header.slot_bytes) };
        std::os::unix::fs::FileExt::write_all_at(&*self.file, bytes, self.offset_of(to))
    }

    /// The mapped ranges of `slots`, neighbours merged so that system calls are few and reads large.
    pub(crate) fn ranges(&self, slots: impl IntoIterator<Item = u32>) -> Vec<MappedRange> {
        let mut slots: Vec<u32> = slots.into_iter().collect();
        slots.sort_unstable();
        slots.dedup();
        let slot_bytes = self.header.slot_bytes;
        let mut ranges: Vec<MappedRange> = Vec::new();
        for slot in slots {
            let extent = self.extent_of(slot);
            let offset = (slot - extent.first_slot) as usize * slot_bytes;
            match ranges.last_mut() {
                Some(last) if Arc::ptr_eq(&last.extent, extent) && last.offset + last.len == offset => {
                    last.len += slot_bytes;
                }
                _ => ranges.push(MappedRange { extent: Arc::clone(extent), offset, len: slot_bytes }),
            }
        }
        ranges
    }

    fn map(&mut self, more: u32) -> Result<(), KvError> {
        let file_offset = self.offset_of(self.slots);
        let len = more as usize * self.header.slot_bytes;
        let map = MmapOptions::new()
            .offset(file_offset)
            .len(len)
            .map_raw(&*self.file)
            .map_err(KvError::io("map", &self.path))?;
        assert_eq!(map.len(), len);
        self.extents.push(Arc::new(Extent { first_slot: self.slots, slots: more, file_offset, map }));
        self.slots += more;
        Ok(())
    }

    fn extent_of(&self, slot: u32) -> &Arc<Extent> {
        let after = self.extents.partition_point(|extent| extent.first_slot <= slot);
        let extent = &self.extents[after.checked_sub(1).expect("the first extent begins at slot 0")];
        assert!(slot - extent.first_slot < extent.slots, "slot {slot} is not in the page file");
        extent
    }

    fn offset_of(&self, slot: u32) -> u64 {
        HEADER_BYTES as u64 + u64::from(slot) * self.header.slot_bytes as u64
    }
}

fn open_existing(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Writes the header under a temporary name, syncs it and renames it, so that no file has half a header.
fn create(path: &Path, header: &Header) -> Result<File, KvError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = File::create(&new).map_err(KvError::io("create", &new))?;
    file.write_all(&header.encode()).map_err(KvError::io("write the header of", &new))?;
    file.sync_all().map_err(KvError::io("sync", &new))?;
    std::fs::rename(&new, path).map_err(KvError::io("rename into place", path))?;
    sync_folder_of(path)?;
    open_existing(path).map_err(KvError::io("open", path))
}

/// Makes the folder's entry for `path` survive a power cut.
fn sync_folder_of(path: &Path) -> Result<(), KvError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(KvError::io("sync the folder of", path))
}

/// Renames a page file that cannot be used to `NAME.damaged-N` with the first free `N` and returns the new path.
///
/// # Errors
/// `Io` when it cannot be renamed.
pub fn set_aside(path: &Path) -> Result<PathBuf, KvError> {
    let name = path.file_name().unwrap_or_default();
    for number in 1u32.. {
        let mut aside = name.to_os_string();
        aside.push(format!(".damaged-{number}"));
        let aside = path.with_file_name(aside);
        if aside.try_exists().map_err(KvError::io("look for", &aside))? {
            continue;
        }
        std::fs::rename(path, &aside).map_err(KvError::io("set aside", path))?;
        sync_folder_of(path)?;
        return Ok(aside);
    }
    Err(KvError::io("set aside", path)(ErrorKind::AlreadyExists.into()))
}
