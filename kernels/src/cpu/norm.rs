//! Normalisation, activation and residual: the element-wise kernels, row by row.

use super::Cpu;
use super::disjoint::Disjoint;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use super::rows::each_range;

/// Root-mean-square norm: `out = x / sqrt(mean(x²) + eps) · weight`, for every row `[weight.len()]` of `x`
/// (Zhang and Sennrich, 2019).
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let (isa, width) = (cpu.isa, weight.len());
    let out = Disjoint::new(out);
    each_range(cpu, x.len() / width, width, &|rows| {
        let values = rows.start * width..rows.end * width;
        let out = out.part(values.clone());
        out.copy_from_slice(&x[values]);
        dispatch!(isa, norm_rows(out: &mut [f32], weight: &[f32], eps: f32));
    });
}

/// [`rms_norm`] where the rows are.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32) {
    let (isa, width, rows) = (cpu.isa, weight.len(), x.len() / weight.len());
    let x = Disjoint::new(x);
    each_range(cpu, rows, width, &|rows| {
        let x = x.part(rows.start * width..rows.end * width);
        dispatch!(isa, norm_rows(x: &mut [f32], weight: &[f32], eps: f32));
    });
}

#[inline(always)]
fn norm_rows<L: Lanes>(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let (whole, tail) = row.as_chunks::<LANES>();
        let mut squares = L::zero();
        for values in whole {
            let v = L::load(values);
            squares = v.mul_add(v, squares);
        }
        let tail: f32 = tail.iter().map(|v| v * v).sum();
        let scale = 1.0 / ((squares.sum() + tail) / weight.len() as f32 + eps).sqrt();
        scale_values::<L>(row, weight, scale);
    }
}

/// Defines `name::<L>(x, others…; constants…)`: `x = formula`, on sixteen values at a time; the last few are padded.
macro_rules! lanewise {
    ($name:ident($x:ident $(, $other:ident)? $(; $constant:ident)?) = $formula:expr) => {
        #[inline(always)]
        fn $name<L: Lanes>(x: &mut [f32] $(, $other: &[f32])? $(, $constant: f32)?) {
            $(let $constant = L::splat($constant);)?
            let whole = x.len() - x.len() % LANES;
            for at in (0..whole).step_by(LANES) {
                let $x = L::load(sixteen(x, at));
                $(let $other = L::load(sixteen($other, at));)?
                $formula.store(sixteen_mut(x, at));
            }
            if whole < x.len() {
                let $x = L::load(&padded(&x[whole..]));
                $(let $other = L::load(&padded(&$other[whole..]));)?
                let mut result = [0.0; LANES];
                $formula.store(&mut result);
                let rest = x.len() - whole;
                x[whole..].copy_from_slice(&result[..rest]);
            }
        }
    };
}

fn padded(few: &[f32]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    lanes[..few.len()].copy_from_slice(few);
    lanes
}

lanewise!(scale_values(x, weight; scale) = x.mul(scale).mul(weight));
lanewise!(silu_values(gate, up) = silu(gate).mul(up));
lanewise!(gelu_values(gate, up) = gelu(gate).mul(up));
lanewise!(add_values(x, delta; scale) = delta.mul_add(scale, x));
lanewise!(soft_cap_values(x; cap) = cap.mul(x.div(cap).tanh()));

#[inline(always)]
fn silu<L: Lanes>(x: L) -> L {
    x.div(L::zero().sub(x).exp().add(L::splat(1.0)))
}

#[inline(always)]
fn gelu<L: Lanes>(x: L) -> L {
    // −2u = x · (a + b · x²)
    let a = -2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
    let slope = x.mul(x).mul_add(L::splat(a * 0.044715), L::splat(a));
    x.div(x.mul(slope).exp().add(L::splat(1.0)))
}

/// The gated activation of Llama's feed-forward: `gate = silu(gate) · up`, `silu(x) = x / (1 + e⁻ˣ)`.
pub fn silu_gate(cpu: &Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    let (isa, gate) = (cpu.isa, Disjoint::new(gate));
    each_range(cpu, up.len(), 1, &|values| {
        let (gate, up) = (gate.part(values.clone()), &up[values]);
        dispatch!(isa, silu_values(gate: &mut [f32], up: &[f32]));
    });
}

