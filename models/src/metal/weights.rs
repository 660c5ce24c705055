//! Weights on the device: matrices as candle's quantised tensors, which floats are, too; vectors as f32.

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::Tensor as Candle;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use dormouse_kernels::GgmlType;
use dormouse_kernels::quant::dequantize;
use half::f16;

use super::MetalDevice;
use crate::ModelError;
use crate::config::{ModelConfig, Role};
use crate::decoder::Rotation;
use crate::decoder::weights::{Finder, Home, Layer};
use crate::source::ModelSource;
use crate::weights::{Tensor, WeightSource};

/// Columns that candle's product takes at a time, on Metal.
const COLUMNS: usize = 32;

/// A matrix `[rows, cols]`.
pub(super) struct Matrix(QTensor);

impl Matrix {
    /// `x · matrixᵀ`: `[rows, cols]` to `[rows, rows of the matrix]`.
    pub fn product(&self, x: &Candle) -> candle_core::Result<Candle> {
        let x = x.contiguous()?;
        // One row alone would be computed by another kernel, in another order.
        match x.dim(0)? {
            1 => Candle::cat(&[&x, &x], 0)?.apply_op1_no_bwd(&self.0)?.narrow(0, 0, 1),
            _ => x.apply_op1_no_bwd(&self.0),
        }
    }
}

/// The device, as the home of weights from the file at `path`.
pub(super) struct OnDevice {
    device: MetalDevice,
    path: PathBuf,
}

impl OnDevice {
    fn copy(&self, name: &str, tensor: &Tensor, range: Range<usize>) -> Result<Option<Matrix>, ModelError> {
        let Tensor { ty, cols, .. } = *tensor;
        if self.device.candle.is_metal() && !cols.is_multiple_of(COLUMNS) {
            return Err(ModelError::malformed(
                &self.path,
                format!(
                    "tensor '{name}' has rows of {cols} values, which Metal cannot multiply (multiples of {COLUMNS} it \
                     can); use --device cpu"
                ),
            ));
        }
        let row_bytes = ty.row_bytes(cols);
        let bytes = &tensor.bytes()[range.start * row_bytes..range.end * row_bytes];
        let make = || {
            let (bytes, ty) = match candle_type(ty) {
                Some(ty) => (Cow::Borrowed(bytes), ty),
                None => (Cow::Owned(as_halves(ty, bytes, range.len() * cols)), GgmlDType::F16),
            };
            // Candle reads blocks in place, which a safetensors file may have anywhere.
            let bytes =
                if bytes.as_ptr().addr().is_multiple_of(4) { bytes } else { Cow::Owned(bytes.into_owned()) };
            let storage = QStorage::from_data(bytes, &self.device.candle, ty)?;
            QTensor::new(storage, (range.len(), cols))
        };
        make().map(|tensor| Some(Matrix(tensor))).map_err(|error| self.device.error(error))
    }
}

/// Weights of a type that candle lacks, decoded: what its product would make of them, too.
fn as_halves(ty: GgmlType, bytes: &[u8], values: usize) -> Vec<u8> {
    let mut decoded = vec![0.0; values];
    dequantize(ty, bytes, &mut decoded);
    decoded.into_iter().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect()
}

/// What candle calls a type; None where it lacks it.
fn candle_type(ty: GgmlType) -> Option<GgmlDType> {
    Some(match ty {
        GgmlType::F32 => GgmlDType::F32,
        GgmlType::F16 => GgmlDType::F16,
        GgmlType::BF16 => GgmlDType::BF16,
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2K => GgmlDType::Q2K,
        GgmlType::Q3K => GgmlDType::Q3K,
        GgmlType::Q4K => GgmlDType::Q4K,
        GgmlType::Q5K => GgmlDType::Q5K,
        GgmlType::Q6K => GgmlDType::Q6K,
        GgmlType::Iq4Nl | GgmlType::Iq4Xs | GgmlType::Mxfp4 => return None,
    })
}

impl Home for OnDevice {
    type Matrix = Matrix;
    type Vector = Candle;

    fn matrix(&self, name: &str, tensor: &Tensor) -> Result<Option<Matrix>, ModelError> {
        self.copy(name, tensor, 0..tensor.rows)
    }

    fn rows(&self, name: &str, tensor: &Tensor, range: Range<usize>) -> Result<Option<Matrix>, ModelError> {
        self.copy(name, tensor, range)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Candle, ModelError> {
        let len = values.len();
        Candle::from_vec(values, len, &self.device.candle).map_err(|error| self.device.error(error))
    }
}

/// A model on a device.
pub struct Weights {
    device: MetalDevice,
    config: ModelConfig,
    pub(super) rotations: Vec<Rotation>,
    /// Rows are looked up by the host.
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer<OnDevice>>,
    pub(super) output_norm: Candle,
    pub(super) output: Matrix,
}

impl Weights {
    /// Copies every tensor that `config` describes to the device.
    pub fn load(
        device: &MetalDevice,
        source: &ModelSource,
        config: &ModelConfig,
    ) -> Result<Weights, ModelError> {
        let source: &dyn WeightSource = source;
        let home = OnDevice { device: device.clone(), path: Path::to_owned(source.path()) };
        let finder = Finder { source, home: &home, config };
        Ok(Weights {
            device: device.clone(),
            config: config.clone(),
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

    pub fn device(&self) -> &MetalDevice {
        &self.device
    }

    pub(super) fn candle(&self) -> &candle_core::Device {
        &self.device.candle
    }
}
