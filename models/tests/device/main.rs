//! The decoder on a device: the tiny models of every family against `transformers`, bits that depend on the sequence alone,
//! and device pages as a cache of mapped ones. With the feature `cuda`, a CUDA device, or the emulated one that
//! `scripts/check_cuda` brings; with `metal` alone, the same code as on Metal over candle's CPU device.

#![cfg(any(feature = "cuda", feature = "metal"))]
#![allow(clippy::unwrap_used)]

#[path = "../families/case.rs"]
mod case;
#[path = "../families/gguf_file.rs"]
mod gguf_file;
#[path = "../families/quantise.rs"]
mod quantise;
mod rig;

// Parts of the back end by themselves. Here, so that one build serves all tests that need a device.
#[cfg(feature = "cuda")]
#[allow(dead_code)]
#[path = "../../src/cuda/graphs.rs"]
mod graphs;
#[cfg(feature = "cuda")]
#[allow(dead_code)]
#[path = "../../src/cuda/pages.rs"]
mod pages;
#[cfg(feature = "cuda")]
#[allow(dead_code)]
#[path = "../../src/places.rs"]
mod places;

use std::sync::Arc;

use case::{Case, case, cases};
use dormouse_kernels::{GgmlType, KvDtype};
use dormouse_models::Device;
use dormouse_models::backend::Weights;
use dormouse_models::pack::PackFile;
use dormouse_models::source::ModelSource;
use quantise::Weights as Encoding;
use rig::{Computer, Session};
use safetensors::Dtype;

#[cfg(feature = "cuda")]
fn device(budget_bytes: Option<u64>) -> Device {
    let (device, _) = Device::open(dormouse_models::DeviceChoice::Cuda(0), budget_bytes)
        .unwrap_or_else(|error| panic!("{error}; scripts/check_cuda runs these tests without a device"));
    device
}

#[cfg(not(feature = "cuda"))]
fn device(budget_bytes: Option<u64>) -> Device {
    Device::Metal(dormouse_models::metal::MetalDevice::over(candle_core::Device::Cpu, budget_bytes))
}

/// Whether the device records steps, finds likeliest tokens, and keeps keys and values as q8_0.
const IS_CUDA: bool = cfg!(feature = "cuda");
/// The precision of weights in which nothing rounds activations coarsely: candle's product on the CPU does it for all but f32.
const FINE: Dtype = if IS_CUDA { Dtype::F16 } else { Dtype::F32 };
/// The other way to keep keys and values, where the device has it.
const Q8_0: KvDtype = if IS_CUDA { KvDtype::Q8_0 } else { KvDtype::F16 };

fn load(device: &Device, path: &std::path::Path) -> Arc<Weights> {
    let source = ModelSource::open(path).unwrap();
    let pack = PackFile { folders: &[], weights_hash: [0; 32], progress: &mut |_, _| {} };
    Arc::new(Weights::load(device, &source, &source.config().unwrap(), pack).unwrap())
}

/// The case's model on a device whose pages may take `budget_bytes`.
fn on_device(case: &Case, dtype: Dtype, budget_bytes: Option<u64>) -> Arc<Weights> {
    let folder = tempfile::tempdir().unwrap();
    case.write_folder(folder.path(), dtype, 1);
    load(&device(budget_bytes), folder.path())
}

/// Those that an emulated device computes in reasonable time.
fn short_cases() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| case.positions < 1000)
}

fn same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    a.len() == b.len() && a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Of logits, as a part of the largest one at the position.
fn largest_difference(got: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let largest =
        |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, value| most.max(value.abs()));
    let at = |(got, expected): (&Vec<f32>, &Vec<f32>)| {
        largest(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / largest(&mut expected.iter().copied())
    };
    largest(&mut got.iter().zip(expected).map(at))
}

/// For products of quantised weights, which round both sides to f16 (docs/devices.md). Measured: 3.1e-4 to 1.1e-3, in models of
/// width 64, whose short sums average little of it out. Candle's products on the CPU round activations to eight bits.
const QUANTISED_TOLERANCE: f32 = if IS_CUDA { 2e-3 } else { 5e-2 };
/// For products of bf16 weights where they round activations to bf16, too.
const BF16_TOLERANCE: f32 = 2e-2;

#[test]
fn logits_equal_those_of_transformers_at_every_position_in_every_family() {
    let mut families = 0;
    for case in short_cases() {
        let mut computer = Computer::new(on_device(&case, FINE, None), KvDtype::F16);
        let got = computer.append(&mut Session::new(&computer, case.positions), &case.prompt());
        println!("{}: {:e}", case.name, case.error(&got));
        families += 1;
    }
    assert!(families >= 22, "{families} cases");
}

