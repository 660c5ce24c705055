//! A decoder with pages in plain memory, for tests.

// Each test binary uses a part of it.
#![allow(dead_code)]

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PagePtr};
use dormouse_models::decoder::{Activations, Batch, Chunk, Decoder};

/// One sequence of one decoder.
pub struct Rig<'a> {
    decoder: &'a Decoder,
    dtype: KvDtype,
    memory: Vec<Vec<u32>>,
    len: usize,
    work: Activations,
}

impl<'a> Rig<'a> {
    pub fn new(decoder: &'a Decoder, dtype: KvDtype, positions: usize) -> Rig<'a> {
        let bytes = decoder.page_layout(dtype).page_bytes();
        let memory = vec![vec![0u32; bytes / 4]; positions.div_ceil(PAGE_TOKENS)];
        Rig { decoder, dtype, memory, len: 0, work: Activations::default() }
    }

    /// Another sequence with the same past: what a fork is.
    pub fn fork(&self) -> Rig<'a> {
        let work = Activations::default();
        Rig { decoder: self.decoder, dtype: self.dtype, memory: self.memory.clone(), len: self.len, work }
    }

    /// Forgets all but the first `len` tokens.
    pub fn rewind(&mut self, len: usize) {
        self.len = len;
    }

    /// Appends `tokens` and returns the logits of each.
    pub fn append(&mut self, cpu: &Cpu, tokens: &[u32]) -> Vec<Vec<f32>> {
        let rows: Vec<usize> = (0..tokens.len()).collect();
        self.forward(cpu, tokens, &rows);
        let vocab = self.decoder.config().vocab;
        self.work.logits_mut().chunks(vocab).map(<[f32]>::to_vec).collect()
    }

    /// Appends `tokens` and returns the logits of the last.
    pub fn last(&mut self, cpu: &Cpu, tokens: &[u32]) -> Vec<f32> {
        self.forward(cpu, tokens, &[tokens.len() - 1]);
        self.work.logits_mut().to_vec()
    }

    /// Appends `tokens` to `other`, some layers at a time and together with a token of this sequence at each: to the
    /// layers `ends`, the last of which is the last there is. The logits of every one of this sequence's rows, then
    /// those of `other`'s.
    pub fn append_beside(
        &mut self,
        cpu: &Cpu,
        own: &[u32],
        (other, tokens): (&mut Rig<'_>, &[u32]),
        ends: &[usize],
    ) -> Vec<Vec<f32>> {
        let layout = self.decoder.page_layout(self.dtype);
        let (pages, others) = (self.pages(), other.pages());
        let (mut logits, mut hidden, mut begin) = (Vec::new(), Vec::new(), 0);
        for (at, end) in ends.iter().enumerate() {
            let row = own.get(at..at + 1).unwrap_or_default();
            let all = [row, tokens].concat();
            let sequences = [
                Sequence { pages: &pages, first_row: 0, rows: row.len(), start: self.len },
                Sequence { pages: &others, first_row: row.len(), rows: tokens.len(), start: other.len },
            ];
            let is_last = at + 1 == ends.len();
            let wanted: Vec<usize> = (0..if is_last { all.len() } else { row.len() }).collect();
            let sequences = &sequences[usize::from(row.is_empty())..];
            let batch = Batch { tokens: &all, sequences, logit_rows: &wanted };
            let chunk = Chunk { layers: begin..*end, hidden: &mut hidden };
            self.decoder.forward_with_chunk(cpu, &layout, &batch, chunk, &mut self.work);
            let vocab = self.decoder.config().vocab;
            logits.extend(self.work.logits_mut().chunks(vocab).map(<[f32]>::to_vec));
            self.len += row.len();
            begin = *end;
        }
        other.len += tokens.len();
        logits
    }

    fn pages(&mut self) -> Vec<PagePtr> {
        // SAFETY: the vectors hold a page each and are not touched until the pointers are gone.
        self.memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect()
    }

    fn forward(&mut self, cpu: &Cpu, tokens: &[u32], logit_rows: &[usize]) {
        let pages = self.pages();
        let sequence = Sequence { pages: &pages, first_row: 0, rows: tokens.len(), start: self.len };
        let batch = Batch { tokens, sequences: &[sequence], logit_rows };
        self.decoder.forward(cpu, &self.decoder.page_layout(self.dtype), &batch, &mut self.work);
        self.len += tokens.len();
    }
}
