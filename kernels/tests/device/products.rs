use half::f16;

use super::*;
use crate::GgmlType;
use crate::cuda::{Activations, DeviceMatrix};
use crate::quant::dequantize;
use crate::testing::{values, weights};

fn product(gpu: &Arc<Gpu>, matrix: &DeviceMatrix, x: &[f32]) -> Vec<f32> {
    let x = on_device(gpu, x);
    let tokens = x.len() / matrix.cols;
    let out = room(gpu, tokens * matrix.rows);
    let mut activations = Activations::new(gpu).unwrap();
    activations.grow(tokens, matrix.cols).unwrap();
    gpu.matmul(x.span(), &activations, &[(matrix, out.span())]).unwrap();
    read(gpu, out.span())
}

/// More than one round of a block's warps, the last slab not whole, and for floats not whole runs of 32.
fn shapes(ty: GgmlType) -> Vec<(usize, usize)> {
    match ty.block_len() {
        1 => vec![(37, 296), (100, 2600)],
        32 => vec![(37, 288), (100, 4128)],
        _ => vec![(37, 512), (100, 2304)],
    }
}

fn is_quantised(ty: GgmlType) -> bool {
    ty.block_len() > 1
}

/// The f16 with which products compute for a value that is multiplied by `factor` before.
fn rounded(value: f32, factor: f32) -> f32 {
    f16::from_f32(value * factor).to_f32() / factor
}

/// `[rows, cols]` of these weights as products take them: those that are quantised are rounded to f16, times 64.
fn taken(ty: GgmlType, rows: usize, cols: usize, source: &[u8]) -> Vec<f32> {
    let mut w = vec![0.0; rows * cols];
    dequantize(ty, source, &mut w);
    if is_quantised(ty) {
        w.iter_mut().for_each(|w| *w = rounded(*w, 64.0));
    }
    w
}

/// The exact sum, and that of the terms' magnitudes.
fn exact(x: &[f32], w: &[f32]) -> (f64, f64) {
    let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
    (terms().sum(), terms().map(f64::abs).sum())
}

/// Of every type: with the rounding that is documented for quantised ones taken into account, nothing else is lost.
#[test]
fn products_agree_with_an_f64_reference_for_every_type_and_number_of_tokens() {
    let gpu = gpu();
    for ty in GgmlType::ALL {
        for (rows, cols) in shapes(ty) {
            let source = weights(ty, rows, cols, 7);
            let mut decoded = vec![0.0; rows * cols];
            dequantize(ty, &source, &mut decoded);
            let taken = taken(ty, rows, cols, &source);
            let matrix = DeviceMatrix::new(&gpu, ty, rows, cols, &source).unwrap();
            let (mut worst, mut worst_of_all) = (0.0f64, 0.0f64);
            let x = values(70 * cols, 3);
            // The rows' factor may be another: that changes no rounding of such values.
            let taken_x: Vec<f32> =
                x.iter().map(|x| if is_quantised(ty) { rounded(*x, 16384.0) } else { *x }).collect();
            let out = product(&gpu, &matrix, &x);
            for (at, got) in out.iter().enumerate() {
                let (token, row) = (at / rows * cols, at % rows * cols);
                let (expected, scale) = exact(&taken_x[token..token + cols], &taken[row..row + cols]);
                let error = (f64::from(*got) - expected).abs() / scale;
                worst = worst.max(error);
                assert!(
                    error <= 1e-6,
                    "{} {rows} × {cols} token {}: {got} for {expected}",
                    ty.name(),
                    at / rows
                );
                if is_quantised(ty) {
                    let (unrounded, scale) = exact(&x[token..token + cols], &decoded[row..row + cols]);
                    worst_of_all = worst_of_all.max((f64::from(*got) - unrounded).abs() / scale);
                }
            }
            for tokens in [1, 11, 40] {
                let part = product(&gpu, &matrix, &x[..tokens * cols]);
                assert_eq!(bits(&part), bits(&out[..tokens * rows]), "{} {tokens} tokens", ty.name());
            }
            println!("{} {rows} × {cols}: {worst:.1e}, with rounding {worst_of_all:.1e}", ty.name());
            assert!(worst_of_all <= 2e-4, "{} {rows} × {cols}: {worst_of_all}", ty.name());
        }
    }
}

#[test]
fn weights_are_decoded_to_the_bits_of_the_specification_rounded_to_f16_where_they_are_quantised() {
    let gpu = gpu();
    for ty in GgmlType::ALL {
        let (rows, cols) = (3, 512);
        let source = weights(ty, rows, cols, 11);
        let w = taken(ty, rows, cols, &source);
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
        let tokens = 131;
        let x = values(tokens * cols, 5);
        let together = product(&gpu, &matrix, &x);
        for count in [1, 8, 9, 33] {
            for first in [31, tokens - count] {
                let part = product(&gpu, &matrix, &x[first * cols..(first + count) * cols]);
                let same = bits(&part) == bits(&together[first * rows..(first + count) * rows]);
                assert!(same, "{}: {count} rows from {first} on", ty.name());
            }
        }
    }
}

#[test]
fn a_rows_magnitude_is_its_own_affair() {
    let gpu = gpu();
    for ty in [GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0] {
        let (rows, cols) = (37, 288);
        let matrix = DeviceMatrix::new(&gpu, ty, rows, cols, &weights(ty, rows, cols, 7)).unwrap();
        let x = values(cols, 5);
        let alone = product(&gpu, &matrix, &x);
        // Powers of two change no bit but the exponent, from the least of normal numbers on.
        let scales = [1.0, 2f32.powi(100), 2f32.powi(-90), 2f32.powi(20), 0.0];
        let mut all: Vec<f32> = scales.iter().flat_map(|scale| x.iter().map(move |x| x * scale)).collect();
        all.extend((0..cols).map(|k| if k == 100 { f32::NAN } else { x[k] }));
        all.extend((0..cols).map(|k| if k == 100 { f32::INFINITY } else { x[k] }));
        all.extend(&x);
        let out = product(&gpu, &matrix, &all);
        let row = |number: usize| &out[number * rows..(number + 1) * rows];
        for (number, scale) in scales.iter().enumerate() {
            let expected: Vec<f32> = alone.iter().map(|value| value * scale).collect();
            assert!(row(number) == expected, "{} times {scale}", ty.name());
        }
        assert!(row(5).iter().chain(row(6)).all(|value| !value.is_finite()), "{}", ty.name());
        assert_eq!(bits(row(7)), bits(&alone));
    }
}

#[test]
fn products_of_the_same_activations_are_what_each_is_alone() {
    let gpu = gpu();
    let (cols, tokens) = (512, 3);
    let types = [GgmlType::Q4K, GgmlType::BF16, GgmlType::F32, GgmlType::F16, GgmlType::Q8_0];
    let matrices = types.map(|ty| {
        DeviceMatrix::new(&gpu, ty, 20, cols, &weights(ty, 20, cols, ty.gguf_id().into())).unwrap()
    });
    let values = values(tokens * cols, 5);
    let (x, outs) = (on_device(&gpu, &values), types.map(|_| room(&gpu, tokens * 20)));
    let mut activations = Activations::new(&gpu).unwrap();
    activations.grow(tokens, cols).unwrap();
    let products: Vec<_> = matrices.iter().zip(&outs).map(|(matrix, out)| (matrix, out.span())).collect();
    gpu.matmul(x.span(), &activations, &products).unwrap();
    for (matrix, out) in products {
        assert_eq!(bits(&read(&gpu, out)), bits(&product(&gpu, matrix, &values)), "{}", matrix.ty.name());
    }
}
