//! Normalisation and activation, row by row.

use super::isa::dispatch;
use super::lanes::{LANES, Lanes, sixteen, sixteen_mut};
use super::{Cpu, Isa};

/// Root-mean-square norm: `out = x / sqrt(mean(x²) + eps) · weight`, for every row `[weight.len()]` of `x`
/// (Zhang and Sennrich, 2019).
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let isa = cpu.isa;
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        dispatch!(isa, rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
    }
}

#[inline(always)]
fn rms_norm_row<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let whole = x.len() - x.len() % LANES;
    let mut squares = L::zero();
    for at in (0..whole).step_by(LANES) {
        let v = L::load(sixteen(x, at));
        squares = v.mul_add(v, squares);
    }
    let tail: f32 = x[whole..].iter().map(|v| v * v).sum();
    let scale = 1.0 / ((squares.sum() + tail) / x.len() as f32 + eps).sqrt();
    for at in (0..whole).step_by(LANES) {
        let scaled = L::load(sixteen(x, at)).mul(L::splat(scale));
        scaled.mul(L::load(sixteen(weight, at))).store(sixteen_mut(out, at));
    }
    for i in whole..x.len() {
        out[i] = x[i] * scale * weight[i];
    }
}

/// The gated activation of Llama's feed-forward: `gate = silu(gate) · up`, `silu(x) = x / (1 + e⁻ˣ)`.
pub fn silu_gate(cpu: &Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    /// Values of one task: large enough to outweigh handing it out.
    const CHUNK: usize = 16 * 1024;
    let isa = cpu.isa;
    let chunks: Vec<_> = gate.chunks_mut(CHUNK).zip(up.chunks(CHUNK)).map(std::sync::Mutex::new).collect();
    cpu.pool.run(chunks.len(), &|task| {
        if let Ok(mut chunk) = chunks[task].lock() {
            let (gate, up) = &mut *chunk;
            silu_gate_chunk_on(isa, gate, up);
        }
    });
}

fn silu_gate_chunk_on(isa: Isa, gate: &mut [f32], up: &[f32]) {
    dispatch!(isa, silu_gate_chunk(gate: &mut [f32], up: &[f32]));
}

#[inline(always)]
fn silu_gate_chunk<L: Lanes>(gate: &mut [f32], up: &[f32]) {
    let whole = gate.len() - gate.len() % LANES;
    for at in (0..whole).step_by(LANES) {
        silu_gate_lanes::<L>(sixteen_mut(gate, at), sixteen(up, at));
    }
    if whole < gate.len() {
        let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
        let rest = gate.len() - whole;
        g[..rest].copy_from_slice(&gate[whole..]);
        u[..rest].copy_from_slice(&up[whole..]);
        silu_gate_lanes::<L>(&mut g, &u);
        gate[whole..].copy_from_slice(&g[..rest]);
    }
}

#[inline(always)]
fn silu_gate_lanes<L: Lanes>(gate: &mut [f32; LANES], up: &[f32; LANES]) {
    let g = L::load(gate);
    let mut denominator = [0.0; LANES];
    L::zero().sub(g).exp().add(L::splat(1.0)).store(&mut denominator);
    g.mul(L::load(up)).store(gate);
    for (value, d) in gate.iter_mut().zip(denominator) {
        *value /= d;
    }
}

/// `x += delta`, element by element.
pub fn add(x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len());
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}

#[cfg(test)]
mod tests {
    use super::super::Pool;
    use super::*;

    fn cpus() -> impl Iterator<Item = Cpu> {
        Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu { isa, pool: Pool::new(2) })
    }

    #[test]
    fn rms_norm_matches_its_definition_in_f64() {
        let x: Vec<f32> = (0..2 * 41).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let weight: Vec<f32> = (0..41).map(|i| 0.5 + i as f32 / 41.0).collect();
        for cpu in cpus() {
            let mut out = vec![0.0; x.len()];
            rms_norm(&cpu, &x, &weight, 1e-5, &mut out);
            for (row, out) in x.chunks(41).zip(out.chunks(41)) {
                let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 41.0;
                for i in 0..41 {
                    let exact = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!(
                        (f64::from(out[i]) - exact).abs() < 1e-6 * exact.abs().max(1.0),
                        "{}",
                        cpu.isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn silu_gate_matches_its_definition_in_f64_out_to_the_extremes() {
        let gate: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) / 4.0).chain([0.0, -0.0, 1e-30]).collect();
        let up: Vec<f32> = gate.iter().map(|g| 1.0 - g / 3.0).collect();
        for cpu in cpus() {
            let mut out = gate.clone();
            silu_gate(&cpu, &mut out, &up);
            for ((g, u), out) in gate.iter().zip(&up).zip(out) {
                let exact = f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u);
                assert!(
                    (f64::from(out) - exact).abs() < 1e-6 * exact.abs() + 1e-30,
                    "{g} {}",
                    cpu.isa.name()
                );
            }
        }
    }
}
