//! `dormouse chat`: a conversation that can be left and gone on with.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::answer::{self, Opened};
use crate::cli::{Answering, ChatArguments};
use crate::client::{Client, Connection};
use crate::config::Config;
use crate::output::{dim, outln};

/// Time between two looks for a server that has gone away.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

const HELP: &str = "\
/fork NAME   go on in a copy of this session; the original stays as it is
/rewind      take the last question and its answer back
/events      the session's log
/help        this list
/exit        leave (also Ctrl-D); Ctrl-C stops an answer";

pub async fn chat(config: &Config, arguments: ChatArguments) -> Result<()> {
    let connection = Connection::open(config, arguments.server.url.as_deref()).await?;
    let outcome = talk(&connection, config, &arguments).await;
    connection.close().await?;
    outcome
}

async fn talk(connection: &Connection, config: &Config, arguments: &ChatArguments) -> Result<()> {
    let client = connection.client.clone();
    let opened = answer::open_session(&client, config, arguments.session.as_deref()).await?;
    let mut chat = Chat {
        client,
        config: config.clone(),
        url: arguments.server.url.clone(),
        answering: arguments.answering.clone(),
        id: String::new(),
        name: None,
    };
    chat.enter(&opened.session)?;
    chat.greet(&opened);
    if !opened.is_new {
        chat.restore(&opened.session).await?;
    }
    let mut lines = LineEditor::open(config.data_dir.join("chat_history.txt"))?;
    loop {
        let (line, editor) = lines.read().await?;
        lines = editor;
        let line = match line {
            Line::Text(text) => text,
            Line::Interrupted => {
                eprintln!("{}", dim("Ctrl-D or /exit leaves"));
                continue;
            }
            Line::End => break,
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            command if command.starts_with('/') => {
                // A command that fails is no reason to leave.
                if let Err(error) = chat.command(command).await {
                    eprintln!("{error:#}");
                }
            }
            _ => {
                if let Err(error) = chat.say(&line).await {
                    eprintln!("\n{error:#}");
                }
            }
        }
    }
    eprintln!("{}", dim(&format!("go on with: dormouse chat --session {}", chat.name())));
    Ok(())
}

struct Chat {
    client: Client,
    /// Where to look for the server when it has gone away.
    config: Config,
    url: Option<String>,
    answering: Answering,
    /// The session's id, and the name that people know it by.
    id: String,
    name: Option<String>,
}

impl Chat {
    /// The session that is talked in from now on.
    fn enter(&mut self, session: &Value) -> Result<()> {
        self.id = session["id"].as_str().context("the server's session has no id")?.to_string();
        self.name = session["name"].as_str().map(String::from);
        Ok(())
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }

    fn greet(&self, opened: &Opened) {
        if opened.is_new {
            let model = opened.session["model"].as_str().unwrap_or("the model");
            eprintln!("{}", dim(&format!("new session {} with {model}; /help lists commands", self.id)));
        }
    }

    /// Makes a session that was there before ready, and shows the rest of an answer that was left unfinished.
    async fn restore(&mut self, session: &Value) -> Result<()> {
        if let Some(turn) = session["active_turn"].as_str() {
            eprintln!("{}", dim("an answer is on its way:"));
            return self.show(turn).await;
        }
        let receipt = self.client.post(&["v1", "sessions", &self.id, "resume"], &[], &json!({})).await?;
        eprintln!(
            "{}",
            dim(&format!(
                "resumed {}: {} of {} tokens restored in {:.0} ms",
                self.name(),
                receipt["restored_tokens"],
                session["tokens"],
                receipt["restore_ms"].as_f64().unwrap_or(0.0),
            ))
        );
        Ok(())
    }

    async fn say(&mut self, text: &str) -> Result<()> {
        let mut body = answer::fields(&self.answering);
        body.insert("input".into(), text.into());
        // In the background: the answer goes on when this program is closed, and is there at the next start.
        body.insert("background".into(), true.into());
        let path = ["v1", "sessions", &self.id, "turns"];
        let begun = self.client.post(&path, &[], &Value::Object(body)).await?;
        let turn = begun["id"].as_str().context("the server's turn has no id")?;
        self.show(turn).await
    }

    /// Prints the answer as it comes. Ctrl-C cancels it; what was said until then stays. When the server goes away, the
    /// answer goes on where it was as soon as the server is back.
    async fn show(&mut self, turn: &str) -> Result<()> {
        let mut last_seen = None;
        let turn = loop {
            match self.listen(turn, &mut last_seen).await? {
                Some(turn) => break turn,
                None => eprintln!("\n{}", dim("the server is gone; waiting for it (Ctrl-C stops waiting)")),
            }
            tokio::select! {
                back = self.server_is_back() => back?,
                pressed = tokio::signal::ctrl_c() => {
                    pressed.context("cannot listen for Ctrl-C")?;
                    eprintln!("{}", dim(answer::CUT_OFF));
                    return Ok(());
                }
            }
        };
        outln!("");
        let stopped = if turn["status"] == "cancelled" { "stopped · " } else { "" };
        eprintln!("{}", dim(&format!("{stopped}{}", answer::receipt_line(&turn))));
        Ok(())
    }

