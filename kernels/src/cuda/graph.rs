//! Work that is recorded once, and asked for as a whole again and again.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{CudaError, call};
use super::gpu::Gpu;

/// Recorded work: which kernels and copies, with which arguments. What they read lies in memory, and is what it holds when they
/// run.
pub struct Graph {
    gpu: Arc<Gpu>,
    executable: sys::CUgraphExec,
    /// [`Gpu::given_back`] before it was recorded.
    given_back: u64,
}

// SAFETY: the driver's handle may be used from any thread, by one at a time, which borrowing sees to: `launch` alone uses it
// while it is shared, and the owner of what the work writes keeps others from it.
unsafe impl Send for Graph {}

impl Gpu {
    /// Records what `work` asks of the device, none of which is done now. It may neither wait for the device nor take memory,
    /// nor give any back; what another thread asks of the same `Gpu` meanwhile would be recorded too ([`Gpu::beside`]). A driver
    /// may load a kernel when it is first started: better before than within `work`.
    ///
    /// # Errors
    /// Those of `work`; and the driver's, where `work` does what cannot be recorded.
    pub fn record(self: &Arc<Gpu>, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.enter()?;
        let given_back = self.given_back();
        // What other threads do with the driver meanwhile is their own affair.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        call!(cuStreamBeginCapture_v2(self.stream(), mode))?;
        let outcome = work();
        let mut recorded = std::ptr::null_mut();
        let ended = call!(cuStreamEndCapture(self.stream(), &mut recorded));
        let mut executable = std::ptr::null_mut();
        let made = outcome
            .and(ended)
            .and_then(|()| call!(cuGraphInstantiateWithFlags(&mut executable, recorded, 0)));
        if !recorded.is_null() {
            // What was made of it stays. A description that cannot be given back goes with the process.
            let _ = call!(cuGraphDestroy(recorded));
        }
        made?;
        Ok(Graph { gpu: Arc::clone(self), executable, given_back })
    }
}

impl Graph {
    /// Whether no memory that was taken through the same [`Gpu`], of the device's or such as it can reach, was given back since
    /// this was recorded: what the work names of it is still there then.
    pub fn is_current(&self) -> bool {
        self.given_back == self.gpu.given_back()
    }

    /// Asks for all of the work.
    ///
    /// # Safety
    /// The memory that the work names is there ([`Graph::is_current`] where nobody knows otherwise), and everything holds that
    /// was promised when it was recorded.
    pub unsafe fn launch(&self) -> Result<(), CudaError> {
        call!(cuGraphLaunch(self.executable, self.gpu.stream()))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // As for device memory. The driver keeps it until it has run.
        let _ = self.gpu.enter();
        let _ = call!(cuGraphExecDestroy(self.executable));
    }
}