#[test]
fn weights_of_other_precision_hold_the_same_model() {
    for name in ["llama", "gemma3", "phi3", "qwen3_moe"] {
        let case = case(name);
        let [floats, halves] = [Dtype::F32, Dtype::BF16].map(|dtype| {
            let mut computer = Computer::new(on_device(&case, dtype, None), KvDtype::F16);
            computer.append(&mut Session::new(&computer, case.positions), &case.prompt())
        });
        println!("{name}: {:e} in f32", case.error(&floats));
        let apart = largest_difference(&halves, &floats);
        println!("{name}: {apart:e} between bf16 and f32");
        assert!(apart < BF16_TOLERANCE, "{name}: {apart}");
        if IS_CUDA {
            case.error(&halves);
        }
    }
}

/// Those of floats are computed without tensor cores. Matrices that are rows of another one, experts that share a tensor, and blocks
/// of every kind of alignment; candle's product on the CPU takes rows of three blocks, as those of 96 values are, in two types only.
#[test]
fn quantised_files_compute_what_the_same_weights_as_floats_do() {
    for (name, ty) in [
        ("phi3", GgmlType::Q4_0),
        ("qwen3_moe", GgmlType::Q8_0),
        ("llama", if IS_CUDA { GgmlType::Q4_1 } else { GgmlType::Q8_0 }),
        ("gemma3", if IS_CUDA { GgmlType::Q5_1 } else { GgmlType::Q4_0 }),
    ] {
        let mut case = case(name);
        // Every expert is used, because a rounding that changes which are moves the logits by any amount.
        if let Some(experts) = case.config.get("num_experts").cloned() {
            case.gguf.as_mut().unwrap().set("expert_used_count", experts);
        }
        let computer = |encoding| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            case.gguf.as_ref().unwrap().write_as(&case, &path, encoding);
            Computer::new(load(&device(None), &path), KvDtype::F16)
        };
        let prompt = case.prompt();
        let mut floats = computer(Encoding::Rounded(ty));
        let expected = floats.append(&mut Session::new(&floats, case.positions), &prompt);
        let mut quantised = computer(Encoding::Quantised(ty));
        let got = quantised.append(&mut Session::new(&quantised, case.positions), &prompt);
        let error = largest_difference(&got, &expected);
        println!("{name} in {}: {error:e}", ty.name());
        assert!(error < QUANTISED_TOLERANCE, "{name} in {}: {error}", ty.name());
        let mut session = Session::new(&quantised, case.positions);
        let mut pieces = quantised.append(&mut session, &prompt[..70]);
        for token in &prompt[70..] {
            pieces.extend(quantised.append(&mut session, &[*token]));
        }
        assert!(same_bits(&got, &pieces), "{name} in {}: single steps", ty.name());
    }
}

#[test]
fn chunks_single_steps_forks_and_rewinds_give_the_same_bits_in_every_family() {
    for case in short_cases() {
        let mut computer = Computer::new(on_device(&case, Dtype::BF16, None), KvDtype::F16);
        let prompt = case.prompt();
        let whole = computer.append(&mut Session::new(&computer, case.positions), &prompt);
        let mut session = Session::new(&computer, case.positions);
        let mut pieces = Vec::new();
        for range in [0..3, 3..30, 30..31, 31..64] {
            pieces.extend(computer.append(&mut session, &prompt[range]));
        }
        // A fork beyond the window's edge, which goes another way for a while before it is rewound.
        let mut fork = session.fork();
        computer.append(&mut fork, &[1, 2, 3, 4, 5]);
        fork.len = 64;
        let forked = computer.append(&mut fork, &prompt[64..]);
        assert!(same_bits(&whole[64..], &forked), "{}: a fork", case.name);
        pieces.extend(computer.append(&mut session, &prompt[64..90]));
        for token in &prompt[90..] {
            pieces.extend(computer.append(&mut session, &[*token]));
        }
        assert!(same_bits(&whole, &pieces), "{}: chunks and steps", case.name);
        // The first step is done kernel by kernel, the second one recorded.
        assert!(!IS_CUDA || computer.backend.replays() >= prompt.len() as u64 - 92, "{}", case.name);
    }
}

