//! They need a device, or the emulated one that `scripts/check_cuda` brings along.

use dormouse_kernels::{KvDtype, PAGE_TOKENS};

use super::*;

const LAYOUT: PageLayout = PageLayout { layers: 3, kv_heads: 2, head_dim: 24, dtype: KvDtype::F16 };

/// Mapped pages, each of bytes of its own.
struct Mapped(Vec<Vec<u32>>);

impl Mapped {
    fn new(count: usize) -> Mapped {
        let words = LAYOUT.page_bytes() / 4;
        let page = |page: usize| (0..words).map(|word| (page * words + word) as u32).collect();
        Mapped((0..count).map(page).collect())
    }

    fn pages(&mut self) -> Vec<PagePtr> {
        // SAFETY: the vectors hold a page each and are not touched while the pointers are used.
        self.0.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect()
    }
}

/// A cache for so many pages, two in a piece of memory, one layer of one page in half of the staging memory.
fn cache(pages: usize) -> PageCache {
    let gpu = Gpu::open(0)
        .unwrap_or_else(|error| panic!("{error}; scripts/check_cuda runs these tests without a device"));
    let stride = LAYOUT.page_bytes().next_multiple_of(ALIGNMENT);
    let sizes = Sizes { piece_bytes: 2 * stride + 1, staging_bytes: 0 };
    PageCache::of_sizes(&gpu, LAYOUT, Some((pages * stride) as u64), sizes).unwrap()
}

/// A sequence that has computed all of these pages, but for the position that it computes now.
fn whole(pages: &[PagePtr]) -> Sequence<'_> {
    Sequence { pages, first_row: 0, rows: 1, start: pages.len() * PAGE_TOKENS - 1 }
}

/// What the device has at the places of `pages`, after all that was asked of it.
fn on_device(cache: &PageCache, pages: &[PagePtr]) -> Vec<Vec<u8>> {
    let mut host = Pinned::new(&cache.gpu, LAYOUT.page_bytes()).unwrap();
    let read = |page: &PagePtr| {
        // SAFETY: it is waited for before anything else is done with the memory.
        unsafe { cache.span(cache.places.of(page).unwrap()).copy_out(&cache.gpu, &mut host).unwrap() };
        cache.gpu.wait().unwrap();
        host.as_slice().to_vec()
    };
    pages.iter().map(read).collect()
}

fn bytes(pages: &[PagePtr]) -> Vec<Vec<u8>> {
    pages.iter().map(|page| page.bytes(&LAYOUT, 0, LAYOUT.page_bytes()).to_vec()).collect()
}

#[test]
fn pages_go_up_layer_by_layer_through_little_memory_and_arrive_whole() {
    let (mut mapped, mut cache) = (Mapped::new(5), cache(5));
    let pages = mapped.pages();
    cache.place(&[whole(&pages)]).unwrap();
    assert!(cache.lacks_some());
    for layer in 0..LAYOUT.layers {
        cache.bring_layer(layer).unwrap();
    }
    assert!(on_device(&cache, &pages) == bytes(&pages));
    cache.wrote(&[whole(&pages)]);
    cache.place(&[whole(&pages)]).unwrap();
    assert!(!cache.lacks_some());
}

#[test]
fn a_layer_that_was_asked_for_after_its_pages_part_finds_it() {
    let (mut mapped, mut cache) = (Mapped::new(3), cache(3));
    let pages = mapped.pages();
    cache.place(&[whole(&pages)]).unwrap();
    let layer_bytes = layer_bytes(&LAYOUT);
    for layer in 0..LAYOUT.layers {
        cache.bring_layer(layer).unwrap();
        for page in &pages {
            let part = layer * layer_bytes..(layer + 1) * layer_bytes;
            let mut host = Pinned::new(&cache.gpu, layer_bytes).unwrap();
            let span = cache.span(cache.places.of(page).unwrap()).part(part.clone());
            // SAFETY: it is waited for before anything else is done with the memory.
            unsafe { span.copy_out(&cache.gpu, &mut host).unwrap() };
            cache.gpu.wait().unwrap();
            assert!(host.as_slice() == page.bytes(&LAYOUT, part.start, part.len()), "layer {layer}");
        }
    }
}

#[test]
fn a_pass_that_failed_leaves_no_page_for_there() {
    let (mut mapped, mut cache) = (Mapped::new(2), cache(2));
    let pages = mapped.pages();
    cache.place(&[whole(&pages)]).unwrap();
    cache.bring_layer(0).unwrap();
    // The next pass begins anew, with what the first one lacked.
    cache.place(&[whole(&pages)]).unwrap();
    assert!(cache.lacks_some());
    for layer in 0..LAYOUT.layers {
        cache.bring_layer(layer).unwrap();
    }
    assert!(on_device(&cache, &pages) == bytes(&pages));
}

#[test]
fn sequences_that_share_a_page_bring_it_up_once_as_far_as_any_needs_it() {
    let (mut mapped, mut cache) = (Mapped::new(2), cache(2));
    let pages = mapped.pages();
    let short = Sequence { pages: &pages[..1], first_row: 0, rows: 1, start: 20 };
    let sequences = [short, Sequence { first_row: 1, ..whole(&pages) }, short];
    let addresses = cache.place(&sequences).unwrap();
    assert_eq!((addresses[0], addresses[0]), (addresses[1], addresses[3]));
    let coming: Vec<usize> = cache.places.coming().iter().map(|coming| coming.positions).collect();
    assert_eq!(coming, [PAGE_TOKENS, PAGE_TOKENS - 1]);
}

/// Two pieces of two pages, and one of the fifth.
#[test]
fn a_last_piece_that_is_not_whole_has_places_for_the_pages_that_it_holds_and_no_more() {
    let (mut mapped, mut cache) = (Mapped::new(6), cache(5));
    let pages = mapped.pages();
    assert!(cache.check_room(5).is_ok() && cache.check_room(6).is_err());
    let mut addresses = cache.place(&[whole(&pages[..5])]).unwrap();
    for layer in 0..LAYOUT.layers {
        cache.bring_layer(layer).unwrap();
    }
    assert!(on_device(&cache, &pages[..5]) == bytes(&pages[..5]), "none lies over another");
    cache.wrote(&[whole(&pages[..5])]);
    assert_eq!((cache.memory.places, cache.memory.pieces.len()), (5, 3));
    assert_eq!(cache.memory.pieces[2].len(), cache.memory.stride);
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 5);
    // A sixth page takes the place of the one that was used longest ago, and together they have no room.
    cache.place(&[whole(&pages[1..5])]).unwrap();
    let sixth = cache.place(&[whole(&pages[5..])]).unwrap();
    assert!(addresses.contains(&sixth[0]) && cache.places.of(&pages[0]).is_none());
    assert!(cache.place(&[whole(&pages)]).is_err());
    assert_eq!(cache.fitting(&[whole(&pages[..3]), whole(&pages[2..5]), whole(&pages[5..])]), 2);
    cache.give_back();
    assert_eq!((cache.memory.places, cache.memory.pieces.len()), (0, 0));
    assert!(cache.check_room(5).is_ok() && cache.check_room(6).is_err());
}
