//! The forms of answers, each drawn at random many times and read as their readers would.

#![allow(clippy::unwrap_used)]

mod common;

use common::{COMPILER, Dice, TOKENIZER, draw, text};
use dormouse_answer::{AnswerFormat, CallSyntax, OutputFormat, Reasoning, ToolChoice};
use dormouse_grammar::{Constraint, GrammarRequest};
use dormouse_models::tokenizer::Specials;
use serde_json::{Value, json};

fn tools() -> Vec<Value> {
    vec![
        json!({"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"], "additionalProperties": false}}}),
        json!({"type": "function", "function": {"name": "stop_now"}}),
    ]
}

fn calling(calls: CallSyntax, choice: ToolChoice) -> GrammarRequest {
    GrammarRequest {
        tools: tools(),
        choice,
        parallel: true,
        answer_format: AnswerFormat { calls: Some(calls), reasoning: None },
        ..GrammarRequest::default()
    }
}

const ALL: [CallSyntax; 6] = [
    CallSyntax::Hermes,
    CallSyntax::Llama3,
    CallSyntax::Mistral,
    CallSyntax::MistralArgs,
    CallSyntax::Gemma,
    CallSyntax::Generic,
];

/// Feeds a text, token by token; the constraint after it, or the text before the token that was refused.
fn feed(request: &GrammarRequest, text: &str) -> Result<Constraint, String> {
    let grammar = COMPILER.compile(request).unwrap().unwrap();
    let mut constraint = grammar.begin();
    let mut before = Vec::new();
    for token in TOKENIZER.encode(text, Specials::Literal, false).unwrap() {
        if !constraint.allows(token).unwrap() {
            return Err(common::text(&before));
        }
        constraint.advance(token).unwrap();
        before.push(token);
    }
    Ok(constraint)
}

fn may_end(constraint: &mut Constraint) -> bool {
    constraint.allows(TOKENIZER.eog_tokens()[0]).unwrap()
}

#[test]
fn plain_requests_are_not_constrained() {
    assert!(COMPILER.compile(&GrammarRequest::default()).unwrap().is_none());
    for choice in [ToolChoice::None, ToolChoice::Auto] {
        let no_tools = GrammarRequest { tools: Vec::new(), ..calling(CallSyntax::Hermes, choice) };
        assert!(COMPILER.compile(&no_tools).unwrap().is_none());
    }
    assert!(COMPILER.compile(&calling(CallSyntax::Hermes, ToolChoice::None)).unwrap().is_none());
}

#[test]
fn a_json_object_is_any_object_and_nothing_else() {
    let request = GrammarRequest { format: OutputFormat::JsonObject, ..GrammarRequest::default() };
    let grammar = COMPILER.compile(&request).unwrap().unwrap();
    for seed in 0..40 {
        let answer = text(&draw(&grammar, &mut Dice(seed)).unwrap());
        let value: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
        assert!(value.is_object(), "{answer}");
    }
    for (text, accepted) in [
        ("{}", true),
        ("{\"a\": [1, 2.5, true, null, {\"b\": \"c\\n\"}]}", true),
        ("{\n  \"a\": 1\n}", false),
        ("{\"a\":1}", false),
        ("[1]", false),
        ("Sure! {", false),
        ("{}{", false),
        ("{\"a\": 1e9}", false),
    ] {
        assert_eq!(feed(&request, text).is_ok_and(|mut it| may_end(&mut it)), accepted, "{text}");
    }
}

#[test]
fn an_answer_ends_where_its_form_ends_and_not_before() {
    let request = GrammarRequest { format: OutputFormat::JsonObject, ..GrammarRequest::default() };
    let mut half = feed(&request, "{\"a\": 1").unwrap();
    assert!(!may_end(&mut half));
    assert!(half.advance(TOKENIZER.eog_tokens()[0]).is_err());
    let mut whole = feed(&request, "{\"a\": 1}").unwrap();
    let mut logits = vec![0.0f32; TOKENIZER.vocab_size()];
    whole.mask(&mut logits).unwrap();
    let left: Vec<u32> = (0..logits.len() as u32).filter(|token| logits[*token as usize] == 0.0).collect();
    let mut ends = TOKENIZER.eog_tokens().to_vec();
    ends.sort_unstable();
    assert_eq!(left, ends);
    whole.advance(left[0]).unwrap();
    assert!(whole.advance(left[0]).is_err());
}

