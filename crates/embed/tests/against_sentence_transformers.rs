//! Vectors of the real model against those of sentence-transformers, in `expected.json` (see `make_expected.py`).

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, Waker};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use dormouse_embed::{EmbedError, Embedder, Encoder, Input};
use serde::Deserialize;
use serde_json::Value;

/// What the vectors may differ by, in any of their numbers.
const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Expected {
    texts: Vec<String>,
    tokens: Vec<usize>,
    max_tokens: usize,
    vectors: Vec<String>,
    poolings: Vec<Pooled>,
}

#[derive(Deserialize)]
struct Pooled {
    pooling_mode: Value,
    texts: Vec<String>,
    vectors: Vec<String>,
}

fn expected() -> Expected {
    serde_json::from_str(include_str!("expected.json")).unwrap()
}

fn folder() -> PathBuf {
    let path = std::env::var_os("DORMOUSE_TEST_EMBEDDING_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/all-MiniLM-L6-v2"),
        PathBuf::from,
    );
    assert!(
        path.join("model.safetensors").exists(),
        "{} is missing: run scripts/fetch_weights",
        path.display()
    );
    path
}

fn decode(text: &str) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(text).unwrap();
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn texts(texts: &[String]) -> Vec<Input> {
    texts.iter().cloned().map(Input::Text).collect()
}

fn always() -> bool {
    true
}

/// The largest difference of any two numbers.
fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

fn assert_close(left: &[f32], right: &[f32], what: &str) {
    let difference = difference(left, right);
    assert!(difference < TOLERANCE, "{what}: differs by {difference}");
}

/// The model's folder with another pooling, and without scaling.
fn with_pooling(mode: &Value) -> tempfile::TempDir {
    let folder = folder().canonicalize().unwrap();
    let other = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "sentence_bert_config.json", "tokenizer.json"] {
        std::os::unix::fs::symlink(folder.join(file), other.path().join(file)).unwrap();
    }
    let modules = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;
    std::fs::write(other.path().join("modules.json"), modules).unwrap();
    std::fs::create_dir(other.path().join("1_Pooling")).unwrap();
    let pooling = serde_json::json!({ "pooling_mode": mode });
    std::fs::write(other.path().join("1_Pooling/config.json"), pooling.to_string()).unwrap();
    other
}

#[test]
fn vectors_and_token_counts_are_those_of_sentence_transformers() {
    let expected = expected();
    let encoder = Encoder::load(&folder()).unwrap();
    assert_eq!((encoder.dimensions(), encoder.max_tokens()), (384, expected.max_tokens));
    let together = encoder.embed(&texts(&expected.texts), None, &always).unwrap();
    assert_eq!(together.tokens, expected.tokens.iter().sum::<usize>());
    for (index, text) in expected.texts.iter().enumerate() {
        let vector = decode(&expected.vectors[index]);
        assert_close(&together.vectors[index], &vector, text);
        let alone = encoder.embed(&[Input::Text(text.clone())], None, &always).unwrap();
        assert_close(&alone.vectors[0], &vector, text);
        assert_eq!(alone.tokens, expected.tokens[index], "{text}");
    }
}

#[test]
fn every_pooling_is_that_of_sentence_transformers() {
    for pooled in expected().poolings {
        let folder = with_pooling(&pooled.pooling_mode);
        let encoder = Encoder::load(folder.path()).unwrap();
        let found = encoder.embed(&texts(&pooled.texts), None, &always).unwrap();
        for (vector, expected) in found.vectors.iter().zip(&pooled.vectors) {
            assert_close(vector, &decode(expected), &pooled.pooling_mode.to_string());
        }
    }
}

#[test]
fn tokens_with_their_special_ones_are_the_text_that_they_stand_for() {
    let encoder = Encoder::load(&folder()).unwrap();
    // [CLS] hello world ! [SEP]
    let tokens = Input::Tokens(vec![101, 7592, 2088, 999, 102]);
    let found =
        encoder.embed(&[tokens, Input::Text("Hello, world!".replace(',', ""))], None, &always).unwrap();
    assert!(difference(&found.vectors[0], &found.vectors[1]) < 1e-6);
}

