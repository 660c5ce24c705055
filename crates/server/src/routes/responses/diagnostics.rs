//! `prompt_cache_diagnostics`: whether what was known of a prompt was found, and why not. OpenAI estimates this; here it
//! is what the receipt says, in OpenAI's words and, under `dormouse`, in ours.

use dormouse_engine::{Miss, Receipt};
use dormouse_session::{Response, Turn};
use serde_json::{Map, Value, json};

/// Prompts that are not of one chain share whole pages: up to a page of what two prompts have in common is computed again.
const PAGE_TOKENS: u64 = 64;

/// What `prompt_cache_options.comparison_response_id` names, kept with the response that asks for the comparison:
/// null where there is no such response.
pub fn comparison(
    model: Option<&str>,
    object: &Map<String, Value>,
    other: Option<(&Response, &Turn)>,
) -> Value {
    let Some((other, turn)) = other else { return Value::Null };
    let differs =
        |name: &str| object.get(name) != other.record.get("object").and_then(|object| object.get(name));
    let inside = |name: &str, field: &str| {
        let of =
            |object: Option<&Value>| object.and_then(|it| it.get(name)).and_then(|it| it.get(field)).cloned();
        let mine = object.get(name).and_then(|it| it.get(field)).cloned();
        mine != of(other.record.get("object"))
    };
    let reason = if model.is_some_and(|model| model != other.model) {
        "model_changed"
    } else if differs("tools") {
        "tools_changed"
    } else if inside("text", "format") {
        "text_format_changed"
    } else if inside("reasoning", "effort") {
        "reasoning_effort_changed"
    } else {
        "input_changed"
    };
    json!({ "tokens": turn.usage.prompt_tokens, "reason": reason })
}

/// `comparison` is what [`comparison`] said, where it was asked for; `has_past`: the prompt goes on from something that
/// was computed before.
pub fn diagnostics(receipt: &Receipt, turn: &Turn, comparison: Option<&Value>, has_past: bool) -> Value {
    let cached = turn.usage.cached_tokens as u64;
    match comparison {
        Some(Value::Null) => return json!({ "type": "comparison_response_not_found" }),
        Some(other) => {
            let tokens = other["tokens"].as_u64().unwrap_or(0);
            return match cached + PAGE_TOKENS > tokens {
                true => json!({ "type": "cache_hit" }),
                false => miss(other["reason"].as_str().unwrap_or("input_changed"), receipt, turn),
            };
        }
        None if !has_past => return Value::Null,
        None => {}
    }
    match &receipt.miss {
        // Of a conversation's first response there is nothing to tell.
        None if cached == 0 => Value::Null,
        None => json!({ "type": "cache_hit" }),
        Some(known) => match openai_reason(known) {
            Some(reason) => miss(reason, receipt, turn),
            // OpenAI has no word for pages that were evicted or damaged.
            None => json!({ "type": "unavailable", "dormouse": known }),
        },
    }
}

fn miss(reason: &str, receipt: &Receipt, turn: &Turn) -> Value {
    json!({
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": turn.usage.prompt_tokens.saturating_sub(turn.usage.cached_tokens),
        "comparison_reusable_tokens": turn.usage.cached_tokens,
        "dormouse": receipt.miss,
    })
}

fn openai_reason(miss: &Miss) -> Option<&'static str> {
    match miss.reason.as_str() {
        "model_changed" | "tokenizer_changed" => Some("model_changed"),
        "tools_changed" => Some("tools_changed"),
        "truncated" => Some("context_compacted"),
        "instructions_changed" | "template_changed" | "prefix_differs" => Some("input_changed"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{response, turn};
    use super::*;
    use dormouse_answer::AnswerFormat;
    use dormouse_session::TurnStatus;

    fn told(reason: Option<&str>, cached: usize, comparison: Option<&Value>, has_past: bool) -> Value {
        let mut turn = turn("x", &AnswerFormat::default(), TurnStatus::Completed);
        (turn.usage.prompt_tokens, turn.usage.cached_tokens) = (100, cached);
        let miss = reason.map(|reason| Miss { reason: reason.into(), at_token: cached, at_message: Some(1) });
        let receipt = Receipt { restored_tokens: cached, miss, ..Receipt::default() };
        diagnostics(&receipt, &turn, comparison, has_past)
    }

    #[test]
    fn a_chain_says_whether_its_past_was_found_and_where_it_was_lost() {
        assert_eq!(told(None, 90, None, true)["type"], "cache_hit");
        assert_eq!(told(None, 0, None, true), Value::Null);
        assert_eq!(told(Some("new_session"), 0, None, false), Value::Null);
        let miss = told(Some("tools_changed"), 20, None, true);
        assert_eq!((&miss["type"], &miss["reason"]), (&json!("cache_miss"), &json!("tools_changed")));
        assert_eq!((&miss["cache_missed_tokens"], &miss["dormouse"]["at_token"]), (&json!(80), &json!(20)));
        assert_eq!(told(Some("page_evicted"), 20, None, true)["type"], "unavailable");
    }

    #[test]
    fn a_comparison_names_what_differs_first() {
        let (other, turn) = (response(false), turn("x", &AnswerFormat::default(), TurnStatus::Completed));
        let same = other.record["object"].as_object().unwrap().clone();
        let reason = |model: &str, object: &Map<String, Value>| {
            comparison(Some(model), object, Some((&other, &turn)))["reason"].clone()
        };
        assert_eq!(reason("m", &same), "input_changed");
        assert_eq!(reason("other", &same), "model_changed");
        let mut changed = same.clone();
        changed.insert("text".into(), json!({"format": {"type": "json_object"}}));
        assert_eq!(reason("m", &changed), "text_format_changed");
        changed.insert("tools".into(), json!([1]));
        assert_eq!(reason("m", &changed), "tools_changed");
        assert_eq!(comparison(None, &same, None), Value::Null);
    }

    #[test]
    fn a_comparison_is_a_hit_where_the_other_prompt_was_found_again() {
        let other = json!({"tokens": 80, "reason": "input_changed"});
        assert_eq!(told(None, 64, Some(&other), false)["type"], "cache_hit");
        assert_eq!(told(None, 10, Some(&other), false)["reason"], "input_changed");
        assert_eq!(told(None, 10, Some(&Value::Null), false)["type"], "comparison_response_not_found");
    }
}
