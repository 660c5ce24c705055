//! Which files the models are: found by name or path, offered for download where they are missing.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use dormouse_models::catalog::{self, DEFAULT_MODEL, Entry, Kind, Resolved};
use dormouse_models::pull::{self, Endpoints, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::Config;

/// A model to serve: what clients call it, and where it is.
#[derive(Clone, Debug)]
pub struct ModelFile {
    pub name: String,
    pub path: PathBuf,
}

/// The files of the configured models, or of the default one. Missing weights are offered for download.
pub async fn choose(config: &Config, assume_yes: bool) -> Result<Vec<ModelFile>> {
    let names: Vec<&str> = match config.models.as_slice() {
        [] => vec![DEFAULT_MODEL],
        models => models.iter().map(String::as_str).collect(),
    };
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        files.push(find(name, Kind::Chat, config, assume_yes).await?);
    }
    Ok(files)
}

/// The files of the configured embedding model, if there is one.
pub async fn choose_embedding(config: &Config, assume_yes: bool) -> Result<Option<ModelFile>> {
    match &config.embedding_model {
        Some(name) => find(name, Kind::Embedding, config, assume_yes).await.map(Some),
        None => Ok(None),
    }
}

async fn find(name: &str, kind: Kind, config: &Config, assume_yes: bool) -> Result<ModelFile> {
    let path = match catalog::resolve(name, &config.weights_dir())? {
        Resolved::Catalog { entry, .. } if entry.kind != kind => {
            bail!("'{name}' is no {} model: serve it with {} {name}", kind.name(), flag(entry.kind))
        }
        Resolved::File(path) | Resolved::Catalog { path: Some(path), .. } => path,
        Resolved::Catalog { entry, path: None } => offer(entry, config, assume_yes).await?,
    };
    Ok(ModelFile { name: name_of(name), path })
}

/// Whether the configured models, or the default one, can be served without a download.
pub fn are_here(config: &Config) -> Result<bool> {
    let is_here = |name: &str| {
        let resolved = catalog::resolve(name, &config.weights_dir())?;
        Ok(!matches!(resolved, Resolved::Catalog { path: None, .. }))
    };
    match config.models.as_slice() {
        [] => is_here(DEFAULT_MODEL),
        models => models.iter().try_fold(true, |all, name| Ok(all && is_here(name)?)),
    }
}

/// What clients call a model that was given as a name or a path.
pub fn name_of(name_or_path: &str) -> String {
    if let Ok(Some(entry)) = catalog::find(name_or_path) {
        return entry.name.clone();
    }
    let path = Path::new(name_or_path);
    let name = match path.extension() {
        Some(kind) if kind.eq_ignore_ascii_case("gguf") => path.file_stem(),
        _ => path.file_name(),
    };
    name.map_or_else(|| name_or_path.to_string(), |name| name.to_string_lossy().into_owned())
}

async fn offer(entry: &Entry, config: &Config, assume_yes: bool) -> Result<PathBuf> {
    let what = format!("{} ({:.0} MB, {})", entry.name, entry.size_bytes as f64 / 1e6, entry.licence);
    let from = source_names(entry);
    if !assume_yes {
        if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
            bail!(
                "the weights of {what} are not here; `dormouse models pull {}` downloads them from {from}, and so does \
                 `dormouse serve --yes`",
                entry.name
            );
        }
        if !ask(&format!("Download {what} from {from}?")).await? {
            bail!("without weights there is nothing to serve; name a file with {} PATH", flag(entry.kind));
        }
    }
    pull_with_bar(entry, config).await
}

fn flag(kind: Kind) -> &'static str {
    match kind {
        Kind::Chat => "--model",
        Kind::Embedding => "--embedding-model",
    }
}

/// Where an entry can come from, in the order it is tried.
pub fn source_names(entry: &Entry) -> String {
    use dormouse_models::catalog::Source;
    let name = |source: &Source| match source {
        Source::Hub { hub, .. } => format!("the hub ({hub})"),
        Source::Package(member) => format!("the Python package {}", member.pypi),
        Source::Parts { parts } => format!("{} Python packages", parts.len()),
    };
    entry.sources.iter().map(name).collect::<Vec<_>>().join(" or ")
}

/// Asks on the terminal; Enter is yes.
async fn ask(question: &str) -> Result<bool> {
    eprint!("{question} [Y/n] ");
    std::io::stderr().flush()?;
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    });
    let line = answer.await.context("reading the answer failed")?.context("cannot read the answer")?;
    Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "" | "y" | "yes"))
}

/// Downloads an entry's weights, with a bar on standard error.
pub async fn pull_with_bar(entry: &Entry, config: &Config) -> Result<PathBuf> {
    let bar = Bar::default();
    let path = pull::pull(entry, &config.weights_dir(), &Endpoints::from_environment(), &bar).await;
    bar.end();
    Ok(path?)
}

/// One bar after the other, one for each step.
#[derive(Default)]
struct Bar {
    current: Mutex<Option<ProgressBar>>,
}

impl Bar {
    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        // A bar that another thread broke is still only a bar.
        let mut current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        act(&mut current);
    }

    fn end(&self) {
        self.with(|current| {
            if let Some(bar) = current.take() {
                bar.finish();
            }
        });
    }
}

impl Progress for Bar {
    fn stage(&self, text: &str) {
        self.end();
        let style = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let bar = ProgressBar::new(0).with_message(text.to_string());
        // The template is a constant; were it ever wrong, the plain bar does as well.
        let bar = match ProgressStyle::with_template(style) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        self.with(|current| *current = Some(bar));
    }

    fn total(&self, bytes: u64) {
        self.with(|current| current.iter().for_each(|bar| bar.set_length(bytes)));
    }

    fn advance(&self, bytes: u64) {
        self.with(|current| current.iter().for_each(|bar| bar.inc(bytes)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_call_a_file_by_its_name_and_a_known_model_by_its_own() {
        assert_eq!(name_of("/weights/Tiny-1B.Q4_1.gguf"), "Tiny-1B.Q4_1");
        assert_eq!(name_of("./models/tiny-1b.v2"), "tiny-1b.v2");
        assert_eq!(name_of("smollm2-135m"), "smollm2");
    }
}
