//! Constrained answers: they have the form that was asked for, whatever guesses and crashes there are.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use dormouse_answer::{AnswerFormat, CallSyntax, OutputFormat, ToolChoice};
use dormouse_engine::{DraftSource, FinishReason, Grammar, GrammarRequest, Guess, Sampling};
use serde_json::{Value, json};

const PROMPT: &str = "<|im_start|>user\nDescribe a person as JSON.<|im_end|>\n<|im_start|>assistant\n";

fn person() -> Value {
    json!({"type": "object", "properties": {
        "full_name": {"type": "string", "maxLength": 30},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"enum": ["carpenter", "teacher", "astronomer"]},
        "addresses": {"type": "array", "maxItems": 2, "items": {"type": "object", "properties": {
            "street": {"type": "string", "maxLength": 20}, "postcode": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "postcode"]}}},
        "required": ["full_name", "age_in_years", "occupation", "addresses"]})
}

fn schema(rig: &Rig, schema: Value) -> Option<Arc<Grammar>> {
    let format = OutputFormat::JsonSchema { name: "answer".into(), schema, strict: true };
    rig.engine.grammar(&GrammarRequest { format, ..GrammarRequest::default() }).unwrap()
}

/// Ways of choosing a token that a mask could disturb.
fn asks(grammar: &Option<Arc<Grammar>>) -> Vec<Ask> {
    let still = greedy(300).sampling;
    let seeded = Sampling { temperature: 0.9, seed: 3, ..Sampling::default() };
    let ways = [
        still.clone(),
        Sampling { repetition_penalty: 1.2, logprobs: Some(2), ..still },
        seeded.clone(),
        Sampling { top_k: 5, top_p: 0.9, logprobs: Some(1), ..seeded.clone() },
        Sampling { temperature: 2.0, min_p: 0.01, seed: 9, ..seeded },
    ];
    let ask = |sampling| Ask { sampling, grammar: grammar.clone(), ..greedy(300) };
    ways.into_iter().map(ask).collect()
}

