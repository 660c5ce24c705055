//! `dormouse sessions`: what the server's session endpoints do, from the command line.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::cli::{SessionsArguments, SessionsCommand};
use crate::client::{Client, Connection};
use crate::config::Config;
use crate::output::{ago, outln, print_json, print_table};
use crate::sizes::Bytes;

pub async fn sessions(config: &Config, arguments: SessionsArguments, as_json: bool) -> Result<()> {
    let connection = Connection::open(config, arguments.server.url.as_deref()).await?;
    let outcome = act(&connection.client, arguments.command, as_json).await;
    connection.close().await?;
    outcome
}

async fn act(client: &Client, command: SessionsCommand, as_json: bool) -> Result<()> {
    match command {
        SessionsCommand::Ls { all } => list(client, all, as_json).await,
        SessionsCommand::Show { session } => show(client, &session, as_json).await,
        SessionsCommand::Fork { session, at, name } => {
            let body = json!({ "at": at.as_deref().map(place).transpose()?, "name": name });
            let fork = client.post(&["v1", "sessions", &session, "fork"], &[], &body).await?;
            report(as_json, &fork, || {
                let (id, tokens) = (text(&fork["id"]), number(&fork["tokens"]));
                let recomputed = number(&fork["dormouse"]["recomputed_tokens"]);
                format!("{id}: {tokens} tokens shared, {recomputed} recomputed")
            })
        }
        SessionsCommand::Rewind { session, to } => {
            let body = json!({ "to": place(&to)? });
            let session = client.post(&["v1", "sessions", &session, "rewind"], &[], &body).await?;
            report(as_json, &session, || {
                format!("{}: {} tokens are left", text(&session["id"]), number(&session["tokens"]))
            })
        }
        SessionsCommand::Park { session } => {
            let receipt = client.post(&["v1", "sessions", &session, "park"], &[], &json!({})).await?;
            report(as_json, &receipt, || {
                let released = Bytes(number(&receipt["ram_bytes_released"]));
                format!("{released} of RAM given back; {} tokens stay on disk", number(&receipt["tokens"]))
            })
        }
        SessionsCommand::Resume { session, dry_run } => {
            let query: &[(&str, &str)] = if dry_run { &[("dry_run", "true")] } else { &[] };
            let receipt = client.post(&["v1", "sessions", &session, "resume"], query, &json!({})).await?;
            report(as_json, &receipt, || {
                let what = if dry_run { "would be restored" } else { "restored" };
                format!(
                    "{} tokens {what} from {}, {} read, {} to compute again, {:.1} ms",
                    number(&receipt["restored_tokens"]),
                    text(&receipt["tier"]),
                    Bytes(number(&receipt["bytes_read"])),
                    number(&receipt["recomputed_tokens"]),
                    receipt["restore_ms"].as_f64().unwrap_or(0.0),
                )
            })
        }
        SessionsCommand::Rm { sessions } => remove(client, &sessions, as_json).await,
        SessionsCommand::Events { session, starting_after, follow } => {
            events(client, &session, starting_after, follow, as_json).await
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// The answer itself with `--json`, else a sentence about it.
fn report(as_json: bool, answer: &Value, sentence: impl FnOnce() -> String) -> Result<()> {
    if as_json {
        return print_json(answer);
    }
    outln!("{}", sentence());
    Ok(())
}

/// A turn's id, or a token position.
fn place(text: &str) -> Result<Value> {
    match text.parse::<u64>() {
        Ok(position) => Ok(position.into()),
        Err(_) if text.starts_with("turn_") => Ok(text.into()),
        Err(_) => bail!("'{text}' is no place: give the id of a turn (turn_…) or a token position"),
    }
}

async fn list(client: &Client, implicit: bool, as_json: bool) -> Result<()> {
    let query: &[(&str, &str)] = if implicit { &[("implicit", "true")] } else { &[] };
    let sessions = client.get_all(&["v1", "sessions"], query).await?;
    if as_json {
        return print_json(&sessions);
    }
    let rows: Vec<[String; 8]> = sessions
        .iter()
        .map(|session| {
            [
                text(&session["name"]).into(),
                text(&session["id"]).into(),
                text(&session["status"]).into(),
                number(&session["turns"]).to_string(),
                number(&session["tokens"]).to_string(),
                Bytes(number(&session["kv_bytes"])).to_string(),
                Bytes(number(&session["bytes_written"])).to_string(),
                ago(number(&session["last_active_at"])),
            ]
        })
        .collect();
    print_table(["NAME", "ID", "STATUS", "TURNS", "TOKENS", "KV", "WRITTEN", "LAST USED"], &rows)
}

async fn show(client: &Client, session: &str, as_json: bool) -> Result<()> {
    let found = client.get(&["v1", "sessions", session], &[]).await?;
    let items = client.get_all(&["v1", "sessions", session, "items"], &[]).await?;
    if as_json {
        return print_json(&json!({ "session": found, "items": items }));
    }
    for (name, value) in found.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        outln!("{name:<16}{}", value.as_str().map_or_else(|| value.to_string(), String::from));
    }
    for item in &items {
        outln!("\n[{}] {}", text(&item["message"]["role"]), text(&item["turn"]));
        outln!("{}", text(&item["message"]["content"]));
    }
    Ok(())
}

/// Deletes one after the other; those that cannot be deleted do not keep the others.
async fn remove(client: &Client, sessions: &[String], as_json: bool) -> Result<()> {
    let mut answers = Vec::new();
    let mut failed = 0;
    for session in sessions {
        match client.delete(&["v1", "sessions", session]).await {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                failed += 1;
                eprintln!("dormouse: {session}: {error:#}");
            }
        }
    }
    if as_json {
        print_json(&answers)?;
    } else {
        for answer in &answers {
            outln!("{} deleted", text(&answer["id"]));
        }
    }
    if failed > 0 {
        bail!("{failed} of {} sessions could not be deleted", sessions.len());
    }
    Ok(())
}

async fn events(
    client: &Client,
    session: &str,
    mut starting_after: Option<u64>,
    follow: bool,
    as_json: bool,
) -> Result<()> {
    let path = ["v1", "sessions", session, "events"];
    let print = |event: &Value| -> Result<()> {
        let (sequence_number, kind) = (number(&event["sequence_number"]), text(&event["type"]));
        if as_json {
            outln!("{event}");
        } else {
            outln!("{sequence_number:>6}  {kind:<28} {}", event["data"]);
        }
        Ok(())
    };
    loop {
        let start = starting_after.map(|number| number.to_string());
        let mut query = vec![];
        query.extend(start.as_deref().map(|start| ("starting_after", start)));
        if follow {
            query.push(("stream", "true"));
            let mut events = client.get_events(&path, &query).await?;
            while let Some(event) = events.next().await? {
                print(&event)?;
            }
            return Ok(());
        }
        query.push(("limit", "1000"));
        let page = client.get(&path, &query).await?;
        let data = page["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        data.iter().try_for_each(print)?;
        if data.is_empty() || page["has_more"] != true {
            return Ok(());
        }
        starting_after = data.last().map(|event| number(&event["sequence_number"]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_turn_or_a_position() {
        assert_eq!(place("64").unwrap(), json!(64));
        assert_eq!(place("turn_1").unwrap(), json!("turn_1"));
        assert!(place("message 3").is_err());
    }
}
