//! KV pages on the device: a cache of the mapped pages, which stay the truth.
//!
//! A page's address in the mapping names it. What the device holds of a page are its first positions, with the bytes that the
//! mapping has there: both are written by forward passes, and whoever else writes a mapped page says so
//! ([`PageCache::forget`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::cuda::{CudaError, DeviceBuffer, Gpu, Mark, Pinned, Span, Uploads};
use dormouse_kernels::{PAGE_TOKENS, PageLayout, PagePtr};

/// Pages on the device begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Device memory is taken in pieces of about this many bytes, as it is needed, and never given back: other models on the
/// same device take theirs meanwhile.
const PIECE_BYTES: usize = 64 << 20;
/// Pages go up through pinned memory of about this many bytes, one half of which is filled while the other is copied.
const STAGING_BYTES: usize = 32 << 20;
/// Without a budget, what is left free when memory is taken: activations and whoever else uses the device need it.
const LEFT_FREE_BYTES: usize = 512 << 20;

/// A page that the device holds.
struct Held {
    place: usize,
    /// Its first positions, which are as in the mapping.
    positions: usize,
    last_used: u64,
}

pub(super) struct PageCache {
    gpu: Arc<Gpu>,
    layout: PageLayout,
    stride: usize,
    /// Pages of a piece.
    piece_pages: usize,
    /// Most pages; None: what there is room for.
    most_pages: Option<usize>,
    pieces: Vec<DeviceBuffer<u8>>,
    /// Pages that the pieces have room for; the last piece may be a smaller one.
    places: usize,
    free: Vec<usize>,
    held: HashMap<PagePtr, Held>,
    clock: u64,
    /// What the device lacks of the pages of the pass that is being made.
    coming: Vec<Coming>,
    uploads: Uploads,
    staging: Staging,
    /// Behind the last layer's parts that were sent.
    arrived: Mark,
}

/// A page on its way up.
struct Coming {
    page: PagePtr,
    place: usize,
    /// The positions that the device has once it is there.
    positions: usize,
}

/// Pinned memory in two halves.
struct Staging {
    memory: Pinned<u8>,
    /// Behind the copies from each half, when it was left.
    left: [Mark; 2],
    half: usize,
    filled: usize,
}

impl Staging {
    fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Staging, CudaError> {
        let (memory, left) = (Pinned::new(gpu, bytes)?, [Mark::new(gpu)?, Mark::new(gpu)?]);
        Ok(Staging { memory, left, half: 0, filled: 0 })
    }

    /// Room for so many bytes, no more than a half, which no copy needs any longer.
    fn take(&mut self, uploads: &Uploads, bytes: usize) -> Result<usize, CudaError> {
        let half_bytes = self.memory.len() / 2;
        if self.filled + bytes > half_bytes {
            uploads.set(&self.left[self.half])?;
            (self.half, self.filled) = (1 - self.half, 0);
            self.left[self.half].wait()?;
        }
        let at = self.half * half_bytes + self.filled;
        self.filled += bytes;
        Ok(at)
    }
}

/// Where a cache begins to take memory.
struct Sizes {
    piece_bytes: usize,
    staging_bytes: usize,
}

impl PageCache {
    pub fn new(
        gpu: &Arc<Gpu>,
        layout: PageLayout,
        budget_bytes: Option<u64>,
    ) -> Result<PageCache, CudaError> {
        let sizes = Sizes { piece_bytes: PIECE_BYTES, staging_bytes: STAGING_BYTES };
        PageCache::of_sizes(gpu, layout, budget_bytes, sizes)
    }

    fn of_sizes(
        gpu: &Arc<Gpu>,
        layout: PageLayout,
        budget_bytes: Option<u64>,
        sizes: Sizes,
    ) -> Result<PageCache, CudaError> {
        let stride = layout.page_bytes().next_multiple_of(ALIGNMENT);
        let most_pages = budget_bytes.map(|bytes| (bytes / stride as u64) as usize);
        if most_pages == Some(0) {
            let (what, wanted) = ("KV pages (--device-budget holds not one)", stride);
            return Err(CudaError::NoRoom { what, wanted, free: budget_bytes.unwrap_or(0) as usize });
        }
        let piece_pages = (sizes.piece_bytes / stride).max(1).min(most_pages.unwrap_or(usize::MAX));
        let staging = Staging::new(gpu, sizes.staging_bytes.max(2 * layer_bytes(&layout)))?;
        Ok(PageCache {
            gpu: Arc::clone(gpu),
            layout,
            stride,
            piece_pages,
            most_pages,
            pieces: Vec::new(),
            places: 0,
            free: Vec::new(),
            held: HashMap::new(),
            clock: 0,
            coming: Vec::new(),
            uploads: Uploads::new(gpu)?,
            staging,
            arrived: Mark::new(gpu)?,
        })
    }

