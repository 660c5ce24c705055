//! Pieces of an answer's text, token by token, are the text: whatever characters the tokens cut through, and whatever stops it.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_engine::OutputText;
use proptest::prelude::*;

/// Tokens of prose, and single bytes that begin, continue and break characters.
fn output() -> impl Strategy<Value = Vec<u32>> {
    let prose = tokens("The naïve café on the corner — open “daily” — sells 🐭 figurines. 狐は森で眠る。\n");
    let words = prop::sample::select(prose);
    prop::collection::vec(prop_oneof![3 => words, 1 => 0..400u32], 0..60)
}

/// What all tokens say together.
fn whole(output: &[u32]) -> String {
    let tokenizer = tokenizer();
    let visible = output.iter().filter(|token| !tokenizer.is_control(**token));
    let bytes: Vec<u8> =
        visible.flat_map(|token| tokenizer.token_bytes(*token).unwrap_or_default()).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The pieces as they were told, and whether a stop string ended them.
fn told(output: &[u32], stop: &[String]) -> (Vec<String>, bool) {
    let mut text = OutputText::new(tokenizer(), stop, &[]);
    let mut pieces = Vec::new();
    for token in output {
        let (piece, stopped) = text.push(*token);
        pieces.push(piece);
        if stopped {
            return (pieces, true);
        }
    }
    pieces.push(text.finish());
    (pieces, false)
}

/// A part of `text`, by shares of its characters.
fn part(text: &str, at: f64, share: f64) -> String {
    let characters: Vec<char> = text.chars().collect();
    let begin = (at * characters.len() as f64) as usize;
    let count = (share * 8.0) as usize + 1;
    characters.iter().skip(begin).take(count).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_join_to_the_text(output in output()) {
        let (pieces, stopped) = told(&output, &[]);
        prop_assert!(!stopped);
        prop_assert_eq!(pieces.concat(), whole(&output));
    }

    #[test]
    fn a_stop_string_ends_the_text_before_its_first_occurrence(
        output in output(), at in 0.0..1.0f64, share in 0.0..1.0f64,
    ) {
        let text = whole(&output);
        let stop = part(&text, at, share);
        // An unfinished character is known as one only when no token follows.
        prop_assume!(!stop.is_empty() && !stop.contains(char::REPLACEMENT_CHARACTER));
        let (pieces, stopped) = told(&output, std::slice::from_ref(&stop));
        match text.find(&stop) {
            Some(end) => {
                prop_assert_eq!(pieces.concat(), &text[..end]);
                prop_assert!(stopped);
            }
            None => prop_assert_eq!(pieces.concat(), text),
        }
    }

    #[test]
    fn of_several_stop_strings_none_is_ever_told(
        output in output(), places in prop::collection::vec((0.0..1.0f64, 0.0..1.0f64), 1..4),
    ) {
        let text = whole(&output);
        let stops: Vec<String> = places.iter().map(|(at, share)| part(&text, *at, *share)).collect();
        prop_assume!(stops.iter().all(|stop| !stop.is_empty() && !stop.contains(char::REPLACEMENT_CHARACTER)));
        let (pieces, stopped) = told(&output, &stops);
        let said = pieces.concat();
        prop_assert!(stopped && text.starts_with(&said), "{said:?} of {text:?}");
        prop_assert!(stops.iter().all(|stop| !said.contains(stop.as_str())), "{said:?} with {stops:?}");
        prop_assert!(stops.iter().any(|stop| text[said.len()..].starts_with(stop.as_str())));
    }
}
