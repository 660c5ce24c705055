//! What a pass tells the device, gathered on the host and sent in one copy.

use std::marker::PhantomData;
use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, DeviceBuffer, Gpu, Pinned, Plain, Span};

/// Where everything begins: enough for any type of number.
const ALIGNMENT: usize = 16;

/// Gathered bytes, and their copy on the device.
pub(super) struct Inputs {
    host: Pinned<u8>,
    device: DeviceBuffer<u8>,
    gathered: Vec<u8>,
}

/// Values among the inputs.
#[derive(Clone, Copy)]
pub(super) struct Input<T> {
    at: usize,
    len: usize,
    values: PhantomData<T>,
}

impl Inputs {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Inputs, CudaError> {
        let (host, device) = (Pinned::new(gpu, 0)?, DeviceBuffer::new(gpu, 0, "a pass's inputs")?);
        Ok(Inputs { host, device, gathered: Vec::new() })
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        self.gathered.clear();
    }

    pub fn add<T: Plain>(&mut self, values: &[T]) -> Input<T> {
        let at = self.gathered.len().next_multiple_of(ALIGNMENT);
        self.gathered.resize(at, 0);
        self.gathered.extend_from_slice(T::bytes(values));
        Input { at, len: values.len(), values: PhantomData }
    }

    /// Sends all of it. The device has waited for the last pass's inputs, or there was none.
    pub fn send(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        let len = self.gathered.len();
        // Twice as much at least, since contexts grow page by page, and a new place is a new one for recorded steps.
        self.host.grow(len.next_power_of_two())?;
        self.device.grow(len.next_power_of_two(), "a pass's inputs")?;
        self.host.as_mut_slice()[..len].copy_from_slice(&self.gathered);
        // SAFETY: every pass ends with waiting for the device, before the next one writes here.
        unsafe { self.device.first(len).copy_in(gpu, &self.host, 0) }
    }

    /// On the device, after [`Inputs::send`].
    pub fn span<T: Plain>(&self, input: Input<T>) -> Span<'_, T> {
        self.device.span().part(input.at..input.at + input.len * size_of::<T>()).cast()
    }
}
