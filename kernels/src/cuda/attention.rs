//! Keys and values into device pages, and attention over them.

use super::driver::CudaError;
use super::gpu::{Gpu, Grid, Kernel};
use super::memory::Span;
use crate::cpu::attention::{Attention, Sequence};
use crate::page::{KvDtype, PAGE_TOKENS, PageLayout};

/// Positions of one segment, and queries of one block, in `attention.cu`.
const SEGMENT: usize = 256;
const QUERIES: usize = 8;
/// Bytes that the partial results of a call may take; where they would take more, a block walks all segments of its queries.
const PARTIALS_MOST: usize = 64 << 20;
/// Blocks for each multiprocessor from which on the device is busy without splitting sequences.
const BUSY: usize = 2;

/// Queries of one block: `Tile` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    first_row: u32,
    first_position: u32,
    table: u32,
    first_query: u32,
    queries: u32,
}

// SAFETY: numbers without gaps between them.
unsafe impl super::memory::Plain for Tile {}

/// The tiles of all sequences, whose pages follow one another in one table; `heads` share a KV head. And the most segments
/// that a sequence has.
pub fn tiles(sequences: &[Sequence<'_>], heads: usize) -> (Vec<Tile>, usize) {
    let (mut tiles, mut table, mut segments) = (Vec::new(), 0, 0);
    for sequence in sequences {
        let queries = sequence.rows * heads;
        tiles.extend((0..queries).step_by(QUERIES).map(|first| Tile {
            first_row: sequence.first_row as u32,
            first_position: sequence.start as u32,
            table,
            first_query: first as u32,
            queries: QUERIES.min(queries - first) as u32,
        }));
        table += sequence.pages.len() as u32;
        segments = segments.max((sequence.start + sequence.rows).div_ceil(SEGMENT));
    }
    (tiles, segments)
}

/// `PageShape` of `pages.cuh`: where a layer lies in a page.
#[repr(C)]
struct PageShape {
    k_offset: u64,
    v_offset: u64,
    head_bytes: u64,
    row_bytes: u32,
    kv_heads: u32,
    head_dim: u32,
    is_q8: u32,
}

impl PageShape {
    fn new(layout: &PageLayout, layer: usize) -> PageShape {
        PageShape {
            k_offset: layout.k_offset(layer, 0) as u64,
            v_offset: layout.v_offset(layer, 0) as u64,
            head_bytes: layout.head_bytes() as u64,
            row_bytes: layout.row_bytes() as u32,
            kv_heads: layout.kv_heads as u32,
            head_dim: layout.head_dim as u32,
            is_q8: u32::from(layout.dtype == KvDtype::Q8_0),
        }
    }
}

/// `AppendArgs` of `append.cu`.
#[repr(C)]
struct AppendArguments {
    k: u64,
    v: u64,
    pages: u64,
    places: u64,
    down: u64,
    shape: PageShape,
}

/// `AttentionArgs` of `attention.cu`.
#[repr(C)]
struct AttendArguments {
    q: u64,
    out: u64,
    tiles: u64,
    pages: u64,
    partials: u64,
    shape: PageShape,
    heads: u32,
    scale: f32,
    window: u32,
    soft_cap: f32,
    splits: u32,
}

/// `MergeArgs` of `attention.cu`.
#[repr(C)]
struct MergeArguments {
    partials: u64,
    out: u64,
    positions: u64,
    heads: u32,
    head_dim: u32,
    window: u32,
    splits: u32,
}

/// New keys and values of one layer, `[rows, kv_heads, head_dim]` each.
pub struct Append<'a> {
    pub layout: &'a PageLayout,
    pub layer: usize,
    pub k: Span<'a, f32>,
    pub v: Span<'a, f32>,
    /// Of each row: the device's page, and its place in it.
    pub pages: Span<'a, u64>,
    pub places: Span<'a, u32>,
    /// Receives the rows as they are stored, `[rows, {K, V}, kv_heads, row_bytes]`.
    pub down: Span<'a, u8>,
}

