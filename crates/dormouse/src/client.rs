//! The HTTP client of the commands that talk to a server, and the server that they start where none runs.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use dormouse_store::lock;
use futures::StreamExt;
use reqwest::{Method, Response, StatusCode, Url};
use serde_json::Value;

use crate::config::Config;
use crate::server::Server;
use crate::weights;

/// Longest line of an event stream that is read: a whole answer fits many times.
const EVENT_LIMIT_BYTES: usize = 64 << 20;

/// A server's answer that is not a success.
#[derive(Debug)]
pub struct ServerError {
    pub status: StatusCode,
    pub message: String,
}

impl fmt::Display for ServerError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} (HTTP {})", self.message, self.status.as_u16())
    }
}

impl std::error::Error for ServerError {}

/// Whether an error is the server's "there is no such thing".
pub fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ServerError>().is_some_and(|error| error.status == StatusCode::NOT_FOUND)
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    api_key: Option<String>,
}

impl Client {
    pub fn new(base: &str, api_key: Option<String>) -> Result<Client> {
        let base: Url = base.parse().with_context(|| format!("'{base}' is no address of a server"))?;
        if base.cannot_be_a_base() {
            bail!("'{base}' is no address of a server; it should look like http://127.0.0.1:8642");
        }
        let mut builder = reqwest::Client::builder();
        if base.host_str().is_some_and(|host| matches!(host, "localhost" | "127.0.0.1" | "[::1]")) {
            // A proxy of the environment is not meant for this computer.
            builder = builder.no_proxy();
        }
        Ok(Client { http: builder.build().context("cannot set up the HTTP client")?, base, api_key })
    }

    /// Of the server at `url`, else of the one that owns the data directory, if one runs.
    pub fn find(config: &Config, url: Option<&str>) -> Result<Option<Client>> {
        let running = match url {
            Some(url) => Some(url.to_string()),
            None => running_server(&config.data_dir)?,
        };
        running.map(|address| Client::new(&address, config.api_key.clone())).transpose()
    }