fn assert_is_a_person(answer: &Answer) {
    assert_eq!(answer.reason, Some(FinishReason::Stop), "{:?}", answer.texts.concat());
    let value: Value = serde_json::from_str(&answer.texts.concat()).unwrap();
    assert!(value["full_name"].is_string() && value["age_in_years"].as_u64().unwrap() <= 120);
    for address in value["addresses"].as_array().unwrap() {
        assert_eq!(address["postcode"].as_str().unwrap().len(), 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_its_form_and_is_the_same_with_and_without_guesses() {
    let (plain, guessing) = (Rig::new(PLAIN), Rig::new(NGRAM));
    let grammar = schema(&plain, person());
    let prompt = tokens(PROMPT);
    for (way, ask) in asks(&grammar).into_iter().enumerate() {
        let session = format!("{way}");
        let (expected, _) = plain.answer(&session, &prompt, &ask).await;
        assert_is_a_person(&expected);
        let (answer, _) = guessing.answer(&session, &prompt, &ask).await;
        assert_eq!(answer, expected, "way {way}");
    }
    let stats = guessing.engine.stats().await.unwrap();
    assert!(stats.accepted_tokens > 0, "what is forced was not guessed");
    // Guesses that are always wrong, of any kind.
    let ask = asks(&grammar).swap_remove(2);
    let (expected, _) = plain.answer("again", &prompt, &ask).await;
    for wrong in [vec![0, 1, 2, 3], vec![28, 28, 28], vec![49_151; 9]] {
        let rig = Rig::new(DraftSource::Given(Arc::new(move |_| wrong.clone())));
        assert_eq!(rig.answer("again", &prompt, &ask).await.0, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_is_killed_goes_on_in_its_form_with_the_same_tokens() {
    let plain = Rig::new(PLAIN);
    let grammar = schema(&plain, person());
    let (prompt, ask) = (tokens(PROMPT), asks(&grammar).swap_remove(2));
    let (expected, _) = plain.answer("s", &prompt, &ask).await;
    assert_is_a_person(&expected);
    let directory = tempfile::tempdir().unwrap();
    let (copies, path, begin) = (Arc::new(Mutex::new(Vec::new())), directory.path().to_owned(), prompt.len());
    let (taken, whole) = (Arc::clone(&copies), expected.tokens.len());
    let copying: Guess = Arc::new(move |log| {
        let mut copies = taken.lock().unwrap();
        let points = [1, whole / 4, whole / 2, whole - 2, usize::MAX - begin];
        if log.len() >= begin + points[copies.len()] {
            copies.push(copy(&path));
        }
        Vec::new()
    });
    let rig = Rig::open(directory, DraftSource::Given(copying), CONTEXT);
    rig.create("s").await;
    let running = rig.begin("s", 0, &prompt, &ask).await;
    let turn = running.id.clone();
    rig.finish(running).await;
    let killed = std::mem::take(&mut *copies.lock().unwrap());
    assert_eq!(killed.len(), 4);
    for directory in killed {
        let rig = Rig::open(directory, NGRAM, CONTEXT);
        // Another process has compiled it.
        let grammar = schema(&rig, person());
        let again = rig.go_on("s", &turn, prompt.len(), &Ask { grammar, ..ask.clone() }).await;
        let (answer, _) = rig.finish(again).await;
        assert_eq!((answer.tokens, answer.texts), (expected.tokens.clone(), expected.texts.clone()));
        assert_eq!(answer.reason, Some(FinishReason::Stop));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_the_models_own_also_where_the_grammar_overrules_it() {
    let rig = Rig::new(PLAIN);
    let grammar = schema(&rig, json!({"const": "xylophone"}));
    let sampling = Sampling { temperature: 0.0, logprobs: Some(3), ..Sampling::default() };
    let ask = Ask { sampling, grammar, ..greedy(20) };
    let (answer, _) = rig.answer("s", &tokens(PROMPT), &ask).await;
    assert_eq!(answer.texts.concat(), "\"xylophone\"");
    let (chosen, top) = answer.logprobs[0].clone().unwrap();
    assert_ne!(top[0].0, answer.tokens[0]);
    assert!(f32::from_bits(chosen) < f32::from_bits(top[0].1));
}

#[tokio::test(flavor = "multi_thread")]
async fn constrained_and_free_turns_share_steps_and_answer_as_if_alone() {
    let (plain, rig) = (Rig::new(PLAIN), Rig::new(NGRAM));
    let grammar = schema(&plain, person());
    let mut all = asks(&grammar);
    all.extend(asks(&None));
    let prompt = tokens(PROMPT);
    let mut running = Vec::new();
    for (number, ask) in all.iter().enumerate() {
        let session = format!("{number}");
        rig.create(&session).await;
        running.push(rig.begin(&session, 0, &prompt, ask).await);
    }
    for (number, (turn, ask)) in running.into_iter().zip(&all).enumerate() {
        let (answer, _) = rig.finish(turn).await;
        assert_eq!(answer, plain.answer(&format!("{number}"), &prompt, ask).await.0, "turn {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_call_is_made_and_a_log_that_is_no_answer_fails_the_turn_alone() {
    let rig = Rig::new(NGRAM);
    let tools = vec![json!({"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}}})];
    let request = GrammarRequest {
        tools,
        choice: ToolChoice::Required,
        answer_format: AnswerFormat { calls: Some(CallSyntax::Hermes), reasoning: None },
        ..GrammarRequest::default()
    };
    let grammar = rig.engine.grammar(&request).unwrap();
    let (answer, _) =
        rig.answer("call", &tokens(PROMPT), &Ask { grammar: grammar.clone(), ..greedy(100) }).await;
    let text = answer.texts.concat();
    let call =
        text.strip_prefix("<tool_call>\n").and_then(|call| call.strip_suffix("\n</tool_call>")).unwrap();
    let call: Value = serde_json::from_str(call).unwrap();
    assert!(call["name"] == "get_weather" && call["arguments"]["city"].is_string(), "{text}");
    // As if another version had written the answer's first tokens.
    let prompt = tokens(PROMPT);
    rig.create("broken").await;
    let begun = rig.begin("broken", 0, &[&prompt[..], &tokens("Sure!")].concat(), &greedy(5)).await;
    let turn = begun.id.clone();
    rig.engine.cancel(&turn);
    let broken = rig.resubmit("broken", &turn, prompt.len(), &Ask { grammar, ..greedy(50) }).await;
    assert!(broken.to_string().contains("grammar"), "{broken}");
    assert_eq!(rig.engine.unhealthy(), None);
    rig.answer("after", &prompt, &greedy(3)).await;
}
