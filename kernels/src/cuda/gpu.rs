//! One device: its context, one stream that everything is done on in order, and the kernels.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys;
use sys::CUfunction_attribute_enum as Attribute;

use super::KERNELS_VERSION;
use super::driver::{self, CudaError, DeviceFacts, call};
use super::products::Width;
use crate::GgmlType;

macro_rules! images {
    ($($name:literal),*) => {
        [$(include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")) as &[u8]),*]
    };
}

/// What `build.rs` made of `kernels/cuda/*.cu`.
const IMAGES: [&[u8]; 7] =
    images!("activations", "append", "attention", "matmul_f32", "matmul_few", "matmul_many", "pointwise");

/// Dynamic shared memory that a block may have without asking.
const SHARED_WITHOUT_ASKING: usize = 48 << 10;

/// A kernel of `kernels/cuda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Matmul(Width, GgmlType),
    RoundActivations,
    RmsNorm,
    AddScaled,
    AddBias,
    ScaleRows,
    SiluGate,
    GeluGate,
    Scale,
    SoftCap,
    GatherRows,
    ScatterRows,
    Likeliest,
    Rope,
    AppendKv,
    Attend,
    MergeSegments,
}

impl Kernel {
    /// All kernels, each with the name that its source gives it.
    fn all() -> impl Iterator<Item = (Kernel, String)> {
        let others = [
            (Kernel::RoundActivations, "round_activations"),
            (Kernel::RmsNorm, "rms_norm"),
            (Kernel::AddScaled, "add_scaled"),
            (Kernel::AddBias, "add_bias"),
            (Kernel::ScaleRows, "scale_rows"),
            (Kernel::SiluGate, "silu_gate"),
            (Kernel::GeluGate, "gelu_gate"),
            (Kernel::Scale, "scale"),
            (Kernel::SoftCap, "soft_cap"),
            (Kernel::GatherRows, "gather_rows"),
            (Kernel::ScatterRows, "scatter_rows"),
            (Kernel::Likeliest, "likeliest"),
            (Kernel::Rope, "rope"),
            (Kernel::AppendKv, "append_kv"),
            (Kernel::Attend, "attend"),
            (Kernel::MergeSegments, "merge_segments"),
        ];
        let products = GgmlType::ALL.into_iter().flat_map(|ty| {
            let widths = Width::of(ty).iter();
            widths.map(move |width| (Kernel::Matmul(*width, ty), width.kernel_name(ty)))
        });
        products.chain(others.map(|(kernel, name)| (kernel, name.to_owned())))
    }
}

/// The blocks of a launch, the threads of each, and the bytes of shared memory whose size the launch says.
pub(super) struct Grid {
    pub blocks: [usize; 3],
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Grid {
    /// Blocks of 256 threads.
    pub fn of(x: usize, y: usize, z: usize) -> Grid {
        Grid { blocks: [x, y, z], threads: 256, shared_bytes: 0 }
    }
}

/// A device that computes.
///
/// What is asked of it is done later, in the order of asking; [`Gpu::wait`] waits for all of it. A fault on the device shows
/// at some later call.
pub struct Gpu {
    ordinal: usize,
    facts: DeviceFacts,
    context: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<Kernel, sys::CUfunction>,
    /// Whose modules the kernels are from, where not this one's.
    opened: Option<Arc<Gpu>>,
    given_back: AtomicU64,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current, which every use does; the
// driver locks what its functions share.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Takes the device with this number and loads the kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Gpu>, CudaError> {
        driver::start()?;
        let device = driver::device(ordinal)?;
        let facts = driver::facts(device)?;
        if IMAGES.iter().any(|image| image.is_empty()) {
            return Err(CudaError::NoCode);
        }
        if !facts.is_supported() {
            let DeviceFacts { name, major, minor, .. } = facts;
            return Err(CudaError::TooOld { name, major, minor });
        }
        let mut context = std::ptr::null_mut();
        call!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        // From here on, what was taken is given back when this is dropped.
        let mut gpu = Gpu {
            ordinal,
            facts,
            context,
            device,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            kernels: HashMap::new(),
            opened: None,
            given_back: AtomicU64::new(0),
        };
        gpu.enter()?;
        call!(cuStreamCreate(&mut gpu.stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        for image in IMAGES {
            // Images begin with words of eight bytes.
            let mut words = vec![0u64; image.len().div_ceil(8)];
            words.iter_mut().zip(image.chunks(8)).for_each(|(word, bytes)| {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_ne_bytes(whole);
            });
            let mut module = std::ptr::null_mut();
            call!(cuModuleLoadData(&mut module, words.as_ptr().cast()))?;
            gpu.modules.push(module);
        }
        for (kernel, name) in Kernel::all() {
            let function = gpu.find(name)?;
            if let Kernel::Matmul(width, ty) = kernel
                && width.shared_bytes(ty) > SHARED_WITHOUT_ASKING
            {
                let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                call!(cuFuncSetAttribute(function, attribute, width.shared_bytes(ty) as i32))?;
            }
            gpu.kernels.insert(kernel, function);
        }
        Ok(Arc::new(gpu))
    }

    /// The same device with an order of its own: what is asked of this one is done without regard to the other one's work.
    /// Memory and kernels are the same.
    pub fn beside(self: &Arc<Gpu>) -> Result<Arc<Gpu>, CudaError> {
        let mut context = std::ptr::null_mut();
        call!(cuDevicePrimaryCtxRetain(&mut context, self.device))?;
        let mut gpu = Gpu {
            ordinal: self.ordinal,
            facts: self.facts.clone(),
            context,
            device: self.device,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            kernels: self.kernels.clone(),
            opened: Some(Arc::clone(self.opened.as_ref().unwrap_or(self))),
            given_back: AtomicU64::new(0),
        };
        gpu.enter()?;
        call!(cuStreamCreate(&mut gpu.stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        Ok(Arc::new(gpu))
    }

    /// The kernel of this name in whichever module has it.
    fn find(&self, name: String) -> Result<sys::CUfunction, CudaError> {
        let name = CString::new(name).expect("names of kernels are plain");
        let mut outcome = Err(CudaError::NoCode);
        for module in &self.modules {
            let mut function = std::ptr::null_mut();
            outcome = call!(cuModuleGetFunction(&mut function, *module, name.as_ptr())).map(|()| function);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// As it is named in settings.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// Identity of the bits that the kernels produce here: their version and the device's generation, as what exp and tanh
    /// are made of may differ from one to another.
    pub fn numerics(&self) -> String {
        format!("cuda{KERNELS_VERSION}-sm{}{}", self.facts.major, self.facts.minor)
    }

    /// Makes the device current for the calling thread: other threads opened it.
    pub fn enter(&self) -> Result<(), CudaError> {
        call!(cuCtxSetCurrent(self.context))
    }

    /// Bytes of the device's memory that nobody uses.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        call!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok(free)
    }

    /// Waits until all that was asked for is done.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.enter()?;
        call!(cuStreamSynchronize(self.stream))
    }

    /// How often memory that was taken through this was given back: an address that was known may be another's now.
    pub(super) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    pub(super) fn note_given_back(&self) {
        self.given_back.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// `arguments` is the struct that the kernel takes, and what it points to is memory of this device that holds as much as
    /// the kernel reads and writes with this grid.
    pub(super) unsafe fn launch<A>(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: &A,
    ) -> Result<(), CudaError> {
        let [x, y, z] = grid.blocks.map(|blocks| u32::try_from(blocks).expect("a grid's size fits"));
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let function = self.kernels[&kernel];
        let mut parameters = [std::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        let (threads, shared) = (grid.threads, grid.shared_bytes as u32);
        call!(cuLaunchKernel(
            function,
            x,
            y,
            z,
            threads,
            1,
            1,
            shared,
            self.stream,
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        ))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Whatever cannot be given back goes with the process.
        let _ = self.enter();
        for module in &self.modules {
            let _ = call!(cuModuleUnload(*module));
        }
        if !self.stream.is_null() {
            let _ = call!(cuStreamDestroy_v2(self.stream));
        }
        let _ = call!(cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({}, {})", self.name(), self.facts.name)
    }
}
