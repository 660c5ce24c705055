//! Fetching a known model: each source in turn, resumable, checked, and moved into place only when it is right.
//!
//! Every name on disk comes from the catalog, none from the network. Unfinished downloads are `.part` files in the
//! weights folder; the next pull goes on where they end.

mod download;
mod package_index;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::catalog::{Companion, Entry, PackageMember, Source};
use crate::error::ModelError;
use download::{Download, client};

/// Hears how a pull goes.
pub trait Progress: Send + Sync {
    /// A new step, in words.
    fn stage(&self, text: &str);
    /// The step's bytes in all.
    fn total(&self, bytes: u64);
    /// So many more bytes are there, whether fetched now or before.
    fn advance(&self, bytes: u64);
}

/// Where hub and package index are.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// Address of the hub, without a slash at the end.
    pub hub: String,
    /// Sent to the hub as a bearer token.
    pub hub_token: Option<String>,
    /// Address of a Simple API (PEP 503, 691), without a slash at the end.
    pub package_index: String,
}

impl Endpoints {
    /// `HF_ENDPOINT`, `HF_TOKEN` and `PIP_INDEX_URL`, with the public services as defaults.
    pub fn from_environment() -> Endpoints {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let address = |name: &str, default: &str| {
            variable(name).unwrap_or_else(|| default.to_owned()).trim_end_matches('/').to_owned()
        };
        Endpoints {
            hub: address("HF_ENDPOINT", "https://huggingface.co"),
            hub_token: variable("HF_TOKEN"),
            package_index: address("PIP_INDEX_URL", "https://pypi.org/simple"),
        }
    }
}

/// Why one source failed, in words for the final error.
type Reason = String;

/// Fetches `entry` into `weights_dir` and returns what it is loaded from, a file or a folder; at once if everything is
/// there and right.
///
/// Safe to interrupt at any moment. When every source fails, the error lists what was tried and why it failed.
pub async fn pull(
    entry: &Entry,
    weights_dir: &Path,
    endpoints: &Endpoints,
    progress: &dyn Progress,
) -> Result<PathBuf, ModelError> {
    let home = entry.home(weights_dir);
    std::fs::create_dir_all(&home).map_err(|source| ModelError::io(&home, source))?;
    let _lock = lock(entry, weights_dir)?;
    let target = entry.path(weights_dir);
    if entry.weights_path(weights_dir).exists() {
        progress.stage(&format!("checking {}", entry.name));
        if is_right(entry, &home).await.map_err(ModelError::Catalog)? {
            return Ok(target);
        }
        progress.stage(&format!("{} is not what the catalog names: fetching it again", target.display()));
    }
    check_space(entry, weights_dir)?;

    let client = client().map_err(ModelError::Catalog)?;
    let mut attempts = Vec::new();
    for source in &entry.sources {
        let pull = Pull { entry, weights_dir, home: &home, endpoints, progress, client: &client };
        let (place, result) = match source {
            Source::Hub { hub, file } => {
                (format!("{}/{hub}", endpoints.hub), pull.fetch_from_hub(hub, file).await)
            }
            Source::Package(member) => (
                format!("the package {}", member.pypi),
                pull.fetch_from_packages(std::slice::from_ref(member)).await,
            ),
            Source::Parts { parts } => {
                let names: Vec<&str> = parts.iter().map(|part| part.pypi.as_str()).collect();
                (format!("the packages {}", names.join(", ")), pull.fetch_from_packages(parts).await)
            }
        };
        match result {
            Ok(()) => return Ok(target),
            Err(reason) => {
                progress.stage(&format!("{place}: {reason}"));
                attempts.push(format!("  {place}: {reason}"));
            }
        }
    }
    Err(ModelError::Catalog(format!(
        "'{}' could not be fetched from any of its sources:\n{}\nWhat was fetched is kept; the next pull goes on from \
         there. What was fetched by other means can be put at {}",
        entry.name,
        attempts.join("\n"),
        target.display()
    )))
}

