//! The decoder in candle's tensors, for Metal: the same forward pass as [`crate::decoder`], without kernels of our own.
//!
//! Which operation candle has for a device is all that this knows of Metal; tests compute with candle's CPU device, which has
//! the same ones.
//!
//! **Batch invariance** is a matter of shapes here. Products with weights go through candle's quantised matrix product, whose
//! tiles are the same for any number of rows (floats go through it, too). Products of attention, whose tiles candle chooses
//! by shape, always have one shape ([`attention`]). Whatever else there is computes each row, or each number, by itself.

mod attention;
mod forward;
mod pages;
mod weights;

use std::time::Instant;

use dormouse_kernels::{Cpu, KvDtype, PageLayout, PagePtr};

use crate::ModelError;
use crate::decoder::Batch;
use pages::PageCache;
pub use weights::Weights;

/// What is left free of the memory that a device recommends to use: activations need it.
const LEFT_FREE_BYTES: usize = 512 << 20;

/// A device of candle's.
#[derive(Clone, Debug)]
pub struct MetalDevice {
    candle: candle_core::Device,
    /// What KV pages may take; None: what weights leave free, but for a part.
    budget_bytes: Option<u64>,
}

impl MetalDevice {
    /// The GPU of this computer.
    pub fn open(budget_bytes: Option<u64>) -> Result<MetalDevice, String> {
        if !cfg!(target_os = "macos") {
            return Err("Metal is there on macOS alone".to_owned());
        }
        let candle = candle_core::Device::new_metal(0).map_err(|error| error.to_string())?;
        Ok(MetalDevice::over(candle, budget_bytes))
    }

    /// Any device of candle's, for tests.
    pub fn over(candle: candle_core::Device, budget_bytes: Option<u64>) -> MetalDevice {
        MetalDevice { candle, budget_bytes }
    }

    /// Identity of the bits that it computes: candle's operations in their version, on this kind of GPU.
    pub fn numerics(&self) -> String {
        format!("metal{ARITHMETIC_VERSION}-candle{CANDLE_VERSION}-{}", self.architecture())
    }

    /// The kind of GPU, as Metal calls it.
    pub fn architecture(&self) -> String {
        #[cfg(target_os = "macos")]
        if let candle_core::Device::Metal(metal) = &self.candle {
            return metal.metal_device().architecture_name();
        }
        "cpu".to_owned()
    }

    /// Bytes that may yet be taken of its memory; None: it cannot say.
    pub fn free_bytes(&self) -> Option<usize> {
        #[cfg(target_os = "macos")]
        if let candle_core::Device::Metal(metal) = &self.candle {
            let metal = metal.metal_device();
            let free =
                metal.recommended_max_working_set_size().saturating_sub(metal.current_allocated_size());
            return Some(free);
        }
        None
    }

    /// Bytes per second to the device and back.
    pub fn measure_copies(&self) -> Result<(f64, f64), String> {
        const BYTES: usize = 64 << 20;
        let measure = || {
            let host = vec![1u8; BYTES];
            let there = candle_core::Tensor::zeros(BYTES, candle_core::DType::U8, &self.candle)?;
            self.candle.synchronize()?;
            let start = Instant::now();
            there.slice_set(&candle_core::Tensor::from_slice(&host, BYTES, &self.candle)?, 0, 0)?;
            self.candle.synchronize()?;
            let up = start.elapsed();
            let start = Instant::now();
            there.to_vec1::<u8>()?;
            Ok((BYTES as f64 / up.as_secs_f64(), BYTES as f64 / start.elapsed().as_secs_f64()))
        };
        measure().map_err(|error: candle_core::Error| error.to_string())
    }

    pub(crate) fn error(&self, error: impl std::fmt::Display) -> ModelError {
        ModelError::Device { device: "metal".to_owned(), what: error.to_string() }
    }
}

/// Raised whenever a change here can alter bits.
const ARITHMETIC_VERSION: u32 = 1;
/// Of the workspace's candle, which is pinned.
const CANDLE_VERSION: &str = "0.11.1";

/// What a forward pass on the device needs besides weights, kept from one to the next.
pub(crate) struct State {
    layout: PageLayout,
    pages: PageCache,
    /// The last pass's, `[logit_rows, vocab]`.
    logits: Vec<f32>,
}

impl State {
    pub fn new(weights: &Weights, layout: PageLayout) -> Result<State, ModelError> {
        let device = weights.device();
        if layout.dtype != KvDtype::F16 {
            return Err(
                device.error("keys and values are kept as f16 there; use --kv-dtype f16, or --device cpu")
            );
        }
        let most_bytes = match device.budget_bytes {
            Some(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
            None => device.free_bytes().map_or(usize::MAX, |free| free.saturating_sub(LEFT_FREE_BYTES)),
        };
        let most_pages = most_bytes / layout.page_bytes();
        if most_pages == 0 {
            return Err(device.error(format!(
                "{most_bytes} bytes are there for KV pages, and one takes {} (--device-budget); or use --device cpu",
                layout.page_bytes()
            )));
        }
        let pages =
            PageCache::new(&device.candle, layout, most_pages).map_err(|error| device.error(error))?;
        Ok(State { layout, pages, logits: Vec::new() })
    }

    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    pub fn check_room(&self, weights: &Weights, pages: usize) -> Result<(), ModelError> {
        self.pages.check_room(pages).map_err(|what| weights.device().error(what))
    }

    pub fn forget(&mut self, pages: &[PagePtr]) {
        self.pages.forget(pages);
    }

    pub fn forget_all(&mut self) {
        self.pages.forget_all();
    }

    /// In as many passes as the room for pages asks for: which sequences share one changes no bit.
    pub fn forward(&mut self, cpu: &Cpu, weights: &Weights, batch: &Batch<'_>) -> Result<(), ModelError> {
        self.logits.clear();
        let mut rest = batch.sequences;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.pages.fitting(rest));
            batch.part(now, |part| self.pass(cpu, weights, part)).map_err(|what| {
                // What was half done on the device is no longer what the host has.
                self.pages.forget_all();
                weights.device().error(what)
            })?;
            rest = later;
        }
        Ok(())
    }
}
