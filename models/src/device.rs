//! Which device a model is loaded for: what can be asked for, and what is there.

use std::fmt;
use std::str::FromStr;

use dormouse_kernels::Cpu;

use crate::ModelError;

#[cfg(not(feature = "cuda"))]
const NO_CUDA: &str = "this build has no code for CUDA (its feature 'cuda' is off)";
#[cfg(not(feature = "metal"))]
const NO_METAL: &str = "this build has no code for Metal (its feature 'metal' is off)";

/// What a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU where this build and this computer have one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceChoice, String> {
        let number = |text: &str| text.strip_prefix("cuda:")?.parse().ok();
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            "metal" => Ok(DeviceChoice::Metal),
            other => number(other).map(DeviceChoice::Cuda).ok_or_else(|| {
                format!("expected auto, cpu, cuda:N (N counts from 0) or metal, found '{other}'")
            }),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(number) => write!(f, "cuda:{number}"),
            DeviceChoice::Metal => f.write_str("metal"),
        }
    }
}

/// A device that is there.
#[derive(Clone, Debug)]
pub enum Device {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice),
    #[cfg(feature = "metal")]
    Metal(crate::metal::MetalDevice),
}

/// A CUDA device, and what pages may take of its memory.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
pub struct CudaDevice {
    pub gpu: std::sync::Arc<dormouse_kernels::cuda::Gpu>,
    /// None: what weights leave free, but for a part.
    pub budget_bytes: Option<u64>,
}

impl Device {
    /// Opens what was asked for; also says why `auto` means the CPU, where this build could compute elsewhere. KV pages may
    /// take `budget_bytes` of the device's memory.
    pub fn open(
        choice: DeviceChoice,
        budget_bytes: Option<u64>,
    ) -> Result<(Device, Option<String>), ModelError> {
        match choice {
            DeviceChoice::Cpu => Ok((Device::Cpu, None)),
            DeviceChoice::Cuda(number) => match cuda(number, budget_bytes) {
                Ok(device) => Ok((device, None)),
                Err(why) => Err(not_here(choice, format!("{why}; use --device cpu"))),
            },
            DeviceChoice::Metal => match metal(budget_bytes) {
                Ok(device) => Ok((device, None)),
                Err(why) => Err(not_here(choice, format!("{why}; use --device cpu"))),
            },
            DeviceChoice::Auto => Ok(Device::first(budget_bytes)),
        }
    }

    /// The first GPU where this build has code for one, and there is one; else the CPU, and why.
    fn first(budget_bytes: Option<u64>) -> (Device, Option<String>) {
        type Open = fn(Option<u64>) -> Result<Device, String>;
        let gpus: [(bool, Open); 2] =
            [(cfg!(feature = "metal"), metal), (cfg!(feature = "cuda"), |budget| cuda(0, budget))];
        let mut reasons = Vec::new();
        for (_, open) in gpus.into_iter().filter(|(is_built, _)| *is_built) {
            match open(budget_bytes) {
                Ok(device) => return (device, None),
                Err(why) => reasons.push(why),
            }
        }
        let why = (!reasons.is_empty()).then(|| format!("{}; computing on the CPU", reasons.join("; ")));
        (Device::Cpu, why)
    }

    /// Identity of the bits that it computes.
    pub fn numerics(&self, cpu: &Cpu) -> String {
        match self {
            Device::Cpu => cpu.numerics(),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => device.gpu.numerics(),
            #[cfg(feature = "metal")]
            Device::Metal(device) => device.numerics(),
        }
    }

    /// What it is, for people.
    pub fn describe(&self, cpu: &Cpu) -> String {
        match self {
            Device::Cpu => format!("CPU, {}, {} threads", cpu.isa.name(), cpu.pool.threads()),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => format!("{}, {}", device.gpu.name(), device.gpu.facts().name),
            #[cfg(feature = "metal")]
            Device::Metal(device) => format!("metal, {}", device.architecture()),
        }
    }
}

