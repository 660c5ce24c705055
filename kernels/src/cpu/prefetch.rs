//! Asking the processor for bytes before they are needed.
//!
//! A core waits for memory most of the time unless it is asked early: what it fetches by itself ahead of a kernel's reads
//! is a kilobyte or so, and nothing across pages.

/// Asks for the 64-byte lines of `bytes` bytes at `start`, which may lie anywhere, in the second-level cache. Little by little: a
/// core that has asked for some dozens of lines waits until the first ones have come.
#[inline(always)]
pub fn prefetch(start: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch changes nothing but what the caches hold, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(line).cast()) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (start, line);
    }
}
