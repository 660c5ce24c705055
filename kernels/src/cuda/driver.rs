//! The driver's functions, called by name from the library that is found when the program runs.

use std::ffi::{CStr, c_char};

use cudarc::driver::sys;
use sys::CUdevice_attribute_enum as Attribute;

/// What went wrong with a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("this computer has no CUDA driver (libcuda.so.1 was not found)")]
    NoDriver,
    #[error("there is no CUDA device {ordinal}: this computer has {count}, counted from 0")]
    NoDevice { ordinal: usize, count: usize },
    #[error(
        "this program holds no code for CUDA devices: its build had a stand-in for nvcc; build it with a real one (NVCC=…)"
    )]
    NoCode,
    #[error("{name} has compute capability {major}.{minor}, and at least 8.0 is needed")]
    TooOld { name: String, major: i32, minor: i32 },
    #[error("the device has no room for {wanted} bytes of {what}: {free} bytes are free")]
    NoRoom { what: &'static str, wanted: usize, free: usize },
    #[error("the CUDA driver's {call} failed: {why}")]
    Call { call: &'static str, why: String },
}

/// The result of a driver's function as ours.
pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<(), CudaError> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the driver leaves a static string, or says that it knows none.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) } == sys::CUresult::CUDA_SUCCESS;
    let why = match known && !text.is_null() {
        // SAFETY: a static string of the driver's.
        true => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        false => format!("{result:?}"),
    };
    Err(CudaError::Call { call, why })
}

/// `check(name, name(arguments))`
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::check(
            stringify!($function),
            // SAFETY: the arguments are what the driver's manual asks for; pointers are to live memory of the right size.
            unsafe { cudarc::driver::sys::$function($($argument),*) },
        )
    };
}
pub(super) use call;

/// Finds and starts the driver; quick where that has been done.
pub(super) fn start() -> Result<(), CudaError> {
    // SAFETY: looks for a library and loads it.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    call!(cuInit(0))
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    pub name: String,
    pub memory_bytes: usize,
    /// Compute capability.
    pub major: i32,
    pub minor: i32,
    pub multiprocessors: usize,
}

impl DeviceFacts {
    /// Whether this build has code for the device, once nvcc was a real one.
    pub fn is_supported(&self) -> bool {
        self.major >= 8
    }
}

/// All devices, by their numbers.
pub fn devices() -> Result<Vec<DeviceFacts>, CudaError> {
    start()?;
    (0..count()?).map(|ordinal| facts(device(ordinal)?)).collect()
}

/// The newest CUDA that the driver supports: major and minor version.
pub fn driver_version() -> Result<(i32, i32), CudaError> {
    start()?;
    let mut version = 0;
    call!(cuDriverGetVersion(&mut version))?;
    Ok((version / 1000, version % 1000 / 10))
}

pub(super) fn device(ordinal: usize) -> Result<sys::CUdevice, CudaError> {
    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let mut device = 0;
    call!(cuDeviceGet(&mut device, ordinal as i32))?;
    Ok(device)
}

pub(super) fn facts(device: sys::CUdevice) -> Result<DeviceFacts, CudaError> {
    let mut name = [0 as c_char; 256];
    call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
    // SAFETY: the array's last byte is zero whatever the driver wrote before it.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory_bytes = 0;
    call!(cuDeviceTotalMem_v2(&mut memory_bytes, device))?;
    let attribute = |which| {
        let mut value = 0;
        call!(cuDeviceGetAttribute(&mut value, which, device)).map(|()| value)
    };
    Ok(DeviceFacts {
        name,
        memory_bytes,
        major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
    })
}

fn count() -> Result<usize, CudaError> {
    let mut count = 0;
    call!(cuDeviceGetCount(&mut count))?;
    Ok(count as usize)
}
