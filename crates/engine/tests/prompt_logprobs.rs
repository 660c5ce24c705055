//! What the model thinks of a prompt's tokens is what it thought of them when it said them.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_engine::{FinishReason, Sampling};

const OPENING: &str = "The lighthouse keeper counted the ships every evening, and every evening";

fn scoring(top: u8, max_tokens: usize) -> Ask {
    Ask { prompt_logprobs: Some(top), ..greedy(max_tokens) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_scored_with_the_bits_that_its_generation_had() {
    let rig = Rig::new(PLAIN);
    let opening = tokens(OPENING);
    let sampling = Sampling { temperature: 0.9, seed: 3, logprobs: Some(5), ..Sampling::default() };
    let (said, _) = rig.answer("said", &opening, &Ask { sampling, ..greedy(150) }).await;
    let whole = [opening.clone(), said.tokens.clone()].concat();
    let (scored, receipt) = rig.answer("scored", &whole, &scoring(5, 1)).await;
    // Its pages are there, but logits are not kept.
    assert_eq!((receipt.restored_tokens, scored.tokens.len()), (0, 1));
    let scores = scored.prompt.unwrap();
    assert_eq!(scores.len(), whole.len() - 1);
    let expected: Vec<_> = said.logprobs.into_iter().flatten().collect();
    assert_eq!(scores[opening.len() - 1..], expected);
    // In company, in other pieces, and with less asked for, the numbers are the same.
    let (few, many) = (scoring(2, 4), greedy(40));
    let ((other, _), _) =
        tokio::join!(rig.answer("other", &whole[..100], &few), rig.answer("talk", &opening, &many));
    for (few, many) in other.prompt.unwrap().iter().zip(&scores) {
        assert_eq!((few.0, &few.1[..]), (many.0, &many.1[..2]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_may_be_scored_without_an_answer() {
    let rig = Rig::new(NGRAM);
    let prompt = tokens(OPENING);
    let (scored, _) = rig.answer("scored", &prompt, &scoring(0, 0)).await;
    assert_eq!((scored.tokens.len(), scored.reason), (0, Some(FinishReason::Length)));
    assert_eq!((scored.prompt.unwrap().len(), scored.log_len), (prompt.len() - 1, prompt.len()));
    let (one, _) = rig.answer("one token", &prompt[..1], &scoring(3, 0)).await;
    assert_eq!(one.prompt, Some(Vec::new()));
    let (plain, _) = rig.answer("plain", &prompt, &greedy(6)).await;
    let (both, _) = rig.answer("both", &prompt, &scoring(1, 6)).await;
    assert_eq!((plain.prompt, both.tokens), (None, plain.tokens));
}
