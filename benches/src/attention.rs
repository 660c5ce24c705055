//! Attention alone, in the shape of the model: one layer over pages that hold its depth.

use std::time::Instant;

use dormouse_kernels::cpu::attention::{Attention, Sequence, attend, store_kv};
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};
use dormouse_models::config::ModelConfig;

/// Sequences, positions that each has already, and rows that each computes.
const CASES: [(usize, usize, usize); 6] =
    [(1, 4096, 1), (1, 4096, 3), (1, 4096, 15), (8, 1024, 1), (1, 0, 512), (1, 4096, 256)];
/// The same for branches of one session, which have all these positions in common.
const BRANCHES: [(usize, usize, usize); 2] = [(8, 4096, 1), (50, 4096, 1)];
/// Layers of the pages: together they are larger than the caches, so that decoding reads memory as in a model.
const LAYERS: usize = 16;
const REPEATS: usize = 15;

/// Prints, for each case, the median time of a layer, the rate at which it reads pages and that at which it multiplies.
pub fn print(cpu: &Cpu, config: &ModelConfig) {
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let layout =
            PageLayout { layers: LAYERS, kv_heads: config.kv_heads, head_dim: config.head_dim, dtype };
        for (sequences, depth, rows) in CASES {
            case(cpu, layout, config.heads, (sequences, depth, rows), false);
        }
        for branches in BRANCHES {
            case(cpu, layout, config.heads, branches, true);
        }
    }
}

fn case(
    cpu: &Cpu,
    layout: PageLayout,
    heads: usize,
    (sequences, depth, rows): (usize, usize, usize),
    are_branches: bool,
) {
    let positions = depth + rows;
    let pages = positions.div_ceil(PAGE_TOKENS);
    let page = vec![0u64; layout.page_bytes().div_ceil(8)];
    let mut memory = vec![page; sequences * pages];
    // SAFETY: each vector holds a page and lives as long as the table, which this function alone uses.
    let mut table: Vec<PagePtr> =
        memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
    if are_branches {
        for branch in 1..sequences {
            table.copy_within(..depth / PAGE_TOKENS, branch * pages);
        }
    }

    let width = layout.kv_heads * layout.head_dim;
    let values = |n: usize| -> Vec<f32> { (0..n).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect() };
    let (k, v) = (values(positions * width), values(positions * width));
    for table in table.chunks(pages) {
        for layer in 0..layout.layers {
            let all = Sequence { pages: table, first_row: 0, rows: positions, start: 0 };
            store_kv(cpu, &layout, layer, &[all], &k, &v);
        }
    }

    let batch: Vec<Sequence<'_>> = table
        .chunks(pages)
        .enumerate()
        .map(|(index, pages)| Sequence { pages, first_row: index * rows, rows, start: depth })
        .collect();
    let q = values(sequences * rows * heads * layout.head_dim);
    let mut out = vec![0.0; q.len()];
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let begun = Instant::now();
            for layer in 0..LAYERS {
                let scale = 1.0 / (layout.head_dim as f32).sqrt();
                let attention = Attention { layout, layer, heads, scale, window: None, soft_cap: None };
                attend(cpu, attention, &batch, &q, &mut out);
            }
            begun.elapsed().as_secs_f64() / LAYERS as f64
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let seconds = seconds[REPEATS / 2];

    let bytes = sequences * positions * 2 * layout.kv_heads * layout.row_bytes();
    let pairs: usize = (depth + 1..=depth + rows).sum::<usize>() * sequences;
    let products = pairs * heads * layout.head_dim * 2;
    println!(
        "attention {:<4} {sequences} x {rows:<3} rows at {depth:<4} {:>8.1} µs a layer  {:>5.1} GB/s  {:>6.1} G multiply-adds/s{}",
        layout.dtype.name(),
        seconds * 1e6,
        bytes as f64 / seconds / 1e9,
        products as f64 / seconds / 1e9,
        if are_branches { ", branches" } else { "" },
    );
}
