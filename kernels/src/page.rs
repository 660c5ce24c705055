//! The geometry of one KV page: the keys and values of [`PAGE_TOKENS`] consecutive positions, for all layers.
//!
//! Inside a page: layer-major, K then V, each `[kv_heads, PAGE_TOKENS, head_dim]` contiguous, so that attention
//! streams one layer's page once for a whole group of query heads.

/// Positions held by one page. 64 keeps a page of the default model at 1.4 MiB: large enough that disk reads are
/// sequential, small enough that a crash, which recomputes at most one page, costs well under a second.
pub const PAGE_TOKENS: usize = 64;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE half precision, 2 bytes a value.
    F16,
    /// GGML Q8_0 blocks along the head dimension: 32 signed bytes and one f16 scale, 34 bytes for 32 values.
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

    /// Byte offset of the K run of `head` in `layer`; position `p` of the page is at `+ p * row_bytes()`.
    pub fn k_offset(&self, layer: usize, head: usize) -> usize {
        debug_assert!(layer < self.layers && head < self.kv_heads);
        (layer * 2 * self.kv_heads + head) * self.head_bytes()
    }

    /// Byte offset of the V run of `head` in `layer`.
    pub fn v_offset(&self, layer: usize, head: usize) -> usize {
        self.k_offset(layer, head) + self.kv_heads * self.head_bytes()
    }

    /// Bytes of a whole page, without the padding that a page file may add.
    pub fn page_bytes(&self) -> usize {
        self.runs() * self.head_bytes()
    }

    /// KV bytes that one token costs.
    pub fn token_bytes(&self) -> usize {
        self.runs() * self.row_bytes()
    }
}

/// The bytes of one page in a mapped page file.
///
/// Whoever makes one vouches for it; kernels then read and write pages without further ceremony.
#[derive(Clone, Copy, Debug)]
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

    /// Asks the processor for `len` bytes at `offset` of the page, to have them near when they are read.
    #[inline(always)]
    pub fn prefetch(self, layout: &PageLayout, offset: usize, len: usize) {
        assert!(offset + len <= layout.page_bytes(), "prefetch past the end of a page");
        #[cfg(target_arch = "x86_64")]
        for line in (0..len).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: inside the page; a prefetch changes nothing but what the caches hold.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.0.add(offset + line).cast_const().cast()) }
        }
    }

    /// Writes `bytes` at `offset` of the page.
    pub fn write(self, layout: &PageLayout, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= layout.page_bytes(), "write past the end of a page");
        // SAFETY: inside the page, which is writable and unread there by the promise of `new`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(offset), bytes.len()) }
    }
}
