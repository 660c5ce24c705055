//! Sessions with pages in plain memory, and who computes for them.

use std::sync::Arc;

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};
use dormouse_models::backend::{Backend, Weights};
use dormouse_models::decoder::Batch;

pub struct Computer {
    pub backend: Backend,
    layout: PageLayout,
    vocab: usize,
}

pub struct Session {
    memory: Vec<Vec<u32>>,
    pub len: usize,
}

impl Session {
    pub fn new(computer: &Computer, positions: usize) -> Session {
        let words = computer.layout.page_bytes() / 4;
        Session { memory: vec![vec![0; words]; positions.div_ceil(PAGE_TOKENS)], len: 0 }
    }

    pub fn fork(&self) -> Session {
        Session { memory: self.memory.clone(), len: self.len }
    }

    /// The same positions, in the pages that this session has.
    pub fn copy_from(&mut self, other: &Session) {
        self.memory.iter_mut().zip(&other.memory).for_each(|(own, other)| own.copy_from_slice(other));
        self.len = other.len;
    }

    pub fn pages(&mut self) -> Vec<PagePtr> {
        // SAFETY: the vectors hold a page each and are not touched until the pointers are gone.
        self.memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect()
    }
}

impl Computer {
    pub fn new(weights: Arc<Weights>, dtype: KvDtype) -> Computer {
        let (layout, vocab) = (weights.config().page_layout(dtype), weights.config().vocab);
        Computer { backend: Backend::new(weights, layout, Cpu::new(1).unwrap()).unwrap(), layout, vocab }
    }

    /// Appends `tokens` and returns the logits of each.
    pub fn append(&mut self, session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
        self.try_append(session, tokens).unwrap()
    }

    pub fn try_append(&mut self, session: &mut Session, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        self.compute(vec![(session, tokens)])
    }

    /// Appends to several sessions in one batch: the logits of each row.
    pub fn append_all(&mut self, parts: Vec<(&mut Session, &[u32])>) -> Vec<Vec<f32>> {
        self.compute(parts).unwrap()
    }

    /// Appends to several sessions in one batch: the likeliest token after each row, as the device finds it.
    #[cfg(feature = "cuda")]
    pub fn likeliest(&mut self, parts: Vec<(&mut Session, &[u32])>) -> Vec<u32> {
        self.run(parts, true).unwrap();
        let (logits, likeliest) = self.backend.results_mut();
        assert!(logits.is_empty());
        likeliest.to_vec()
    }

    fn compute(&mut self, parts: Vec<(&mut Session, &[u32])>) -> Result<Vec<Vec<f32>>, String> {
        self.run(parts, false)?;
        Ok(self.backend.logits_mut().chunks(self.vocab).map(<[f32]>::to_vec).collect())
    }

    fn run(&mut self, mut parts: Vec<(&mut Session, &[u32])>, likeliest: bool) -> Result<(), String> {
        let tokens: Vec<u32> = parts.iter().flat_map(|(_, tokens)| tokens.iter().copied()).collect();
        let tables: Vec<Vec<PagePtr>> = parts.iter_mut().map(|(session, _)| session.pages()).collect();
        let mut first_row = 0;
        let sequences: Vec<Sequence<'_>> = parts
            .iter()
            .zip(&tables)
            .map(|((session, tokens), pages)| {
                first_row += tokens.len();
                let rows = tokens.len();
                Sequence { pages, first_row: first_row - rows, rows, start: session.len }
            })
            .collect();
        let logit_rows: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch { tokens: &tokens, sequences: &sequences, logit_rows: &logit_rows };
        let computed = match likeliest {
            true => self.backend.forward_to_likeliest(&batch),
            false => self.backend.forward(&batch, None),
        };
        computed.map_err(|error| error.to_string())?;
        parts.iter_mut().for_each(|(session, tokens)| session.len += tokens.len());
        Ok(())
    }
}
