//! Who computes: the one place that knows which device a model is on.

use std::sync::Arc;

use dormouse_kernels::{Cpu, PageLayout, PagePtr};

use crate::config::ModelConfig;
use crate::decoder::{Activations, Batch, Chunk, Decoder};
use crate::pack::{PackFile, PackedWeights};
use crate::source::ModelSource;
use crate::{Device, ModelError, TokenId};

/// A loaded model's weights, where they are computed with.
pub enum Weights {
    Cpu(Box<Decoder>),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::Weights>),
    #[cfg(feature = "metal")]
    Metal(Box<crate::metal::Weights>),
}

impl Weights {
    /// Packs them where the CPU needs that, into memory where `pack` names no folder; a device takes them as they lie in the file.
    pub fn load(
        device: &Device,
        source: &ModelSource,
        config: &ModelConfig,
        pack: PackFile<'_>,
    ) -> Result<Weights, ModelError> {
        match device {
            Device::Cpu => {
                let packed = match pack.folders {
                    [] => PackedWeights::in_memory(source)?,
                    _ => PackedWeights::open(source, pack)?,
                };
                Ok(Weights::Cpu(Box::new(Decoder::new(source, &packed, config.clone())?)))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                Ok(Weights::Cuda(Box::new(crate::cuda::Weights::load(device, source, config)?)))
            }
            #[cfg(feature = "metal")]
            Device::Metal(device) => {
                Ok(Weights::Metal(Box::new(crate::metal::Weights::load(device, source, config)?)))
            }
        }
    }

    pub fn config(&self) -> &ModelConfig {
        match self {
            Weights::Cpu(decoder) => decoder.config(),
            #[cfg(feature = "cuda")]
            Weights::Cuda(weights) => weights.config(),
            #[cfg(feature = "metal")]
            Weights::Metal(weights) => weights.config(),
        }
    }

    /// The decoder on the CPU, if that is where they are.
    pub fn on_cpu(&self) -> Option<&Decoder> {
        match self {
            Weights::Cpu(decoder) => Some(decoder),
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => None,
        }
    }
}

/// Computes for one loaded model. Its owner's thread alone uses it.
pub struct Backend {
    weights: Arc<Weights>,
    layout: PageLayout,
    cpu: Cpu,
    state: State,
}

/// What a forward pass needs besides weights.
enum State {
    Cpu(Box<Activations>),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::State>),
    #[cfg(feature = "metal")]
    Metal(Box<crate::metal::State>),
}

impl Backend {
    /// For weights where they are, and pages of this layout; on a GPU, `cpu` does what is left to the host.
    pub fn new(weights: Arc<Weights>, layout: PageLayout, cpu: Cpu) -> Result<Backend, ModelError> {
        let state = match &*weights {
            Weights::Cpu(_) => State::Cpu(Box::default()),
            #[cfg(feature = "cuda")]
            Weights::Cuda(weights) => State::Cuda(Box::new(crate::cuda::State::new(weights, layout)?)),
            #[cfg(feature = "metal")]
            Weights::Metal(weights) => State::Metal(Box::new(crate::metal::State::new(weights, layout)?)),
        };
        Ok(Backend { weights, layout, cpu, state })
    }

    /// The threads of the host.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Whether [`Backend::forward`] takes a chunk. Where rows are cheap beside weights, prompts go through whole.
    pub fn takes_chunks(&self) -> bool {
        matches!(self.state, State::Cpu(_))
    }

    /// Whether a sequence may have so many pages where this computes; if not, what to do.
    #[cfg_attr(not(any(feature = "cuda", feature = "metal")), allow(unused_variables))]
    pub fn check_room(&self, pages: usize) -> Result<(), ModelError> {
        match (&self.state, &*self.weights) {
            #[cfg(feature = "cuda")]
            (State::Cuda(state), Weights::Cuda(weights)) => state.check_room(weights, pages),
            #[cfg(feature = "metal")]
            (State::Metal(state), Weights::Metal(weights)) => state.check_room(weights, pages),
            _ => Ok(()),
        }
    }