    pub fn forget(&mut self, pages: &[PagePtr]) {
        for page in pages {
            if let Some(held) = self.held.remove(page) {
                self.free.push(held.place);
            }
        }
    }

    pub fn forget_all(&mut self) {
        self.free.extend(self.held.drain().map(|(_, held)| held.place));
    }

    /// Whether so many pages of one sequence can be on the device.
    pub fn check_room(&self, pages: usize) -> Result<(), CudaError> {
        if pages <= self.places || pages <= self.capacity() {
            return Ok(());
        }
        Err(CudaError::NoRoom {
            what: "a session's KV pages (give it more with --device-budget, or use --kv-dtype q8_0 or --device cpu)",
            wanted: pages * self.stride,
            free: self.capacity() * self.stride,
        })
    }

    /// How many of the sequences, from the first on, can have their pages on the device together: at least one, whether or
    /// not it can.
    pub fn fitting(&self, sequences: &[Sequence<'_>]) -> usize {
        let (most, mut pages) = (self.capacity(), HashSet::<PagePtr>::new());
        let fits = |sequence: &&Sequence<'_>| {
            pages.extend(pages_of(sequence));
            pages.len() <= most
        };
        sequences.iter().take_while(fits).count().max(1)
    }

    /// Pages that the device holds or has room for. What it has no room for now it may have later.
    fn capacity(&self) -> usize {
        // A device that cannot say has failed, and the pass says how.
        let free = self.gpu.free_bytes().unwrap_or(usize::MAX).saturating_sub(self.left_free());
        let more = free / (self.piece_pages * self.stride) * self.piece_pages;
        self.places.saturating_add(more).min(self.most_pages.unwrap_or(usize::MAX))
    }

    fn left_free(&self) -> usize {
        if self.most_pages.is_some() { 0 } else { LEFT_FREE_BYTES }
    }

    /// Gives all of its memory back to the device, which was waited for: something else needs room.
    pub fn give_back(&mut self) {
        self.forget_all();
        self.free.clear();
        self.pieces.clear();
        self.places = 0;
    }