/// The gated activation of Gemma's feed-forward: `gate = gelu(gate) · up`, with the tanh form of GELU (Hendrycks and
/// Gimpel, 2016): `gelu(x) = x / 2 · (1 + tanh u) = x / (1 + e⁻²ᵘ)`, `u = √(2/π) · (x + 0.044715 x³)`.
pub fn gelu_gate(cpu: &Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    let (isa, gate) = (cpu.isa, Disjoint::new(gate));
    each_range(cpu, up.len(), 1, &|values| {
        let (gate, up) = (gate.part(values.clone()), &up[values]);
        dispatch!(isa, gelu_values(gate: &mut [f32], up: &[f32]));
    });
}

/// `x += scale · delta`, element by element.
pub fn add_scaled(cpu: &Cpu, x: &mut [f32], delta: &[f32], scale: f32) {
    assert_eq!(x.len(), delta.len());
    let (isa, x) = (cpu.isa, Disjoint::new(x));
    each_range(cpu, delta.len(), 1, &|values| {
        let (x, delta) = (x.part(values.clone()), &delta[values]);
        dispatch!(isa, add_values(x: &mut [f32], delta: &[f32], scale: f32));
    });
}

/// `x += bias` on every row `[bias.len()]` of `x`.
pub fn add_bias(cpu: &Cpu, x: &mut [f32], bias: &[f32]) {
    let (width, rows) = (bias.len(), x.len() / bias.len());
    let x = Disjoint::new(x);
    each_range(cpu, rows, width, &|rows| {
        for row in rows {
            let row = x.part(row * width..(row + 1) * width);
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
    });
}

/// `x *= factor`, element by element.
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `x = cap · tanh(x / cap)`, element by element (Gemma 2).
pub fn soft_cap(cpu: &Cpu, x: &mut [f32], cap: f32) {
    let (isa, len, x) = (cpu.isa, x.len(), Disjoint::new(x));
    each_range(cpu, len, 1, &|values| {
        let x = x.part(values);
        dispatch!(isa, soft_cap_values(x: &mut [f32], cap: f32));
    });
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Pool};
    use super::*;

    fn cpus() -> impl Iterator<Item = Cpu> {
        Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu {
            isa,
            precision: crate::cpu::Precision::Int8,
            pool: Pool::new(2),
        })
    }

    /// Values of every size, both signs, enough for several tasks and not whole lanes.
    fn wide() -> Vec<f32> {
        let spread = (0..9000).map(|i| (i as f32 - 4500.0) / 40.0);
        spread.chain([0.0, -0.0, 1e-30, -1e-30, 1e-40, 3e8, -3e8, 1e20, -1e20]).collect()
    }

    #[test]
    fn rms_norm_matches_its_definition_in_f64() {
        for width in [1, 16, 41, 576] {
            let rows = 40;
            let x: Vec<f32> = (0..rows * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
            let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 41.0).collect();
            for cpu in cpus() {
                let mut out = vec![0.0; x.len()];
                rms_norm(&cpu, &x, &weight, 1e-5, &mut out);
                for (row, out) in x.chunks(width).zip(out.chunks(width)) {
                    let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let exact = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                        let error = (f64::from(out[i]) - exact).abs();
                        assert!(error < 1e-6 * exact.abs().max(1.0), "{}", cpu.isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn silu_gate_matches_its_definition_in_f64_out_to_the_extremes() {
        let gate = wide();
        let up: Vec<f32> = gate.iter().map(|g| 1.0 - (g / 3.0).clamp(-40.0, 40.0)).collect();
        for cpu in cpus() {
            let mut out = gate.clone();
            silu_gate(&cpu, &mut out, &up);
            for ((g, u), out) in gate.iter().zip(&up).zip(out) {
                let exact = f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u);
                // Beyond −88 the exponential stands still, and the result is nothing beside any activation.
                let bound = 1e-6 * exact.abs() + f64::from(g.abs()) * 1e-36;
                assert!((f64::from(out) - exact).abs() <= bound, "{g} {}", cpu.isa.name());
            }
        }
    }

    #[test]
    fn gelu_gate_matches_its_definition_in_f64_out_to_the_extremes() {
        let gate = wide();
        let up: Vec<f32> = gate.iter().map(|g| 1.0 - (g / 3.0).clamp(-40.0, 40.0)).collect();
        for cpu in cpus() {
            let mut out = gate.clone();
            gelu_gate(&cpu, &mut out, &up);
            for ((g, u), out) in gate.iter().zip(&up).zip(out) {
                let x = f64::from(*g);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let exact = x / (1.0 + (-2.0 * inner).exp()) * f64::from(*u);
                // The exponent's own rounding grows with it: 88 · 2⁻²³ of the result.
                let bound = 2e-5 * exact.abs() + f64::from(g.abs()) * 1e-36;
                assert!((f64::from(out) - exact).abs() <= bound, "{g} {out} {exact} {}", cpu.isa.name());
                if g.abs() < 3.0 {
                    assert!((f64::from(out) - exact).abs() <= 1e-6 * exact.abs(), "{g} {}", cpu.isa.name());
                }
            }
        }
    }

    #[test]
    fn tiers_that_fuse_multiply_adds_give_the_same_bits() {
        let x = wide();
        let delta: Vec<f32> = x.iter().rev().map(|v| v * 0.3).collect();
        let results: Vec<(Isa, Vec<u32>)> = cpus()
            .filter(|cpu| cpu.isa != Isa::Portable)
            .map(|cpu| {
                let (mut silu, mut gelu, mut sum) = (x.clone(), x.clone(), x.clone());
                silu_gate(&cpu, &mut silu, &delta);
                gelu_gate(&cpu, &mut gelu, &delta);
                add_scaled(&cpu, &mut sum, &delta, 0.7);
                soft_cap(&cpu, &mut sum, 30.0);
                let mut normed = vec![0.0; 9000];
                rms_norm(&cpu, &x[..9000], &delta[..600], 1e-6, &mut normed);
                (cpu.isa, [silu, gelu, sum, normed].concat().iter().map(|v| v.to_bits()).collect())
            })
            .collect();
        for pair in results.windows(2) {
            assert!(pair[0].1 == pair[1].1, "{} and {}", pair[0].0.name(), pair[1].0.name());
        }
    }

    #[test]
    fn a_rows_norm_does_not_depend_on_the_rows_beside_it() {
        let x: Vec<f32> = (0..64 * 576).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 300.0).collect();
        let weight = vec![1.25; 576];
        for cpu in cpus() {
            let (mut together, mut alone) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            rms_norm(&cpu, &x, &weight, 1e-5, &mut together);
            for (x, out) in x.chunks(576).zip(alone.chunks_mut(576)) {
                rms_norm(&cpu, x, &weight, 1e-5, out);
            }
            assert!(together == alone, "{}", cpu.isa.name());
        }
    }

    #[test]
    fn a_norm_in_place_is_the_same_norm() {
        let x: Vec<f32> = (0..9 * 72).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 300.0).collect();
        let weight: Vec<f32> = (0..72).map(|i| 1.0 + i as f32 / 72.0).collect();
        for cpu in cpus() {
            let (mut out, mut in_place) = (vec![0.0; x.len()], x.clone());
            rms_norm(&cpu, &x, &weight, 1e-5, &mut out);
            rms_norm_in_place(&cpu, &mut in_place, &weight, 1e-5);
            assert!(out == in_place, "{}", cpu.isa.name());
        }
    }

    #[test]
    fn sums_and_caps_match_their_definitions_in_f64() {
        let x: Vec<f32> = (0..9001).map(|i| (i as f32 - 4500.0) / 30.0).chain([1e-6, 1e30, -1e30]).collect();
        let delta: Vec<f32> = x.iter().rev().map(|v| v.clamp(-9.0, 9.0)).collect();
        for cpu in cpus() {
            let (mut sum, mut capped, mut biased) = (x.clone(), x.clone(), x[..9000].to_vec());
            add_scaled(&cpu, &mut sum, &delta, 0.25);
            soft_cap(&cpu, &mut capped, 30.0);
            add_bias(&cpu, &mut biased, &delta[..300]);
            for i in 0..x.len() {
                let exact = f64::from(x[i]) + 0.25 * f64::from(delta[i]);
                assert!((f64::from(sum[i]) - exact).abs() <= 2e-7 * exact.abs(), "{}", cpu.isa.name());
                let exact = 30.0 * (f64::from(x[i]) / 30.0).tanh();
                assert!((f64::from(capped[i]) - exact).abs() < 1e-5, "{} {}", x[i], cpu.isa.name());
            }
            assert!((0..9000).all(|i| biased[i] == x[i] + delta[i % 300]));
        }
    }
}