    /// The address of a resource; segments may hold anything, they are escaped.
    fn url(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Url> {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .map_err(|()| anyhow!("'{}' is no address of a server", self.base))?
            .extend(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        Ok(url)
    }

    async fn ask(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Response> {
        let mut request = self.http.request(method, self.url(path, query)?);
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response =
            request.send().await.with_context(|| format!("the server at {} does not answer", self.base))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.context("the server's error could not be read")?;
        let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut message = parsed["error"]["message"].as_str().unwrap_or(&text).to_string();
        if status == StatusCode::UNAUTHORIZED {
            message += "; give a key with --api-key, or set DORMOUSE_API_KEY";
        }
        Err(ServerError { status, message }.into())
    }

    pub async fn get(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value> {
        json(self.ask(Method::GET, path, query, None).await?).await
    }

    pub async fn post(&self, path: &[&str], query: &[(&str, &str)], body: &Value) -> Result<Value> {
        json(self.ask(Method::POST, path, query, Some(body)).await?).await
    }

    /// Every entry of a list that comes in pages.
    pub async fn get_all(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Vec<Value>> {
        let mut found: Vec<Value> = Vec::new();
        loop {
            let after = found.last().and_then(|last| last["id"].as_str()).map(String::from);
            let mut query = query.to_vec();
            query.push(("limit", "100"));
            query.extend(after.as_deref().map(|after| ("after", after)));
            let mut page = self.get(path, &query).await?;
            let data = page["data"].as_array_mut().map(std::mem::take).unwrap_or_default();
            let is_last = data.is_empty() || page["has_more"] != true;
            found.extend(data);
            if is_last {
                return Ok(found);
            }
        }
    }

    pub async fn delete(&self, path: &[&str]) -> Result<Value> {
        json(self.ask(Method::DELETE, path, &[], None).await?).await
    }

    pub async fn get_events(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Events> {
        Ok(Events::new(self.ask(Method::GET, path, query, None).await?))
    }

    pub async fn post_events(&self, path: &[&str], body: &Value) -> Result<Events> {
        Ok(Events::new(self.ask(Method::POST, path, &[], Some(body)).await?))
    }
}

async fn json(response: Response) -> Result<Value> {
    response.json().await.context("the server's answer is not JSON")
}

/// The data of server-sent events, one JSON value each.
pub struct Events {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    lines: Lines,
}

impl Events {
    fn new(response: Response) -> Events {
        let bytes = response.bytes_stream().map(|chunk| chunk.map(|chunk| chunk.to_vec()));
        Events { bytes: bytes.boxed(), lines: Lines::default() }
    }

    /// The next event; None when the stream is over. An event with `error` is an error.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            while let Some(line) = self.lines.next() {
                let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    return Ok(None);
                }
                let value: Value =
                    serde_json::from_str(data).context("the server sent an event that is not JSON")?;
                if let Some(message) = value["error"]["message"].as_str() {
                    bail!("{message}");
                }
                return Ok(Some(value));
            }
            match self.bytes.next().await {
                None => return Ok(None),
                Some(chunk) => self.lines.push(&chunk.context("the connection to the server broke off")?)?,
            }
        }
    }
}

/// Cuts bytes into lines as they come; a line may come in pieces, and so may a character.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Bytes of the buffer that were handed out.
    taken: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        if self.buffer.len() + bytes.len() > EVENT_LIMIT_BYTES {
            bail!("the server sent an event of more than {EVENT_LIMIT_BYTES} bytes");
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn next(&mut self) -> Option<String> {
        let rest = &self.buffer[self.taken..];
        let length = rest.iter().position(|byte| *byte == b'\n')?;
        let line = String::from_utf8_lossy(&rest[..length]).trim_end_matches('\r').to_string();
        self.taken += length + 1;
        Some(line)
    }
}

/// A server to talk to: one that runs already, or one in this process.
pub struct Connection {
    pub client: Client,
    local: Option<Server>,
}

impl Connection {
    /// Finds the server at `url`, or the one that owns the data directory, or starts one in this process.
    pub async fn open(config: &Config, url: Option<&str>) -> Result<Connection> {
        if let Some(client) = Client::find(config, url)? {
            return Ok(Connection { client, local: None });
        }
        let models = weights::choose(config, false).await?;
        let config =
            Config { host: "127.0.0.1".into(), port: 0, api_key: None, require_key: false, ..config.clone() };
        let server = Server::start(&config, models, None).await?;
        Ok(Connection { client: Client::new(&server.url, None)?, local: Some(server) })
    }

    /// Stops the server if it is this process's own.
    pub async fn close(self) -> Result<()> {
        match self.local {
            Some(server) => server.stop().await,
            None => Ok(()),
        }
    }
}

/// Address of the server that owns the data directory, if one runs.
pub fn running_server(data_dir: &Path) -> Result<Option<String>> {
    match lock::holder(data_dir)? {
        None => Ok(None),
        Some(lock::Holder { address: Some(address), .. }) => Ok(Some(address)),
        Some(lock::Holder { pid, address: None }) => bail!(
            "process {pid} owns the data directory {} and does not answer yet; try again in a moment",
            data_dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_characters_may_come_in_pieces() {
        let mut lines = Lines::default();
        let text = "data: {\"delta\":\"ü\"}\r\n\ndata: 2\n".as_bytes();
        let mut found = Vec::new();
        for byte in text {
            lines.push(&[*byte]).unwrap();
            while let Some(line) = lines.next() {
                found.push(line);
            }
        }
        assert_eq!(found, ["data: {\"delta\":\"ü\"}", "", "data: 2"]);
    }

    #[test]
    fn names_are_escaped_in_addresses() {
        let client = Client::new("http://127.0.0.1:1", None).unwrap();
        let url = client.url(&["v1", "sessions", "a b/ü"], &[("after", "x&y")]).unwrap();
        assert_eq!(url.as_str(), "http://127.0.0.1:1/v1/sessions/a%20b%2F%C3%BC?after=x%26y");
    }

    #[test]
    fn a_wrong_address_is_an_error() {
        assert!(Client::new("nonsense", None).is_err());
        assert!(Client::new("mailto:me", None).is_err());
    }
}
