//! Schemas that are made to be expensive: each is refused or compiled, and answers at every token.

#![allow(clippy::unwrap_used)]

mod common;

use common::{COMPILER, Dice, TOKENIZER};
use dormouse_answer::OutputFormat;
use dormouse_grammar::GrammarRequest;
use serde_json::{Map, Value, json};

fn nested(levels: usize, leaf: Value, wrap: impl Fn(Value) -> Value) -> Value {
    (0..levels).fold(leaf, |inner, _| wrap(inner))
}

fn schemas() -> Vec<(&'static str, Value)> {
    let many: Map<String, Value> = (0..4000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    let values: Vec<String> = (0..4900).map(|i| format!("value number {i} of many")).collect();
    let doubling: Map<String, Value> = (0..30)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (
                format!("d{i}"),
                json!({"type": "object", "properties": {"a": next, "b": next}, "required": ["a", "b"]}),
            )
        })
        .chain([("d30".to_owned(), json!({"type": "null"}))])
        .collect();
    let combined: Vec<Value> = (0..12)
        .map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "string"}}}, {"properties": {format!("b{i}"): {"type": "integer"}}}]}))
        .collect();
    let counted = |pattern: &str| json!({"type": "string", "pattern": pattern});
    vec![
        ("many properties", json!({"type": "object", "properties": many})),
        ("many values", json!({"enum": values})),
        (
            "500 properties",
            json!({"type": "object", "properties": (0..500).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect::<Map<String, Value>>()}),
        ),
        (
            "1900 required properties",
            json!({"type": "object", "properties": (0..1900).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect::<Map<String, Value>>(), "required": (0..1900).map(|i| format!("p{i}")).collect::<Vec<_>>()}),
        ),
        ("nested repetitions", counted("^((a{1,30}){1,30}){1,30}$")),
        ("long repetition", counted("^(ab|cd|ef){1,1000}$")),
        ("alternatives", counted("^(a?){500}a{500}$")),
        ("backtracking", counted("(a+)+b(.*c){9}")),
        ("overlap", counted(".*a.{300}$")),
        (
            "overlap and length",
            json!({"type": "string", "pattern": ".*a.{30}$", "minLength": 2000, "maxLength": 30000}),
        ),
        ("long text", json!({"type": "string", "minLength": 2048})),
        (
            "long arrays",
            nested(
                6,
                json!({"type": "null"}),
                |items| json!({"type": "array", "items": items, "minItems": 2000, "maxItems": 30000}),
            ),
        ),
        (
            "nested arrays",
            nested(
                31,
                json!({"type": "integer"}),
                |items| json!({"type": "array", "items": items, "maxItems": 9}),
            ),
        ),
        (
            "nested choices",
            nested(
                14,
                json!({"type": "string"}),
                |it| json!({"anyOf": [it, {"type": "array", "items": it}]}),
            ),
        ),
        ("doubling references", json!({"$ref": "#/$defs/d0", "$defs": doubling})),
        ("combinations", json!({"type": "object", "allOf": combined})),
        (
            "optional properties",
            json!({"type": "object", "properties": (0..60).map(|i| (format!("p{i}"), json!({"$ref": "#"}))).collect::<Map<String, Value>>()}),
        ),
        (
            "circle",
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        ),
        (
            "circle with a sibling",
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "allOf": [{"$ref": "#/$defs/a"}]}}}),
        ),
        ("steps", json!({"type": "integer", "multipleOf": 99_999_989, "minimum": 3})),
        (
            "patterns of names",
            json!({"type": "object", "patternProperties": {"^a.*b$": {}, "^a.*c$": {"type": "null"}, "(x|y){1,200}z": {}}}),
        ),
        ("deep text", counted(&"(".repeat(1000))),
        ("brackets", counted(&format!("{}a{}", "(".repeat(900), ")".repeat(900)))),
    ]
}

#[test]
fn expensive_schemas_are_refused_or_compiled() {
    for (name, schema) in schemas() {
        let began = std::time::Instant::now();
        let format = OutputFormat::JsonSchema { name: "answer".into(), schema, strict: true };
        let compiled = COMPILER.compile(&GrammarRequest { format, ..GrammarRequest::default() });
        let took = began.elapsed();
        let grammar = match compiled {
            Ok(grammar) => grammar.unwrap(),
            Err(error) => {
                assert!(error.message.len() < 600, "{name}: {error}");
                println!("{name}: refused after {took:?}: {error}");
                continue;
            }
        };
        let mut constraint = grammar.begin();
        let mut dice = Dice(3);
        let (mut tokens, mut slowest) = (0, std::time::Duration::ZERO);
        let mut logits = vec![0.0f32; TOKENIZER.vocab_size()];
        let ended = loop {
            logits.fill(0.0);
            let began = std::time::Instant::now();
            if let Err(error) = constraint.mask(&mut logits) {
                break error.to_string();
            }
            slowest = slowest.max(began.elapsed());
            let allowed: Vec<u32> =
                (0..logits.len() as u32).filter(|token| logits[*token as usize] == 0.0).collect();
            let token = allowed[dice.below(allowed.len())];
            if let Err(error) = constraint.advance(token) {
                break error.to_string();
            }
            tokens += 1;
            if TOKENIZER.eog_tokens().contains(&token) || tokens == 400 {
                break String::new();
            }
        };
        println!("{name}: {took:?}, {tokens} tokens, slowest {slowest:?} {ended}");
    }
}
