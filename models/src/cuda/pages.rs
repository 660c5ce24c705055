//! KV pages on the device: a cache of the mapped pages ([`crate::places`]), which stay the truth.

use std::ops::Range;
use std::sync::Arc;

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::cuda::{CudaError, DeviceBuffer, Gpu, Mark, Pinned, Span, Uploads};
use dormouse_kernels::{PageLayout, PagePtr};

use crate::places::{Places, fitting};

/// Pages on the device begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Device memory is taken in pieces of about this many bytes, as it is needed, and never given back: other models on the
/// same device take theirs meanwhile.
const PIECE_BYTES: usize = 64 << 20;
/// Pages go up through pinned memory of about this many bytes, one half of which is filled while the other is copied.
const STAGING_BYTES: usize = 32 << 20;
/// Without a budget, what is left free when memory is taken: activations and whoever else uses the device need it.
const LEFT_FREE_BYTES: usize = 512 << 20;

pub(super) struct PageCache {
    gpu: Arc<Gpu>,
    layout: PageLayout,
    memory: Pieces,
    places: Places,
    uploads: Uploads,
    staging: Staging,
    /// Behind the last layer's parts that were sent.
    arrived: Mark,
}

/// The device's memory for pages.
struct Pieces {
    gpu: Arc<Gpu>,
    /// Bytes from one page to the next.
    stride: usize,
    /// Pages of a piece.
    piece_pages: usize,
    /// Most pages; None: what there is room for.
    most_pages: Option<usize>,
    pieces: Vec<DeviceBuffer<u8>>,
    /// Pages that the pieces have room for; the last piece may be a smaller one.
    places: usize,
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
            memory: Pieces {
                gpu: Arc::clone(gpu),
                stride,
                piece_pages,
                most_pages,
                pieces: Vec::new(),
                places: 0,
            },
            places: Places::default(),
            uploads: Uploads::new(gpu)?,
            staging,
            arrived: Mark::new(gpu)?,
        })
    }

    pub fn forget(&mut self, pages: &[PagePtr]) {
        self.places.forget(pages);
    }

    pub fn forget_all(&mut self) {
        self.places.forget_all();
    }

    /// Whether so many pages of one sequence can be on the device.
    pub fn check_room(&self, pages: usize) -> Result<(), CudaError> {
        if pages <= self.memory.places || pages <= self.memory.capacity() {
            return Ok(());
        }
        Err(CudaError::NoRoom {
            what: "a session's KV pages (give it more with --device-budget, or use --kv-dtype q8_0 or --device cpu)",
            wanted: pages * self.memory.stride,
            free: self.memory.capacity() * self.memory.stride,
        })
    }

    /// How many of the sequences, from the first on, can have their pages on the device together: at least one, whether or
    /// not it can.
    pub fn fitting(&self, sequences: &[Sequence<'_>]) -> usize {
        fitting(sequences, self.memory.capacity())
    }

    /// Gives all of its memory back to the device, which was waited for: something else needs room.
    pub fn give_back(&mut self) {
        self.places = Places::default();
        self.memory.pieces.clear();
        self.memory.places = 0;
    }

    /// Makes room for all pages of `sequences`, and notes what the device lacks of them, which [`PageCache::bring_layer`] brings
    /// up. The device's addresses of all their pages, one sequence after the other; of pages that nothing is known of yet, 0.
    pub fn place(&mut self, sequences: &[Sequence<'_>]) -> Result<Vec<u64>, CudaError> {
        let (places, memory) = (&mut self.places, &mut self.memory);
        let placed = places.place(sequences, &mut || memory.grow()).map_err(|full| CudaError::NoRoom {
            what: "a step's KV pages (give them more with --device-budget)",
            wanted: (full.0 + 1) * memory.stride,
            free: full.0 * memory.stride,
        })?;
        let address = |place: Option<usize>| place.map_or(0, |place| self.span(place).address());
        Ok(placed.into_iter().map(address).collect())
    }

    /// Whether the device lacks something of the pages that were placed.
    pub fn lacks_some(&self) -> bool {
        !self.places.coming().is_empty()
    }

    fn span(&self, place: usize) -> Span<'_, u8> {
        self.memory.span(place, self.layout.page_bytes())
    }

    /// Sends up one layer's part of what the device lacks, with what it holds of positions that nobody reads. What is asked of
    /// the device from now on finds it there; what was asked for before goes on meanwhile.
    pub fn bring_layer(&mut self, layer: usize) -> Result<(), CudaError> {
        if !self.lacks_some() {
            return Ok(());
        }
        let bytes = layer_bytes(&self.layout);
        for coming in self.places.coming() {
            let at = self.staging.take(&self.uploads, bytes)?;
            let mapped = coming.page.bytes(&self.layout, layer * bytes, bytes);
            self.staging.memory.as_mut_slice()[at..at + bytes].copy_from_slice(mapped);
            let to = self
                .memory
                .span(coming.place, self.layout.page_bytes())
                .part(layer * bytes..(layer + 1) * bytes);
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
        self.places.wrote(sequences);
    }
}

impl Pieces {
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

    /// Takes one more piece of the device's memory, if there is one: the places that it has.
    fn grow(&mut self) -> Range<usize> {
        let have = self.places;
        let pages = self.piece_pages.min(self.most_pages.unwrap_or(usize::MAX).saturating_sub(have));
        let bytes = pages * self.stride;
        let has_room = self.gpu.free_bytes().is_ok_and(|free| free >= bytes + self.left_free());
        if pages == 0 || !has_room {
            return have..have;
        }
        // Where others took the room at the same moment, pages make room for each other.
        let Ok(piece) = DeviceBuffer::new(&self.gpu, bytes, "KV pages") else { return have..have };
        self.pieces.push(piece);
        self.places += pages;
        have..self.places
    }

    fn span(&self, place: usize, page_bytes: usize) -> Span<'_, u8> {
        let (piece, index) = (place / self.piece_pages, place % self.piece_pages);
        self.pieces[piece].span().part(index * self.stride..index * self.stride + page_bytes)
    }
}

/// A layer's part of a page is in one piece.
fn layer_bytes(layout: &PageLayout) -> usize {
    layout.page_bytes() / layout.layers
}

#[cfg(test)]
#[path = "pages/tests.rs"]
mod tests;
