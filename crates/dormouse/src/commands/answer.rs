//! Streaming a turn's answer to the terminal, and the receipt under it.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use crate::cli::Answering;
use crate::client::{Client, Events, is_not_found};
use crate::config::Config;

/// The request fields that the flags ask for.
pub fn fields(answering: &Answering) -> Map<String, Value> {
    let mut fields = Map::new();
    let flags = [
        ("temperature", answering.temperature.map(Value::from)),
        ("seed", answering.seed.map(Value::from)),
        ("max_tokens", answering.max_tokens.map(Value::from)),
        ("ignore_eos", answering.ignore_eos.then_some(Value::from(true))),
    ];
    fields.extend(flags.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))));
    fields
}

/// A session found by name or id, or made under a new name.
pub struct Opened {
    pub session: Value,
    pub is_new: bool,
}

/// Finds the session, or makes one: nameless when `name` is None.
pub async fn open_session(client: &Client, config: &Config, name: Option<&str>) -> Result<Opened> {
    if let Some(name) = name {
        match client.get(&["v1", "sessions", name], &[]).await {
            Ok(session) => return Ok(Opened { session, is_new: false }),
            Err(error) if is_not_found(&error) && !name.starts_with("sess_") => {}
            Err(error) => return Err(error),
        }
    }
    let mut body = json!({ "name": name });
    if let [model, ..] = config.models.as_slice() {
        body["model"] = model_id(client, model).await?.into();
    }
    let session = client.post(&["v1", "sessions"], &[], &body).await?;
    Ok(Opened { session, is_new: true })
}

/// The server's name for a model that was given as a name or a path.
pub async fn model_id(client: &Client, model: &str) -> Result<String> {
    let list = client.get(&["v1", "models"], &[]).await?;
    let ids: Vec<&str> = list["data"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|card| card["dormouse"]["loaded"] != false)
        .filter_map(|card| card["id"].as_str())
        .collect();
    let name = crate::weights::name_of(model);
    match ids.iter().find(|id| **id == model || **id == name) {
        Some(id) => Ok(id.to_string()),
        None => bail!("the server does not serve '{model}'; it serves: {}", ids.join(", ")),
    }
}

/// What was told of a turn before its server went away.
pub const CUT_OFF: &str =
    "the server stopped in the middle of the answer; it goes on after the server's next start";

/// Prints the text of a turn's events as they come; answers the turn at its end, None when the server went away before.
/// `last_seen` is the number of the last event that was printed.
pub async fn print_events(events: &mut Events, last_seen: &mut Option<u64>) -> Result<Option<Value>> {
    let mut out = std::io::stdout();
    loop {
        let event = match events.next().await {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(None),
            Err(broken) => {
                tracing::debug!("the stream of an answer broke off: {broken:#}");
                return Ok(None);
            }
        };
        *last_seen = event["sequence_number"].as_u64().or(*last_seen);
        match event["type"].as_str() {
            Some("session.turn.output_text.delta") => {
                out.write_all(event["delta"].as_str().unwrap_or_default().as_bytes())?;
                out.flush()?;
            }
            Some("session.turn.completed" | "session.turn.cancelled") => {
                return Ok(Some(event["turn"].clone()));
            }
            Some("session.turn.failed") => {
                bail!(
                    "{}",
                    event["turn"]["error"].as_str().unwrap_or("the answer failed, and no reason is known")
                )
            }
            _ => {}
        }
    }
}

/// What the turn cost, in one line.
pub fn receipt_line(turn: &Value) -> String {
    let (usage, receipt) = (&turn["usage"], &turn["dormouse"]);
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let mut line = format!(
        "{} tokens restored from {} · {} recomputed · first token {:.0} ms · {} in, {} out",
        number(&receipt["restored_tokens"]),
        receipt["tier"].as_str().unwrap_or("none"),
        number(&receipt["recomputed_tokens"]),
        receipt["ttft_ms"].as_f64().unwrap_or(0.0),
        number(&usage["prompt_tokens"]),
        number(&usage["completion_tokens"]),
    );
    if let Some(reason) = receipt["miss"]["reason"].as_str() {
        line += &format!(" · miss: {reason} at token {}", number(&receipt["miss"]["at_token"]));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_that_were_given_reach_the_server() {
        let answering =
            Answering { temperature: Some(0.0), seed: None, max_tokens: Some(5), ignore_eos: false };
        assert_eq!(Value::Object(fields(&answering)), json!({"temperature": 0.0, "max_tokens": 5}));
    }

    #[test]
    fn the_receipt_fits_one_line_and_names_a_miss() {
        let turn = json!({
            "usage": {"prompt_tokens": 40, "completion_tokens": 7},
            "dormouse": {"restored_tokens": 32, "recomputed_tokens": 0, "tier": "disk", "ttft_ms": 12.4,
                "miss": {"reason": "page_damaged", "at_token": 32}},
        });
        let line = receipt_line(&turn);
        assert_eq!(
            line,
            "32 tokens restored from disk · 0 recomputed · first token 12 ms · 40 in, 7 out · miss: page_damaged at token 32"
        );
    }
}
