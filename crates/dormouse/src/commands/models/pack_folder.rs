//! A place for packed weights.

use std::fs;
use std::path::{Path, PathBuf};

use dormouse_kernels::packed::PACK_VERSION;
use rustix::fs::Access;

use crate::assemble::free_disk;

/// A folder that packed weights may be kept in.
pub struct PackFolder {
    pub path: PathBuf,
    pub writable: bool,
    pub free_bytes: u64,
}

impl PackFolder {
    /// Looks at a folder, or at the one that it would be made in.
    pub fn look_at(path: &Path) -> PackFolder {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let there = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
        PackFolder {
            path: path.to_owned(),
            writable: rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK).is_ok(),
            free_bytes: free_disk(there).map_or(0, |free| free.0),
        }
    }

    /// A pack of this layout that was made for a file of this name, if there is one. Whether it still belongs to the file's
    /// contents is for `serve` to find out: it takes reading all of them.
    pub fn pack_of(&self, model: &Path) -> Option<PathBuf> {
        let begin = format!("{}.", model.file_name()?.to_string_lossy());
        let end = format!("-v{PACK_VERSION}.pack");
        let entries = fs::read_dir(&self.path).ok()?.flatten();
        entries.map(|entry| entry.path()).find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&begin) && name.ends_with(&end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_is_known_by_its_name_and_a_folder_that_is_not_there_by_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny.gguf");
        let here = PackFolder::look_at(folder.path());
        assert!(here.writable && here.free_bytes > 0 && here.pack_of(&model).is_none());
        let pack = folder.path().join(format!("tiny.gguf.0123456789abcdef-v{PACK_VERSION}.pack"));
        fs::write(&pack, b"").unwrap();
        assert_eq!(here.pack_of(&model), Some(pack));
        assert!(PackFolder::look_at(&folder.path().join("not/yet")).writable);
    }
}
