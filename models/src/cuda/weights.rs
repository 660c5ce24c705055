//! Weights on the device: matrices as they lie in the model's file, vectors as f32.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, DeviceBuffer, DeviceMatrix, Gpu};

use crate::ModelError;
use crate::config::{ModelConfig, Role};
use crate::decoder::Rotation;
use crate::decoder::weights::{Finder, Home, Layer};
use crate::device::CudaDevice;
use crate::source::ModelSource;
use crate::weights::{Tensor, WeightSource};

/// The device, as the home of weights from the file at `path`.
pub(super) struct OnDevice {
    gpu: Arc<Gpu>,
    path: std::path::PathBuf,
}

impl OnDevice {
    fn copy(
        &self,
        name: &str,
        tensor: &Tensor,
        range: Range<usize>,
    ) -> Result<Option<DeviceMatrix>, ModelError> {
        let Tensor { ty, cols, .. } = *tensor;
        if !DeviceMatrix::is_possible(ty, cols) {
            return Err(ModelError::malformed(
                &self.path,
                format!(
                    "tensor '{name}' has rows of {cols} {} values, which the kernels for devices cannot multiply \
                     (multiples of {} they can); use --device cpu",
                    ty.name(),
                    ty.block_len().max(8)
                ),
            ));
        }
        let row_bytes = ty.row_bytes(cols);
        let bytes = &tensor.bytes()[range.start * row_bytes..range.end * row_bytes];
        let matrix = DeviceMatrix::new(&self.gpu, ty, range.len(), cols, bytes);
        matrix.map(Some).map_err(|error| failed(&self.gpu, error))
    }
}

impl Home for OnDevice {
    type Matrix = DeviceMatrix;
    type Vector = DeviceBuffer<f32>;

    fn matrix(&self, name: &str, tensor: &Tensor) -> Result<Option<DeviceMatrix>, ModelError> {
        self.copy(name, tensor, 0..tensor.rows)
    }

    fn rows(
        &self,
        name: &str,
        tensor: &Tensor,
        range: Range<usize>,
    ) -> Result<Option<DeviceMatrix>, ModelError> {
        self.copy(name, tensor, range)
    }

    fn vector(&self, values: Vec<f32>) -> Result<DeviceBuffer<f32>, ModelError> {
        DeviceBuffer::of(&self.gpu, &values, "weights").map_err(|error| failed(&self.gpu, error))
    }
}

/// A model on a device.
pub struct Weights {
    gpu: Arc<Gpu>,
    config: ModelConfig,
    budget_bytes: Option<u64>,
    pub(super) rotations: Vec<Rotation>,
    /// Rows are looked up by the host.
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer<OnDevice>>,
    pub(super) output_norm: DeviceBuffer<f32>,
    pub(super) output: DeviceMatrix,
}

impl Weights {
    /// Copies every tensor that `config` describes to the device.
    pub fn load(
        device: &CudaDevice,
        source: &ModelSource,
        config: &ModelConfig,
    ) -> Result<Weights, ModelError> {
        let source: &dyn WeightSource = source;
        let home = OnDevice { gpu: Arc::clone(&device.gpu), path: Path::to_owned(source.path()) };
        let finder = Finder { source, home: &home, config };
        Ok(Weights {
            gpu: Arc::clone(&device.gpu),
            config: config.clone(),
            budget_bytes: device.budget_bytes,
            rotations: Rotation::of(config),
            embedding: finder.embedding()?,
            layers: (0..config.layers).map(|layer| finder.layer(layer)).collect::<Result<_, _>>()?,
            output_norm: finder.norm(0, Role::OutputNorm, config.d_model)?,
            output: finder.output()?,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// What pages may take.
    pub fn budget_bytes(&self) -> Option<u64> {
        self.budget_bytes
    }

    pub fn error(&self, error: CudaError) -> ModelError {
        failed(&self.gpu, error)
    }
}

fn failed(gpu: &Gpu, error: CudaError) -> ModelError {
    ModelError::Device { device: gpu.name(), what: error.to_string() }
}
