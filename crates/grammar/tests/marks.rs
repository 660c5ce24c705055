//! Marks of calls and of reasoning that are tokens of their own, of the kind that gives no text.

#![allow(clippy::unwrap_used)]

use dormouse_answer::{AnswerFormat, CallSyntax, OutputFormat, Reasoning, ToolChoice};
use dormouse_grammar::{Compiler, Constraint, GrammarRequest};
use dormouse_models::tokenizer::Specials;
use dormouse_models::{TokenId, Tokenizer};
use serde_json::{Map, Value, json};

const MARKS: [&str; 7] =
    ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|python_tag|>", "<|other|>", "</s>"];

/// A token for each byte, and marks.
fn tokenizer() -> Tokenizer {
    let mut next = 0x100;
    let vocabulary: Map<String, Value> = (0..=255u8)
        .map(|byte| {
            let character = match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as char,
                _ => {
                    next += 1;
                    char::from_u32(next - 1).unwrap()
                }
            };
            (character.to_string(), json!(byte))
        })
        .collect();
    let added: Vec<Value> = MARKS
        .iter()
        .enumerate()
        .map(|(index, mark)| {
            json!({"id": 256 + index, "content": mark, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        })
        .collect();
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level, "model": {"type": "BPE", "dropout": null,
        "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
        "byte_fallback": false, "vocab": vocabulary, "merges": []}});
    let config = Map::from_iter([("eos_token".to_owned(), json!("</s>"))]);
    Tokenizer::from_json(file.to_string().as_bytes(), &config, &[]).unwrap()
}

fn request(calls: Option<CallSyntax>, choice: ToolChoice) -> GrammarRequest {
    let parameters = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    GrammarRequest {
        tools: vec![json!({"type": "function", "function": {"name": "count", "parameters": parameters}})],
        choice,
        parallel: true,
        answer_format: AnswerFormat { calls, reasoning: None },
        ..GrammarRequest::default()
    }
}

/// Whether the text, with its marks as tokens or spelled out, is a whole answer.
fn is_answer(request: &GrammarRequest, text: &str, marks: Specials) -> bool {
    let tokenizer = tokenizer();
    let grammar = Compiler::new(&tokenizer).unwrap().compile(request).unwrap().unwrap();
    let mut constraint: Constraint = grammar.begin();
    let mut tokens: Vec<TokenId> = tokenizer.encode(text, marks, false).unwrap();
    tokens.push(tokenizer.eog_tokens()[0]);
    tokens.into_iter().all(|token| {
        let mut logits = vec![0.0f32; tokenizer.vocab_size()];
        let alone = constraint.allows(token).unwrap();
        constraint.mask(&mut logits).unwrap();
        assert_eq!(alone, logits[token as usize] == 0.0, "{text}: {token}");
        alone && constraint.advance(token).is_ok()
    })
}

#[test]
fn calls_begin_with_the_mark_itself_and_not_with_its_spelling() {
    let answers = [
        (CallSyntax::Mistral, "[TOOL_CALLS][{\"name\": \"count\", \"arguments\": {\"n\": 3}}]"),
        (
            CallSyntax::Mistral,
            "[TOOL_CALLS][{\"name\": \"count\", \"arguments\": {\"n\": 3}}, {\"name\": \"count\", \"arguments\": {\"n\": 4}}]",
        ),
        (CallSyntax::MistralArgs, "[TOOL_CALLS]count[ARGS]{\"n\": 3}[TOOL_CALLS]count[ARGS]{\"n\": 4}"),
    ];
    for (calls, answer) in answers {
        for choice in [ToolChoice::Required, ToolChoice::Auto] {
            let request = request(Some(calls), choice);
            assert!(is_answer(&request, answer, Specials::Parse), "{answer}");
            assert!(!is_answer(&request, answer, Specials::Literal), "{answer}");
            assert!(!is_answer(&request, "[TOOL_CALLS]nothing", Specials::Parse));
            assert!(!is_answer(&request, "<|other|>", Specials::Parse));
        }
        let auto = request(Some(calls), ToolChoice::Auto);
        assert!(is_answer(&auto, &format!("I count. {answer}"), Specials::Parse));
        assert!(is_answer(&auto, "I do not count: [ARGS] is only text.", Specials::Literal));
        assert!(!is_answer(&auto, "Text that has a mark which gives none: <|other|>", Specials::Parse));
    }
}

#[test]
fn llamas_mark_and_its_bare_object_both_begin_a_call() {
    let auto = request(Some(CallSyntax::Llama3), ToolChoice::Auto);
    let call = "{\"name\": \"count\", \"parameters\": {\"n\": 3}}";
    assert!(is_answer(&auto, call, Specials::Parse));
    assert!(is_answer(&auto, &format!("<|python_tag|>{call}"), Specials::Parse));
    assert!(!is_answer(&auto, "<|python_tag|>print(3)", Specials::Parse));
    assert!(is_answer(&auto, "print(3)", Specials::Parse));
}

#[test]
fn reasoning_ends_with_its_mark() {
    for starts_open in [true, false] {
        let reasoning = Reasoning { open: "[THINK]".into(), close: "[/THINK]".into(), starts_open };
        let mut json = request(None, ToolChoice::None);
        json.format = OutputFormat::JsonObject;
        json.answer_format.reasoning = Some(reasoning.clone());
        let opened = if starts_open { "" } else { "[THINK]" };
        assert!(is_answer(&json, &format!("{opened}Well, {{[/THINK]\n{{}}"), Specials::Parse));
        assert!(is_answer(&json, &format!("{opened}[/THINK]{{}}"), Specials::Parse));
        assert!(!is_answer(&json, &format!("{opened}Well."), Specials::Parse));
        assert_eq!(is_answer(&json, "{}", Specials::Parse), !starts_open);
        let mut auto = request(Some(CallSyntax::MistralArgs), ToolChoice::Auto);
        auto.answer_format.reasoning = Some(reasoning);
        let call = "[TOOL_CALLS]count[ARGS]{\"n\": 3}";
        for answer in [call, "Three.", ""] {
            assert!(
                is_answer(&auto, &format!("{opened}Well.[/THINK]\n{answer}"), Specials::Parse),
                "{answer}"
            );
        }
        assert!(!is_answer(&auto, &format!("{opened}Well {call}"), Specials::Parse));
    }
}

#[test]
fn a_vocabulary_without_an_end_is_refused_with_words() {
    let tokenizer = tokenizer().limited_to(256).unwrap();
    let error = Compiler::new(&tokenizer).err().unwrap();
    assert!(error.message.contains("no token that ends an answer"), "{error}");
}