#[test]
fn a_batch_gives_each_of_its_sequences_the_bits_that_it_has_alone() {
    for (name, dtype) in [("llama3_scaled", KvDtype::F16), ("gemma2", Q8_0), ("qwen3_moe", KvDtype::F16)] {
        let case = case(name);
        let weights = on_device(&case, Dtype::F16, None);
        let mut computer = Computer::new(weights, dtype);
        let prompts: Vec<Vec<u32>> = (0..5).map(|n| case.prompt()[n..90 - n * 7].to_vec()).collect();
        let alone: Vec<Vec<f32>> = prompts
            .iter()
            .flat_map(|prompt| computer.append(&mut Session::new(&computer, 100), prompt))
            .collect();
        let mut sessions: Vec<Session> = prompts.iter().map(|_| Session::new(&computer, 100)).collect();
        let parts = sessions.iter_mut().zip(&prompts).map(|(session, prompt)| (session, &prompt[..]));
        let together = computer.append_all(parts.collect());
        assert!(same_bits(&alone, &together), "{name}");
    }
}

/// Steps whose sequences change, pages and segments that fill, and buffers that move between them.
#[test]
fn recorded_steps_give_each_sequence_the_bits_that_it_has_alone() {
    for (name, dtype) in [("llama", KvDtype::F16), ("gemma2", Q8_0), ("qwen3_moe", KvDtype::F16)] {
        let case = case(name);
        let weights = on_device(&case, Dtype::F32, None);
        let mut computer = Computer::new(Arc::clone(&weights), dtype);
        // They end beyond a segment's border, a page's, and before both.
        let text: Vec<u32> = case.prompt().into_iter().cycle().take(270).collect();
        let lengths = [252, 124, 5];
        let alone: Vec<Vec<Vec<f32>>> = lengths
            .iter()
            .map(|length| {
                computer.append(&mut Session::new(&computer, 320), &text[..length + 12]).split_off(*length)
            })
            .collect();
        let mut computer = Computer::new(weights, dtype);
        let mut sessions: Vec<Session> = lengths.iter().map(|_| Session::new(&computer, 320)).collect();
        for (session, length) in sessions.iter_mut().zip(lengths) {
            computer.append(session, &text[..length]);
        }
        // The first three are a step kernel by kernel, a recorded one and a replay. The fifth begins the next segment; before
        // the seventh, which would be a replay, a longer prompt moves the buffers.
        const STEPS: [usize; 12] =
            [0b111, 0b111, 0b111, 0b101, 0b101, 0b101, 0b101, 0b111, 0b111, 0b111, 0b101, 0b101];
        for (number, who) in STEPS.iter().enumerate() {
            if number == 6 {
                computer.append(&mut Session::new(&computer, 320), &text);
            }
            let who: Vec<usize> = (0..3).filter(|session| who & (1 << session) != 0).collect();
            let expected: Vec<Vec<f32>> =
                who.iter().map(|one| alone[*one][sessions[*one].len - lengths[*one]].clone()).collect();
            let parts = sessions.iter_mut().enumerate().filter(|(one, _)| who.contains(one));
            let parts = parts.map(|(_, session)| {
                let at = session.len;
                (session, &text[at..at + 1])
            });
            let got = computer.append_all(parts.collect());
            assert!(same_bits(&got, &expected), "{name}: step {number}");
        }
        assert_eq!(computer.backend.replays(), if IS_CUDA { 3 } else { 0 }, "{name}");
    }
}

/// What one asks for while the other one records must not be recorded. Passes are of some rows each, as where guesses are checked.
#[test]
fn two_that_compute_with_the_same_weights_do_not_meet() {
    let case = case("llama");
    let weights = on_device(&case, Dtype::F32, None);
    let prompt = case.prompt();
    let mut computer = Computer::new(Arc::clone(&weights), KvDtype::F16);
    let whole = computer.append(&mut Session::new(&computer, 100), &prompt[..60]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut computer = Computer::new(Arc::clone(&weights), KvDtype::F16);
                let mut session = Session::new(&computer, 100);
                for (tokens, expected) in prompt[..60].chunks(3).zip(whole.chunks(3)) {
                    let got = computer.append(&mut session, tokens);
                    assert!(same_bits(&got, expected), "position {}", session.len);
                }
                assert_eq!(computer.backend.replays(), if IS_CUDA { 18 } else { 0 });
            });
        }
    });
}

#[test]
fn another_process_goes_on_from_the_mapped_pages_with_the_same_bits() {
    for (name, dtype) in [("qwen3", KvDtype::F16), ("gemma3", Q8_0)] {
        let case = case(name);
        let weights = on_device(&case, Dtype::F32, None);
        let prompt = case.prompt();
        let mut computer = Computer::new(Arc::clone(&weights), dtype);
        let mut session = Session::new(&computer, case.positions);
        let whole = computer.append(&mut Session::new(&computer, case.positions), &prompt);
        for range in [0..50, 50..51, 51..70] {
            computer.append(&mut session, &prompt[range]);
        }
        // Nothing of the device's pages is left.
        let mut next = Computer::new(weights, dtype);
        let rest = next.append(&mut session, &prompt[70..]);
        assert!(same_bits(&whole[70..], &rest), "{name}");
    }
}

