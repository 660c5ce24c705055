//! The two things ever done to page bytes outside kernels: checksums, and the copy of copy-on-write.

use dormouse_kernels::{PAGE_TOKENS, PageLayout};

/// CRC-32C of the bytes that the first `positions` positions of the page at `page` have, ascending ([`PageLayout::held`]).
///
/// # Safety
/// `page` points to `layout.page_bytes()` mapped bytes, and nobody writes those positions meanwhile.
pub(crate) unsafe fn checksum(layout: &PageLayout, page: *const u8, positions: usize) -> u32 {
    assert!((1..=PAGE_TOKENS).contains(&positions));
    if positions == PAGE_TOKENS {
        // Runs lie side by side, so a sealed page is one stretch.
        // SAFETY: the caller's promise.
        return crc32c::crc32c(unsafe { std::slice::from_raw_parts(page, layout.page_bytes()) });
    }
    layout.held(positions).fold(0, |crc, held| {
        // SAFETY: the caller's promise; what is held lies inside the page.
        crc32c::crc32c_append(crc, unsafe { std::slice::from_raw_parts(page.add(held.start), held.len()) })
    })
}

/// Copies the first `positions` positions of the page at `from` to the page at `to`.
///
/// # Safety
/// Both point to `layout.page_bytes()` mapped bytes of different slots, `to`'s is not read or written by anybody
/// else, and nobody writes those positions of `from` meanwhile.
pub(crate) unsafe fn copy_rows(layout: &PageLayout, from: *const u8, to: *mut u8, positions: usize) {
    assert!(positions < PAGE_TOKENS, "a sealed page is never copied");
    for held in layout.held(positions) {
        // SAFETY: the caller's promise; what is held lies inside both pages, which do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.add(held.start), to.add(held.start), held.len()) };
    }
}
