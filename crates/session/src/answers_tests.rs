use std::path::Path;

use dormouse_answer::ToolChoice;
use dormouse_models::gguf::GgufFile;
use serde_json::json;

use super::*;

fn tokenizer() -> Arc<Tokenizer> {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"),
        Into::into,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    Arc::new(Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap())
}

/// Marks that are control tokens of the test model's vocabulary, as those of reasoning are of others'.
fn thinking() -> AnswerFormat {
    let (open, close) = ("<|im_start|>".to_owned(), "<|endoftext|>".to_owned());
    AnswerFormat { calls: None, reasoning: Some(Reasoning { open, close, starts_open: true }) }
}

#[test]
fn marks_that_are_control_tokens_are_shown_to_the_reader() {
    let tokenizer = tokenizer();
    let format = thinking();
    let tokens = tokenizer.encode("Hm, so.<|endoftext|>\nHello<|im_end|>", Specials::Parse, false).unwrap();
    let text = |shown: &[TokenId]| {
        let mut output = OutputText::new(&tokenizer, &[], shown);
        let text: String = tokens.iter().map(|token| output.push(*token).0).collect();
        text + &output.finish()
    };
    assert_eq!(text(&shown(&tokenizer, &AnswerFormat::default())), "Hm, so.\nHello");
    let whole = text(&shown(&tokenizer, &format));
    assert_eq!(whole, "Hm, so.<|endoftext|>\nHello");
    let message = answer_message("turn_1", &format, &whole);
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm, so."), &json!("Hello")));
    // The line break and the word after the mark, and the end.
    assert_eq!(reasoning_tokens(&tokens, &tokenizer, &[], &format), tokens.len() - 3);
    assert_eq!(reasoning_tokens(&tokens, &tokenizer, &[], &AnswerFormat::default()), 0);
}

#[test]
fn the_template_tells_whether_the_answer_begins_inside_the_reasoning() {
    let template = ChatTemplate::new("{{ messages[0].content }}<think>\n", "", "").unwrap();
    let plain = ChatTemplate::chatml("", "").unwrap();
    let tokenizer = tokenizer();
    let tools = [json!({"type": "function", "function": {"name": "f"}})];
    let read = |template: &ChatTemplate, end: &str, tools: &[Value], choice: ToolChoice| {
        let generation = Generation { tool_choice: choice, ..Generation::default() };
        format(template, &tokenizer, end, tools, &generation).unwrap()
    };
    let open = |end: &str| read(&template, end, &[], ToolChoice::Auto).reasoning.map(|it| it.starts_open);
    assert_eq!(open("assistant\n<think>\n"), Some(true));
    assert_eq!(open("assistant\n<think>\n\n</think>\n\n"), Some(false));
    assert!(read(&plain, "assistant\n", &[], ToolChoice::Auto).is_plain());
    assert_eq!(read(&plain, "", &tools, ToolChoice::Auto).calls, Some(CallSyntax::Generic));
    assert_eq!(read(&plain, "", &tools, ToolChoice::None).calls, None);
}

#[test]
fn a_choice_must_be_among_the_tools() {
    let tools = [json!({"type": "function", "function": {"name": "f"}})];
    let allowed = |name: &str| ToolChoice::Allowed { names: vec![name.into()], required: false };
    for good in [ToolChoice::Auto, ToolChoice::Required, ToolChoice::Function("f".into()), allowed("f")] {
        assert!(check_choice(&good, &tools).is_ok(), "{good:?}");
    }
    for bad in [ToolChoice::Function("g".into()), allowed("g")] {
        assert!(check_choice(&bad, &tools).is_err(), "{bad:?}");
    }
    assert!(check_choice(&ToolChoice::Required, &[]).is_err());
    assert!(check_choice(&ToolChoice::None, &[]).is_ok());
}
