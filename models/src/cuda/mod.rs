//! The decoder on a CUDA device: the same forward pass as [`crate::decoder`], kernel by kernel or as recorded ([`graphs`]).
//!
//! Pages on the device are a cache of the mapped ones ([`pages`]): a forward pass brings up what its sequences lack, writes
//! new keys and values to both, and returns when the mapped pages are complete.

mod buffers;
mod experts;
mod forward;
mod graphs;
mod inputs;
mod pages;
mod weights;

use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, Gpu, Pinned};
use dormouse_kernels::{Cpu, PageLayout, PagePtr};

use crate::ModelError;
use crate::decoder::Batch;
use buffers::Buffers;
use graphs::Graphs;
use inputs::Inputs;
use pages::PageCache;
pub use weights::Weights;

/// What comes of the rows whose logits a batch names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Logits,
    /// The first of the largest, found on the device.
    Likeliest,
}

/// What a forward pass on the device needs besides weights, kept from one to the next.
pub(crate) struct State {
    /// Beside the one of the weights, which others may compute with, too.
    gpu: Arc<Gpu>,
    layout: PageLayout,
    pages: PageCache,
    inputs: Inputs,
    buffers: Buffers,
    graphs: Graphs,
    routing: experts::Routing,
    /// The last pass's, `[logit_rows, vocab]`, or of each row the first of the largest.
    logits: Vec<f32>,
    likeliest: Vec<u32>,
    /// Logits, or tokens in their place, and rows of keys and values on their way from the device.
    logits_out: Pinned<f32>,
    likeliest_out: Pinned<u32>,
    rows_out: Pinned<u8>,
}

impl State {
    pub fn new(weights: &Weights, layout: PageLayout) -> Result<State, ModelError> {
        let new = || {
            let gpu = &weights.gpu().beside()?;
            Ok(State {
                gpu: Arc::clone(gpu),
                layout,
                pages: PageCache::new(gpu, layout, weights.budget_bytes())?,
                inputs: Inputs::new(gpu)?,
                buffers: Buffers::new(gpu)?,
                graphs: Graphs::new(),
                routing: experts::Routing::new(gpu)?,
                logits: Vec::new(),
                likeliest: Vec::new(),
                logits_out: Pinned::new(gpu, 0)?,
                likeliest_out: Pinned::new(gpu, 0)?,
                rows_out: Pinned::new(gpu, 0)?,
            })
        };
        new().map_err(|error: CudaError| weights.error(error))
    }

    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    pub fn results_mut(&mut self) -> (&mut [f32], &[u32]) {
        (&mut self.logits, &self.likeliest)
    }

    /// Passes that were asked for as a whole, as they had been recorded.
    pub fn replays(&self) -> u64 {
        self.graphs.replays
    }

    pub fn check_room(&self, weights: &Weights, pages: usize) -> Result<(), ModelError> {
        self.pages.check_room(pages).map_err(|error| weights.error(error))
    }

    pub fn forget(&mut self, pages: &[PagePtr]) {
        self.pages.forget(pages);
    }

    pub fn forget_all(&mut self) {
        self.pages.forget_all();
    }

    /// In as many passes as the device's memory asks for: which sequences share one changes no bit. Leaves logits or tokens.
    pub fn forward(
        &mut self,
        cpu: &Cpu,
        weights: &Weights,
        batch: &Batch<'_>,
        wanted: Wanted,
    ) -> Result<(), ModelError> {
        self.logits.clear();
        self.likeliest.clear();
        let (mut rest, mut most, mut has_given_back) = (batch.sequences, usize::MAX, false);
        while !rest.is_empty() {
            let count = self.pages.fitting(rest).min(most);
            let (now, later) = rest.split_at(count);
            match batch.part(now, |part| self.pass(cpu, weights, part, wanted)) {
                Ok(()) => rest = later,
                // Nothing was computed yet. What there is room for is a guess: others take memory, too.
                Err(CudaError::NoRoom { .. }) if count > 1 => most = count / 2,
                // Pages that nobody needs now may be in the way of activations.
                Err(CudaError::NoRoom { .. }) if !has_given_back => {
                    self.gpu.wait().map_err(|error| weights.error(error))?;
                    self.pages.give_back();
                    has_given_back = true;
                }
                Err(error) => {
                    // What was half done on the device is no longer what the host has. It may still be at it, and what
                    // is asked for next must not meet that; should waiting fail too, the first error says more.
                    let _ = self.gpu.wait().and_then(|()| self.pages.wait());
                    self.pages.forget_all();
                    return Err(weights.error(error));
                }
            }
        }
        Ok(())
    }
}