    /// Makes room for all pages of `sequences`, and notes what the device lacks of them, which [`PageCache::bring_layer`] brings
    /// up. The device's addresses of all their pages, one sequence after the other; of pages that nothing is known of yet, 0.
    pub fn place(&mut self, sequences: &[Sequence<'_>]) -> Result<Vec<u64>, CudaError> {
        self.clock += 1;
        self.coming.clear();
        for page in sequences.iter().flat_map(|sequence| pages_of(sequence)) {
            if let Some(held) = self.held.get_mut(page) {
                held.last_used = self.clock;
            }
        }
        let (mut addresses, mut coming) = (Vec::new(), HashMap::new());
        for sequence in sequences {
            let used = pages_of(sequence).len();
            for (index, page) in sequence.pages.iter().enumerate() {
                if index >= used {
                    addresses.push(0);
                    continue;
                }
                let place = self.place_of(*page)?;
                let needed = sequence.start.saturating_sub(index * PAGE_TOKENS).min(PAGE_TOKENS);
                if self.held[page].positions < needed {
                    // Sequences that begin alike share pages, and may need more of one or less.
                    let known = coming.entry(*page).or_insert_with(|| {
                        self.coming.push(Coming { page: *page, place, positions: 0 });
                        self.coming.len() - 1
                    });
                    let positions = &mut self.coming[*known].positions;
                    *positions = needed.max(*positions);
                }
                addresses.push(self.address(place));
            }
        }
        Ok(addresses)
    }

    fn place_of(&mut self, page: PagePtr) -> Result<usize, CudaError> {
        if let Some(held) = self.held.get(&page) {
            return Ok(held.place);
        }
        let place = self.take_place()?;
        self.held.insert(page, Held { place, positions: 0, last_used: self.clock });
        Ok(place)
    }

    /// Whether the device lacks something of the pages that were placed.
    pub fn lacks_some(&self) -> bool {
        !self.coming.is_empty()
    }

    fn take_place(&mut self) -> Result<usize, CudaError> {
        if self.free.is_empty() {
            self.grow();
        }
        if let Some(place) = self.free.pop() {
            return Ok(place);
        }
        // The least recently used pages that this batch does not need, several at once, so that they are not looked for
        // again for the next page.
        let others = self.held.iter().filter(|(_, held)| held.last_used < self.clock);
        let mut oldest: Vec<(u64, PagePtr)> = others.map(|(page, held)| (held.last_used, *page)).collect();
        oldest.sort_unstable();
        oldest.truncate((self.held.len() / 16).max(1));
        let pages: Vec<PagePtr> = oldest.into_iter().map(|(_, page)| page).collect();
        self.forget(&pages);
        let held = self.held.len();
        self.free.pop().ok_or(CudaError::NoRoom {
            what: "a step's KV pages (give them more with --device-budget)",
            wanted: (held + 1) * self.stride,
            free: held * self.stride,
        })
    }

    /// Takes one more piece of the device's memory, if there is one.
    fn grow(&mut self) {
        let have = self.places;
        let pages = self.piece_pages.min(self.most_pages.unwrap_or(usize::MAX).saturating_sub(have));
        let bytes = pages * self.stride;
        let has_room = self.gpu.free_bytes().is_ok_and(|free| free >= bytes + self.left_free());
        if pages == 0 || !has_room {
            return;
        }
        // Where others took the room at the same moment, pages make room for each other.
        if let Ok(piece) = DeviceBuffer::new(&self.gpu, bytes, "KV pages") {
            self.pieces.push(piece);
            self.places += pages;
            self.free.extend((have..have + pages).rev());
        }
    }

    fn address(&self, place: usize) -> u64 {
        self.span(place).address()
    }

    fn span(&self, place: usize) -> Span<'_, u8> {
        let (piece, index) = (place / self.piece_pages, place % self.piece_pages);
        self.pieces[piece].span().part(index * self.stride..index * self.stride + self.layout.page_bytes())
    }

    /// Sends up one layer's part of what the device lacks, with what it holds of positions that nobody reads. What is asked of
    /// the device from now on finds it there; what was asked for before goes on meanwhile.
    pub fn bring_layer(&mut self, layer: usize) -> Result<(), CudaError> {
        if self.coming.is_empty() {
            return Ok(());
        }
        let bytes = layer_bytes(&self.layout);
        for coming in &self.coming {
            let at = self.staging.take(&self.uploads, bytes)?;
            let mapped = coming.page.bytes(&self.layout, layer * bytes, bytes);
            self.staging.memory.as_mut_slice()[at..at + bytes].copy_from_slice(mapped);
            let to = self.span(coming.place).part(layer * bytes..(layer + 1) * bytes);
            // SAFETY: this part of the staging memory is written again once its half's mark was waited for. Passes end with
            // waiting for the device, even those that fail, so nobody uses this place for what was there before.
            unsafe { self.uploads.copy(&self.staging.memory, at, to)? };
        }
        self.uploads.set(&self.arrived)?;
        self.gpu.wait_for(&self.arrived)
    }

    /// Waits for what is on its way up, for a pass that failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.uploads.set(&self.arrived)?;
        self.arrived.wait()
    }

    /// After a pass that was waited for: the device and the mapping hold the rows of `sequences`.
    pub fn wrote(&mut self, sequences: &[Sequence<'_>]) {
        for coming in self.coming.drain(..) {
            self.held.entry(coming.page).and_modify(|held| held.positions = coming.positions);
        }
        for sequence in sequences {
            let end = sequence.start + sequence.rows;
            for (index, page) in pages_of(sequence).iter().enumerate().skip(sequence.start / PAGE_TOKENS) {
                let positions = (end - index * PAGE_TOKENS).min(PAGE_TOKENS);
                self.held.entry(*page).and_modify(|held| held.positions = positions);
            }
        }
    }
}

/// A layer's part of a page is in one piece.
fn layer_bytes(layout: &PageLayout) -> usize {
    layout.page_bytes() / layout.layers
}

/// The pages of all positions up to the last row's.
fn pages_of<'a>(sequence: &Sequence<'a>) -> &'a [PagePtr] {
    &sequence.pages[..(sequence.start + sequence.rows).div_ceil(PAGE_TOKENS)]
}

#[cfg(test)]
#[path = "pages/tests.rs"]
mod tests;
