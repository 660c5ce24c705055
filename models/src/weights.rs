//! Tensors as views of a mapped file: nothing is copied, the page cache is the only copy in RAM.

use std::path::Path;
use std::sync::Arc;

use dormouse_kernels::GgmlType;
use memmap2::Mmap;

/// A matrix `[rows, cols]` (a vector has one row), row-major, in a mapped file.
#[derive(Clone)]
pub struct Tensor {
    pub ty: GgmlType,
    pub rows: usize,
    pub cols: usize,
    map: Arc<Mmap>,
    offset: usize,
}

impl Tensor {
    pub fn new(ty: GgmlType, rows: usize, cols: usize, map: Arc<Mmap>, offset: usize) -> Tensor {
        assert!(offset + rows * ty.row_bytes(cols) <= map.len(), "tensor reaches past its file");
        Tensor { ty, rows, cols, map, offset }
    }

    /// The tensor's bytes, `rows * ty.row_bytes(cols)` of them.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.offset..][..self.rows * self.ty.row_bytes(self.cols)]
    }

    /// The whole tensor as f32, for vectors and tests.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        dormouse_kernels::quant::dequantize(self.ty, self.bytes(), &mut out);
        out
    }
}

/// Where a model's tensors and settings come from: a GGUF file, or a folder with safetensors and `config.json`.
pub trait WeightSource {
    fn path(&self) -> &Path;
    /// The tensor of this name, in the file's own naming.
    fn tensor(&self, name: &str) -> Option<Tensor>;
}
