//! One file over HTTP into a `.part` file, going on where an earlier attempt ended.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};

use super::{Progress, Reason, sha256_of};

/// Connections that break are taken up again this many times without a new byte in between.
const FRUITLESS_ATTEMPTS: usize = 3;

/// A client that gives up on silence, not on size.
pub fn client() -> Result<reqwest::Client, Reason> {
    reqwest::Client::builder()
        .user_agent(concat!("dormouse/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .read_timeout(Duration::from_secs(60))
        .build()
        .map_err(|error| format!("no HTTP client: {}", words(error)))
}

/// An error with its causes, and without the address, which may hold a password.
pub fn words(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        words = format!("{words}: {inner}");
        cause = inner.source();
    }
    words
}

pub struct Download<'a> {
    pub client: &'a reqwest::Client,
    pub progress: &'a dyn Progress,
}

impl Download<'_> {
    /// Fetches `url` into `part` and checks its sum. A part from an earlier attempt that proves wrong is thrown away
    /// and fetched once more from the beginning.
    pub async fn checked(
        &self,
        url: &str,
        token: Option<&str>,
        part: &Path,
        sha256: &str,
    ) -> Result<(), Reason> {
        for _ in 0..2 {
            let resumed = part.metadata().is_ok_and(|metadata| metadata.len() > 0);
            self.fetch(url, token, part).await?;
            let found = sha256_of(part.to_owned()).await?;
            if found == sha256 {
                return Ok(());
            }
            std::fs::remove_file(part)
                .map_err(|error| format!("cannot remove {}: {error}", part.display()))?;
            if !resumed {
                return Err(format!("the fetched file has the sha256 {found} instead of {sha256}"));
            }
            self.progress.stage("the part fetched earlier was damaged: fetching it again");
        }
        Err("the fetched file was wrong twice".to_owned())
    }

    async fn fetch(&self, url: &str, token: Option<&str>, part: &Path) -> Result<(), Reason> {
        let mut fruitless = 0;
        loop {
            let before = part.metadata().map_or(0, |metadata| metadata.len());
            match self.attempt(url, token, part, before).await {
                Ok(()) => return Ok(()),
                Err(Failure::Final(reason)) => return Err(reason),
                Err(Failure::Passing(reason)) => {
                    let grew = part.metadata().is_ok_and(|metadata| metadata.len() > before);
                    fruitless = if grew { 0 } else { fruitless + 1 };
                    if fruitless == FRUITLESS_ATTEMPTS {
                        return Err(reason);
                    }
                    self.progress.stage(&format!("{reason}; going on from there"));
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
    }

    /// One request, for the bytes from `have` on.
    async fn attempt(&self, url: &str, token: Option<&str>, part: &Path, have: u64) -> Result<(), Failure> {
        let mut request = self.client.get(url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let mut response = request.send().await.map_err(|error| {
            // A server that was never reached is not worth waiting for: there may be another source.
            if error.is_connect() && have == 0 {
                Failure::Final(words(error))
            } else {
                Failure::Passing(words(error))
            }
        })?;
        let local =
            |error: std::io::Error| Failure::Final(format!("cannot write {}: {error}", part.display()));
        let (mut file, start) = match response.status() {
            StatusCode::OK => (File::create(part).map_err(local)?, 0),
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
                if !range.is_some_and(|range| range.starts_with(&format!("bytes {have}-"))) {
                    return Err(Failure::Final(
                        "the server sent another range than it was asked for".to_owned(),
                    ));
                }
                (OpenOptions::new().append(true).open(part).map_err(local)?, have)
            }
            // Nothing lies beyond what is there: it is whole, or wrong, which its sum will tell.
            StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => return Ok(()),
            status if status.is_server_error() => {
                return Err(Failure::Passing(format!("the server answers {status}")));
            }
            status => return Err(Failure::Final(format!("the server answers {status}"))),
        };
        let length = response.content_length();
        if let Some(length) = length {
            self.progress.total(start + length);
        }
        self.progress.advance(start);
        let mut received = 0;
        while let Some(chunk) = response.chunk().await.map_err(|error| Failure::Passing(words(error)))? {
            file.write_all(&chunk).map_err(local)?;
            received += chunk.len() as u64;
            self.progress.advance(chunk.len() as u64);
        }
        match length {
            Some(length) if received < length => {
                Err(Failure::Passing(format!("the connection ended after {received} of {length} bytes")))
            }
            _ => Ok(()),
        }
    }
}

enum Failure {
    /// Trying again may help.
    Passing(Reason),
    Final(Reason),
}
