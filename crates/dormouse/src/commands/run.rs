//! `dormouse run`: one prompt, one answer.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::answer;
use crate::cli::RunArguments;
use crate::client::{Client, Connection};
use crate::config::Config;
use crate::output::{dim, outln, print_json};

pub async fn run(config: &Config, arguments: RunArguments, as_json: bool) -> Result<()> {
    let prompt = prompt(arguments.prompt.as_deref())?;
    let connection = Connection::open(config, arguments.server.url.as_deref()).await?;
    let client = &connection.client;
    let outcome = match &arguments.session {
        Some(session) => in_session(client, config, &arguments, session, &prompt, as_json).await,
        None => once(client, config, &arguments, &prompt, as_json).await,
    };
    connection.close().await?;
    outcome
}

/// The flag's text, and after it what comes on standard input if that is no terminal.
fn prompt(flag: Option<&str>) -> Result<String> {
    let mut prompt = flag.unwrap_or_default().to_string();
    let input = std::io::stdin();
    if !input.is_terminal() {
        let mut text = String::new();
        input.lock().read_to_string(&mut text).context("standard input is not text")?;
        if !prompt.is_empty() && !text.is_empty() {
            prompt.push('\n');
        }
        prompt += &text;
    }
    if prompt.trim().is_empty() {
        bail!("there is no prompt: give one with -p, or on standard input");
    }
    Ok(prompt)
}

async fn in_session(
    client: &Client,
    config: &Config,
    arguments: &RunArguments,
    session: &str,
    prompt: &str,
    as_json: bool,
) -> Result<()> {
    let opened = answer::open_session(client, config, Some(session)).await?;
    let id = opened.session["id"].as_str().context("the server's session has no id")?;
    let mut body = answer::fields(&arguments.answering);
    body.insert("input".into(), prompt.into());
    let path = ["v1", "sessions", id, "turns"];
    if as_json {
        return print_json(&client.post(&path, &[], &Value::Object(body)).await?);
    }
    body.insert("stream".into(), true.into());
    let mut events = client.post_events(&path, &Value::Object(body)).await?;
    let turn = answer::print_events(&mut events, &mut None).await?.context(answer::CUT_OFF)?;
    outln!("");
    eprintln!("{}", dim(&answer::receipt_line(&turn)));
    Ok(())
}

async fn once(
    client: &Client,
    config: &Config,
    arguments: &RunArguments,
    prompt: &str,
    as_json: bool,
) -> Result<()> {
    let mut body = answer::fields(&arguments.answering);
    if let [model, ..] = config.models.as_slice() {
        body.insert("model".into(), answer::model_id(client, model).await?.into());
    }
    body.insert("messages".into(), json!([{ "role": "user", "content": prompt }]));
    let path = ["v1", "chat", "completions"];
    if as_json {
        return print_json(&client.post(&path, &[], &Value::Object(body)).await?);
    }
    body.insert("stream".into(), true.into());
    let mut events = client.post_events(&path, &Value::Object(body)).await?;
    let mut out = std::io::stdout();
    while let Some(chunk) = events.next().await? {
        let text = chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    outln!("");
    Ok(())
}
