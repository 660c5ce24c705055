//! The page file's header page; `docs/page-format.md` has its bytes.

use std::path::Path;

use dormouse_kernels::{KvDtype, PAGE_TOKENS, PageLayout};

use crate::{Identity, KvError};

pub(crate) const HEADER_BYTES: usize = 4096;
pub(crate) const FORMAT_VERSION: u32 = 2;
/// Slots begin and end on multiples of this, so that one page of memory never holds parts of two of them.
const SLOT_ALIGNMENT: usize = 4096;
/// Space is reserved in steps of about this much: few mappings, and little of the disk taken before it is needed.
const EXTENT_BYTES: usize = 64 << 20;

const MAGIC: &[u8; 8] = b"DORMOUSE";
const CHECKSUM_OFFSET: usize = HEADER_BYTES - 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) identity: Identity,
    pub(crate) layout: PageLayout,
    pub(crate) slots_per_extent: u32,
    pub(crate) slot_bytes: usize,
}

impl Header {
    pub(crate) fn new(identity: Identity, layout: PageLayout) -> Result<Header, KvError> {
        let page_bytes = layout.page_bytes();
        let fits = |dimension: usize| u32::try_from(dimension).is_ok();
        let whole = [layout.layers, layout.kv_heads, layout.head_dim].into_iter().all(fits);
        if page_bytes == 0 || !whole || i64::try_from(page_bytes).is_err() {
            return Err(KvError::Layout { page_bytes });
        }
        let slot_bytes = page_bytes.next_multiple_of(SLOT_ALIGNMENT);
        let slots_per_extent = (EXTENT_BYTES / slot_bytes).max(1) as u32;
        Ok(Header { identity, layout, slots_per_extent, slot_bytes })
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(8, &FORMAT_VERSION.to_le_bytes());
        put(12, &(HEADER_BYTES as u32).to_le_bytes());
        put(16, &self.identity.fingerprint);
        put(48, &self.identity.tenant_salt);
        put(80, &(self.layout.layers as u32).to_le_bytes());
        put(84, &(self.layout.kv_heads as u32).to_le_bytes());
        put(88, &(self.layout.head_dim as u32).to_le_bytes());
        put(92, &dtype_code(self.layout.dtype).to_le_bytes());
        put(96, &(PAGE_TOKENS as u32).to_le_bytes());
        put(100, &self.slots_per_extent.to_le_bytes());
        put(104, &(self.slot_bytes as u64).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_OFFSET]);
        bytes[CHECKSUM_OFFSET..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks that `bytes`, the first of the file at `path`, are the header of a file for exactly `self`.
    ///
    /// # Errors
    /// The first check that failed, in the order in which `docs/page-format.md` lists them.
    pub(crate) fn check(&self, bytes: &[u8; HEADER_BYTES], path: &Path) -> Result<(), KvError> {
        let path = || path.to_path_buf();
        if &bytes[..8] != MAGIC {
            return Err(KvError::NotAPageFile { path: path() });
        }
        let version = u32_at(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(KvError::Version { path: path(), found: version, supported: FORMAT_VERSION });
        }
        let (found, expected) = (u32_at(bytes, CHECKSUM_OFFSET), crc32c::crc32c(&bytes[..CHECKSUM_OFFSET]));
        if found != expected {
            return Err(KvError::HeaderChecksum { path: path(), found, expected });
        }
        let own = self.encode();
        let parts = [
            (16..48, "model (its fingerprint differs)"),
            (48..80, "tenant"),
            (80..CHECKSUM_OFFSET, "page layout"),
        ];
        for (range, what) in parts {
            if bytes[range.clone()] != own[range] {
                return Err(KvError::OtherIdentity { path: path(), what });
            }
        }
        Ok(())
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(field)
}

fn dtype_code(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F16 => 0,
        KvDtype::Q8_0 => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let layout = PageLayout { layers: 2, kv_heads: 3, head_dim: 64, dtype: KvDtype::F16 };
        Header::new(Identity { fingerprint: [7; 32], tenant_salt: [8; 32] }, layout).unwrap()
    }

    fn reseal(bytes: &mut [u8; HEADER_BYTES]) {
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_OFFSET]);
        bytes[CHECKSUM_OFFSET..].copy_from_slice(&checksum.to_le_bytes());
    }

    #[test]
    fn a_header_passes_its_own_check() {
        header().check(&header().encode(), Path::new("p")).unwrap();
    }

    #[test]
    fn every_kind_of_wrong_header_has_its_own_error() {
        let path = Path::new("p");
        let changed = |change: fn(&mut [u8; HEADER_BYTES])| {
            let mut bytes = header().encode();
            change(&mut bytes);
            header().check(&bytes, path).unwrap_err()
        };
        assert!(matches!(changed(|b| b[0] = 0), KvError::NotAPageFile { .. }));
        assert!(matches!(
            changed(|b| b[8] = 0),
            KvError::Version { found: 0, supported: FORMAT_VERSION, .. }
        ));
        assert!(matches!(changed(|b| b[8] = 3), KvError::Version { found: 3, .. }));
        assert!(matches!(changed(|b| b[3000] ^= 1), KvError::HeaderChecksum { .. }));
        for (offset, expected) in [(16, "model"), (48, "tenant"), (88, "layout")] {
            let mut bytes = header().encode();
            bytes[offset] ^= 1;
            reseal(&mut bytes);
            match header().check(&bytes, path).unwrap_err() {
                KvError::OtherIdentity { what, .. } => assert!(what.contains(expected)),
                other => panic!("unexpected {other}"),
            }
        }
    }

    #[test]
    fn a_layout_without_bytes_is_refused() {
        let layout = PageLayout { layers: 0, kv_heads: 3, head_dim: 64, dtype: KvDtype::F16 };
        let identity = Identity { fingerprint: [7; 32], tenant_salt: [8; 32] };
        assert!(matches!(Header::new(identity, layout), Err(KvError::Layout { page_bytes: 0 })));
    }
}