/// A GPU of this computer, for people.
#[derive(Clone, Debug)]
pub struct Accelerator {
    /// As settings name it.
    pub device: String,
    pub name: String,
    pub memory_bytes: u64,
    /// Of a CUDA device, and the newest CUDA that its driver supports.
    pub compute_capability: Option<String>,
    pub driver: Option<String>,
    /// Bytes per second to the device and back; or why it cannot compute, e.g. because this build has no code for it.
    pub copies: Result<(f64, f64), String>,
}

/// All GPUs, each tried out; or why there are none.
pub fn accelerators() -> Result<Vec<Accelerator>, String> {
    match (cuda_accelerators(), metal_accelerator()) {
        (Err(cuda), Err(metal)) => Err(format!("{cuda}; {metal}")),
        (cuda, metal) => Ok(cuda.unwrap_or_default().into_iter().chain(metal).collect()),
    }
}

#[cfg(feature = "cuda")]
fn cuda_accelerators() -> Result<Vec<Accelerator>, String> {
    use dormouse_kernels::cuda::{CopyRates, CudaError, Gpu, devices, driver_version};
    let find = || Ok((driver_version()?, devices()?));
    let ((major, minor), found) = find().map_err(|error: CudaError| error.to_string())?;
    let measure = |ordinal| {
        let rates = CopyRates::measure(&Gpu::open(ordinal)?)?;
        Ok((rates.to_device, rates.to_host))
    };
    let accelerator = |(ordinal, facts): (usize, dormouse_kernels::cuda::DeviceFacts)| Accelerator {
        device: format!("cuda:{ordinal}"),
        memory_bytes: facts.memory_bytes as u64,
        compute_capability: Some(format!("{}.{}", facts.major, facts.minor)),
        driver: Some(format!("CUDA {major}.{minor}")),
        copies: measure(ordinal).map_err(|error: CudaError| error.to_string()),
        name: facts.name,
    };
    Ok(found.into_iter().enumerate().map(accelerator).collect())
}

#[cfg(not(feature = "cuda"))]
fn cuda_accelerators() -> Result<Vec<Accelerator>, String> {
    Err(NO_CUDA.to_owned())
}

#[cfg(feature = "metal")]
fn metal_accelerator() -> Result<Accelerator, String> {
    let device = crate::metal::MetalDevice::open(None)?;
    Ok(Accelerator {
        device: "metal".to_owned(),
        name: device.architecture(),
        memory_bytes: device.free_bytes().unwrap_or(0) as u64,
        compute_capability: None,
        driver: None,
        copies: device.measure_copies(),
    })
}

#[cfg(not(feature = "metal"))]
fn metal_accelerator() -> Result<Accelerator, String> {
    Err(NO_METAL.to_owned())
}

fn not_here(choice: DeviceChoice, what: impl Into<String>) -> ModelError {
    ModelError::Device { device: choice.to_string(), what: what.into() }
}

#[cfg(feature = "cuda")]
fn cuda(number: usize, budget_bytes: Option<u64>) -> Result<Device, String> {
    let gpu = dormouse_kernels::cuda::Gpu::open(number).map_err(|error| error.to_string())?;
    Ok(Device::Cuda(CudaDevice { gpu, budget_bytes }))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize, _: Option<u64>) -> Result<Device, String> {
    Err(NO_CUDA.to_owned())
}

#[cfg(feature = "metal")]
fn metal(budget_bytes: Option<u64>) -> Result<Device, String> {
    crate::metal::MetalDevice::open(budget_bytes).map(Device::Metal)
}

#[cfg(not(feature = "metal"))]
fn metal(_: Option<u64>) -> Result<Device, String> {
    Err(NO_METAL.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:12", "metal"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn what_this_build_cannot_do_is_said_in_one_sentence() {
        let refused = |choice| Device::open(choice, None).unwrap_err().to_string();
        #[cfg(not(feature = "metal"))]
        assert!(refused(DeviceChoice::Metal).starts_with("device metal: this build has no code for Metal"));
        #[cfg(all(feature = "metal", not(target_os = "macos")))]
        assert!(refused(DeviceChoice::Metal).starts_with("device metal: Metal is there on macOS alone"));
        #[cfg(not(feature = "cuda"))]
        assert!(refused(DeviceChoice::Cuda(1)).starts_with("device cuda:1: this build has no code for CUDA"));
    }
}
