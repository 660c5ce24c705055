//! Memory of the device, memory of the host that the device can reach, and copies between them.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::driver::{CudaError, call};
use super::gpu::Gpu;

/// Numbers that devices and hosts lay out alike, without gaps between them, and of which every bit pattern is one.
///
/// # Safety
/// As the first sentence says.
pub unsafe trait Plain: Copy + 'static {
    /// The bytes of some values.
    fn bytes(values: &[Self]) -> &[u8] {
        // SAFETY: there are no gaps between the numbers, and bytes need no alignment.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

/// `len` values in the device's memory.
pub struct DeviceBuffer<T> {
    gpu: Arc<Gpu>,
    at: u64,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Plain> DeviceBuffer<T> {
    /// Memory that holds anything. `what` it is for, should there be no room.
    pub fn new(gpu: &Arc<Gpu>, len: usize, what: &'static str) -> Result<DeviceBuffer<T>, CudaError> {
        let wanted = len.max(1) * size_of::<T>();
        let free = gpu.free_bytes()?;
        if wanted > free {
            return Err(CudaError::NoRoom { what, wanted, free });
        }
        let mut at = 0;
        call!(cuMemAlloc_v2(&mut at, wanted))?;
        Ok(DeviceBuffer { gpu: Arc::clone(gpu), at, len, values: PhantomData })
    }

    /// A copy of `values`, when this returns.
    pub fn of(gpu: &Arc<Gpu>, values: &[T], what: &'static str) -> Result<DeviceBuffer<T>, CudaError> {
        let buffer = DeviceBuffer::new(gpu, values.len(), what)?;
        // Through pieces, so that a model's weights need no pinned memory of their size.
        const PIECE_BYTES: usize = 16 << 20;
        let piece = (PIECE_BYTES / size_of::<T>()).min(values.len().max(1));
        let mut staging = Pinned::new(gpu, piece)?;
        for (index, values) in values.chunks(piece).enumerate() {
            let (first, len) = (index * piece, values.len());
            staging.as_mut_slice()[..len].copy_from_slice(values);
            // SAFETY: it is waited for before the staging memory is written again or given back.
            unsafe { buffer.span().part(first..first + len).copy_in(gpu, &staging, 0)? };
            gpu.wait()?;
        }
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn span(&self) -> Span<'_, T> {
        Span { at: self.at, len: self.len, of: PhantomData }
    }

    /// The first values.
    pub fn first(&self, len: usize) -> Span<'_, T> {
        self.span().part(0..len)
    }

    /// At least `len` values, which may be others than before.
    pub fn grow(&mut self, len: usize, what: &'static str) -> Result<(), CudaError> {
        if len > self.len {
            *self = DeviceBuffer::new(&self.gpu, len, what)?;
        }
        Ok(())
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        // Memory that cannot be given back goes with the process. The driver waits for those who use it.
        let _ = self.gpu.enter();
        let _ = call!(cuMemFree_v2(self.at));
        self.gpu.note_given_back();
    }
}

/// Values of a [`DeviceBuffer`]. Who reads and who writes them is the order of what is asked of the device.
pub struct Span<'a, T> {
    at: u64,
    len: usize,
    of: PhantomData<&'a T>,
}

impl<T> Clone for Span<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Span<'_, T> {}

