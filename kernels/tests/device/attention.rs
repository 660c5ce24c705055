use super::*;
use crate::cpu::Cpu;
use crate::cpu::attention::store_rows;
use crate::cpu::attention::{Attention, Sequence, attend, store_kv};
use crate::cuda::{Append, Attend, tiles};
use crate::page::{KvDtype, PAGE_TOKENS, PageLayout, PagePtr};
use crate::testing::values;

/// Pages of one sequence, on the host and on the device.
struct Pages {
    memory: Vec<Vec<u32>>,
    device: DeviceBuffer<u8>,
    layout: PageLayout,
}

impl Pages {
    fn new(gpu: &Arc<Gpu>, layout: PageLayout, positions: usize) -> Pages {
        let count = positions.div_ceil(PAGE_TOKENS);
        let memory = vec![vec![0u32; layout.page_bytes() / 4]; count];
        let device = room(gpu, count * layout.page_bytes());
        // Zeros like the host's: positions that nothing was written to are compared too.
        device.span().clear(gpu).unwrap();
        Pages { memory, device, layout }
    }

    fn host(&mut self) -> Vec<PagePtr> {
        // SAFETY: the vectors hold a page each and are not touched until the pointers are gone.
        self.memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect()
    }

    fn device(&self) -> Vec<u64> {
        let address = |page: usize| self.device.span().address() + (page * self.layout.page_bytes()) as u64;
        (0..self.memory.len()).map(address).collect()
    }

