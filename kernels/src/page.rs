//! The geometry of one KV page: the keys and values of [`PAGE_TOKENS`] consecutive positions, for all layers.
//!
//! Inside a page: layer-major, K then V, each `kv_heads` runs, so that attention streams one layer's page once for a
//! whole group of query heads. Values lie as they are computed, `[PAGE_TOKENS, head_dim]`; keys lie turned, as
//! `[PAGE_TOKENS / 16, head_dim, 16]`, since the score of a key is a sum along the head: sixteen positions are then one
//! vector of it.

use std::ops::Range;

/// Positions held by one page. 64 keeps a page of the default model at 1.4 MiB: large enough that disk reads are
/// sequential, small enough that a crash, which recomputes at most one page, costs well under a second.
pub const PAGE_TOKENS: usize = 64;

/// Positions whose keys lie together, turned.
pub const KEY_GROUP: usize = 16;

/// Bytes of a turned group of one Q8_0 block of 32 values: sixteen scales, then `[32, 16]` quants.
pub(crate) const KEY_BLOCK_BYTES: usize = 34 * KEY_GROUP;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE half precision, 2 bytes a value.
    F16,
    /// GGML Q8_0 blocks along the head dimension: 32 signed bytes and one f16 scale, 34 bytes for 32 values. Of turned
    /// keys, each block's sixteen scales precede its quants.
    Q8_0,
}

impl KvDtype {
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F16 => "f16",
            KvDtype::Q8_0 => "q8_0",
        }
    }

    pub fn parse(text: &str) -> Option<KvDtype> {
        [KvDtype::F16, KvDtype::Q8_0].into_iter().find(|dtype| dtype.name() == text)
    }

    /// Bytes of one `head_dim`-long row of keys or values.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            KvDtype::F16 => head_dim * 2,
            KvDtype::Q8_0 => head_dim.div_ceil(32) * 34,
        }
    }
}

/// Shape of every page of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageLayout {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDtype,
}

impl PageLayout {
    /// Bytes of one K or V row of one head.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.head_dim)
    }

    /// Bytes of the `[PAGE_TOKENS, head_dim]` run of one head, for K or for V.
    pub fn head_bytes(&self) -> usize {
        PAGE_TOKENS * self.row_bytes()
    }

    /// Runs (`layers × {K, V} × kv_heads`) in a page; run `i` begins at `i * head_bytes()`.
    pub fn runs(&self) -> usize {
        self.layers * 2 * self.kv_heads
    }

    /// Byte offset of the K run of `head` in `layer`; the group of positions `16 · g ..` is at `+ 16 · g · row_bytes()`.
    pub fn k_offset(&self, layer: usize, head: usize) -> usize {
        debug_assert!(layer < self.layers && head < self.kv_heads);
        (layer * 2 * self.kv_heads + head) * self.head_bytes()
    }

    /// Byte offset of the V run of `head` in `layer`; position `p` of the page is at `+ p · row_bytes()`.
    pub fn v_offset(&self, layer: usize, head: usize) -> usize {
        self.k_offset(layer, head) + self.kv_heads * self.head_bytes()
    }

    /// Bytes of a whole page, without the padding that a page file may add.
    pub fn page_bytes(&self) -> usize {
        self.runs() * self.head_bytes()
    }

    /// Where a group of keys has its parts: byte offsets inside the group, and the bytes that each of its sixteen positions
    /// has there. In this order a position's parts are its row.
    pub fn key_parts(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (parts, of_a_block) = match self.dtype {
            KvDtype::F16 => (self.head_dim, 1),
            KvDtype::Q8_0 => (self.head_dim.div_ceil(32) * 33, 33),
        };
        let dtype = self.dtype;
        (0..parts).map(move |part| match (dtype, part / of_a_block, part % of_a_block) {
            (KvDtype::F16, value, _) => (value * 2 * KEY_GROUP, 2),
            (KvDtype::Q8_0, block, 0) => (block * KEY_BLOCK_BYTES, 2),
            (KvDtype::Q8_0, block, quant) => (block * KEY_BLOCK_BYTES + (quant + 1) * KEY_GROUP, 1),
        })
    }

    /// The bytes of a page that its first `positions` positions have, ascending: all that is read of a page which holds
    /// no more. The others may be written meanwhile.
    pub fn held(&self, positions: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        assert!(positions <= PAGE_TOKENS);
        let layout = *self;
        let (row, whole, rest) = (self.row_bytes(), positions / KEY_GROUP * KEY_GROUP, positions % KEY_GROUP);
        (0..self.runs()).flat_map(move |run| {
            let start = run * layout.head_bytes();
            let keys = (run / layout.kv_heads).is_multiple_of(2);
            let rows = if keys { whole } else { positions };
            let parts = (keys && rest > 0).then(|| layout.key_parts()).into_iter().flatten();
            let parts = parts.map(move |(offset, bytes)| {
                let at = start + whole * row + offset;
                at..at + rest * bytes
            });
            std::iter::once(start..start + rows * row).filter(|range| !range.is_empty()).chain(parts)
        })
    }

    /// KV bytes that one token costs.
    pub fn token_bytes(&self) -> usize {
        self.runs() * self.row_bytes()
    }
}

