//! What choosing a token asks of a row of logits: the largest of each of its parts, and sums of exponentials.
//!
//! A row is as long as the vocabulary, and what is known of its parts says where it need not be read again.

use super::Cpu;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes};

/// Logits of a part; a row's last one may be shorter.
pub const PART: usize = 128;

/// The largest number of each part of `logits`, −∞ where there is none.
pub fn maxima(cpu: &Cpu, logits: &[f32], out: &mut Vec<f32>) {
    out.resize(logits.len().div_ceil(PART), 0.0);
    dispatch!(cpu.isa, maxima_of(logits: &[f32], out: &mut [f32]));
}

/// The sum of `e^((logit − largest) · scale)` of each part. `largest` is the row's and `scale` positive; what is not a number
/// counts for nothing, as does an exponential under 10⁻³⁰.
pub fn sums(cpu: &Cpu, logits: &[f32], largest: f32, scale: f32, out: &mut Vec<f32>) {
    out.resize(logits.len().div_ceil(PART), 0.0);
    dispatch!(cpu.isa, sums_of(logits: &[f32], largest: f32, scale: f32, out: &mut [f32]));
}

/// The terms of the sum of one part.
pub fn terms(cpu: &Cpu, part: &[f32], largest: f32, scale: f32) -> [f32; PART] {
    let mut terms = padded(part);
    let out = &mut terms;
    dispatch!(cpu.isa, terms_of(out: &mut [f32; PART], largest: f32, scale: f32));
    terms
}

fn padded(few: &[f32]) -> [f32; PART] {
    let mut part = [f32::NEG_INFINITY; PART];
    part[..few.len()].copy_from_slice(few);
    part
}

#[inline(always)]
fn maxima_of<L: Lanes>(logits: &[f32], out: &mut [f32]) {
    let (parts, rest) = logits.as_chunks::<PART>();
    for (part, out) in parts.iter().zip(&mut *out) {
        *out = largest_of::<L>(part);
    }
    if !rest.is_empty() {
        out[parts.len()] = largest_of::<L>(&padded(rest));
    }
}

#[inline(always)]
fn largest_of<L: Lanes>(part: &[f32; PART]) -> f32 {
    let mut largest = L::splat(f32::NEG_INFINITY);
    for values in part.as_chunks::<LANES>().0 {
        largest = L::load(values).max(largest);
    }
    largest.largest()
}

#[inline(always)]
fn sums_of<L: Lanes>(logits: &[f32], largest: f32, scale: f32, out: &mut [f32]) {
    let (parts, rest) = logits.as_chunks::<PART>();
    for (part, out) in parts.iter().zip(&mut *out) {
        *out = sum_of::<L>(part, largest, scale);
    }
    if !rest.is_empty() {
        out[parts.len()] = sum_of::<L>(&padded(rest), largest, scale);
    }
}

#[inline(always)]
fn sum_of<L: Lanes>(part: &[f32; PART], largest: f32, scale: f32) -> f32 {
    let mut sum = L::zero();
    for values in part.as_chunks::<LANES>().0 {
        sum = sum.add(term(L::load(values), largest, scale));
    }
    sum.sum()
}

#[inline(always)]
fn terms_of<L: Lanes>(part: &mut [f32; PART], largest: f32, scale: f32) {
    for values in part.as_chunks_mut::<LANES>().0 {
        term(L::load(values), largest, scale).store(values);
    }
}

#[inline(always)]
fn term<L: Lanes>(logits: L, largest: f32, scale: f32) -> L {
    logits.sub(L::splat(largest)).mul(L::splat(scale)).softmax_weight()
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::*;
    use crate::testing::values;

    #[test]
    fn every_tier_finds_the_maxima_and_sums_of_parts_of_rows_of_any_length() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let cpu = Cpu { isa, ..Cpu::new(1).unwrap() };
            let (mut found, mut summed) = (Vec::new(), Vec::new());
            for length in [1, 2, 127, 128, 129, 1000, 4096] {
                let mut row: Vec<f32> = values(length, 5).iter().map(|value| value * 20.0).collect();
                for at in (1..length).step_by(7) {
                    row[at] = [f32::NAN, f32::NEG_INFINITY][at % 2];
                }
                maxima(&cpu, &row, &mut found);
                let most = |part: &[f32]| part.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(found, row.chunks(PART).map(most).collect::<Vec<f32>>(), "{isa:?}");
                for scale in [1.0f32, 0.7, 30.0] {
                    let largest = most(&row);
                    sums(&cpu, &row, largest, scale, &mut summed);
                    let exact = |logit: &f32| {
                        let power = (f64::from(*logit) - f64::from(largest)) * f64::from(scale);
                        if power.is_nan() { 0.0 } else { power.exp() }
                    };
                    let close = |got: f32, exact: f64, what: &str| {
                        let error = (f64::from(got) - exact).abs();
                        assert!(error <= 3e-5 * exact + 2e-28, "{isa:?}: a {what} of {got}, not {exact}");
                    };
                    for (part, sum) in row.chunks(PART).zip(&summed) {
                        close(*sum, part.iter().map(exact).sum(), "sum");
                        let terms = terms(&cpu, part, largest, scale);
                        terms.iter().zip(part).for_each(|(term, logit)| close(*term, exact(logit), "term"));
                        assert!(terms[part.len()..].iter().all(|term| *term == 0.0));
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_of_no_numbers_has_no_maximum_and_sums_to_nothing() {
        let cpu = Cpu::new(1).unwrap();
        let (row, mut out) = ([f32::NEG_INFINITY; 200], Vec::new());
        maxima(&cpu, &row, &mut out);
        assert_eq!(out, [f32::NEG_INFINITY; 2]);
        sums(&cpu, &row, f32::NEG_INFINITY, 1.0, &mut out);
        assert_eq!(out, [0.0; 2]);
    }
}