/// Holds off a second pull of the same model; released when dropped.
fn lock(entry: &Entry, weights_dir: &Path) -> Result<File, ModelError> {
    let path = weights_dir.join(format!(".{}.lock", entry.folder.as_ref().unwrap_or(&entry.file)));
    let file = File::create(&path).map_err(|source| ModelError::io(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(ModelError::Catalog(format!("'{}' is being fetched by another process already", entry.name)))
        }
        Err(std::fs::TryLockError::Error(source)) => Err(ModelError::io(&path, source)),
    }
}

/// Room for the file and for the package that it comes in.
fn check_space(entry: &Entry, weights_dir: &Path) -> Result<(), ModelError> {
    let space =
        rustix::fs::statvfs(weights_dir).map_err(|error| ModelError::io(weights_dir, error.into()))?;
    let (free, needed) = (space.f_bavail * space.f_frsize, entry.size_bytes * 2);
    if free < needed {
        return Err(ModelError::Catalog(format!(
            "fetching '{}' needs {} MB in {}, which has {} MB free",
            entry.name,
            needed / 1_000_000,
            weights_dir.display(),
            free / 1_000_000
        )));
    }
    Ok(())
}

/// The model's files: companions first, so that its weights are never there without them.
fn files(entry: &Entry) -> impl Iterator<Item = Wanted<'_>> {
    let companions = entry.companions.iter();
    let companions = companions.map(|Companion { file, size_bytes, sha256 }| (file, *size_bytes, sha256));
    let files = companions.chain([(&entry.file, entry.size_bytes, &entry.sha256)]);
    files.map(|(file, size_bytes, sha256)| Wanted { file, size_bytes, sha256 })
}

/// A file of the catalog.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    /// From the model's folder on.
    file: &'a str,
    size_bytes: u64,
    sha256: &'a str,
}

impl Wanted<'_> {
    /// Where it lies at a source whose weights lie at `weights`.
    fn beside(&self, entry: &Entry, weights: &str) -> String {
        match weights.rsplit_once('/') {
            _ if self.file == entry.file => weights.to_owned(),
            Some((folder, _)) => format!("{folder}/{}", self.file),
            None => self.file.to_owned(),
        }
    }
}

/// All of the model's files are there and have their sums.
async fn is_right(entry: &Entry, home: &Path) -> Result<bool, Reason> {
    for wanted in files(entry) {
        let path = home.join(wanted.file);
        if !path.exists() || sha256_of(path).await? != wanted.sha256 {
            return Ok(false);
        }
    }
    Ok(true)
}

struct Pull<'a> {
    entry: &'a Entry,
    weights_dir: &'a Path,
    home: &'a Path,
    endpoints: &'a Endpoints,
    progress: &'a dyn Progress,
    client: &'a reqwest::Client,
}

