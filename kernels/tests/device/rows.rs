use super::*;
use crate::cpu::rope::{self, RopeKind};
use crate::cpu::{Cpu, norm};
use crate::cuda::Rotation;
use crate::testing::values;

/// Far apart, both signs.
fn spread(count: usize, seed: u64) -> Vec<f32> {
    values(count, seed).iter().map(|value| value * value * value * 30.0).collect()
}

fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        assert!(error <= 2e-6 * expected.abs().max(1.0), "{what} at {at}: {got} for {expected}");
    }
}

#[test]
fn norms_are_those_of_the_cpu_and_may_be_made_in_place() {
    let (gpu, cpu) = (gpu(), Cpu::new(1).unwrap());
    for width in [1, 24, 64, 576, 1000] {
        let (x, weight) = (spread(5 * width, 1), spread(width, 2));
        let mut expected = vec![0.0; x.len()];
        norm::rms_norm(&cpu, &x, &weight, 1e-5, &mut expected);
        let (device, weight, out) = (on_device(&gpu, &x), on_device(&gpu, &weight), room(&gpu, x.len()));
        gpu.rms_norm(device.span(), weight.span(), 1e-5, out.span()).unwrap();
        let apart = read(&gpu, out.span());
        assert_close(&apart, &expected, "norm");
        gpu.rms_norm(device.span(), weight.span(), 1e-5, device.span()).unwrap();
        assert_eq!(bits(&read(&gpu, device.span())), bits(&apart));
        let alone = on_device(&gpu, &x[3 * width..4 * width]);
        gpu.rms_norm(alone.span(), weight.span(), 1e-5, alone.span()).unwrap();
        assert_eq!(bits(&read(&gpu, alone.span())), bits(&apart[3 * width..4 * width]), "a row alone");
    }
}

#[test]
fn what_is_done_value_by_value_is_what_the_cpu_does() {
    let (gpu, cpu) = (gpu(), Cpu::new(1).unwrap());
    let (x, other) = (spread(7 * 100, 1), spread(7 * 100, 2));
    type OnCpu = fn(&Cpu, &mut [f32], &[f32]);
    type OnGpu = fn(&Gpu, Span<'_, f32>, Span<'_, f32>) -> Result<(), CudaError>;
    let cases: [(&str, OnCpu, OnGpu); 6] = [
        ("silu", norm::silu_gate, Gpu::silu_gate),
        ("gelu", norm::gelu_gate, Gpu::gelu_gate),
        ("add", |cpu, x, y| norm::add_scaled(cpu, x, y, 0.3), |gpu, x, y| gpu.add_scaled(x, y, 0.3)),
        ("bias", |cpu, x, y| norm::add_bias(cpu, x, &y[..100]), |gpu, x, y| gpu.add_bias(x, y.part(0..100))),
        ("cap", |cpu, x, _| norm::soft_cap(cpu, x, 5.0), |gpu, x, _| gpu.soft_cap(x, 5.0)),
        ("scale", |_, x, _| norm::scale(x, 0.7), |gpu, x, _| gpu.scale(x, 0.7)),
    ];
    for (name, on_cpu, on_gpu) in cases {
        let mut expected = x.clone();
        on_cpu(&cpu, &mut expected, &other);
        let (device, other) = (on_device(&gpu, &x), on_device(&gpu, &other));
        on_gpu(&gpu, device.span(), other.span()).unwrap();
        assert_close(&read(&gpu, device.span()), &expected, name);
    }
    let (device, factors) = (on_device(&gpu, &x), on_device(&gpu, &other[..7]));
    gpu.scale_rows(device.span(), factors.span()).unwrap();
    let expected: Vec<f32> = x.iter().enumerate().map(|(at, x)| x * other[at / 100]).collect();
    assert_eq!(bits(&read(&gpu, device.span())), bits(&expected));
}

#[test]
fn rows_are_gathered_and_scattered_by_their_numbers() {
    let gpu = gpu();
    let (from, to) = (on_device(&gpu, &values(5 * 300, 1)), room(&gpu, 2 * 300));
    let rows = on_device(&gpu, &[4u32, 1]);
    gpu.gather_rows(from.span(), rows.span(), 300, to.span()).unwrap();
    let (all, gathered) = (read(&gpu, from.span()), read(&gpu, to.span()));
    assert_eq!((&gathered[..300], &gathered[300..]), (&all[1200..], &all[300..600]));
    let factors = on_device(&gpu, &[2.0f32, -1.0]);
    gpu.scatter_rows(to.span(), rows.span(), factors.span(), from.span()).unwrap();
    let scattered = read(&gpu, from.span());
    for at in 0..300 {
        assert_eq!(scattered[at], all[at], "a row that is not named");
        assert_eq!((scattered[1200 + at], scattered[300 + at]), (all[1200 + at] * 3.0, 0.0));
    }
}

#[test]
fn rotations_are_those_of_the_cpu_to_the_bit() {
    let (gpu, cpu) = (gpu(), Cpu::new(1).unwrap());
    for kind in [RopeKind::Interleaved, RopeKind::Half] {
        for (head_dim, pairs) in [(64, 32), (24, 8), (6, 3), (8, 0)] {
            let (rows, heads) = (7, 3);
            let x = values(rows * heads * head_dim, 1);
            let (cos, sin) = (values(rows * pairs, 2), values(rows * pairs, 3));
            let mut expected = x.clone();
            rope::rotate(&cpu, kind, &mut expected, head_dim, pairs, &cos, &sin);
            let (x, cos, sin) = (on_device(&gpu, &x), on_device(&gpu, &cos), on_device(&gpu, &sin));
            let rotation = Rotation { kind, head_dim, pairs, cos: cos.span(), sin: sin.span() };
            gpu.rotate(x.span(), rotation).unwrap();
            assert_eq!(bits(&read(&gpu, x.span())), bits(&expected), "{kind:?} {head_dim} {pairs}");
        }
    }
}

#[test]
fn the_likeliest_is_the_first_of_the_largest_numbers_of_a_row() {
    let gpu = gpu();
    let mut state = 7u32;
    for width in [1, 2, 255, 256, 257, 1000, 3001] {
        let rows = 9;
        let logits: Vec<f32> = (0..rows * width)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Few values, so that the largest comes more than once. The first rows have none that could be chosen.
                let few = [f32::NAN, f32::NEG_INFINITY, -1.5, -0.0, 0.0, 2.5, 2.5];
                few[(state >> 20) as usize % if at < 2 * width { 2 } else { 7 }]
            })
            .collect();
        let (device, out) = (on_device(&gpu, &logits), room(&gpu, rows));
        gpu.likeliest(device.span(), out.span()).unwrap();
        let first_of_the_largest = |row: &[f32]| {
            let mut best = (0, f32::NEG_INFINITY);
            for (place, logit) in row.iter().enumerate() {
                best = if *logit > best.1 { (place as u32, *logit) } else { best };
            }
            best.0
        };
        let expected: Vec<u32> = logits.chunks(width).map(first_of_the_largest).collect();
        assert_eq!(read(&gpu, out.span()), expected, "{width} values");
    }
}
