use std::ops::Range;

use half::f16;

use super::super::{Isa, Pool};
use super::*;
use crate::page::KvDtype;

const HEADS: usize = 6;

fn layout(dtype: KvDtype, kv_heads: usize, head_dim: usize) -> PageLayout {
    PageLayout { layers: 2, kv_heads, head_dim, dtype }
}

/// Values of −1.5 to 1.5 with nothing in common.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)) >> 40) as f32 / 5_592_405.0 - 1.5
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn cpus() -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu {
        isa,
        precision: crate::cpu::Precision::Int8,
        pool: Pool::new(2),
    })
}

/// Pages in plain memory.
struct Pages {
    memory: Vec<Vec<u32>>,
    table: Vec<PagePtr>,
    layout: PageLayout,
}

impl Pages {
    /// Room for `tokens` positions, of which none is written: every 16-bit number in it is none.
    fn new(layout: PageLayout, tokens: usize) -> Pages {
        let page = vec![0xfe01_fe01u32; layout.page_bytes().div_ceil(4)];
        let mut memory = vec![page; tokens.div_ceil(PAGE_TOKENS)];
        // SAFETY: the vectors are as long as a page and live as long as the table.
        let table = memory.iter_mut().map(|m| unsafe { PagePtr::new(m.as_mut_ptr().cast()) }).collect();
        Pages { memory, table, layout }
    }

    fn filled(layout: PageLayout, tokens: usize) -> Pages {
        let pages = Pages::new(layout, tokens);
        let width = layout.kv_heads * layout.head_dim;
        pages.write(&noise(tokens * width, 1), &noise(tokens * width, 2));
        pages
    }

    /// Writes positions from 0 on, in every layer.
    fn write(&self, k: &[f32], v: &[f32]) {
        let cpu = Cpu { isa: Isa::best(), precision: crate::cpu::Precision::Int8, pool: Pool::new(2) };
        let rows = k.len() / (self.layout.kv_heads * self.layout.head_dim);
        let sequence = Sequence { pages: &self.table, first_row: 0, rows, start: 0 };
        for layer in 0..self.layout.layers {
            store_kv(&cpu, &self.layout, layer, &[sequence], k, v);
        }
    }

    /// One head's key (or value) as it is stored, in layer 1.
    fn row(&self, value: bool, head: usize, position: usize) -> Vec<f64> {
        let layout = &self.layout;
        let (page, at) = (self.table[position / PAGE_TOKENS], position % PAGE_TOKENS);
        let bytes = if value {
            page.bytes(layout, layout.v_offset(1, head) + at * layout.row_bytes(), layout.row_bytes())
                .to_vec()
        } else {
            let group = layout.k_offset(1, head) + at / KEY_GROUP * KEY_GROUP * layout.row_bytes();
            let part = |(offset, bytes)| page.bytes(layout, group + offset + at % KEY_GROUP * bytes, bytes);
            layout.key_parts().flat_map(part).copied().collect()
        };
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f64();
        let mut row: Vec<f64> = match layout.dtype {
            KvDtype::F16 => bytes.chunks(2).map(half).collect(),
            KvDtype::Q8_0 => {
                let blocks = bytes.chunks(34);
                blocks.flat_map(|b| b[2..].iter().map(move |q| f64::from(*q as i8) * half(b))).collect()
            }
        };
        row.truncate(layout.head_dim);
        row
    }

    fn attention(&self, heads: usize, window: Option<usize>) -> Attention {
        Attention { layout: self.layout, layer: 1, heads, scale: 0.2, window, soft_cap: None }
    }

    /// `rows` rows from `start` on.
    fn attend(&self, cpu: &Cpu, attention: Attention, start: usize, q: &[f32]) -> Vec<f32> {
        let rows = q.len() / (attention.heads * self.layout.head_dim);
        let mut out = vec![f32::NAN; q.len()];
        let sequence = Sequence { pages: &self.table, first_row: 0, rows, start };
        attend(cpu, attention, &[sequence], q, &mut out);
        out
    }

