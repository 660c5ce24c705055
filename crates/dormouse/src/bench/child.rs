//! A server in a process of its own, to be killed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::client::Client;
use crate::config::Config;

/// A running child server. Dropping it kills it.
pub struct ChildServer {
    process: Child,
    pub client: Client,
    /// From exec to the `ready` line.
    pub ready_ms: f64,
}

/// What all children of one benchmark have in common.
pub struct Setup {
    pub data_dir: PathBuf,
    pub model: PathBuf,
    pub config: Config,
}

impl Setup {
    /// Starts this program's own `serve` and waits until it answers.
    pub fn start(&self) -> Result<ChildServer> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let config = &self.config;
        let mut command = Command::new(program);
        command.arg("serve").args(["--host", "127.0.0.1", "--port", "0"]);
        command.arg("--data-dir").arg(&self.data_dir).arg("--model").arg(&self.model);
        command.args(["--threads", &config.threads.to_string(), "--kv-dtype", config.kv_dtype.name()]);
        command.args(["--activations", config.activations.name()]);
        command.args(["--durability", config.durability.name()]);
        if let Some(context) = config.context {
            command.args(["--ctx", &context.to_string()]);
        }
        command
            .env_remove("DORMOUSE_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let begun = Instant::now();
        let mut process = command.spawn().context("cannot start a server to measure")?;
        let output = process.stdout.take().context("the server has no standard output")?;
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        let ready_ms = begun.elapsed().as_secs_f64() * 1e3;
        match read.map(|_| line.trim().strip_prefix("ready ")) {
            Ok(Some(url)) => Ok(ChildServer { client: Client::new(url, None)?, process, ready_ms }),
            _ => {
                let status = process.wait()?;
                bail!(
                    "the server did not start ({status}); `dormouse serve` with the same settings says why"
                );
            }
        }
    }
}

impl ChildServer {
    /// kill -9.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill().context("cannot kill the server")?;
        self.process.wait().context("the killed server does not end")?;
        Ok(())
    }

    /// Bytes of RAM that the process holds, mapped files included.
    pub fn resident_bytes(&self) -> Result<u64> {
        let id = self.process.id().to_string();
        // What `ps` says in every Unix, /proc says in Linux without a package for it.
        let text = match fs::read_to_string(format!("/proc/{id}/status")) {
            Ok(text) => text
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"))
                .map(str::to_owned),
            Err(_) => {
                let ps =
                    Command::new("ps").args(["-o", "rss=", "-p", &id]).output().context("cannot run ps")?;
                Some(String::from_utf8_lossy(&ps.stdout).into_owned())
            }
        };
        let kilobytes = text.and_then(|kilobytes| kilobytes.trim().parse::<u64>().ok());
        Ok(kilobytes.context("the system does not say what memory the server holds")? * 1024)
    }
}

impl Drop for ChildServer {
    fn drop(&mut self) {
        // A child that has ended already cannot be killed, and need not be.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Bytes that a folder takes on disk.
pub fn disk_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        total += if metadata.is_dir() { disk_bytes(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(total)
}

/// The page files of a data directory.
pub fn page_files(pages_dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(pages_dir).with_context(|| format!("cannot read {}", pages_dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|kind| kind == "pages"));
    Ok(paths)
}
