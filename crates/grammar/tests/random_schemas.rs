//! Every answer that a grammar allows satisfies the schema, in the eyes of a full validator: random schemas of all keywords,
//! random answers. `DORMOUSE_TEST_SCHEMAS` is how many schemas have to pass the rule; `DORMOUSE_TEST_SEED` plays a run again.

#![allow(clippy::unwrap_used)]

mod common;

use common::{COMPILER, Dice, draw, text};
use dormouse_answer::OutputFormat;
use dormouse_grammar::GrammarRequest;
use serde_json::{Map, Value, json};

const WORDS: [&str; 8] = ["name", "age", "a b", "city", "é", "tags", "x", "kind"];

/// A schema at random. Few of them make sense; the rule says which.
fn schema(dice: &mut Dice, depth: usize) -> Value {
    let leaf = depth >= 3;
    match dice.below(if leaf { 8 } else { 15 }) {
        0 => json!({ "type": "boolean" }),
        1 => string(dice),
        2 => number(dice, "integer"),
        3 => number(dice, "number"),
        4 => json!({ "enum": [word(dice), dice.below(9), null, 0.5, -3, ["x", {"y": word(dice)}]] }),
        5 => {
            let values = [json!(word(dice)), json!(12.25), json!(-7), json!({ "k": [1, "z"] })];
            json!({ "const": values[dice.below(4)] })
        }
        6 => {
            let name = ["string", "integer", "number"][dice.below(3)];
            json!({ "type": ["null", name] })
        }
        7 => match dice.below(8) {
            0 => json!(true),
            1 => json!({ "not": {} }),
            2 => json!({ "$ref": "#" }),
            3 => json!({ "type": "string", "format": "unheard-of" }),
            _ => json!({ "$ref": format!("#/$defs/d{}", dice.below(3)) }),
        },
        8 | 9 => array(dice, depth),
        10 => {
            let options: Vec<Value> = (0..1 + dice.below(3)).map(|_| schema(dice, depth + 1)).collect();
            json!({ ["anyOf", "oneOf", "allOf"][dice.below(3)]: options })
        }
        11 => {
            let tagged = |dice: &mut Dice, tag: &str| {
                let mut object = object(dice, depth + 1);
                object["properties"]["kind"] = json!({ "const": tag });
                object["required"] = json!(["kind"]);
                object
            };
            let options = json!([tagged(dice, "a"), tagged(dice, "b")]);
            json!({ ["anyOf", "oneOf"][dice.below(2)]: options })
        }
        _ => object(dice, depth),
    }
}

fn word(dice: &mut Dice) -> &'static str {
    WORDS[dice.below(WORDS.len())]
}

fn string(dice: &mut Dice) -> Value {
    const PATTERNS: [&str; 12] = [
        "^[a-z]{2,5}$",
        "^\\d{3}-\\d{4}$",
        "[abc]z?$",
        "^a|b$",
        "[^\\w]",
        "^(foo|ba[rz])+$",
        "\\s",
        "^.{1,4}$",
        "^\\S+$",
        "^[\\w.%+-]+@[\\w.-]+\\.[A-Za-z]{2,}$",
        "^(?:[A-Z][a-z]*\\s?){1,3}$",
        "[a-cé-ü]",
    ];
    const FORMATS: [&str; 19] = [
        "date",
        "time",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
        "uri-reference",
        "json-pointer",
        "relative-json-pointer",
        "regex",
        "iri",
        "idn-email",
        "idn-hostname",
        "uri-template",
        "iri-reference",
    ];
    let mut map = Map::from_iter([("type".to_owned(), json!("string"))]);
    if dice.chance(30) {
        map.insert("minLength".into(), dice.below(6).into());
    }
    if dice.chance(30) {
        map.insert("maxLength".into(), (3 + dice.below(12)).into());
    }
    if dice.chance(30) {
        map.insert("pattern".into(), PATTERNS[dice.below(PATTERNS.len())].into());
    }
    if dice.chance(30) {
        map.insert("format".into(), FORMATS[dice.below(FORMATS.len())].into());
    }
    Value::Object(map)
}

fn number(dice: &mut Dice, kind: &str) -> Value {
    const SMALL: [f64; 8] = [0.0, 0.1, 0.3, -0.7, 1.0, 1e-9, -2.5e-8, 0.000_000_07];
    let mut map = Map::from_iter([("type".to_owned(), json!(kind))]);
    let bound = |dice: &mut Dice| match dice.below(5) {
        4 => json!(SMALL[dice.below(SMALL.len())]),
        0 => json!(dice.below(50) as i64 - 25),
        1 => json!((dice.below(4000) as f64 - 2000.0) / 16.0),
        2 => json!((dice.below(2_000_000) as f64 - 1e6) / 1000.0),
        _ => json!(dice.below(1 << 40)),
    };
    for keyword in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
        if dice.chance(25) {
            map.insert(keyword.into(), bound(dice));
        }
    }
    if dice.chance(20) {
        map.insert(
            "multipleOf".into(),
            [json!(1), json!(3), json!(7), json!(10), json!(0.5)][dice.below(5)].clone(),
        );
    }
    Value::Object(map)
}

