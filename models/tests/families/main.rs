//! Every family against `transformers`: tiny models with made-up weights, logits compared at every position of a prompt
//! that is longer than the sliding window and crosses a page, and at the end of one of 8,192 tokens. `generate.py` made the
//! expected logits.

#![allow(clippy::unwrap_used)]

mod case;
mod gguf_file;
mod quantise;
mod quantised;
mod real_gemma3;
#[path = "../rig/mod.rs"]
mod rig;

use case::{case, cases, load};
use dormouse_kernels::{Cpu, KvDtype};
use rig::Rig;
use safetensors::Dtype;

fn same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    a.len() == b.len() && a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn logits_equal_those_of_transformers_at_every_position_in_every_family() {
    let cases = cases();
    assert!(cases.len() >= 25, "{} cases", cases.len());
    let cpu = Cpu::new(2).unwrap();
    for case in cases {
        let decoder = case.decoder(Dtype::F32, 1);
        let got = Rig::new(&decoder, KvDtype::F16, case.positions).append(&cpu, &case.prompt());
        println!("{}: {:e}", case.name, case.error(&got));
    }
}

#[test]
fn chunks_single_steps_forks_and_rewinds_give_the_same_bits_in_every_family() {
    let (two, one) = (Cpu::new(2).unwrap(), Cpu::new(1).unwrap());
    for case in cases().into_iter().filter(|case| case.positions < 1000) {
        let decoder = case.decoder(Dtype::F32, 1);
        let prompt = case.prompt();
        let whole = Rig::new(&decoder, KvDtype::F16, case.positions).append(&two, &prompt);
        let mut rig = Rig::new(&decoder, KvDtype::F16, case.positions);
        let mut pieces = Vec::new();
        for range in [0..3, 3..30, 30..64] {
            pieces.extend(rig.append(&one, &prompt[range]));
        }
        // A fork beyond the window's edge, which goes another way for a while before it is rewound.
        let mut fork = rig.fork();
        fork.append(&one, &[1, 2, 3, 4, 5]);
        fork.rewind(64);
        let forked = fork.append(&two, &prompt[64..]);
        assert!(same_bits(&whole[64..], &forked), "{}: a fork", case.name);
        for token in &prompt[64..] {
            pieces.extend(rig.append(&one, &[*token]));
        }
        assert!(same_bits(&whole, &pieces), "{}: chunks and steps", case.name);
    }
}

#[test]
fn half_precision_and_split_files_hold_the_same_model() {
    let cpu = Cpu::new(2).unwrap();
    for name in ["llama", "gemma3", "phi3", "qwen3_moe"] {
        let case = case(name);
        for (dtype, files) in [(Dtype::F16, 1), (Dtype::BF16, 3)] {
            let decoder = case.decoder(dtype, files);
            let got = Rig::new(&decoder, KvDtype::F16, case.positions).append(&cpu, &case.prompt());
            case.error(&got);
        }
    }
}

#[test]
fn a_gguf_file_of_the_same_weights_computes_the_same_logits() {
    let cpu = Cpu::new(2).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut architectures = Vec::new();
    for case in cases() {
        let Some(description) = &case.gguf else { continue };
        let path = folder.path().join(format!("{}.gguf", case.name));
        description.write(&case, &path);
        let decoder = load(&path);
        let got = Rig::new(&decoder, KvDtype::F16, case.positions).append(&cpu, &case.prompt());
        println!("{}: {:e}", case.name, case.error(&got));
        architectures.push(description.architecture.clone());
    }
    architectures.sort();
    architectures.dedup();
    let expected = [
        "gemma", "gemma2", "gemma3", "granite", "llama", "mistral3", "olmo2", "phi3", "qwen2", "qwen3",
        "qwen3moe", "smollm3",
    ];
    assert_eq!(architectures, expected);
}
