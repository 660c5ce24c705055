use proptest::prelude::*;

use super::*;
use crate::{Answer, Call};

const SYNTAXES: [CallSyntax; 6] = [
    CallSyntax::Hermes,
    CallSyntax::Llama3,
    CallSyntax::Mistral,
    CallSyntax::MistralArgs,
    CallSyntax::Gemma,
    CallSyntax::Generic,
];

fn format(calls: CallSyntax) -> AnswerFormat {
    AnswerFormat { calls: Some(calls), reasoning: None }
}

fn thinking(calls: Option<CallSyntax>, starts_open: bool) -> AnswerFormat {
    let reasoning = Reasoning { open: "<think>".into(), close: "</think>".into(), starts_open };
    AnswerFormat { calls, reasoning: Some(reasoning) }
}

fn call(name: &str, arguments: &str) -> Call {
    Call { name: name.into(), arguments: arguments.into() }
}

fn parse(syntax: CallSyntax, text: &str) -> Answer {
    Answer::parse(&format(syntax), text)
}

fn calls(syntax: CallSyntax, text: &str) -> Vec<Call> {
    let answer = parse(syntax, text);
    assert_eq!((answer.content.as_str(), answer.reasoning.as_str()), ("", ""), "{text}");
    answer.calls
}

#[test]
fn each_family_writes_its_calls_in_its_own_way() {
    let (one, two) = (call("weather", r#"{"city": "Paris"}"#), call("time", "{}"));
    let both = vec![one.clone(), two.clone()];
    for syntax in [CallSyntax::Hermes, CallSyntax::Generic] {
        let text = "\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
                    <tool_call>{\"name\":\"time\",\"arguments\":{}}</tool_call>\n";
        assert_eq!(calls(syntax, text), both);
    }
    let text = r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abc"}, {"name": "time", "arguments": {}}]"#;
    assert_eq!(calls(CallSyntax::Mistral, text), both);
    let text = r#"[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[CALL_ID]9xZ[ARGS]{}"#;
    assert_eq!(calls(CallSyntax::MistralArgs, text), both);
    assert_eq!(calls(CallSyntax::Mistral, text), both, "either spelling is understood");
    let text = r#"{"name": "weather", "parameters": {"city": "Paris"}}"#;
    assert_eq!(calls(CallSyntax::Llama3, text), vec![one.clone()]);
    assert_eq!(calls(CallSyntax::Llama3, &format!("<|python_tag|>{text}")), vec![one.clone()]);
    assert_eq!(
        calls(CallSyntax::Llama3, &format!("{text}; {{\"name\": \"time\", \"parameters\": {{}}}}")),
        both
    );
    for fence in ["tool_code", "json"] {
        let text = format!("```{fence}\n{text}\n```");
        assert_eq!(calls(CallSyntax::Gemma, &text), vec![one.clone()]);
    }
}

#[test]
fn keys_in_any_order_further_keys_and_arguments_as_text_are_understood() {
    for (text, arguments) in [
        (r#"{"arguments": {"a": [1, "}"]}, "name": "f"}"#, r#"{"a": [1, "}"]}"#),
        (r#"{"id": 7, "type": "function", "name": "f", "arguments": {"a": "\"}"}}"#, r#"{"a": "\"}"}"#),
        (r#"{"name": "f", "arguments": "{\"a\": 1}"}"#, r#"{"a": 1}"#),
        (r#"{"name": "f", "arguments": null, "more": {"x": [true]}}"#, "{}"),
        (r#"{"name": "f"}"#, "{}"),
    ] {
        let text = format!("<tool_call>{text}</tool_call>");
        assert_eq!(calls(CallSyntax::Hermes, &text), [call("f", arguments)], "{text}");
    }
}

#[test]
fn what_is_no_call_stays_content_word_for_word() {
    for text in [
        "Use <tool_call> to call.",
        "<tool_call>\nnothing here\n</tool_call>",
        r#"<tool_call>{"name": "two words", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "f", "arguments": [1]}</tool_call>"#,
        r#"<tool_call>{"no": "name"}</tool_call>"#,
        "<tool_call>{\"name\": \"f",
        "a < b, <tool_cal",
    ] {
        let answer = parse(CallSyntax::Hermes, text);
        assert_eq!((answer.content.as_str(), answer.calls.len()), (text, 0));
    }
    for text in
        [r#"{"name": "Bob", "age": 3}"#, r#"{"name": "Bob"}"#, "{ }", r#"A: {"name": "f", "parameters": {}}"#]
    {
        assert_eq!(parse(CallSyntax::Llama3, text).content, text);
    }
    for text in [
        "```json\n[1, 2]\n```",
        "See ```json\n{\"name\": \"f\", \"parameters\": {}}\n```",
        "```rust\nfn f() {}\n```",
    ] {
        assert_eq!(parse(CallSyntax::Gemma, text).content, text);
    }
    for text in ["[TOOL_CALLS]", "[TOOL_CALLS][]x", "[TOOL_CALLS]f[ARG]{}", "[1] [TOOL_"] {
        assert_eq!(parse(CallSyntax::Mistral, text).content, text);
    }
}

#[test]
fn a_refused_candidate_does_not_hide_the_call_after_it() {
    let text = "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let answer = parse(CallSyntax::Hermes, text);
    assert_eq!((answer.content.as_str(), answer.calls), ("<tool_call>", vec![call("f", "{}")]));
}

#[test]
fn content_before_and_after_calls_is_kept_without_the_space_beside_them() {
    let text = "Let me see.\n\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n\nDone. \n";
    let answer = parse(CallSyntax::Hermes, text);
    assert_eq!(answer.content, "Let me see.Done. \n");
    let plain = " two  words\n\n";
    assert_eq!(parse(CallSyntax::Hermes, plain).content, plain);
    assert_eq!(parse(CallSyntax::Hermes, "\n \n").content, "\n \n");
}

#[test]
fn arguments_come_while_they_are_written_and_a_cut_off_call_has_no_end() {
    let mut parser = AnswerParser::new(&format(CallSyntax::Hermes));
    assert_eq!(parser.push("<tool_call>\n{\"name\": \"f\", \"arguments\": "), []);
    let begun = [
        Piece::CallBegin { index: 0, name: "f".into() },
        Piece::CallArguments { index: 0, fragment: "{\"a\"".into() },
    ];
    assert_eq!(parser.push("{\"a\""), begun);
    assert_eq!(parser.push(": 1"), [Piece::CallArguments { index: 0, fragment: ": 1".into() }]);
    assert_eq!(parser.finish(), []);
}

#[test]
fn a_call_that_goes_wrong_after_its_arguments_is_a_call_and_the_rest_is_content() {
    let answer = parse(CallSyntax::Hermes, r#"<tool_call>{"name": "f", "arguments": {}]oops"#);
    assert_eq!((answer.content.as_str(), answer.calls), ("]oops", vec![call("f", "{}")]));
}

#[test]
fn reasoning_is_told_apart_from_the_answer() {
    let text = "<think>\nHm, <b>.\n</think>\n\nHello\n";
    for (format, text) in [
        (thinking(None, false), text),
        (thinking(None, true), &text["<think>\n".len()..]),
        (thinking(None, true), text),
    ] {
        let answer = Answer::parse(&format, text);
        assert_eq!((answer.reasoning.as_str(), answer.content.as_str()), ("Hm, <b>.", "Hello\n"));
    }
    let answer = Answer::parse(
        &thinking(Some(CallSyntax::Llama3), true),
        "a</think>\n{\"name\": \"f\", \"parameters\": {}}",
    );
    assert_eq!((answer.reasoning.as_str(), answer.calls), ("a", vec![call("f", "{}")]));
    let open = Answer::parse(&thinking(None, true), "never closed </thin");
    assert_eq!((open.reasoning.as_str(), open.content.as_str()), ("never closed </thin", ""));
    let late = "The mark <think> begins reasoning.</think>";
    assert_eq!(Answer::parse(&thinking(None, false), late).content, late);
}

#[test]
fn the_parser_knows_when_it_is_inside_the_reasoning() {
    let mut parser = AnswerParser::new(&thinking(None, true));
    assert!(parser.is_reasoning());
    parser.push("a</thi");
    assert!(parser.is_reasoning());
    parser.push("nk>");
    assert!(!parser.is_reasoning());
}

#[test]
fn plain_text_passes_untouched() {
    let text = "<think>\n<tool_call> [TOOL_CALLS]\n ";
    assert_eq!(Answer::parse(&AnswerFormat::default(), text).content, text);
}

#[test]
fn what_a_syntax_writes_it_reads() {
    for syntax in SYNTAXES {
        let written = [("f_1", r#"{"a": {"b": "}\"\n"}}"#), ("g-2", "{}")];
        let most = if syntax.shape().separator.is_some() { 2 } else { 1 };
        let text = syntax.write(written[..most].iter().copied());
        let expected: Vec<Call> =
            written[..most].iter().map(|(name, arguments)| call(name, arguments)).collect();
        assert_eq!(calls(syntax, &text), expected, "{syntax:?}: {text}");
    }
}

#[test]
fn text_that_begins_call_after_call_takes_bounded_work() {
    let text = r#"<tool_call>{"x": ""#.repeat(4000);
    assert_eq!(parse(CallSyntax::Hermes, &text).content, text);
    let text = "<tool_call>".repeat(20_000);
    assert_eq!(parse(CallSyntax::Hermes, &text).content, text);
}

/// Texts made of what the parser looks for, whole and broken.
fn texts() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("<tool_call>"),
        Just("</tool_call>"),
        Just("<think>"),
        Just("</think>"),
        Just("[TOOL_CALLS]"),
        Just("[ARGS]"),
        Just("[CALL_ID]"),
        Just("<|python_tag|>"),
        Just("```json\n"),
        Just("```tool_code\n"),
        Just("```"),
        Just("{\"name\": \"f\""),
        Just(", \"arguments\": {"),
        Just(", \"parameters\": {\"a\": \"é}\""),
        Just("\"x\": [1, {}]"),
        Just("}"),
        Just("}}"),
        Just("["),
        Just("]"),
        Just(", "),
        Just("; "),
        Just(" "),
        Just("\n"),
        Just("word"),
        Just("<"),
        Just("日本"),
        Just("\""),
        Just("\\"),
        Just("{"),
        Just("f"),
        Just("{\"name\": \"f\", \"arguments\": {\"a\": 1}}"),
        Just("{\"name\": \"g\", \"parameters\": {}}"),
    ];
    prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
}

/// The JSON of any object, in any spelling of white space.
fn arguments() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i32>().prop_map(Into::into),
        any::<String>().prop_map(Into::into),
        Just("</tool_call> }]{\"\\ [ARGS]".into()),
    ];
    let value = leaf.prop_recursive(3, 16, 4, |inner| {
        let list = prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from);
        let object = prop::collection::btree_map(any::<String>(), inner, 0..4);
        prop_oneof![list, object.prop_map(|fields| fields.into_iter().collect())]
    });
    let object = prop::collection::btree_map("[a-z]{1,8}", value, 0..4);
    let object = object.prop_map(|fields| fields.into_iter().collect::<serde_json::Value>());
    (object, any::<bool>()).prop_map(|(object, pretty)| match pretty {
        true => serde_json::to_string_pretty(&object).unwrap(),
        false => object.to_string(),
    })
}

fn formats() -> impl Strategy<Value = AnswerFormat> {
    (prop::option::of(prop::sample::select(SYNTAXES.to_vec())), 0..3).prop_map(|(calls, reasoning)| {
        match reasoning {
            0 => AnswerFormat { calls, reasoning: None },
            open => thinking(calls, open == 2),
        }
    })
}

fn without_space(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_chunks_join_to_the_answer_of_the_whole(format in formats(), text in texts(), cuts in prop::collection::vec(1usize..9, 1..40)) {
        let whole = Answer::parse(&format, &text);
        let mut parser = AnswerParser::new(&format);
        let (mut joined, mut pieces) = (Answer::default(), Vec::new());
        let characters: Vec<char> = text.chars().collect();
        let (mut from, mut cut) = (0, cuts.iter().cycle());
        while from < characters.len() {
            let to = (from + cut.next().unwrap()).min(characters.len());
            pieces.extend(parser.push(&characters[from..to].iter().collect::<String>()));
            from = to;
        }
        pieces.extend(parser.finish());
        // Calls come in order, each begun before its arguments, and ended at most once.
        let (mut begun, mut ended) = (0, 0);
        for piece in &pieces {
            match piece {
                Piece::CallBegin { index, .. } => { prop_assert_eq!((*index, ended), (begun, begun)); begun += 1; }
                Piece::CallArguments { index, .. } => prop_assert_eq!((*index, ended), (begun - 1, begun - 1)),
                Piece::CallEnd { index } => { prop_assert_eq!((*index, ended), (begun - 1, begun - 1)); ended += 1; }
                Piece::Content(text) | Piece::Reasoning(text) => prop_assert!(!text.is_empty()),
            }
        }
        joined.extend(pieces);
        prop_assert_eq!(joined, whole);
    }

    #[test]
    fn calls_that_a_syntax_writes_are_read_word_for_word(
        syntax in prop::sample::select(SYNTAXES.to_vec()),
        written in prop::collection::vec(("[a-zA-Z0-9_.-]{1,16}", arguments()), 1..4),
    ) {
        let most = if syntax.shape().separator.is_some() { written.len() } else { 1 };
        let written = &written[..most];
        let text = syntax.write(written.iter().map(|(name, arguments)| (name.as_str(), arguments.as_str())));
        let expected: Vec<Call> = written.iter().map(|(name, arguments)| call(name, arguments)).collect();
        prop_assert_eq!(calls(syntax, &text), expected);
    }

    #[test]
    fn nothing_is_lost_where_there_is_no_call(syntax in prop::sample::select(SYNTAXES.to_vec()), text in texts()) {
        let answer = parse(syntax, &text);
        if answer.calls.is_empty() {
            prop_assert_eq!(answer.content, text);
        }
    }

    #[test]
    fn reasoning_and_content_are_the_text_without_its_marks(starts_open: bool, text in texts()) {
        let answer = Answer::parse(&thinking(None, starts_open), &text);
        let said = without_space(&(answer.reasoning + &answer.content));
        let (text, said_marks) = (without_space(&text), |text: &str| text.replace("<think>", "").replace("</think>", ""));
        prop_assert_eq!(said_marks(&said), said_marks(&text));
    }
}