    /// Prints what follows the last event seen; None when the server goes away before the turn's end.
    async fn listen(&self, turn: &str, last_seen: &mut Option<u64>) -> Result<Option<Value>> {
        let path = ["v1", "sessions", &self.id, "turns", turn];
        let seen = last_seen.map(|number| number.to_string());
        let mut query = vec![("stream", "true")];
        query.extend(seen.as_deref().map(|seen| ("starting_after", seen)));
        let mut events = self.client.get_events(&path, &query).await?;
        let mut answer = std::pin::pin!(answer::print_events(&mut events, last_seen));
        tokio::select! {
            turn = &mut answer => turn,
            pressed = tokio::signal::ctrl_c() => {
                pressed.context("cannot listen for Ctrl-C")?;
                self.client.post(&["v1", "sessions", &self.id, "turns", turn, "cancel"], &[], &json!({})).await?;
                answer.await
            }
        }
    }

    /// Returns when the server answers again, be it at another address.
    async fn server_is_back(&mut self) -> Result<()> {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            // A server that is only starting counts as gone, too.
            let Ok(Some(client)) = Client::find(&self.config, self.url.as_deref()) else { continue };
            if client.get(&["health"], &[]).await.is_ok() {
                self.client = client;
                return Ok(());
            }
        }
    }

    async fn command(&mut self, line: &str) -> Result<()> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (command, rest.trim()) {
            ("/help", _) => eprintln!("{HELP}"),
            ("/fork", name) => {
                let name = (!name.is_empty()).then_some(name);
                let path = ["v1", "sessions", &self.id, "fork"];
                let fork = self.client.post(&path, &[], &json!({ "name": name })).await?;
                self.enter(&fork)?;
                eprintln!(
                    "{}",
                    dim(&format!("now in {}, which shares {} tokens", self.name(), fork["tokens"]))
                );
            }
            ("/rewind", _) => self.rewind().await?,
            ("/events", _) => {
                let page =
                    self.client.get(&["v1", "sessions", &self.id, "events"], &[("limit", "1000")]).await?;
                for event in page["data"].as_array().into_iter().flatten() {
                    eprintln!(
                        "{:>5}  {} {}",
                        event["sequence_number"],
                        event["type"].as_str().unwrap_or("-"),
                        event["data"]
                    );
                }
            }
            _ => eprintln!("there is no command {command}; /help lists them"),
        }
        Ok(())
    }

    /// Goes back to where the last turn's input begins.
    async fn rewind(&self) -> Result<()> {
        let items = self.client.get_all(&["v1", "sessions", &self.id, "items"], &[]).await?;
        let Some(last) = items.iter().rev().find_map(|item| item["turn"].as_str()) else {
            eprintln!("there is nothing to take back");
            return Ok(());
        };
        let start = items.iter().find(|item| item["turn"] == last).map(|item| item["token_start"].clone());
        let path = ["v1", "sessions", &self.id, "rewind"];
        let session = self.client.post(&path, &[], &json!({ "to": start })).await?;
        eprintln!("{}", dim(&format!("took the last turn back; {} tokens are left", session["tokens"])));
        Ok(())
    }
}

enum Line {
    Text(String),
    Interrupted,
    End,
}

/// Line editing with a history that outlives the program. Reading blocks, so it happens on a thread of its own.
struct LineEditor {
    editor: DefaultEditor,
    history: PathBuf,
}

impl LineEditor {
    fn open(history: PathBuf) -> Result<LineEditor> {
        let mut editor = DefaultEditor::new().context("cannot read lines from this terminal")?;
        if history.exists()
            && let Err(error) = editor.load_history(&history)
        {
            tracing::warn!(%error, path = %history.display(), "the chat history cannot be read");
        }
        Ok(LineEditor { editor, history })
    }

    async fn read(mut self) -> Result<(Line, LineEditor)> {
        let reading = tokio::task::spawn_blocking(move || {
            let line = match self.editor.readline("> ") {
                Ok(line) => {
                    self.remember(&line);
                    Line::Text(line)
                }
                Err(ReadlineError::Interrupted) => Line::Interrupted,
                Err(ReadlineError::Eof) => Line::End,
                Err(error) => return Err(error),
            };
            Ok((line, self))
        });
        reading.await.context("the line editor failed")?.context("cannot read a line")
    }

    fn remember(&mut self, line: &str) {
        let added = self.editor.add_history_entry(line);
        if let Err(error) = added.and_then(|_| self.editor.append_history(&self.history)) {
            tracing::warn!(%error, path = %self.history.display(), "the chat history cannot be written");
        }
    }
}
