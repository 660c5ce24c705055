//! The two things ever done to page bytes outside kernels: checksums, and the copy of copy-on-write.

use dormouse_kernels::{PAGE_TOKENS, PageLayout};

/// CRC-32C of the first `positions` rows of every run of the page at `page`, in the order of the runs.
///
/// # Safety
/// `page` points to `layout.page_bytes()` mapped bytes, and nobody writes those rows meanwhile.
pub(crate) unsafe fn checksum(layout: &PageLayout, page: *const u8, positions: usize) -> u32 {
    assert!((1..=PAGE_TOKENS).contains(&positions));
    if positions == PAGE_TOKENS {
        // Runs lie side by side, so a sealed page is one stretch.
        // SAFETY: the caller's promise.
        return crc32c::crc32c(unsafe { std::slice::from_raw_parts(page, layout.page_bytes()) });
    }
    let len = positions * layout.row_bytes();
    (0..layout.runs()).fold(0, |crc, run| {
        // SAFETY: the caller's promise; `positions < PAGE_TOKENS`, so the rows lie inside run `run` of the page.
        let rows = unsafe { std::slice::from_raw_parts(page.add(run * layout.head_bytes()), len) };
        crc32c::crc32c_append(crc, rows)
    })
}

/// Copies the first `positions` rows of every run of the page at `from` to the page at `to`.
///
/// # Safety
/// Both point to `layout.page_bytes()` mapped bytes of different slots, `to`'s is not read or written by anybody
/// else, and nobody writes those rows of `from` meanwhile.
pub(crate) unsafe fn copy_rows(layout: &PageLayout, from: *const u8, to: *mut u8, positions: usize) {
    assert!(positions < PAGE_TOKENS, "a sealed page is never copied");
    let len = positions * layout.row_bytes();
    for run in 0..layout.runs() {
        let offset = run * layout.head_bytes();
        // SAFETY: the caller's promise; the rows lie inside run `run` of both pages, which do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.add(offset), to.add(offset), len) };
    }
}
