//! Speculation changes when tokens come, and nothing else: every test compares with an engine that does not guess.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use dormouse_engine::{DraftSource, FinishReason, Guess, Sampling};
use dormouse_models::TokenId;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const POEM: &str = "Say this three times: The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy \
     dog. The quick brown fox";
const ESSAY: &str = "<|im_start|>user\nWhy is the sea salty?<|im_end|>\n<|im_start|>assistant\n";

/// Ways of sampling that a guess could disturb.
fn asks() -> Vec<(&'static str, Ask)> {
    let base = greedy(48);
    let sampled = |sampling: Sampling| Ask { sampling, ..base.clone() };
    let seeded = Sampling { temperature: 0.8, seed: 11, ..Sampling::default() };
    let still = base.sampling.clone();
    vec![
        ("greedy", base.clone()),
        ("greedy with log-probabilities", sampled(Sampling { logprobs: Some(4), ..still.clone() })),
        ("sampled with log-probabilities", sampled(Sampling { logprobs: Some(1), ..seeded.clone() })),
        (
            "top-k, top-p and min-p",
            sampled(Sampling { top_k: 40, top_p: 0.9, min_p: 0.02, ..seeded.clone() }),
        ),
        ("a cool head", sampled(Sampling { temperature: 0.3, seed: 5, ..seeded.clone() })),
        ("repetition penalty", sampled(Sampling { repetition_penalty: 1.15, ..still.clone() })),
        (
            "presence and frequency penalties",
            sampled(Sampling {
                presence_penalty: 0.4,
                frequency_penalty: 0.2,
                logprobs: Some(2),
                ..seeded.clone()
            }),
        ),
        ("logit bias", sampled(Sampling { logit_bias: vec![(260, 3.0), (2, -5.0)], ..still })),
        ("a stop string", Ask { stop: vec!["dog. The".into(), "salt is".into()], ..base.clone() }),
        ("the model's own end", Ask { ignore_eos: false, max_tokens: 80, ..sampled(seeded) }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn lookup_changes_no_token_and_no_bit_however_tokens_are_chosen() {
    let (plain, guessing) = (Rig::new(PLAIN), Rig::new(NGRAM));
    let mut accepted = 0;
    for (name, prompt) in [("poem", POEM), ("essay", ESSAY)] {
        for (way, ask) in asks() {
            let session = format!("{name}, {way}");
            let (expected, _) = plain.answer(&session, &tokens(prompt), &ask).await;
            let (answer, receipt) = guessing.answer(&session, &tokens(prompt), &ask).await;
            assert_eq!(answer, expected, "{session}");
            assert!(receipt.accepted_tokens <= receipt.drafted_tokens);
            assert!(receipt.accepted_tokens <= answer.tokens.len());
            accepted += receipt.accepted_tokens;
        }
    }
    let stats = guessing.engine.stats().await.unwrap();
    assert_eq!(stats.accepted_tokens, accepted as u64);
    // How many are computed depends on what steps take here and now; the first repetitions are always tried.
    assert!(accepted > 0);
    assert!(stats.steps < plain.engine.stats().await.unwrap().steps);
    assert_eq!(stats.output_tokens, plain.engine.stats().await.unwrap().output_tokens);
    guessing.assert_same_pages(&plain);
}

/// What happens to the guesses at one position.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// How many of the next tokens are guessed right, before one is not.
    right: usize,
    /// Guesses in all; more than the engine can use, sometimes.
    length: usize,
    wrong: TokenId,
}

/// Guesses that know the log to come, and are right as often as planned.
fn oracle(logs: Vec<Vec<TokenId>>, plans: Vec<Plan>) -> Guess {
    Arc::new(move |log| {
        let plan = plans[log.len() % plans.len()];
        let future =
            logs.iter().find(|known| known.starts_with(log)).map_or(&[][..], |known| &known[log.len()..]);
        (0..plan.length)
            .map(|ahead| match future.get(ahead) {
                Some(token) if ahead != plan.right => *token,
                Some(token) => (plan.wrong + u32::from(plan.wrong == *token)) % 49_152,
                None => plan.wrong,
            })
            .collect()
    })
}

fn plan() -> impl Strategy<Value = Plan> {
    (0usize..20, 0usize..20, 0u32..49_152).prop_map(|(right, length, wrong)| Plan { right, length, wrong })
}

#[test]
fn whatever_is_guessed_answers_and_pages_are_those_of_plain_decoding() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let cases = (prop::collection::vec(plan(), 1..12), 0..asks().len(), 1usize..64, any::<bool>());
    runner
        .run(&cases, |(plans, way, max_tokens, poem)| {
            let prompt = tokens(if poem { POEM } else { ESSAY });
            let ask = Ask { max_tokens, ..asks().swap_remove(way).1 };
            let (answers, pages) = runtime.block_on(async {
                let plain = Rig::new(PLAIN);
                let (expected, _) = plain.answer("s", &prompt, &ask).await;
                let known = [&prompt[..], &expected.tokens].concat();
                let guessing = Rig::new(DraftSource::Given(oracle(vec![known], plans)));
                let (answer, receipt) = guessing.answer("s", &prompt, &ask).await;
                assert!(receipt.accepted_tokens <= receipt.drafted_tokens);
                ((answer, expected), (guessing.pages(), plain.pages()))
            });
            prop_assert_eq!(answers.0, answers.1);
            prop_assert_eq!(pages.0, pages.1);
            Ok(())
        })
        .unwrap();
}

/// Guesses that are always right.
fn all_right(logs: Vec<Vec<TokenId>>) -> DraftSource {
    DraftSource::Given(oracle(logs, vec![Plan { right: usize::MAX, length: 20, wrong: 0 }]))
}

#[tokio::test(flavor = "multi_thread")]
async fn right_guesses_end_where_the_turn_ends() {
    let prompt = tokens(POEM);
    let plain = Rig::new(PLAIN);
    let (known, _) = plain.answer("known", &prompt, &greedy(40)).await;
    let rig = Rig::new(all_right(vec![[&prompt[..], &known.tokens].concat()]));
    for most in (1..=18).chain([40]) {
        let (answer, receipt) = rig.answer(&format!("{most}"), &prompt, &greedy(most)).await;
        assert_eq!(answer.tokens, known.tokens[..most], "at most {most}");
        assert_eq!((answer.reason, answer.log_len), (Some(FinishReason::Length), prompt.len() + most));
        assert_eq!(receipt.accepted_tokens, receipt.drafted_tokens, "at most {most}");
        // The last token needs no row.
        assert!(receipt.accepted_tokens < most);
    }
    // A token that is guessed rightly may still be the last: the rest of the guesses is forgotten.
    let ask = Ask { stop: vec![known.texts[5].trim().into()], ..greedy(40) };
    let (expected, _) = plain.answer("stopped", &prompt, &ask).await;
    let (answer, receipt) = rig.answer("stopped", &prompt, &ask).await;
    assert_eq!(answer, expected);
    assert_eq!(answer.reason, Some(FinishReason::Stop));
    assert!(receipt.accepted_tokens < receipt.drafted_tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_context_ends_the_answer_at_the_same_token() {
    let prompt = tokens(POEM);
    for context in [prompt.len() + 1, prompt.len() + 2, prompt.len() + 17, 128] {
        let open = |guesser| Rig::open(tempfile::tempdir().unwrap(), guesser, context);
        let plain = open(PLAIN);
        let (expected, _) = plain.answer("s", &prompt, &greedy(500)).await;
        assert_eq!((expected.log_len, expected.reason), (context, Some(FinishReason::Length)));
        let known = [&prompt[..], &expected.tokens].concat();
        for guesser in [NGRAM, all_right(vec![known])] {
            let rig = open(guesser);
            assert_eq!(rig.answer("s", &prompt, &greedy(500)).await.0, expected);
            assert_eq!(rig.pages(), plain.pages());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_that_share_steps_answer_as_if_alone() {
    let ways = asks();
    let long = tokens(&format!("{}{ESSAY}", "The sea is wide. ".repeat(40)));
    let prompts = [tokens(POEM), long, tokens(ESSAY), tokens(POEM)];
    let asked = [&ways[0].1, &ways[6].1, &ways[5].1, &ways[4].1];
    let (plain, mut expected, mut known) = (Rig::new(PLAIN), Vec::new(), Vec::new());
    for (number, (prompt, ask)) in prompts.iter().zip(asked).enumerate() {
        let (answer, _) = plain.answer(&format!("{number}"), prompt, ask).await;
        known.push([&prompt[..], &answer.tokens].concat());
        expected.push(answer);
    }
    let plans = (0..7).map(|i| Plan { right: i * 3 % 7, length: 2 + i * 5 % 13, wrong: 1000 + i as u32 });
    for guesser in [NGRAM, DraftSource::Given(oracle(known, plans.collect()))] {
        let is_given = matches!(guesser, DraftSource::Given(_));
        let rig = Rig::new(guesser);
        let mut running = Vec::new();
        for (number, (prompt, ask)) in prompts.iter().zip(asked).enumerate() {
            let session = format!("{number}");
            rig.create(&session).await;
            running.push(rig.begin(&session, 0, prompt, ask).await);
        }
        for (turn, expected) in running.into_iter().zip(&expected) {
            assert_eq!(&rig.finish(turn).await.0, expected);
        }
        // Whether guesses from the text pay is a matter of the machine and the moment.
        assert!(!is_given || rig.engine.stats().await.unwrap().accepted_tokens > 0);
        rig.assert_same_pages(&plain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_refused_guesses_wrote_is_never_read_after_a_fork_or_a_rewind() {
    let prompt = tokens(POEM);
    let story = async |rig: Rig| {
        let (first, _) = rig.answer("s", &prompt, &asks()[4].1).await;
        let log = [&prompt[..], &first.tokens].concat();
        let mut answers = vec![first];
        // Cuts inside a page, at its end, and where refused guesses lay behind the cut.
        for (number, cut) in [log.len() - 1, log.len() - 7, 64, 65, prompt.len() + 3].into_iter().enumerate()
        {
            let ask = &asks()[1 + number].1;
            answers.push(rig.answer(&format!("fork {cut}"), &log[..cut], ask).await.0);
            let turn = rig.begin("s", cut - 2, &tokens(" And then"), ask).await;
            answers.push(rig.finish(turn).await.0);
        }
        answers
    };
    let expected = story(Rig::new(PLAIN)).await;
    // Guesses that know the first answer: right in the beginning, and then for the other branches often wrong.
    let known = [&prompt[..], &expected[0].tokens].concat();
    let often = (0..5).map(|i| Plan { right: 1 + i, length: 15, wrong: 500 + i as u32 }).collect();
    let blind = vec![Plan { right: 0, length: 15, wrong: 77 }];
    for guesser in
        [NGRAM, DraftSource::Given(oracle(vec![known], often)), DraftSource::Given(oracle(vec![], blind))]
    {
        assert_eq!(story(Rig::new(guesser)).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_moment_leaves_what_plain_decoding_would_leave() {
    let (prompt, ask) = (tokens(POEM), asks().swap_remove(2).1);
    let plain = Rig::new(PLAIN);
    let (expected, _) = plain.answer("s", &prompt, &ask).await;
    let known = [&prompt[..], &expected.tokens].concat();
    let plans: Vec<Plan> = (0..6).map(|i| Plan { right: i, length: 12, wrong: 40 + i as u32 }).collect();
    let guess = oracle(vec![known], plans);
    let directory = tempfile::tempdir().unwrap();
    // Guesses are asked for between two steps: a moment at which the engine can be looked at.
    let (copies, path, begin) = (Arc::new(Mutex::new(Vec::new())), directory.path().to_owned(), prompt.len());
    let (taken, inner) = (Arc::clone(&copies), Arc::clone(&guess));
    let copying: Guess = Arc::new(move |log| {
        let mut copies = taken.lock().unwrap();
        if log.len() >= begin + [1, 9, 21, 30, usize::MAX - begin][copies.len()] {
            copies.push(copy(&path));
        }
        inner(log)
    });
    let rig = Rig::open(directory, DraftSource::Given(copying), CONTEXT);
    rig.create("s").await;
    let running = rig.begin("s", 0, &prompt, &ask).await;
    let turn = running.id.clone();
    rig.finish(running).await;
    let killed = std::mem::take(&mut *copies.lock().unwrap());
    assert_eq!(killed.len(), 4);
    for directory in killed {
        let rig = Rig::open(directory, DraftSource::Given(Arc::clone(&guess)), CONTEXT);
        let again = rig.go_on("s", &turn, prompt.len(), &ask).await;
        let (answer, _) = rig.finish(again).await;
        assert_eq!((answer.tokens, answer.texts), (expected.tokens.clone(), expected.texts.clone()));
        assert_eq!(rig.pages(), plain.pages());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_turn_leaves_a_beginning_of_the_answer_and_a_session_that_goes_on() {
    let prompt = tokens(POEM);
    let plain = Rig::new(PLAIN);
    let (expected, _) = plain.answer("whole", &prompt, &greedy(400)).await;
    let rig = Rig::new(NGRAM);
    rig.create("s").await;
    let mut running = rig.begin("s", 0, &prompt, &greedy(400)).await;
    while running.said() < 50 {
        assert_eq!(running.next().await, None);
    }
    rig.engine.cancel(&running.id);
    let (answer, _) = rig.finish(running).await;
    let said = answer.tokens.len();
    assert_eq!(answer.tokens, expected.tokens[..said]);
    let log = [&prompt[..], &answer.tokens].concat();
    let next = tokens(" Once more:");
    let again = rig.begin("s", log.len(), &next, &greedy(20)).await;
    let (again, receipt) = rig.finish(again).await;
    assert!(receipt.restored_tokens + 1 >= log.len(), "{receipt:?}");
    assert_eq!(again, plain.answer("again", &[&log[..], &next].concat(), &greedy(20)).await.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_without_repetition_is_not_guessed_at() {
    // A thousand times as random as it is sensible: hardly any two tokens occur in a row again.
    let sampling = Sampling { temperature: 50.0, seed: 3, ..Sampling::default() };
    let rig = Rig::new(NGRAM);
    let (answer, receipt) = rig.answer("s", &tokens(ESSAY), &Ask { sampling, ..greedy(60) }).await;
    assert_eq!(answer.tokens.len(), 60);
    assert_eq!((receipt.drafted_tokens, receipt.accepted_tokens), (0, 0));
}