#[test]
fn required_calls_are_calls_in_the_syntax_of_the_model() {
    for calls in ALL {
        let request = calling(calls, ToolChoice::Required);
        let grammar = COMPILER.compile(&request).unwrap().unwrap();
        for seed in 0..12 {
            let answer = text(&draw(&grammar, &mut Dice(seed)).unwrap());
            let parsed = dormouse_answer::Answer::parse(&request.answer_format, &answer);
            assert!(!parsed.calls.is_empty() && parsed.content.trim().is_empty(), "{calls:?}: {answer}");
            for call in &parsed.calls {
                let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                match call.name.as_str() {
                    "get_weather" => assert!(arguments["city"].is_string(), "{answer}"),
                    "stop_now" => assert_eq!(arguments, json!({}), "{answer}"),
                    other => panic!("{other}: {answer}"),
                }
            }
        }
    }
}

#[test]
fn a_named_function_is_called_once_and_without_parallel_calls_there_is_one() {
    for calls in ALL {
        let named = calling(calls, ToolChoice::Function("stop_now".into()));
        let single = GrammarRequest { parallel: false, ..calling(calls, ToolChoice::Required) };
        for request in [named, single] {
            let grammar = COMPILER.compile(&request).unwrap().unwrap();
            for seed in 0..8 {
                let answer = text(&draw(&grammar, &mut Dice(seed)).unwrap());
                let parsed = dormouse_answer::Answer::parse(&request.answer_format, &answer);
                assert_eq!(parsed.calls.len(), 1, "{calls:?}: {answer}");
            }
        }
    }
    let unknown = calling(CallSyntax::Hermes, ToolChoice::Function("missing".into()));
    assert_eq!(COMPILER.compile(&unknown).unwrap_err().param, "tool_choice");
}

#[test]
fn with_auto_text_is_free_until_a_call_begins() {
    let request = calling(CallSyntax::Hermes, ToolChoice::Auto);
    for text in ["Hello, <b>world</b>! {\"name\": 1} <tool_cal", "", "<tool_response>\n\n"] {
        let mut constraint = feed(&request, text).unwrap_or_else(|before| panic!("{before}"));
        assert!(may_end(&mut constraint), "{text}");
    }
    let call = "I look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\", \"unit\": \"C\"}}\n</tool_call>";
    assert!(may_end(&mut feed(&request, call).unwrap()));
    let two = format!("{call}\n<tool_call>\n{{\"name\": \"stop_now\", \"arguments\": {{}}}}\n</tool_call>");
    assert!(may_end(&mut feed(&request, &two).unwrap()));
    for (bad, before) in [
        ("<tool_call>\nnothing", "<tool_call>\n"),
        ("x<tool_call>\n{\"name\": \"get_rich\"", "x<tool_call>\n{\"name\": \"get_"),
        ("<tool_call>\n{\"name\": \"stop_now\", \"arguments\": {\"a", "\"arguments\": {"),
    ] {
        let refused = feed(&request, bad).err().unwrap_or_else(|| panic!("{bad}"));
        assert!(refused.ends_with(before) || bad.starts_with(&refused), "{bad}: {refused}");
    }
    let mut half = feed(&request, "<tool_call>\n{\"name\": \"stop_").unwrap();
    assert!(!may_end(&mut half));
}

#[test]
fn with_auto_llamas_call_begins_where_the_answer_begins() {
    let request = calling(CallSyntax::Llama3, ToolChoice::Auto);
    let call = "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Rome\"}}";
    assert!(may_end(&mut feed(&request, call).unwrap()));
    for text in ["The answer is {\"name\": \"nobody\"}.", "{\"result\": 3}"] {
        assert!(may_end(&mut feed(&request, text).unwrap()), "{text}");
    }
    assert!(feed(&request, "{\"name\": \"nobody\", \"parameters\"").is_err());
    assert!(feed(&request, "{ \"name\" : \"nobody\"").is_err());
}

