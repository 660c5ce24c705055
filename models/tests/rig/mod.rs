//! A decoder with pages in plain memory, for tests.

// Each test binary uses a part of it.
#![allow(dead_code)]

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PagePtr};
use dormouse_models::decoder::{Activations, Batch, Decoder};

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

    fn forward(&mut self, cpu: &Cpu, tokens: &[u32], logit_rows: &[usize]) {
        // SAFETY: the vectors hold a page each and are not touched until the pointers are gone.
        let pages: Vec<PagePtr> =
            self.memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
        let sequence = Sequence { pages: &pages, first_row: 0, rows: tokens.len(), start: self.len };
        let batch = Batch { tokens, sequences: &[sequence], logit_rows };
        self.decoder.forward(cpu, &self.decoder.page_layout(self.dtype), &batch, &mut self.work);
        self.len += tokens.len();
    }
}