#[test]
fn a_shortened_vector_is_the_beginning_of_the_whole_one_at_length_one() {
    let encoder = Encoder::load(&folder()).unwrap();
    let input = [Input::Text("A dormouse.".into())];
    let whole = encoder.embed(&input, None, &always).unwrap().vectors.remove(0);
    let short = encoder.embed(&input, Some(100), &always).unwrap().vectors.remove(0);
    let length = whole[..100].iter().map(|value| value * value).sum::<f32>().sqrt();
    let scaled: Vec<f32> = whole[..100].iter().map(|value| value / length).collect();
    assert!(difference(&short, &scaled) < 1e-6);
}

#[test]
fn inputs_that_the_model_cannot_take_are_named_before_anything_is_computed() {
    let encoder = Encoder::load(&folder()).unwrap();
    let refuse =
        |input: Input| encoder.embed(&[Input::Text("fine".into()), input], None, &always).unwrap_err();
    // 254 words of one token, and the two that every text has, are the limit of 256.
    let words = |count: usize| Input::Text("mouse ".repeat(count));
    assert!(encoder.embed(&[words(254)], None, &always).is_ok());
    let error = refuse(words(255));
    assert!(matches!(error, EmbedError::TooLong { index: 1, tokens: 257, limit: 256 }), "{error}");
    let error = refuse(Input::Tokens(vec![101; 257]));
    assert!(matches!(error, EmbedError::TooLong { index: 1, tokens: 257, limit: 256 }), "{error}");
    let error = refuse(Input::Tokens(vec![101, 30522]));
    assert!(matches!(error, EmbedError::UnknownToken { index: 1, position: 1, token: 30522, last: 30521 }));
    assert!(matches!(refuse(Input::Tokens(Vec::new())), EmbedError::NoTokens { index: 1 }));
    let many = vec![Input::Tokens(vec![101; 256]); 1172];
    let error = encoder.embed(&many, None, &always).unwrap_err();
    assert!(matches!(error, EmbedError::TooManyTokens { tokens: 300_032, limit: 300_000 }), "{error}");
}

#[test]
fn nothing_more_is_computed_for_whoever_has_left() {
    let encoder = Encoder::load(&folder()).unwrap();
    let inputs = vec![Input::Tokens(vec![101; 256]); 10];
    // While the inputs are checked, and before a forward pass.
    for most in [1, inputs.len()] {
        let asked = Cell::new(0);
        let stays = || asked.replace(asked.get() + 1) < most;
        let error = encoder.embed(&inputs, None, &stays).unwrap_err();
        assert!(matches!(error, EmbedError::Cancelled), "{error}");
        assert_eq!(asked.get(), most + 1);
    }
}

#[tokio::test]
async fn requests_at_once_are_all_answered_and_those_beyond_the_queue_are_told_so() {
    let embedder = Embedder::start("mini", &folder(), 2).unwrap();
    assert_eq!((embedder.name(), embedder.dimensions(), embedder.max_tokens()), ("mini", 384, 256));
    // Eight forward passes, so that the queue is filled while they run.
    let slow = || embedder.embed(vec![Input::Tokens(vec![101; 256]); 64], Some(8));
    let mut requests: Vec<_> = std::iter::repeat_with(|| Box::pin(slow())).take(40).collect();
    let mut context = Context::from_waker(Waker::noop());
    let refused = requests
        .iter_mut()
        .filter_map(|request| match request.as_mut().poll(&mut context) {
            Poll::Ready(Err(error @ EmbedError::Busy { .. })) => Some(error.to_string()),
            _ => None,
        })
        .collect::<Vec<_>>();
    assert!(refused.iter().all(|said| said.contains("32 requests")));
    let refused = refused.len();
    assert!((7..=8).contains(&refused), "{refused} of 40 were refused");
    // Those that waited are dropped here: the next one is answered without them being computed.
    drop(requests);
    let answer = loop {
        match embedder.embed(vec![Input::Text("still here".into())], None).await {
            Err(EmbedError::Busy { .. }) => tokio::task::yield_now().await,
            answer => break answer.unwrap(),
        }
    };
    assert_eq!((answer.vectors.len(), answer.vectors[0].len()), (1, 384));
}