#[test]
fn reasoning_is_free_and_the_answer_after_it_is_not() {
    let reasoning = |starts_open| Reasoning { open: "<think>".into(), close: "</think>".into(), starts_open };
    let json = |starts_open| GrammarRequest {
        format: OutputFormat::JsonObject,
        answer_format: AnswerFormat { calls: None, reasoning: Some(reasoning(starts_open)) },
        ..GrammarRequest::default()
    };
    assert!(may_end(&mut feed(&json(true), "Let me see {\n</think>\n\n{}").unwrap()));
    assert!(may_end(&mut feed(&json(false), "<think>\nLet me see\n</think>\n\n{\"a\": 1}").unwrap()));
    assert!(may_end(&mut feed(&json(false), "{\"a\": 1}").unwrap()));
    assert!(feed(&json(false), "Let me see").is_err());
    assert!(feed(&json(true), "So.</think>\n\nSure").is_err());
    let mut auto = calling(CallSyntax::Hermes, ToolChoice::Auto);
    auto.answer_format.reasoning = Some(reasoning(false));
    let thought = "<think>I may write <tool_call> here</think>\n\n";
    assert!(may_end(&mut feed(&auto, &format!("{thought}Hello")).unwrap()));
    let call = "<tool_call>\n{\"name\": \"stop_now\", \"arguments\": {}}\n</tool_call>";
    assert!(may_end(&mut feed(&auto, &format!("{thought}{call}")).unwrap()));
    assert!(feed(&auto, &format!("{thought}<tool_call>\nhello")).is_err());
}

#[test]
fn json_or_a_call_may_be_asked_for_together() {
    let request =
        GrammarRequest { format: OutputFormat::JsonObject, ..calling(CallSyntax::Hermes, ToolChoice::Auto) };
    assert!(may_end(&mut feed(&request, "{\"a\": 1}").unwrap()));
    let call = "<tool_call>\n{\"name\": \"stop_now\", \"arguments\": {}}\n</tool_call>";
    assert!(may_end(&mut feed(&request, call).unwrap()));
    assert!(feed(&request, "Hello").is_err());
}

/// Hermes' tools and one more.
fn with_tool(choice: ToolChoice, parameters: Value, strict: bool) -> GrammarRequest {
    let mut request = calling(CallSyntax::Hermes, choice);
    let function = json!({"name": "odd", "parameters": parameters, "strict": strict});
    request.tools.push(json!({"type": "function", "function": function}));
    request
}

#[test]
fn parameters_that_cannot_be_promised_are_refused_where_a_promise_is_asked_for() {
    let bad = |keyword: &str| match keyword {
        "uniqueItems" => {
            json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}})
        }
        _ => {
            json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "^a$", "minLength": 2}},
            "required": ["a"]})
        }
    };
    for (keyword, told) in [("uniqueItems", "uniqueItems"), ("pattern", "required")] {
        for (choice, strict) in [
            (ToolChoice::Required, false),
            (ToolChoice::Function("odd".into()), false),
            (ToolChoice::Auto, true),
        ] {
            let error = COMPILER.compile(&with_tool(choice, bad(keyword), strict)).unwrap_err();
            assert_eq!(error.param, "tools[2].function.parameters", "{error}");
            assert!(error.keyword.as_deref() == Some(told) || error.message.contains(keyword), "{error}");
            assert!(!error.message.contains("Lark") && !error.message.contains("non-verbose"), "{error}");
        }
        // The model decides, and the tool is not strict: the others are as they are.
        let request = with_tool(ToolChoice::Auto, bad(keyword), false);
        let call = |name: &str, arguments: &str| {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
        };
        assert!(feed(&request, &call("get_weather", "{\"unit\": 1}")).is_err());
        assert!(may_end(&mut feed(&request, &call("get_weather", "{\"city\": \"Rome\"}")).unwrap()));
        let arguments = if keyword == "uniqueItems" { "{\"a\": [1, 1]}" } else { "{\"a\": \"b\"}" };
        assert!(may_end(&mut feed(&request, &call("odd", arguments)).unwrap()));
        assert!(feed(&request, &call("odd", "[]")).is_err());
    }
}