    /// The definition, for one row at `position`.
    fn exact(&self, attention: Attention, position: usize, q: &[f32]) -> Vec<f64> {
        let head_dim = self.layout.head_dim;
        let first = attention.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let mut out = Vec::new();
        for (head, q) in q.chunks(head_dim).enumerate() {
            let kv_head = head / attention.group();
            let scores: Vec<f64> = (first..=position)
                .map(|p| {
                    let key = self.row(false, kv_head, p);
                    let dot: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
                    let score = dot * f64::from(attention.scale);
                    attention.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; head_dim];
            for (weight, p) in weights.iter().zip(first..) {
                for (sum, value) in sum.iter_mut().zip(self.row(true, kv_head, p)) {
                    *sum += weight * value / total;
                }
            }
            out.extend(sum);
        }
        out
    }

    /// Checks rows against the definition: errors stay under `bound` of the largest value.
    fn check(&self, cpu: &Cpu, attention: Attention, start: usize, q: &[f32], bound: f64) {
        let width = attention.heads * self.layout.head_dim;
        let out = self.attend(cpu, attention, start, q);
        let rows = q.len() / width;
        for row in [0, rows / 2, rows - 1] {
            let expected = self.exact(attention, start + row, &q[row * width..][..width]);
            for (got, want) in out[row * width..][..width].iter().zip(expected) {
                let name = cpu.isa.name();
                let what =
                    (self.layout.dtype.name(), self.layout.head_dim, attention.heads, attention.window);
                assert!(
                    (f64::from(*got) - want).abs() < bound,
                    "{got} for {want}: {name} {what:?} {start}+{row}"
                );
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn heads_of_every_size_and_groups_of_every_width_match_an_f64_reference() {
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        for (head_dim, kv_heads, group) in [
            (16, 1, 1),
            (24, 2, 3),
            (32, 2, 2),
            (64, 3, 3),
            (80, 1, 5),
            (96, 2, 6),
            (128, 1, 7),
            (128, 2, 8),
            (256, 1, 4),
        ] {
            let pages = Pages::filled(layout(dtype, kv_heads, head_dim), 330);
            let width = kv_heads * group * head_dim;
            for cpu in cpus() {
                for (start, rows) in [(0, 1), (63, 3), (255, 2), (320, 7), (280, 40)] {
                    let attention = pages.attention(kv_heads * group, None);
                    pages.check(&cpu, attention, start, &noise(rows * width, 9), 4e-6);
                }
            }
        }
    }
}

#[test]
fn windows_and_capped_scores_match_an_f64_reference_across_page_and_segment_borders() {
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let pages = Pages::filled(layout(dtype, 2, 32), 1200);
        for cpu in cpus() {
            for window in [None, Some(1), Some(64), Some(100), Some(512), Some(usize::MAX)] {
                for (start, rows) in [(0, 70), (64, 2), (511, 2), (600, 33), (1199, 1)] {
                    let attention = pages.attention(HEADS, window);
                    let q = noise(rows * HEADS * 32, 9);
                    pages.check(&cpu, attention, start, &q, 4e-6);
                    pages.check(&cpu, Attention { soft_cap: Some(2.5), ..attention }, start, &q, 4e-6);
                }
            }
        }
    }
}

#[test]
fn extreme_scores_keep_to_the_reference() {
    let (tokens, head_dim) = (600, 32);
    let width = 2 * head_dim;
    let v = noise(tokens * width, 2);
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let pages = Pages::new(layout(dtype, 2, head_dim), tokens);
        for cpu in cpus() {
            // One position above all others by thousands, scores all equal, keys and queries of zero, denormal keys.
            for (k, q) in [(40.0, 50.0), (0.0, 1.0), (1.0, 0.0), (1e-7, 1e3), (1e-7, 1e-30)] {
                let k: Vec<f32> = noise(tokens * width, 1).iter().map(|x| x * k).collect();
                let q: Vec<f32> = noise(2 * HEADS * head_dim, 9).iter().map(|x| x * q).collect();
                pages.write(&k, &v);
                // Scores of ten thousands are themselves rounded to a thousandth.
                pages.check(&cpu, pages.attention(HEADS, None), tokens - 2, &q, 3e-3);
            }
            // Values of denormal halves are exact in single precision.
            let small: Vec<f32> = v.iter().map(|x| x * 1e-6).collect();
            pages.write(&small, &small);
            pages.check(
                &cpu,
                pages.attention(HEADS, None),
                tokens - 2,
                &noise(2 * HEADS * head_dim, 9),
                1e-11,
            );
        }
    }
}

#[test]
fn a_key_too_large_for_half_precision_is_stored_as_the_largest_and_one_that_is_no_number_stays_so() {
    let pages = Pages::new(layout(KvDtype::F16, 1, 16), 1);
    let k: Vec<f32> =
        (0..16).map(|i| [1e9, -1e9, f32::INFINITY, f32::NAN, 65504.0, 65519.9, 3e-8, 1.0][i % 8]).collect();
    for cpu in cpus() {
        let sequence = Sequence { pages: &pages.table, first_row: 0, rows: 1, start: 0 };
        store_kv(&cpu, &pages.layout, 1, &[sequence], &k, &k);
        for value in [false, true] {
            let row = pages.row(value, 0, 0);
            let expected =
                [65504.0, -65504.0, 65504.0, f64::NAN, 65504.0, 65504.0, 2f64.powi(-24) * 1.0, 1.0];
            for (got, want) in row.iter().zip(expected.iter().cycle()) {
                assert!(got == want || got.is_nan() && want.is_nan(), "{got} for {want}: {}", cpu.isa.name());
            }
        }
    }
}

#[test]
fn stored_keys_are_rounded_to_nearest_and_quantised_within_half_a_step() {
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        for head_dim in [24, 64, 80] {
            let pages = Pages::new(layout(dtype, 2, head_dim), 70);
            let (k, v) = (noise(70 * 2 * head_dim, 5), noise(70 * 2 * head_dim, 6));
            pages.write(&k, &v);
            for position in 0..70 {
                for head in 0..2 {
                    for (value, source) in [(false, &k), (true, &v)] {
                        let source = &source[(position * 2 + head) * head_dim..][..head_dim];
                        for (stored, x) in pages.row(value, head, position).iter().zip(source) {
                            match dtype {
                                KvDtype::F16 => assert_eq!(*stored, f16::from_f32(*x).to_f64()),
                                KvDtype::Q8_0 => assert!((stored - f64::from(*x)).abs() < 0.51 * 1.5 / 127.0),
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_querys_bits_do_not_depend_on_batch_chunk_or_threads() {
    for (dtype, head_dim) in
        [(KvDtype::F16, 24), (KvDtype::Q8_0, 24), (KvDtype::F16, 64), (KvDtype::Q8_0, 64), (KvDtype::F16, 96)]
    {
        let tokens = 1100;
        let pages = Pages::filled(layout(dtype, 2, head_dim), tokens);
        let width = HEADS * head_dim;
        let q = noise(tokens * width, 4);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for window in [None, Some(130)] {
                let chunked = |threads: usize, chunk: usize, positions: Range<usize>| -> Vec<u32> {
                    let cpu = Cpu { isa, precision: crate::cpu::Precision::Int8, pool: Pool::new(threads) };
                    let mut result = Vec::new();
                    for start in positions.clone().step_by(chunk) {
                        let q = &q[start * width..(start + chunk).min(positions.end) * width];
                        result.extend(bits(&pages.attend(&cpu, pages.attention(HEADS, window), start, q)));
                    }
                    result
                };
                let what = (isa.name(), dtype.name(), head_dim, window);
                let whole = chunked(3, tokens, 0..tokens);
                assert!(whole == chunked(1, 77, 0..tokens), "{what:?}");
                for chunk in [1, 2, 5, 21] {
                    assert!(whole[1000 * width..] == chunked(chunk, chunk, 1000..tokens), "{what:?} {chunk}");
                }
            }
        }
    }
}

#[test]
fn sequences_of_a_batch_get_the_bits_that_they_get_alone() {
    let layout = layout(KvDtype::F16, 2, 64);
    let width = HEADS * 64;
    let pages: Vec<Pages> = [700, 40, 300].into_iter().map(|tokens| Pages::filled(layout, tokens)).collect();
    let rows = [(699, 1), (0, 40), (290, 10)];
    let q = noise(51 * width, 4);
    for cpu in cpus() {
        let attention = pages[0].attention(HEADS, None);
        let (mut sequences, mut alone, mut first_row) = (Vec::new(), Vec::new(), 0);
        for (pages, (start, rows)) in pages.iter().zip(rows) {
            sequences.push(Sequence { pages: &pages.table, first_row, rows, start });
            alone.extend(pages.attend(&cpu, attention, start, &q[first_row * width..][..rows * width]));
            first_row += rows;
        }
        let mut together = vec![f32::NAN; q.len()];
        attend(&cpu, attention, &sequences, &q, &mut together);
        assert!(bits(&together) == bits(&alone), "{}", cpu.isa.name());
    }
}

#[test]
fn tiers_that_fuse_multiply_adds_give_the_same_bits() {
    for (dtype, head_dim, window, soft_cap) in [
        (KvDtype::F16, 64, None, None),
        (KvDtype::F16, 80, Some(300), Some(3.0)),
        (KvDtype::Q8_0, 96, None, Some(20.0)),
        (KvDtype::Q8_0, 24, Some(64), None),
    ] {
        let pages = Pages::filled(layout(dtype, 2, head_dim), 900);
        for (start, rows) in [(899, 1), (600, 50)] {
            let q = noise(rows * HEADS * head_dim, 3);
            let attention = Attention { soft_cap, ..pages.attention(HEADS, window) };
            let results: Vec<(Isa, Vec<u32>)> = cpus()
                .filter(|cpu| cpu.isa != Isa::Portable)
                .map(|cpu| (cpu.isa, bits(&pages.attend(&cpu, attention, start, &q))))
                .collect();
            for pair in results.windows(2) {
                assert!(pair[0].1 == pair[1].1, "{} and {}", pair[0].0.name(), pair[1].0.name());
            }
        }
    }
}

#[test]
fn nothing_outside_the_window_or_past_the_last_row_is_read() {
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let mut pages = Pages::filled(layout(dtype, 2, 64), 1000);
        let q = noise(3 * HEADS * 64, 3);
        for cpu in cpus() {
            let attention = pages.attention(HEADS, Some(200));
            let expected = bits(&pages.attend(&cpu, attention, 700, &q));
            // The last row's window is 503..=702 and the first row's begins at 501: pages 7 to 10.
            for page in (0..7).chain(11..pages.memory.len()) {
                pages.memory[page].fill(0x7e01_7e01);
            }
            assert!(bits(&pages.attend(&cpu, attention, 700, &q)) == expected, "{}", cpu.isa.name());
            pages = Pages::filled(pages.layout, 1000);
        }
        // Pages begin as numbers that are none: only what was written can have been used.
        let pages = Pages::filled(layout(dtype, 2, 64), 650);
        for cpu in cpus() {
            let out = pages.attend(&cpu, pages.attention(HEADS, None), 647, &q);
            assert!(out.iter().all(|x| x.is_finite()), "{}", cpu.isa.name());
        }
    }
}

#[test]
fn branches_of_one_session_get_the_bits_that_they_get_alone() {
    for (dtype, head_dim) in [(KvDtype::F16, 64), (KvDtype::Q8_0, 24)] {
        let layout = layout(dtype, 2, head_dim);
        let width = HEADS * head_dim;
        let trunk = Pages::filled(layout, 1400);
        // Pages in common, position of the first row, rows.
        let branches = [
            (20, 1300, 1),
            (20, 1299, 3),
            (16, 1030, 1),
            (17, 1150, 2),
            (4, 256, 1),
            (0, 700, 1),
            (20, 1280, 45),
        ]
        .into_iter()
        .chain((0..30).map(|n| (20, 1281 + n, 1)));
        let mut first_row = 0;
        let tables: Vec<_> = branches
            .enumerate()
            .map(|(n, (shared, start, rows))| {
                let own = Pages::new(layout, start + rows);
                own.write(
                    &noise((start + rows) * 2 * head_dim, n as u64),
                    &noise((start + rows) * 2 * head_dim, 7),
                );
                let table = [&trunk.table[..shared], &own.table[shared..]].concat();
                first_row += rows;
                (own, table, first_row - rows, rows, start)
            })
            .collect();
        let sequences: Vec<Sequence<'_>> = tables
            .iter()
            .map(|(_, pages, first_row, rows, start)| Sequence {
                pages,
                first_row: *first_row,
                rows: *rows,
                start: *start,
            })
            .collect();
        let q = noise(first_row * width, 4);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (threads, window) in [(1, None), (3, None), (2, Some(300))] {
                let cpu = Cpu { isa, precision: crate::cpu::Precision::Int8, pool: Pool::new(threads) };
                let attention = trunk.attention(HEADS, window);
                let mut together = vec![f32::NAN; q.len()];
                attend(&cpu, attention, &sequences, &q, &mut together);
                for sequence in &sequences {
                    let part = sequence.first_row * width..(sequence.first_row + sequence.rows) * width;
                    let mut alone = vec![f32::NAN; part.len()];
                    let only = Sequence { first_row: 0, ..*sequence };
                    attend(&cpu, attention, &[only], &q[part.clone()], &mut alone);
                    let what = (isa.name(), dtype.name(), threads, window, sequence.start, sequence.rows);
                    assert!(bits(&together[part]) == bits(&alone), "{what:?}");
                }
            }
        }
    }
}