#[test]
fn pages_make_room_for_each_other_on_a_small_device_and_no_bit_changes() {
    let case = case("llama");
    let prompts: Vec<Vec<u32>> = (0..6).map(|n| case.prompt()[n..].to_vec()).collect();
    let run = |budget_pages: Option<u64>| {
        let plenty = on_device(&case, Dtype::F32, None);
        let page_bytes = plenty.config().page_layout(KvDtype::F16).page_bytes() as u64;
        let weights = on_device(&case, Dtype::F32, budget_pages.map(|pages| pages * page_bytes));
        let mut computer = Computer::new(weights, KvDtype::F16);
        let mut sessions: Vec<Session> = prompts.iter().map(|_| Session::new(&computer, 100)).collect();
        let mut logits = Vec::new();
        for range in [0..40, 40..41, 41..60, 60..80, 80..81] {
            let parts =
                sessions.iter_mut().zip(&prompts).map(|(session, prompt)| (session, &prompt[range.clone()]));
            logits.extend(computer.append_all(parts.collect()));
        }
        logits
    };
    let plenty = run(None);
    // Two pages a session: of six sessions, one, two or some at a time.
    for pages in [2, 4, 7] {
        assert!(same_bits(&plenty, &run(Some(pages))), "{pages} pages");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn the_device_finds_the_likeliest_tokens_in_one_pass_or_several() {
    let case = case("llama");
    let page_bytes =
        on_device(&case, Dtype::F32, None).config().page_layout(KvDtype::F16).page_bytes() as u64;
    let prompt = case.prompt();
    // Steps, in which the third one is replayed, and prompts.
    for (pages, ranges) in [(None, [0..1, 1..2, 2..3, 3..40]), (Some(2), [0..40, 40..41, 41..42, 42..70])] {
        let weights = on_device(&case, Dtype::F32, pages.map(|pages: u64| pages * page_bytes));
        let mut computer = Computer::new(weights, KvDtype::F16);
        let mut sessions: Vec<Session> = (0..3).map(|_| Session::new(&computer, 100)).collect();
        for range in ranges {
            let parts = sessions.iter_mut().enumerate();
            let parts = parts.map(|(n, session)| (session, &prompt[n + range.start..n + range.end]));
            let found = computer.likeliest(parts.collect());
            // The same rows once more.
            sessions.iter_mut().for_each(|session| session.len = range.start);
            let parts = sessions.iter_mut().enumerate();
            let parts = parts.map(|(n, session)| (session, &prompt[n + range.start..n + range.end]));
            let logits = computer.append_all(parts.collect());
            let first_of_the_largest = |row: &Vec<f32>| {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter().position(|logit| *logit == largest).unwrap() as u32
            };
            let expected: Vec<u32> = logits.iter().map(first_of_the_largest).collect();
            assert_eq!(found, expected, "{range:?} with {pages:?} pages");
        }
    }
}

#[test]
fn a_session_that_no_room_can_be_made_for_is_refused_and_the_next_one_computes() {
    let case = case("llama");
    let page_bytes =
        on_device(&case, Dtype::F32, None).config().page_layout(KvDtype::F16).page_bytes() as u64;
    let mut computer = Computer::new(on_device(&case, Dtype::F32, Some(page_bytes)), KvDtype::F16);
    let refused = computer.try_append(&mut Session::new(&computer, 100), &case.prompt()).unwrap_err();
    assert!(refused.contains("device ") && refused.contains("--device-budget"), "{refused}");
    let mut plenty = Computer::new(on_device(&case, Dtype::F32, None), KvDtype::F16);
    let expected = plenty.append(&mut Session::new(&plenty, 64), &case.prompt()[..60]);
    let got = computer.append(&mut Session::new(&computer, 64), &case.prompt()[..60]);
    assert!(same_bits(&expected, &got));
}

#[test]
fn a_page_that_was_written_behind_the_devices_back_is_read_again_once_it_is_forgotten() {
    let case = case("llama");
    let mut computer = Computer::new(on_device(&case, Dtype::F32, None), KvDtype::F16);
    let (mut one, mut other) = (Session::new(&computer, 100), Session::new(&computer, 100));
    computer.append(&mut one, &case.prompt()[..70]);
    computer.append(&mut other, &case.prompt()[20..90]);
    let expected = computer.append(&mut other.fork(), &[7]);
    one.copy_from(&other);
    computer.backend.forget(&one.pages());
    let got = computer.append(&mut one, &[7]);
    assert!(same_bits(&expected, &got));
}