impl Pull<'_> {
    fn download(&self) -> Download<'_> {
        Download { client: self.client, progress: self.progress }
    }

    async fn fetch_from_hub(&self, repository: &str, file: &str) -> Result<(), Reason> {
        let token = self.endpoints.hub_token.as_deref();
        for wanted in files(self.entry) {
            let file = wanted.beside(self.entry, file);
            self.progress.stage(&format!("fetching {file} from {repository}"));
            let part = self.part(wanted, ".hub.part")?;
            let url = format!("{}/{repository}/resolve/main/{file}", self.endpoints.hub);
            self.download().checked(&url, token, &part, wanted.sha256).await?;
            self.put_in_place(wanted, &part)?;
        }
        Ok(())
    }

    /// The unfinished file beside the one that it becomes.
    fn part(&self, wanted: Wanted<'_>, ending: &str) -> Result<PathBuf, Reason> {
        let part = self.home.join(format!("{}{ending}", wanted.file));
        let folder = part.parent().unwrap_or(self.home);
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot make the folder {}: {error}", folder.display()))?;
        Ok(part)
    }

    async fn fetch_from_packages(&self, members: &[PackageMember]) -> Result<(), Reason> {
        let mut wheels = Vec::new();
        for member in members {
            let PackageMember { pypi, version, .. } = member;
            self.progress.stage(&format!("fetching the package {pypi} {version}"));
            let wheel =
                package_index::wheel(self.client, &self.endpoints.package_index, pypi, version).await?;
            let part = self.weights_dir.join(format!("{pypi}-{version}.whl.part"));
            self.download().checked(wheel.url.as_str(), None, &part, &wheel.sha256).await?;
            wheels.push((part, member.member.clone()));
        }
        for wanted in files(self.entry) {
            self.progress.stage(&format!("unpacking {}", wanted.file));
            let part = self.part(wanted, ".part")?;
            let mut inputs = wheels.clone();
            inputs.iter_mut().for_each(|(_, member)| *member = wanted.beside(self.entry, member));
            let (size_bytes, sha256, output) = (wanted.size_bytes, wanted.sha256.to_owned(), part.clone());
            let unpacking =
                tokio::task::spawn_blocking(move || unpack(&inputs, &output, size_bytes, &sha256));
            unpacking.await.map_err(|error| format!("unpacking was cut short: {error}"))??;
            self.put_in_place(wanted, &part)?;
        }
        for (wheel, _) in wheels {
            // The model is in place: a left-over wheel only costs space.
            if let Err(error) = std::fs::remove_file(&wheel) {
                tracing::warn!("cannot remove {}: {error}", wheel.display());
            }
        }
        Ok(())
    }

    /// Makes a complete, checked file durable under its name.
    fn put_in_place(&self, wanted: Wanted<'_>, part: &Path) -> Result<(), Reason> {
        let target = self.home.join(wanted.file);
        let durable = || -> std::io::Result<()> {
            File::open(part)?.sync_all()?;
            std::fs::rename(part, &target)?;
            File::open(target.parent().unwrap_or(self.home))?.sync_all()
        };
        durable().map_err(|error| format!("cannot move {} into place: {error}", part.display()))
    }
}

/// Writes the members, end to end, to `output`, and checks the sum of the whole.
fn unpack(wheels: &[(PathBuf, String)], output: &Path, size_bytes: u64, sha256: &str) -> Result<(), Reason> {
    let cannot = |error: std::io::Error| format!("cannot write {}: {error}", output.display());
    let mut file = File::create(output).map_err(cannot)?;
    let mut hash = Sha256::new();
    let mut left = size_bytes;
    let mut buffer = vec![0; 1 << 20];
    for (wheel, member) in wheels {
        let damaged = |error: &dyn std::fmt::Display| format!("{member} cannot be unpacked: {error}");
        let archive = File::open(wheel).map_err(|error| damaged(&error))?;
        let mut archive = zip::ZipArchive::new(archive).map_err(|error| damaged(&error))?;
        let mut packed = archive.by_name(member).map_err(|error| damaged(&error))?;
        loop {
            let count = packed.read(&mut buffer).map_err(|error| damaged(&error))?;
            if count == 0 {
                break;
            }
            left = left
                .checked_sub(count as u64)
                .ok_or_else(|| format!("{member} is larger than the {} bytes expected", size_bytes))?;
            hash.update(&buffer[..count]);
            file.write_all(&buffer[..count]).map_err(cannot)?;
        }
    }
    let found = hex(&hash.finalize());
    if found != sha256 {
        return Err(format!("the unpacked file has the sha256 {found} instead of {sha256}"));
    }
    Ok(())
}

/// The sha256 of a file, in hexadecimal.
async fn sha256_of(path: PathBuf) -> Result<String, Reason> {
    let sum = move || -> std::io::Result<String> {
        let mut file = File::open(&path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&hash.finalize())),
                count => hash.update(&buffer[..count]),
            }
        }
    };
    let summed = tokio::task::spawn_blocking(sum).await;
    let failed = |error: &dyn std::fmt::Display| format!("the fetched file cannot be checked: {error}");
    summed.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