    fn bytes(&self) -> Vec<u8> {
        self.memory.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// Appends rows at `start` to the device's pages, and from there to the host's.
fn append(gpu: &Arc<Gpu>, pages: &mut Pages, layer: usize, start: usize, k: &[f32], v: &[f32]) {
    let layout = pages.layout;
    let rows = k.len() / (layout.kv_heads * layout.head_dim);
    let table = pages.device();
    let positions = start..start + rows;
    let of_rows: Vec<u64> = positions.clone().map(|position| table[position / PAGE_TOKENS]).collect();
    let places: Vec<u32> = positions.map(|position| (position % PAGE_TOKENS) as u32).collect();
    let (of_rows, places) = (on_device(gpu, &of_rows), on_device(gpu, &places));
    let (k, v) = (on_device(gpu, k), on_device(gpu, v));
    let down = room(gpu, rows * 2 * layout.kv_heads * layout.row_bytes());
    let (k, v, pages_of_rows, places) = (k.span(), v.span(), of_rows.span(), places.span());
    let append = Append { layout: &layout, layer, k, v, pages: pages_of_rows, places, down: down.span() };
    // SAFETY: the pages are of this layout, and the places in them.
    unsafe { gpu.append_kv(&append).unwrap() };
    let down = read(gpu, down.span());
    let host = pages.host();
    store_rows(&layout, layer, &[Sequence { pages: &host, first_row: 0, rows, start }], &down);
}

fn layouts() -> impl Iterator<Item = PageLayout> {
    [KvDtype::F16, KvDtype::Q8_0].into_iter().flat_map(|dtype| {
        [24, 64, 128].map(|head_dim| PageLayout { layers: 2, kv_heads: 2, head_dim, dtype })
    })
}

#[test]
fn appended_rows_are_stored_as_the_cpu_stores_them_and_the_host_gets_the_devices_bytes() {
    let (gpu, cpu) = (gpu(), Cpu::new(1).unwrap());
    for layout in layouts() {
        let rows = 75;
        let mut pages = Pages::new(&gpu, layout, 100);
        let mut reference = Pages::new(&gpu, layout, 100);
        for layer in 0..2 {
            let mut k = values(rows * layout.kv_heads * layout.head_dim, 1 + layer as u64);
            // Beyond what a half holds.
            (k[3], k[layout.head_dim]) = (1e9, -1e9);
            let v = values(k.len(), 3 + layer as u64);
            append(&gpu, &mut pages, layer, 10, &k, &v);
            let host = reference.host();
            let sequence = Sequence { pages: &host, first_row: 0, rows, start: 10 };
            store_kv(&cpu, &layout, layer, &[sequence], &k, &v);
        }
        assert!(pages.bytes() == read(&gpu, pages.device.span()), "{layout:?}: host and device differ");
        assert!(pages.bytes() == reference.bytes(), "{layout:?}: device and CPU differ");
    }
}

struct Case {
    attention: Attention,
    /// Positions before the rows, and rows, of each sequence.
    sequences: Vec<(usize, usize)>,
    /// A position whose values are none.
    nan: Option<usize>,
}

/// The device's attention of all rows, with `split` times the blocks that the longest sequence's segments take, and the CPU's
/// over the same pages.
fn both(gpu: &Arc<Gpu>, case: &Case, split: Option<usize>) -> (Vec<f32>, Vec<f32>) {
    let (cpu, layout, heads) = (Cpu::new(1).unwrap(), case.attention.layout, case.attention.heads);
    let mut all: Vec<Pages> = Vec::new();
    for (number, (start, rows)) in case.sequences.iter().enumerate() {
        let mut pages = Pages::new(gpu, layout, start + rows);
        let count = (start + rows) * layout.kv_heads * layout.head_dim;
        let (k, v) = (values(count, 10 + number as u64), values(count, 20 + number as u64));
        let k: Vec<f32> = k.iter().map(|k| k * 3.0).collect();
        let mut v = v;
        if let Some(position) = case.nan {
            v[position * layout.kv_heads * layout.head_dim..][..layout.head_dim].fill(f32::NAN);
        }
        append(gpu, &mut pages, case.attention.layer, 0, &k, &v);
        all.push(pages);
    }
    let device_pages: Vec<u64> = all.iter().flat_map(Pages::device).collect();
    let host: Vec<Vec<PagePtr>> = all.iter_mut().map(Pages::host).collect();
    let (mut first_row, mut positions) = (0, Vec::new());
    let sequences: Vec<Sequence<'_>> = case
        .sequences
        .iter()
        .zip(&host)
        .map(|((start, rows), pages)| {
            positions.extend((*start..start + rows).map(|position| position as u32));
            first_row += rows;
            Sequence { pages, first_row: first_row - rows, rows: *rows, start: *start }
        })
        .collect();
    // Rows of a batch have their queries by their own sequence and position.
    let width = heads * layout.head_dim;
    let q: Vec<f32> = case
        .sequences
        .iter()
        .enumerate()
        .flat_map(|(number, (start, rows))| {
            (*start..start + rows).flat_map(move |row| values(width, (100 + number * 10_000 + row) as u64))
        })
        .collect();
    let mut expected = vec![0.0; q.len()];
    attend(&cpu, case.attention, &sequences, &q, &mut expected);

    let (tiles, segments) = tiles(&sequences, heads / layout.kv_heads);
    let segments = segments * split.unwrap_or(1);
    let partials = split.map_or(0, |_| positions.len() * heads * segments * (2 + layout.head_dim));
    let (device_q, out, partials) = (on_device(gpu, &q), room(gpu, q.len()), room(gpu, partials));
    let (tiles, pages, positions) =
        (on_device(gpu, &tiles), on_device(gpu, &device_pages), on_device(gpu, &positions));
    let call = Attend {
        attention: case.attention,
        q: device_q.span(),
        out: out.span(),
        tiles: tiles.span(),
        pages: pages.span(),
        positions: positions.span(),
        segments,
        partials: partials.span(),
    };
    // SAFETY: the pages are these sequences', and hold all their positions.
    unsafe { gpu.attend(&call).unwrap() };
    (read(gpu, out.span()), expected)
}

fn case(layout: PageLayout, heads: usize, window: Option<usize>, soft_cap: Option<f32>) -> Case {
    let attention = Attention { layout, layer: 1, heads, scale: 0.2, window, soft_cap };
    // One of them begins in one segment and ends in the next.
    Case { attention, sequences: vec![(0, 5), (300, 3), (61, 9), (252, 8), (600, 1)], nan: None }
}

#[test]
fn attention_is_that_of_the_cpu_over_the_same_pages() {
    let gpu = gpu();
    for layout in layouts() {
        for (heads, window, soft_cap) in
            [(2, None, None), (6, Some(70), None), (4, None, Some(2.0)), (18, Some(300), Some(5.0))]
        {
            let case = case(layout, heads, window, soft_cap);
            let (got, expected) = both(&gpu, &case, None);
            for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let what = format!("{layout:?} {heads} heads, window {window:?}, cap {soft_cap:?}, at {at}");
                assert!((got - expected).abs() < 3e-6, "{what}: {got} for {expected}");
            }
            for more in [1, 2] {
                let split = both(&gpu, &case, Some(more)).0;
                assert_eq!(
                    bits(&split),
                    bits(&got),
                    "{layout:?} split by segments, {more} times as many blocks"
                );
            }
        }
    }
}

#[test]
fn heads_wider_than_a_block_are_attended_too() {
    let gpu = gpu();
    for head_dim in [256, 320, 512] {
        let layout = PageLayout { layers: 2, kv_heads: 1, head_dim, dtype: KvDtype::F16 };
        let (got, expected) = both(&gpu, &case(layout, 2, Some(100), None), Some(1));
        let largest = got.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(largest < 5e-6, "{head_dim}: {largest}");
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_the_rows_beside_it() {
    let gpu = gpu();
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        for window in [None, Some(40)] {
            let layout = PageLayout { layers: 2, kv_heads: 2, head_dim: 64, dtype };
            let attention = Attention { layout, layer: 1, heads: 6, scale: 0.2, window, soft_cap: None };
            let width = attention.heads * layout.head_dim;
            let (whole, _) = both(&gpu, &Case { attention, sequences: vec![(0, 290)], nan: None }, None);
            for (start, rows) in [(289, 1), (250, 40), (100, 7), (255, 2), (0, 1)] {
                let (part, _) =
                    both(&gpu, &Case { attention, sequences: vec![(start, rows)], nan: None }, Some(1));
                let same = bits(&part) == bits(&whole[start * width..(start + rows) * width]);
                assert!(same, "{dtype:?}, window {window:?}: {rows} rows from {start} on");
            }
        }
    }
}

#[test]
fn what_a_row_does_not_see_does_not_touch_it_whatever_it_holds() {
    let gpu = gpu();
    let layout = PageLayout { layers: 2, kv_heads: 1, head_dim: 64, dtype: KvDtype::F16 };
    let attention = Attention { layout, layer: 1, heads: 1, scale: 0.2, window: Some(40), soft_cap: None };
    // Position 21 is seen by rows 21 to 60, and not by those around them that share a tile with some of these.
    let sequences = vec![(10, 70)];
    let (sound, _) = both(&gpu, &Case { attention, sequences: sequences.clone(), nan: None }, None);
    let (broken, _) = both(&gpu, &Case { attention, sequences, nan: Some(21) }, None);
    for row in 0..70 {
        let values = row * 64..(row + 1) * 64;
        if (21..=60).contains(&(row + 10)) {
            assert!(broken[values].iter().all(|value| value.is_nan()), "row {row} sees it");
        } else {
            assert_eq!(bits(&broken[values.clone()]), bits(&sound[values]), "row {row} does not");
        }
    }
}