    /// Computes every row of `batch`: writes its keys and values to its pages, which are complete when this returns, and
    /// leaves the wanted logits in [`Backend::logits_mut`]. Each row's bits depend on its own sequence alone. The batch's last
    /// sequence goes only through the chunk's layers, if there is a chunk (see [`Decoder::forward_with_chunk`]).
    ///
    /// # Errors
    /// A device that fails, or whose memory does not hold the pages of one of the sequences ([`Backend::check_room`]). The
    /// pages of the batch's rows hold anything then.
    pub fn forward(&mut self, batch: &Batch<'_>, chunk: Option<Chunk<'_>>) -> Result<(), ModelError> {
        let layout = &self.layout;
        match (&mut self.state, &*self.weights) {
            (State::Cpu(work), Weights::Cpu(decoder)) => {
                match chunk {
                    None => decoder.forward(&self.cpu, layout, batch, work),
                    Some(chunk) => decoder.forward_with_chunk(&self.cpu, layout, batch, chunk, work),
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (State::Cuda(state), Weights::Cuda(weights)) => {
                assert!(chunk.is_none(), "a device takes no chunks");
                state.forward(&self.cpu, weights, batch, crate::cuda::Wanted::Logits)
            }
            #[cfg(feature = "metal")]
            (State::Metal(state), Weights::Metal(weights)) => {
                assert!(chunk.is_none(), "a device takes no chunks");
                state.forward(&self.cpu, weights, batch)
            }
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => unreachable!("the state was made for these weights"),
        }
    }

    /// Whether [`Backend::forward_to_likeliest`] can be called: where logits have a long way to the host.
    pub fn finds_likeliest(&self) -> bool {
        match self.state {
            #[cfg(feature = "cuda")]
            State::Cuda(_) => true,
            _ => false,
        }
    }

    /// As [`Backend::forward`], but leaves of each row whose logits are wanted the first of the likeliest tokens alone, in
    /// [`Backend::results_mut`].
    ///
    /// # Errors
    /// As for `forward`.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn forward_to_likeliest(&mut self, batch: &Batch<'_>) -> Result<(), ModelError> {
        match (&mut self.state, &*self.weights) {
            #[cfg(feature = "cuda")]
            (State::Cuda(state), Weights::Cuda(weights)) => {
                state.forward(&self.cpu, weights, batch, crate::cuda::Wanted::Likeliest)
            }
            _ => unreachable!("the host has the logits anyway"),
        }
    }

    /// The logits of the last forward pass, `[logit_rows, vocab]`.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        match &mut self.state {
            State::Cpu(work) => work.logits_mut(),
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.logits_mut(),
            #[cfg(feature = "metal")]
            State::Metal(state) => state.logits_mut(),
        }
    }

    /// What the last forward pass left: logits as in [`Backend::logits_mut`], or instead of them the likeliest token of each
    /// of their rows.
    pub fn results_mut(&mut self) -> (&mut [f32], &[TokenId]) {
        match &mut self.state {
            State::Cpu(work) => (work.logits_mut(), &[]),
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.results_mut(),
            #[cfg(feature = "metal")]
            State::Metal(state) => (state.logits_mut(), &[]),
        }
    }

    /// Passes that a device was asked for as a whole, as they had been recorded, rather than kernel by kernel.
    pub fn replays(&self) -> u64 {
        match &self.state {
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.replays(),
            _ => 0,
        }
    }

    /// Pages whose bytes on the host changed otherwise than by a forward pass, or that nobody needs on a device now.
    #[cfg_attr(not(any(feature = "cuda", feature = "metal")), allow(unused_variables))]
    pub fn forget(&mut self, pages: &[PagePtr]) {
        match &mut self.state {
            State::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.forget(pages),
            #[cfg(feature = "metal")]
            State::Metal(state) => state.forget(pages),
        }
    }

    /// Forgets all pages: their addresses may mean others from now on.
    pub fn forget_all(&mut self) {
        match &mut self.state {
            State::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.forget_all(),
            #[cfg(feature = "metal")]
            State::Metal(state) => state.forget_all(),
        }
    }
}
