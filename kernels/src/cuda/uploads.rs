//! What goes up while the device computes: a stream beside the one that everything else is done on, and marks in it.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{CudaError, call};
use super::gpu::Gpu;
use super::memory::{Pinned, Plain, Span};

/// Copies to the device, in their own order: nothing else waits for them, nor do they for anything, but by a [`Mark`].
pub struct Uploads {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

// SAFETY: as for the device's own stream.
unsafe impl Send for Uploads {}

impl Uploads {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Uploads, CudaError> {
        gpu.enter()?;
        let mut stream = std::ptr::null_mut();
        call!(cuStreamCreate(&mut stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        Ok(Uploads { gpu: Arc::clone(gpu), stream })
    }

    /// Fills all of `to` from `from`, from its value `first` on.
    ///
    /// # Safety
    /// Those values are neither written nor given back, and nobody uses `to`, before a mark that is set later was waited for.
    /// Whatever was asked of the device before this and uses `to` is done.
    pub unsafe fn copy<T: Plain>(
        &self,
        from: &Pinned<T>,
        first: usize,
        to: Span<'_, T>,
    ) -> Result<(), CudaError> {
        let from = &from.as_slice()[first..first + to.len()];
        call!(cuMemcpyHtoDAsync_v2(to.address(), from.as_ptr().cast(), size_of_val(from), self.stream))
    }

    /// Sets `mark` behind all copies so far, wherever it was before.
    pub fn set(&self, mark: &Mark) -> Result<(), CudaError> {
        call!(cuEventRecord(mark.event, self.stream))
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        // What cannot be given back goes with the process. Copies that are under way are finished.
        let _ = self.gpu.enter();
        let _ = call!(cuStreamDestroy_v2(self.stream));
    }
}

/// A place in the order of [`Uploads`]: nowhere before it is first set, and then nobody waits.
pub struct Mark {
    gpu: Arc<Gpu>,
    event: sys::CUevent,
}

// SAFETY: the driver's handle may be used from any thread.
unsafe impl Send for Mark {}

impl Mark {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Mark, CudaError> {
        gpu.enter()?;
        let mut event = std::ptr::null_mut();
        call!(cuEventCreate(&mut event, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32))?;
        Ok(Mark { gpu: Arc::clone(gpu), event })
    }

    /// Waits until all copies before it are done.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.gpu.enter()?;
        call!(cuEventSynchronize(self.event))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // As for streams.
        let _ = self.gpu.enter();
        let _ = call!(cuEventDestroy_v2(self.event));
    }
}

impl Gpu {
    /// What is asked of the device from now on is done after the copies before `mark` as it is set now.
    pub fn wait_for(&self, mark: &Mark) -> Result<(), CudaError> {
        call!(cuStreamWaitEvent(self.stream(), mark.event, 0))
    }
}
