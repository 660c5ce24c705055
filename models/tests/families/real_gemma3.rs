//! The real Gemma 3 270M against llama.cpp on the same file: `../make_gemma3_goldens.py` made the expected answers.
//!
//! Both multiply quantised weights with activations rounded to eight bits, but not by the same rule. So the judge is a
//! third: the log-probabilities that `transformers` computes in f32 from the same file. We must be as near to those as
//! llama.cpp is, and choose its greedy token wherever it leads by more than the difference.

use dormouse_kernels::{Cpu, KvDtype};
use dormouse_models::Specials;
use dormouse_models::decoder::Decoder;
use dormouse_models::pack::PackedWeights;
use dormouse_models::source::ModelSource;

use crate::rig::Rig;

#[derive(serde::Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
    steps: Vec<Step>,
}

/// A greedy token, its log-probability, and its lead on the next best.
#[derive(serde::Deserialize)]
struct Step {
    id: u32,
    logprob: f64,
    margin: f64,
    /// Its log-probability in f32.
    exact: f64,
}

fn source() -> ModelSource {
    let path = std::env::var_os("DORMOUSE_TEST_GEMMA3").map_or_else(
        || concat!(env!("CARGO_MANIFEST_DIR"), "/weights/gemma-3-270m-q4_k_m.gguf").into(),
        std::path::PathBuf::from,
    );
    ModelSource::open(&path).unwrap_or_else(|error| panic!("{error}: run `dormouse models pull gemma3-270m`"))
}

fn logprob(logits: &[f32], id: u32) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    f64::from(logits[id as usize]) - largest - sum.ln()
}

#[test]
#[ignore = "needs the real model, 250 MB: dormouse models pull gemma3-270m"]
fn gemma3_270m_answers_as_llama_cpp_does_on_the_same_file() {
    let source = source();
    let packed = PackedWeights::in_memory(&source).unwrap();
    let decoder = Decoder::new(&source, &packed, source.config().unwrap()).unwrap();
    let tokenizer = source.tokenizer().unwrap();
    let goldens: Vec<Golden> = serde_json::from_str(include_str!("../gemma3_goldens.json")).unwrap();
    assert!(
        goldens.iter().any(|golden| golden.ids.len() > 600),
        "one prompt is longer than the sliding window"
    );
    let cpu = Cpu::new(2).unwrap();
    let (mut ours, mut theirs, mut missed) = (Vec::new(), Vec::new(), Vec::new());
    for Golden { text, ids, steps } in goldens {
        assert_eq!(tokenizer.encode(&text, Specials::Literal, true).unwrap(), ids);
        let mut rig = Rig::new(&decoder, KvDtype::F16, ids.len() + steps.len());
        let mut logits = rig.last(&cpu, &ids);
        for step in &steps {
            let best =
                (0..logits.len() as u32).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]));
            if best != Some(step.id) {
                missed.push(step.margin);
            }
            ours.push((logprob(&logits, step.id) - step.exact).abs());
            theirs.push((step.logprob - step.exact).abs());
            logits = rig.last(&cpu, &[step.id]);
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    println!("nats from f32, on average and at most: {} and {}", mean(&ours), largest(&ours));
    println!(
        "llama.cpp's: {} and {}; other greedy tokens at leads of {missed:?}",
        mean(&theirs),
        largest(&theirs)
    );
    assert!(mean(&ours) <= mean(&theirs) && largest(&ours) <= largest(&theirs));
    assert!(largest(&missed) <= 2.0 * largest(&theirs), "{missed:?}");
}

#[derive(serde::Deserialize)]
struct Tokens {
    text: String,
    literal: Vec<u32>,
    parsed: Vec<u32>,
}

#[test]
#[ignore = "needs the real model, 250 MB: dormouse models pull gemma3-270m"]
fn gemma3s_sentencepiece_ids_are_those_of_llama_cpp_on_the_same_file() {
    let tokenizer = source().tokenizer().unwrap();
    let goldens: Vec<Tokens> = serde_json::from_str(include_str!("../gemma3_token_goldens.json")).unwrap();
    assert!(goldens.len() >= 300);
    for Tokens { text, literal, parsed } in goldens {
        // An HTML tag of this vocabulary, which llama.cpp takes for an end of generation that users must not write.
        if !text.contains("</s>") {
            assert_eq!(
                tokenizer.encode(&text, Specials::Literal, false).unwrap(),
                literal,
                "literal {text:?}"
            );
        }
        assert_eq!(tokenizer.encode(&text, Specials::Parse, false).unwrap(), parsed, "parsed {text:?}");
    }
}