impl<'a, T: Plain> Span<'a, T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.at
    }

    pub fn part(self, range: Range<usize>) -> Span<'a, T> {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "a part of device memory lies inside of it"
        );
        Span { at: self.at + (range.start * size_of::<T>()) as u64, len: range.len(), of: PhantomData }
    }

    /// The same bytes as values of another type.
    pub fn cast<U: Plain>(self) -> Span<'a, U> {
        let bytes = self.len * size_of::<T>();
        assert!(bytes.is_multiple_of(size_of::<U>()) && self.at.is_multiple_of(align_of::<U>() as u64));
        Span { at: self.at, len: bytes / size_of::<U>(), of: PhantomData }
    }

    /// Fills all of it with zeros.
    pub fn clear(self, gpu: &Gpu) -> Result<(), CudaError> {
        if self.len == 0 {
            return Ok(());
        }
        call!(cuMemsetD8Async(self.at, 0, self.len * size_of::<T>(), gpu.stream()))
    }

    /// Fills all of it from `from`, from its value `first` on.
    ///
    /// # Safety
    /// Those values are neither written nor given back before [`Gpu::wait`].
    pub unsafe fn copy_in(self, gpu: &Gpu, from: &Pinned<T>, first: usize) -> Result<(), CudaError> {
        if self.len == 0 {
            return Ok(());
        }
        let from = &from.as_slice()[first..first + self.len];
        call!(cuMemcpyHtoDAsync_v2(self.at, from.as_ptr().cast(), size_of_val(from), gpu.stream()))
    }

    /// Copies all of it to the beginning of `to`.
    ///
    /// # Safety
    /// Those values are neither used nor given back before [`Gpu::wait`].
    pub unsafe fn copy_out(self, gpu: &Gpu, to: &mut Pinned<T>) -> Result<(), CudaError> {
        if self.len == 0 {
            return Ok(());
        }
        let to = &mut to.as_mut_slice()[..self.len];
        call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), self.at, size_of_val(to), gpu.stream()))
    }
}

/// `len` values in memory of the host that stays where it is, so that the device can copy it by itself.
pub struct Pinned<T> {
    gpu: Arc<Gpu>,
    at: *mut T,
    len: usize,
}

// SAFETY: it owns its memory, as a vector does.
unsafe impl<T: Plain> Send for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    pub fn new(gpu: &Arc<Gpu>, len: usize) -> Result<Pinned<T>, CudaError> {
        gpu.enter()?;
        let mut at: *mut c_void = std::ptr::null_mut();
        let bytes = len.max(1) * size_of::<T>();
        call!(cuMemHostAlloc(&mut at, bytes, 0))?;
        // SAFETY: the driver gave that many bytes; they are numbers from now on.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Pinned { gpu: Arc::clone(gpu), at: at.cast(), len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: allocated and initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: allocated and initialised by `new`.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    /// At least `len` values, which may be others than before.
    pub fn grow(&mut self, len: usize) -> Result<(), CudaError> {
        if len > self.len {
            *self = Pinned::new(&self.gpu, len)?;
        }
        Ok(())
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // As for device memory.
        let _ = self.gpu.enter();
        let _ = call!(cuMemFreeHost(self.at.cast()));
        self.gpu.note_given_back();
    }
}

/// What copies between host and device reach, in bytes per second.
#[derive(Clone, Copy, Debug)]
pub struct CopyRates {
    pub to_device: f64,
    pub to_host: f64,
}

impl CopyRates {
    /// Copies some hundred megabytes each way, through pinned memory.
    pub fn measure(gpu: &Arc<Gpu>) -> Result<CopyRates, CudaError> {
        const BYTES: usize = 64 << 20;
        const TIMES: usize = 4;
        let mut host = Pinned::<u8>::new(gpu, BYTES)?;
        let device = DeviceBuffer::<u8>::new(gpu, BYTES, "measuring copies")?;
        let mut rate = |up: bool| {
            let mut seconds = f64::INFINITY;
            // The first is for waking up.
            for _ in 0..=TIMES {
                let begun = Instant::now();
                // SAFETY: it is waited for before anything else is done with either.
                unsafe {
                    match up {
                        true => device.span().copy_in(gpu, &host, 0)?,
                        false => device.span().copy_out(gpu, &mut host)?,
                    }
                }
                gpu.wait()?;
                seconds = seconds.min(begun.elapsed().as_secs_f64());
            }
            Ok(BYTES as f64 / seconds)
        };
        Ok(CopyRates { to_device: rate(true)?, to_host: rate(false)? })
    }
}
