//! KV pages on the device: a cache of the mapped pages ([`crate::places`]), which stay the truth.

use candle_core::{DType, Device, Result, Tensor};
use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{KEY_GROUP, PAGE_TOKENS, PageLayout, PagePtr};
use half::f16;

use crate::places::{Coming, Places, fitting};

/// Places of the first piece of memory; it doubles as they are needed.
const FIRST_PLACES: usize = 16;
/// The place of a page of zeros, where a segment ends beyond a sequence's pages.
pub(super) const ZEROS: usize = 0;

pub(super) struct PageCache {
    device: Device,
    layout: PageLayout,
    most_pages: usize,
    places: Places,
    /// Of each layer: keys and values, `[places, kv_heads, PAGE_TOKENS, head_dim]` each. Keys lie as they are computed, not
    /// turned as in the mapping.
    layers: Vec<[Tensor; 2]>,
}

impl PageCache {
    /// Room for `most_pages` at most.
    pub fn new(device: &Device, layout: PageLayout, most_pages: usize) -> Result<PageCache> {
        let mut cache = PageCache {
            device: device.clone(),
            layout,
            most_pages,
            places: Places::default(),
            layers: Vec::new(),
        };
        for _ in 0..layout.layers {
            cache.layers.push([cache.memory(1)?, cache.memory(1)?]);
        }
        Ok(cache)
    }

    fn memory(&self, places: usize) -> Result<Tensor> {
        let PageLayout { kv_heads, head_dim, .. } = self.layout;
        Tensor::zeros((places, kv_heads, PAGE_TOKENS, head_dim), DType::F16, &self.device)
    }

    pub fn forget(&mut self, pages: &[PagePtr]) {
        self.places.forget(pages);
    }

    pub fn forget_all(&mut self) {
        self.places.forget_all();
    }

    /// Whether so many pages of one sequence can be on the device; if not, what to do.
    pub fn check_room(&self, pages: usize) -> std::result::Result<(), String> {
        if pages <= self.most_pages {
            return Ok(());
        }
        Err(format!(
            "a session's {pages} KV pages find room for {} (give them more with --device-budget, or use --device cpu)",
            self.most_pages
        ))
    }

    pub fn fitting(&self, sequences: &[Sequence<'_>]) -> usize {
        fitting(sequences, self.most_pages)
    }

    /// Makes room for all pages of `sequences` and brings up what the device lacks of them. Their places, one sequence
    /// after the other; of pages that nothing is known of yet, [`ZEROS`].
    pub fn place(&mut self, sequences: &[Sequence<'_>]) -> Result<Vec<u32>> {
        // Behind the page of zeros.
        let have = self.layers[0][0].dim(0)?;
        let (mut end, most) = (have, self.most_pages + 1);
        let mut grow = || {
            let start = end;
            end = (2 * end).max(FIRST_PLACES).min(most);
            start..end
        };
        let placed = self.places.place(sequences, &mut grow);
        if end > have {
            // One layer after the other, so that no more than one is there twice.
            for layer in 0..self.layers.len() {
                for half in 0..2 {
                    let memory = self.memory(end)?;
                    memory.slice_set(&self.layers[layer][half], 0, 0)?;
                    self.layers[layer][half] = memory;
                }
            }
        }
        let placed = placed.map_err(|full| {
            candle_core::Error::msg(format!(
                "a step's KV pages find room for {} (give them more with --device-budget)",
                full.0
            ))
        })?;
        for coming in self.places.coming() {
            self.bring(coming)?;
        }
        Ok(placed.into_iter().map(|place| place.unwrap_or(ZEROS) as u32).collect())
    }

    /// Sends up the positions of a page that are known, with zeros behind them.
    fn bring(&self, coming: &Coming) -> Result<()> {
        let PageLayout { kv_heads, head_dim, .. } = self.layout;
        for (layer, memory) in self.layers.iter().enumerate() {
            for (half, to) in memory.iter().enumerate() {
                let mut rows = vec![f16::ZERO; kv_heads * PAGE_TOKENS * head_dim];
                for (head, rows) in rows.chunks_exact_mut(PAGE_TOKENS * head_dim).enumerate() {
                    for (position, row) in rows.chunks_exact_mut(head_dim).enumerate().take(coming.positions)
                    {
                        match half {
                            0 => self.read_key(coming.page, layer, head, position, row),
                            _ => self.read_value(coming.page, layer, head, position, row),
                        }
                    }
                }
                let rows = Tensor::from_vec(rows, (1, kv_heads, PAGE_TOKENS, head_dim), &self.device)?;
                to.slice_set(&rows, 0, coming.place)?;
            }
        }
        Ok(())
    }

    fn read_key(&self, page: PagePtr, layer: usize, head: usize, position: usize, row: &mut [f16]) {
        let group_bytes = KEY_GROUP * self.layout.row_bytes();
        let start = self.layout.k_offset(layer, head) + position / KEY_GROUP * group_bytes;
        for ((offset, part), value) in self.layout.key_parts().zip(row) {
            *value = half_of(page.bytes(&self.layout, start + offset + position % KEY_GROUP * part, part));
        }
    }

    fn read_value(&self, page: PagePtr, layer: usize, head: usize, position: usize, row: &mut [f16]) {
        let at = self.layout.v_offset(layer, head) + position * self.layout.row_bytes();
        let bytes = page.bytes(&self.layout, at, self.layout.row_bytes());
        row.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(value, bytes)| *value = half_of(bytes));
    }

    /// A layer's keys and values in these places, one page after the other: `[places, kv_heads, PAGE_TOKENS, head_dim]` each.
    pub fn pages(&self, layer: usize, places: &Tensor) -> Result<[Tensor; 2]> {
        let [keys, values] = &self.layers[layer];
        Ok([keys.index_select(places, 0)?, values.index_select(places, 0)?])
    }

    /// Appends a layer's new rows, `[rows, {K, V}, kv_heads, head_dim]`, to the pages of their sequences, which have these places.
    pub fn append(
        &self,
        layer: usize,
        rows: &Tensor,
        sequences: &[Sequence<'_>],
        places: &[u32],
    ) -> Result<()> {
        let mut table = 0;
        for sequence in sequences {
            let end = sequence.start + sequence.rows;
            let mut position = sequence.start;
            while position < end {
                let (page, first) = (position / PAGE_TOKENS, position % PAGE_TOKENS);
                let count = (end - position).min(PAGE_TOKENS - first);
                let own = rows.narrow(0, sequence.first_row + position - sequence.start, count)?;
                for (half, to) in self.layers[layer].iter().enumerate() {
                    let run =
                        own.narrow(1, half, 1)?.squeeze(1)?.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
                    // Whoever had the place before left something behind: a page begins with zeros, which weigh nothing.
                    let run = match first {
                        0 => run.pad_with_zeros(2, 0, PAGE_TOKENS - count)?,
                        _ => run,
                    };
                    let to = to.narrow(0, places[table + page] as usize, 1)?;
                    to.slice_set(&run.contiguous()?, 2, first)?;
                }
                position += count;
            }
            table += sequence.pages.len();
        }
        Ok(())
    }

    /// After a pass: the device and the mapping hold the rows of `sequences`.
    pub fn wrote(&mut self, sequences: &[Sequence<'_>]) {
        self.places.wrote(sequences);
    }
}

fn half_of(bytes: &[u8]) -> f16 {
    f16::from_le_bytes([bytes[0], bytes[1]])
}