#[test]
fn as_many_tools_as_a_request_may_have_make_a_grammar() {
    let mut request = calling(CallSyntax::Hermes, ToolChoice::Required);
    request.tools = (0..128)
        .map(|tool| {
            let properties: serde_json::Map<String, Value> = (0..20)
                .map(|index| (format!("property_{tool}_{index}"), json!({"type": ["string", "null"], "maxLength": 99})))
                .collect();
            let parameters = json!({"type": "object", "properties": properties});
            json!({"type": "function", "function": {"name": format!("tool_{tool}"), "parameters": parameters}})
        })
        .collect();
    let grammar = COMPILER.compile(&request).unwrap().unwrap();
    draw(&grammar, &mut Dice(1)).unwrap();
}

#[test]
fn an_answer_taken_up_again_is_where_it_was() {
    let request = GrammarRequest { format: OutputFormat::JsonObject, ..GrammarRequest::default() };
    let grammar = COMPILER.compile(&request).unwrap().unwrap();
    let tokens = draw(&grammar, &mut Dice(5)).unwrap();
    let mask = |constraint: &mut Constraint| {
        let mut logits = vec![0.0f32; TOKENIZER.vocab_size()];
        constraint.mask(&mut logits).unwrap();
        logits
    };
    let mut whole = grammar.begin();
    for at in 0..tokens.len() {
        let mut again = grammar.begin();
        tokens[..at].iter().for_each(|token| again.advance(*token).unwrap());
        assert!(mask(&mut again) == mask(&mut whole), "after {at} tokens");
        whole.advance(tokens[at]).unwrap();
    }
}

#[test]
fn looking_ahead_changes_no_mask() {
    let person = json!({"type": "object", "properties": {
        "first_name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"},
        "kind": {"enum": ["carpenter", "car", "cart"]}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["first_name", "age", "kind", "tags"]});
    let schema = OutputFormat::JsonSchema { name: "person".into(), schema: person, strict: true };
    let requests = [
        GrammarRequest { format: schema, ..GrammarRequest::default() },
        calling(CallSyntax::Hermes, ToolChoice::Required),
        calling(CallSyntax::Gemma, ToolChoice::Auto),
    ];
    for request in requests {
        let grammar = COMPILER.compile(&request).unwrap().unwrap();
        let mut forced = 0;
        for seed in 0..6 {
            let tokens = draw(&grammar, &mut Dice(seed)).unwrap();
            let (mut plain, mut looking) = (grammar.begin(), grammar.begin());
            for (at, token) in tokens.iter().enumerate() {
                let ahead = looking.forced();
                forced += ahead.len();
                let bytes = |tokens: &[u32]| -> Vec<u8> {
                    tokens.iter().flat_map(|token| TOKENIZER.token_bytes(*token).unwrap().to_vec()).collect()
                };
                assert!(bytes(&tokens[at..]).starts_with(&ahead));
                // One by one, without the mask of all.
                let some: Vec<u32> = (0..40).map(|step| step * 1201 + at as u32).chain([*token]).collect();
                let single: Vec<bool> = some.iter().map(|token| looking.allows(*token).unwrap()).collect();
                assert_eq!(looking.allowed(&tokens[at..tokens.len() - 1]).unwrap(), tokens.len() - 1 - at);
                let (mut ours, mut theirs) = (vec![0.0f32; 50_000], vec![0.0f32; 50_000]);
                plain.mask(&mut ours).unwrap();
                looking.mask(&mut theirs).unwrap();
                assert!(ours == theirs, "after {:?}", text(&tokens[..at]));
                assert_eq!(
                    single,
                    some.iter().map(|token| ours[*token as usize] == 0.0).collect::<Vec<bool>>()
                );
                plain.advance(*token).unwrap();
                looking.advance(*token).unwrap();
            }
        }
        assert!(forced > 0 || request.choice == ToolChoice::Auto);
    }
}
