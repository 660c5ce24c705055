//! Attention, norms, activations and rotation allocate nothing once they have run: a decode step waits for no allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use dormouse_kernels::cpu::attention::{Attention, Sequence, attend, store_kv};
use dormouse_kernels::cpu::norm::{add_scaled, gelu_gate, rms_norm, silu_gate};
use dormouse_kernels::cpu::rope::{RopeKind, rotate};
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decode_step_allocates_nothing_after_the_first() {
    const HEADS: usize = 6;
    const WIDTH: usize = 6 * 64;
    let cpu = Cpu::new(2).unwrap();
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let layout = PageLayout { layers: 1, kv_heads: 2, head_dim: 64, dtype };
        let mut memory = vec![vec![0u64; layout.page_bytes().div_ceil(8)]; 20];
        // SAFETY: each vector holds a page and outlives the table.
        let pages: Vec<PagePtr> =
            memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
        let filled = vec![0.5; 20 * PAGE_TOKENS * 2 * 64];
        let all = Sequence { pages: &pages, first_row: 0, rows: 20 * PAGE_TOKENS, start: 0 };
        store_kv(&cpu, &layout, 0, &[all], &filled, &filled);

        let (mut x, mut q, mut out) = (vec![0.5; 2 * WIDTH], vec![0.5; 2 * WIDTH], vec![0.0; 2 * WIDTH]);
        let (weight, cos, sin) = (vec![1.0; WIDTH], vec![1.0; 2 * 32], vec![0.0; 2 * 32]);
        let mut step = |position: usize| {
            let sequence = |first_row, start| Sequence { pages: &pages, first_row, rows: 1, start };
            let sequences = [sequence(0, position), sequence(1, position / 2)];
            rms_norm(&cpu, &x, &weight, 1e-5, &mut q);
            rotate(&cpu, RopeKind::Half, &mut q, 64, 32, &cos, &sin);
            store_kv(&cpu, &layout, 0, &sequences, &q[..2 * 128], &q[..2 * 128]);
            let attention =
                Attention { layout, layer: 0, heads: HEADS, scale: 0.1, window: None, soft_cap: None };
            attend(&cpu, attention, &sequences, &q, &mut out);
            silu_gate(&cpu, &mut out, &q);
            gelu_gate(&cpu, &mut out, &q);
            add_scaled(&cpu, &mut x, &out, 0.5);
        };
        // Both threads must have had a task of each kind: which thread takes which is left to chance.
        let mut quiet = 0;
        for _ in 0..2_000 {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            step(1200);
            quiet = if ALLOCATIONS.load(Ordering::Relaxed) == before { quiet + 1 } else { 0 };
            if quiet == 100 {
                break;
            }
        }
        assert_eq!(quiet, 100, "steps go on allocating with {} pages", dtype.name());
    }
}