fn array(dice: &mut Dice, depth: usize) -> Value {
    let mut map = Map::from_iter([("type".to_owned(), json!("array"))]);
    if dice.chance(80) {
        map.insert("items".into(), schema(dice, depth + 1));
    }
    if dice.chance(25) {
        let first: Vec<Value> = (0..1 + dice.below(3)).map(|_| schema(dice, depth + 1)).collect();
        map.insert("prefixItems".into(), Value::Array(first));
    }
    if dice.chance(40) {
        map.insert("minItems".into(), dice.below(3).into());
    }
    if dice.chance(40) {
        map.insert("maxItems".into(), (1 + dice.below(4)).into());
    }
    if dice.chance(5) {
        map.insert("uniqueItems".into(), dice.chance(50).into());
    }
    Value::Object(map)
}

fn object(dice: &mut Dice, depth: usize) -> Value {
    let mut map = Map::new();
    if dice.chance(90) {
        map.insert("type".into(), json!("object"));
    }
    let mut properties = Map::new();
    for _ in 0..dice.below(5) {
        properties.insert(word(dice).to_owned(), schema(dice, depth + 1));
    }
    let mut required: Vec<String> = properties.keys().filter(|_| dice.chance(60)).cloned().collect();
    let other = word(dice).to_owned();
    if dice.chance(8) && !required.contains(&other) {
        required.push(other);
    }
    map.insert("properties".into(), Value::Object(properties));
    if dice.chance(80) {
        map.insert("required".into(), json!(required));
    }
    match dice.below(5) {
        0 | 1 => drop(map.insert("additionalProperties".into(), json!(false))),
        2 => drop(map.insert("additionalProperties".into(), schema(dice, depth + 1))),
        _ => {}
    }
    if dice.chance(8) {
        let pattern = ["^x-", "[0-9]$", "^name", "[aé]"][dice.below(4)];
        map.insert("patternProperties".into(), json!({ pattern: schema(dice, depth + 1) }));
    }
    if dice.chance(8) {
        map.insert("minProperties".into(), dice.below(3).into());
    }
    if dice.chance(8) {
        map.insert("maxProperties".into(), (1 + dice.below(4)).into());
    }
    if dice.chance(8) {
        let names = [
            json!({ "enum": ["name", "x", "other"] }),
            json!({ "pattern": "^[a-z]{1,4}$" }),
            json!({ "const": "x" }),
            json!({ "type": "string" }),
        ];
        map.insert("propertyNames".into(), names[dice.below(4)].clone());
    }
    if dice.chance(5) {
        map.insert("anyOf".into(), json!([schema(dice, depth + 1), object(dice, depth + 1)]));
    }
    Value::Object(map)
}

#[test]
fn random_answers_satisfy_every_schema_that_is_not_refused() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let wanted = number("DORMOUSE_TEST_SCHEMAS").unwrap_or(200);
    let seed = number("DORMOUSE_TEST_SEED").unwrap_or(1);
    let (mut passed, mut refused, mut seen) = (0, std::collections::BTreeMap::new(), 0u64);
    while passed < wanted {
        seen += 1;
        let mut dice = Dice((seed << 32) + seen);
        let mut schema = match dice.chance(70) {
            true => object(&mut dice, 0),
            false => schema(&mut dice, 0),
        };
        if let Value::Object(map) = &mut schema {
            let definitions: Map<String, Value> =
                (0..3).map(|number| (format!("d{number}"), self::schema(&mut dice, 2))).collect();
            map.insert("$defs".into(), Value::Object(definitions));
        }
        let validator = jsonschema::options().should_validate_formats(true).build(&schema);
        let format = OutputFormat::JsonSchema { name: "answer".into(), schema: schema.clone(), strict: true };
        let grammar = match COMPILER.compile(&GrammarRequest { format, ..GrammarRequest::default() }) {
            Ok(grammar) => grammar.unwrap(),
            Err(error) => {
                assert!(error.message.starts_with(&error.param), "{error}");
                let why = error.keyword.unwrap_or_else(|| error.message.clone());
                *refused.entry(why).or_insert(0) += 1;
                continue;
            }
        };
        let validator = validator.unwrap_or_else(|error| panic!("seed {seed}, {seen}: {schema}: {error}"));
        for _ in 0..2 {
            let answer = draw(&grammar, &mut dice);
            let answer = text(&answer.unwrap_or_else(|| panic!("seed {seed}, {seen}: no end of {schema}")));
            let value: Value = match serde_json::from_str(&answer) {
                Ok(value) => value,
                // Where schemas are combined, what none of them describes may be any JSON: 1e999 is, but this reader has no number
                // for it.
                Err(error)
                    if error.to_string().contains("out of range") && schema.to_string().contains("Of\"") =>
                {
                    continue;
                }
                Err(error) => panic!("seed {seed}, {seen}: {error}: {answer}\n{schema}"),
            };
            let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
            assert!(errors.is_empty(), "seed {seed}, {seen}: {errors:?}\n{answer}\n{schema}");
        }
        passed += 1;
    }
    println!("{passed} schemas passed the rule, of {seen}; refused for {refused:#?}");
    assert!(passed * 4 > seen, "the rule refuses too much: {refused:#?}");
}
