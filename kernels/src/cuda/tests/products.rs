use super::*;
use crate::GgmlType;
use crate::cuda::DeviceMatrix;
use crate::quant::dequantize;
use crate::testing::{values, weights};

fn product(gpu: &Arc<Gpu>, matrix: &DeviceMatrix, x: &[f32]) -> Vec<f32> {
    let x = on_device(gpu, x);
    let out = room(gpu, x.len() / matrix.cols * matrix.rows);
    gpu.matmul(matrix, x.span(), out.span()).unwrap();
    read(gpu, out.span())
}

/// More than two slabs, the last of them not whole, and for floats not whole runs of 32.
fn shapes(ty: GgmlType) -> Vec<(usize, usize)> {
    match ty.block_len() {
        1 => vec![(37, 296), (70, 40)],
        32 => vec![(37, 288), (70, 4128)],
        _ => vec![(37, 512), (70, 768)],
    }
}

#[test]
fn products_agree_with_an_f64_reference_for_every_type_and_number_of_tokens() {
    let gpu = gpu();
    for ty in GgmlType::ALL {
        for (rows, cols) in shapes(ty) {
            let source = weights(ty, rows, cols, 7);
            let mut w = vec![0.0; rows * cols];
            dequantize(ty, &source, &mut w);
            let matrix = DeviceMatrix::new(&gpu, ty, rows, cols, &source).unwrap();
            for tokens in [1, 3, 11, 70] {
                let x = values(tokens * cols, 3);
                let out = product(&gpu, &matrix, &x);
                for (at, got) in out.iter().enumerate() {
                    let (token, row) = (at / rows, at % rows);
                    let terms =
                        || (0..cols).map(|k| f64::from(x[token * cols + k]) * f64::from(w[row * cols + k]));
                    let (exact, scale) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let error = (f64::from(*got) - exact).abs();
                    assert!(
                        error <= scale * 1e-6,
                        "{} {rows} × {cols} token {token}: {got} for {exact}",
                        ty.name()
                    );
                }
            }
        }
    }
}

#[test]
fn weights_are_decoded_to_the_bits_of_the_specification() {
    let gpu = gpu();
    for ty in GgmlType::ALL {
        let (rows, cols) = (3, 512);
        let source = weights(ty, rows, cols, 11);
        let mut w = vec![0.0; rows * cols];
        dequantize(ty, &source, &mut w);
        let matrix = DeviceMatrix::new(&gpu, ty, rows, cols, &source).unwrap();
        // Token k is the k-th unit vector, so that its products are column k.
        let mut x = vec![0.0; cols * cols];
        (0..cols).for_each(|k| x[k * cols + k] = 1.0);
        let out = product(&gpu, &matrix, &x);
        for (at, value) in out.iter().enumerate() {
            let decoded = w[at % rows * cols + at / rows];
            assert!(*value == decoded, "{} value {}: {value} for {decoded}", ty.name(), at / rows);
        }
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_the_other_rows() {
    let gpu = gpu();
    for ty in GgmlType::ALL {
        let (rows, cols) = shapes(ty)[1];
        let matrix = DeviceMatrix::new(&gpu, ty, rows, cols, &weights(ty, rows, cols, 7)).unwrap();
        let tokens = 67;
        let x = values(tokens * cols, 5);
        let together = product(&gpu, &matrix, &x);
        for count in [1, 2, 4, 5, 8, 16, 17] {
            for first in [0, 31, tokens - count] {
                let part = product(&gpu, &matrix, &x[first * cols..(first + count) * cols]);
                let same = bits(&part) == bits(&together[first * rows..(first + count) * rows]);
                assert!(same, "{}: {count} rows from {first} on", ty.name());
            }
        }
    }
}