/// What attention needs to know about the batch.
pub struct Attend<'a> {
    pub attention: Attention,
    /// `[rows, heads, head_dim]`
    pub q: Span<'a, f32>,
    pub out: Span<'a, f32>,
    pub tiles: Span<'a, Tile>,
    /// The device's pages of all sequences, one sequence after the other.
    pub pages: Span<'a, u64>,
    /// Of each row.
    pub positions: Span<'a, u32>,
    /// Segments of the longest sequence.
    pub segments: usize,
    /// For [`Gpu::partials`] values.
    pub partials: Span<'a, f32>,
}

impl Gpu {
    /// Writes keys and values to their pages, and beside them for the way to the host.
    ///
    /// # Safety
    /// `pages` names device pages of this layout, and `places` places in them.
    pub unsafe fn append_kv(&self, append: &Append<'_>) -> Result<(), CudaError> {
        let Append { layout, layer, k, v, pages, places, down } = *append;
        let rows = pages.len();
        let width = layout.kv_heads * layout.head_dim;
        assert!(k.len() == rows * width && v.len() == rows * width && places.len() == rows);
        assert_eq!(down.len(), rows * 2 * layout.kv_heads * layout.row_bytes());
        let arguments = AppendArguments {
            k: k.address(),
            v: v.address(),
            pages: pages.address(),
            places: places.address(),
            down: down.address(),
            shape: PageShape::new(layout, layer),
        };
        let grid = Grid { threads: 128, ..Grid::of(rows, layout.kv_heads, 2) };
        // SAFETY: lengths were compared; pages are the caller's promise.
        unsafe { self.launch(Kernel::AppendKv, grid, &arguments) }
    }

    /// Splits that attention of so many tiles takes, and the values that their partial results take: none where a block
    /// walks all segments of its queries. The bits are the same.
    pub fn partials(
        &self,
        layout: &PageLayout,
        heads: usize,
        rows: usize,
        tiles: usize,
        segments: usize,
    ) -> usize {
        let values = rows * heads * segments * (2 + layout.head_dim);
        let busy = tiles * layout.kv_heads >= BUSY * self.facts().multiprocessors;
        if segments < 2 || busy || values * size_of::<f32>() > PARTIALS_MOST { 0 } else { values }
    }

    /// Causal attention of every row of `q` into `out`.
    ///
    /// # Safety
    /// `pages` names device pages of this layout which hold every position up to each tile's last, and tiles and positions
    /// are those of the sequences whose pages these are.
    pub unsafe fn attend(&self, attend: &Attend<'_>) -> Result<(), CudaError> {
        let Attend { attention, q, out, tiles, pages, positions, segments, partials } = attend;
        let Attention { layout, heads, .. } = attention;
        let rows = positions.len();
        assert!(q.len() == out.len() && q.len() == rows * heads * layout.head_dim);
        let splits = if partials.is_empty() { 0 } else { *segments };
        assert_eq!(partials.len(), rows * heads * splits * (2 + layout.head_dim));
        let window = attention.window.unwrap_or(0) as u32;
        let arguments = AttendArguments {
            q: q.address(),
            out: out.address(),
            tiles: tiles.address(),
            pages: pages.address(),
            partials: partials.address(),
            shape: PageShape::new(layout, attention.layer),
            heads: *heads as u32,
            scale: attention.scale,
            window,
            soft_cap: attention.soft_cap.unwrap_or(0.0),
            splits: splits as u32,
        };
        let grid = Grid {
            shared_bytes: QUERIES * (layout.head_dim + SEGMENT) * size_of::<f32>(),
            ..Grid::of(tiles.len(), layout.kv_heads, splits.max(1))
        };
        // SAFETY: lengths were compared; pages and tiles are the caller's promise.
        unsafe { self.launch(Kernel::Attend, grid, &arguments)? };
        if splits == 0 {
            return Ok(());
        }
        let arguments = MergeArguments {
            partials: partials.address(),
            out: out.address(),
            positions: positions.address(),
            heads: *heads as u32,
            head_dim: layout.head_dim as u32,
            window,
            splits: splits as u32,
        };
        // SAFETY: every query has its partial results, of the segments that it sees.
        unsafe { self.launch(Kernel::MergeSegments, Grid::of(rows * heads, 1, 1), &arguments) }
    }
}

const _: () = assert!(SEGMENT.is_multiple_of(PAGE_TOKENS), "a segment is whole pages");
