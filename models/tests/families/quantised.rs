//! Quantised models: their packed weights against the same weights as floats, among them matrices that are rows of another
//! one, whether those are whole tiles or not.

use dormouse_kernels::{Cpu, GgmlType, KvDtype, Precision};
use serde_json::json;

use crate::case::{Case, case, load};
use crate::quantise::Weights;
use crate::rig::Rig;

/// Of the largest logit at a position: activations rounded to 16 bits, in every product of three layers.
const TOLERANCE: f32 = 5e-4;

const TYPES: [GgmlType; 4] = [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_1, GgmlType::Q8_0];

/// Heads of 24 values: Q ends, and K and V begin and end, inside of a tile. A feed-forward block of 40 rows, whose `down` has no
/// whole blocks, and stays as it is.
fn odd_phi3() -> Case {
    let mut case = case("phi3");
    case.name = "phi3 with odd heads".into();
    for (name, shape) in &mut case.tensors {
        *shape = match name.as_str() {
            name if name.contains("qkv_proj") => vec![(4 + 1 + 1) * 24, 64],
            name if name.contains("o_proj") => vec![64, 4 * 24],
            name if name.contains("gate_up_proj") => vec![2 * 40, 64],
            name if name.contains("down_proj") => vec![64, 40],
            _ => continue,
        };
    }
    set(
        &mut case,
        &[
            ("attention.key_length", 24),
            ("attention.value_length", 24),
            ("attention.head_count_kv", 1),
            ("feed_forward_length", 40),
        ],
    );
    case
}

/// Experts of 40 rows.
fn odd_experts() -> Case {
    let mut case = case("qwen3_moe");
    case.name = "qwen3_moe with odd experts".into();
    for (name, shape) in &mut case.tensors {
        match name.contains(".experts.") {
            true if name.contains("down_proj") => *shape = vec![64, 40],
            true => *shape = vec![40, 64],
            false => {}
        }
    }
    set(&mut case, &[("expert_feed_forward_length", 40)]);
    case
}

fn set(case: &mut Case, settings: &[(&str, usize)]) {
    let gguf = case.gguf.as_mut().unwrap();
    settings.iter().for_each(|(name, value)| gguf.set(name, json!(value)));
}

fn logits(cpu: &Cpu, case: &Case, weights: Weights) -> Vec<Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    case.gguf.as_ref().unwrap().write_as(case, &path, weights);
    let decoder = load(&path);
    Rig::new(&decoder, KvDtype::F16, case.positions).append(cpu, &case.prompt())
}

/// The largest difference at any position, as a part of the largest logit there.
fn error(got: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let largest =
        |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, value| most.max(value.abs()));
    assert!(got.iter().flatten().all(|logit| logit.is_finite()));
    let errors = got.iter().zip(expected).map(|(got, expected)| {
        largest(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / largest(&mut expected.iter().copied())
    });
    errors.fold(0.0, f32::max)
}

#[test]
fn packed_weights_compute_what_the_same_weights_as_floats_compute() {
    let cpu = Cpu::new(2).unwrap().with_precision(Precision::Int16);
    let cases = ["llama", "phi3", "phi4_longrope", "qwen3_moe", "gemma3"].map(case);
    for case in cases.into_iter().chain([odd_phi3(), odd_experts()]) {
        for ty in TYPES {
            let packed = logits(&cpu, &case, Weights::Quantised(ty));
            let floats = logits(&cpu, &case, Weights::Rounded(ty));
            let error = error(&packed, &floats);
            println!("{} {}: {error:e}", case.name, ty.name());
            assert!(error < TOLERANCE, "{} {}: {error}", case.name, ty.name());
        }
    }
}

#[test]
fn quantised_rows_of_fused_matrices_give_the_same_bits_in_any_pieces() {
    let (one, two) = (Cpu::new(1).unwrap(), Cpu::new(2).unwrap());
    for case in [odd_phi3(), odd_experts()] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        case.gguf.as_ref().unwrap().write_as(&case, &path, Weights::Quantised(GgmlType::Q4_0));
        let decoder = load(&path);
        let prompt = case.prompt();
        let whole = Rig::new(&decoder, KvDtype::F16, case.positions).append(&two, &prompt);
        let mut rig = Rig::new(&decoder, KvDtype::F16, case.positions);
        let mut pieces = rig.append(&one, &prompt[..50]);
        prompt[50..].iter().for_each(|token| pieces.extend(rig.append(&one, &[*token])));
        assert!(crate::same_bits(&whole, &pieces), "{}", case.name);
    }
}
