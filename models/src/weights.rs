//! Tensors as views of a mapped file: nothing is copied, the page cache is the only copy in RAM.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dormouse_kernels::GgmlType;
use dormouse_kernels::cpu::matmul::Matrix;
use dormouse_kernels::packed::TILE_ROWS;
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

/// A matrix that activations are multiplied with: float weights as they lie in the model's file, quantised ones as tiles
/// ([`crate::pack`]).
#[derive(Clone)]
pub struct Operand {
    pub ty: GgmlType,
    pub rows: usize,
    pub cols: usize,
    map: Arc<Mmap>,
    offset: usize,
    bytes: usize,
}

impl Operand {
    /// Float weights, used in place.
    pub(crate) fn floats(tensor: &Tensor) -> Operand {
        let Tensor { ty, rows, cols, ref map, offset } = *tensor;
        assert!(!ty.is_packed(), "quantised weights are multiplied as tiles");
        Operand { ty, rows, cols, map: map.clone(), offset, bytes: rows * ty.row_bytes(cols) }
    }

    /// Packed weights at `offset` of `map`.
    pub(crate) fn tiles(ty: GgmlType, rows: usize, cols: usize, map: Arc<Mmap>, offset: usize) -> Operand {
        let bytes = ty.packed_bytes(rows, cols);
        assert!(ty.is_packed() && offset + bytes <= map.len(), "tiles reach past their file");
        Operand { ty, rows, cols, map, offset, bytes }
    }

    /// Some consecutive rows. None where rows of quantised weights do not begin and end with whole tiles of sixteen rows.
    pub(crate) fn rows(&self, range: Range<usize>) -> Option<Operand> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows of a matrix");
        let rows = range.len();
        let (skipped, bytes) = if self.ty.is_packed() {
            let whole = |row: usize| row.is_multiple_of(TILE_ROWS) || row == self.rows;
            if !whole(range.start) || !whole(range.end) {
                return None;
            }
            (self.ty.packed_bytes(range.start, self.cols), self.ty.packed_bytes(rows, self.cols))
        } else {
            let row_bytes = self.ty.row_bytes(self.cols);
            (range.start * row_bytes, rows * row_bytes)
        };
        Some(Operand { rows, offset: self.offset + skipped, bytes, ..self.clone() })
    }

    /// The matrix as kernels take it.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.ty, self.rows, self.cols, &self.map[self.offset..][..self.bytes])
    }
}

/// Where a model's tensors and settings come from: a GGUF file, or a folder with safetensors and `config.json`.
pub trait WeightSource {
    fn path(&self) -> &Path;
    /// The tensor of this name, in the file's own naming.
    fn tensor(&self, name: &str) -> Option<Tensor>;
    /// The names of all tensors, in no particular order.
    fn names(&self) -> Vec<&str>;
}