/// The bytes of one page in a mapped page file.
///
/// Whoever makes one vouches for it; kernels then read and write pages without further ceremony.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PagePtr(*mut u8);

// SAFETY: a `PagePtr` is an address; the promise made at its creation covers use from other threads.
unsafe impl Send for PagePtr {}
// SAFETY: as above.
unsafe impl Sync for PagePtr {}

impl PagePtr {
    /// # Safety
    /// `start` must be 4-byte aligned and point to the layout's `page_bytes()` readable and writable bytes for as long
    /// as the pointer is used, and no position may be written while it is read: only the one sequence that a page's open
    /// positions are reserved for writes them, and nobody reads a position before it is written.
    pub unsafe fn new(start: *mut u8) -> PagePtr {
        PagePtr(start)
    }

    pub fn as_ptr(self) -> *mut u8 {
        self.0
    }

    /// `len` bytes at `offset` of the page.
    pub fn bytes<'a>(self, layout: &PageLayout, offset: usize, len: usize) -> &'a [u8] {
        assert!(offset + len <= layout.page_bytes(), "read past the end of a page");
        // SAFETY: inside the page, which is readable by the promise of `new`.
        unsafe { std::slice::from_raw_parts(self.0.add(offset), len) }
    }

    /// Writes `bytes` at `offset` of the page.
    pub fn write(self, layout: &PageLayout, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= layout.page_bytes(), "write past the end of a page");
        // SAFETY: inside the page, which is writable and unread there by the promise of `new`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(offset), bytes.len()) }
    }

    /// Writes a key, as a row of [`PageLayout::row_bytes`], to `position` of the K run at `run`.
    pub fn write_key(self, layout: &PageLayout, run: usize, position: usize, bytes: &[u8]) {
        assert!(position < PAGE_TOKENS && bytes.len() == layout.row_bytes());
        assert!(run + layout.head_bytes() <= layout.page_bytes(), "write past the end of a page");
        let (group, lane) = (position / KEY_GROUP, position % KEY_GROUP);
        let start = run + group * KEY_GROUP * bytes.len();
        let mut from = bytes.as_ptr();
        for (offset, part) in layout.key_parts() {
            // SAFETY: the parts of a position fill a row, and lie inside its group, of this page; see `write`.
            unsafe {
                let to = self.0.add(start + offset + lane * part);
                // Of one byte or two: sizes that are known become moves instead of calls.
                match part {
                    1 => to.write(from.read()),
                    _ => to.cast::<[u8; 2]>().write(from.cast::<[u8; 2]>().read()),
                }
                from = from.add(part);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_has_bytes_of_its_own_and_what_is_held_is_theirs() {
        for (dtype, head_dim) in [KvDtype::F16, KvDtype::Q8_0].into_iter().flat_map(|d| [(d, 24), (d, 64)]) {
            let layout = PageLayout { layers: 1, kv_heads: 2, head_dim, dtype };
            // Of each byte, the position that wrote it, counted from 1.
            let mut memory = vec![0u32; layout.page_bytes().div_ceil(4)];
            // SAFETY: the vector holds a page and outlives the pointer, which this test alone uses.
            let page = unsafe { PagePtr::new(memory.as_mut_ptr().cast()) };
            for position in 0..PAGE_TOKENS {
                let row = vec![position as u8 + 1; layout.row_bytes()];
                for head in 0..2 {
                    page.write_key(&layout, layout.k_offset(0, head), position, &row);
                    page.write(&layout, layout.v_offset(0, head) + position * row.len(), &row);
                }
            }
            let bytes = page.bytes(&layout, 0, layout.page_bytes());
            for positions in 0..=PAGE_TOKENS {
                let mut end = 0;
                let mut held = Vec::new();
                for range in layout.held(positions) {
                    assert!(range.start >= end && !range.is_empty(), "ascending");
                    end = range.end;
                    held.extend_from_slice(&bytes[range]);
                }
                assert_eq!(held.len(), positions * layout.token_bytes(), "{dtype:?} {head_dim} {positions}");
                assert!(held.iter().all(|byte| (1..=positions).contains(&usize::from(*byte))));
            }
        }
    }
}
