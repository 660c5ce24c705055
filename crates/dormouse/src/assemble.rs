//! How a running system is put together: store, models, page pools, engines, sessions.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use dormouse_embed::Embedder;
use dormouse_engine::{Engine, EngineOptions, Reopen};
use dormouse_kernels::{Cpu, PageLayout};
use dormouse_kv::{Identity, KvError, Limits, OpenReport, PagePool};
use dormouse_models::model::{LoadOptions, hash_weights};
use dormouse_models::{Device, DeviceChoice, Model};
use dormouse_session::{Runtime, RuntimeOptions};
use dormouse_store::{Store, WeightsFile};

use crate::config::Config;
use crate::sizes::Bytes;
use crate::weights::ModelFile;

/// The only tenant, until there are keys for several.
const TENANT: &str = "default";
const DEFAULT_QUOTA: Bytes = Bytes(20 << 30);

/// A system that can answer, and go on with what was interrupted.
pub struct Running {
    pub runtime: Runtime,
    pub store: Store,
    pub engines: Vec<Engine>,
    pub pages: Vec<OpenPages>,
    pub embedder: Option<Embedder>,
    pub quota: Bytes,
    /// What computes for each engine.
    pub devices: Vec<String>,
}

impl Running {
    /// What the pages of each model may take by these settings.
    pub fn limits(&self, config: &Config) -> Result<Limits> {
        Ok(limits(config, quota(config)?))
    }
}

/// Of several models each has its part of the RAM.
fn limits(config: &Config, quota: Bytes) -> Limits {
    let models = config.models.len().max(1) as u64;
    let ram_bytes = config.ram_budget.map(|budget| budget.0 / models);
    Limits { quota_bytes: quota.0, ram_bytes }
}

/// A model's page file, as it was found.
pub struct OpenPages {
    pub path: PathBuf,
    pub report: OpenReport,
    /// Where a file that could not be used was put.
    pub set_aside: Option<PathBuf>,
}

/// Opens everything under the data directory, which belongs to this process from then on.
pub async fn assemble(
    config: &Config,
    models: &[ModelFile],
    embedding: Option<&ModelFile>,
) -> Result<Running> {
    let mut names = HashSet::new();
    if let Some(model) = models.iter().chain(embedding).find(|model| !names.insert(&model.name)) {
        bail!("two of the models are called '{}'; serve one of them", model.name);
    }
    // Mending a database or hashing weights takes as long as the disk needs; signals are listened to meanwhile.
    let (settings, files, embedding) = (config.clone(), models.to_vec(), embedding.cloned());
    let opening = tokio::task::spawn_blocking(move || open_all(&settings, &files, embedding.as_ref()));
    let Opened { store, engines, pages, embedder, quota, devices } =
        opening.await.context("opening the data directory failed")??;
    let clock_offset_seconds = config.faults.clock_offset_seconds;
    let options = RuntimeOptions { clock_offset_seconds, ..RuntimeOptions::default() };
    let runtime = Runtime::open(store.clone(), engines.clone(), options)?;
    Ok(Running { runtime, store, engines, pages, embedder, quota, devices })
}

/// All that is opened before the first session is looked at.
struct Opened {
    store: Store,
    engines: Vec<Engine>,
    pages: Vec<OpenPages>,
    embedder: Option<Embedder>,
    quota: Bytes,
    devices: Vec<String>,
}

fn open_all(config: &Config, models: &[ModelFile], embedding: Option<&ModelFile>) -> Result<Opened> {
    let store = open_store(config)?;
    let quota = quota(config)?;
    let device = open_device(config)?;
    // First, because it is quick: a folder that cannot be used is told before weights of gigabytes are read.
    let embedder = embedding.map(|file| start_embedder(config, file)).transpose()?;
    let mut engines = Vec::new();
    let mut pages = Vec::new();
    let mut devices = Vec::new();
    for file in models {
        let (engine, opened, computes) = start_engine(config, &device, &store, file, quota)
            .with_context(|| format!("model '{}' ({})", file.name, file.path.display()))?;
        engines.push(engine);
        pages.push(opened);
        devices.push(computes);
    }
    Ok(Opened { store, engines, pages, embedder, quota, devices })
}

fn start_embedder(config: &Config, file: &ModelFile) -> Result<Embedder> {
    let started = Embedder::start(&file.name, &file.path, config.threads);
    started.with_context(|| format!("embedding model '{}'", file.name))
}

/// Takes the data directory and opens its database.
pub fn open_store(config: &Config) -> Result<Store> {
    make_private_folder(&config.data_dir)?;
    make_private_folder(&config.pages_dir())?;
    Ok(Store::open(&config.data_dir, config.durability)?)
}

/// Opens the device that the settings name; where that turns out to be the CPU, the log says why.
fn open_device(config: &Config) -> Result<Device> {
    let (device, notice) = Device::open(config.device, config.device_budget.map(|budget| budget.0))?;
    if let Some(notice) = notice {
        tracing::warn!("{notice}");
    }
    Ok(device)
}

fn cpu(config: &Config) -> Result<Cpu> {
    Ok(Cpu::new(config.threads).map_err(anyhow::Error::msg)?.with_precision(config.activations))
}

fn start_engine(
    config: &Config,
    device: &Device,
    store: &Store,
    file: &ModelFile,
    quota: Bytes,
) -> Result<(Engine, OpenPages, String)> {
    let (cpu, model) = load_model(config, device, store, file)?;
    let computes = if model.weights().on_cpu().is_some() { &Device::Cpu } else { device }.describe(&cpu);
    let (pool, page_file, opened) = open_pages(config, store, &model, quota)?;
    let (model, store, durability) = (Arc::new(model), store.clone(), config.durability);
    let options = EngineOptions {
        reopen: Some(reopen(config.clone(), store.clone(), Arc::clone(&model), quota)),
        stuck_after: config.stuck_after,
        faults: config.faults.engine.clone(),
        ..config.speculation.into()
    };
    let engine = Engine::start(model, cpu, pool, page_file, store, durability, options)?;
    Ok((engine, opened, computes))
}

/// How an engine that broke down gets its pages back: as at a start.
fn reopen(config: Config, store: Store, model: Arc<Model>, quota: Bytes) -> Reopen {
    Box::new(move || {
        let opened = open_pages(&config, &store, &model, quota);
        opened.map(|(pool, ..)| pool).map_err(|why| format!("{why:#}"))
    })
}

/// A model's pages alone, to be checked.
pub fn assemble_pages(config: &Config, store: &Store, file: &ModelFile) -> Result<(PagePool, OpenPages)> {
    // Its weights need not be on the device for that.
    let numerics = open_device(config)?.numerics(&cpu(config)?);
    let model = load_on(&Device::Cpu, numerics, config, store, file)?;
    let (pool, _, opened) = open_pages(config, store, &model, quota(config)?)?;
    Ok((pool, opened))
}

fn load_model(config: &Config, device: &Device, store: &Store, file: &ModelFile) -> Result<(Cpu, Model)> {
    let cpu = cpu(config)?;
    let loaded = load_on(device, device.numerics(&cpu), config, store, file);
    let model = match loaded {
        Err(why) if config.device == DeviceChoice::Auto && !matches!(device, Device::Cpu) => {
            tracing::warn!("model '{}': {why:#}; computing on the CPU", file.name);
            load_on(&Device::Cpu, cpu.numerics(), config, store, file)?
        }
        loaded => loaded?,
    };
    Ok((cpu, model))
}

fn load_on(
    device: &Device,
    device_numerics: String,
    config: &Config,
    store: &Store,
    file: &ModelFile,
) -> Result<Model> {
    let options = LoadOptions {
        name: file.name.clone(),
        context: config.context,
        kv_dtype: config.kv_dtype,
        weights_hash: weights_hash(store, &file.path)?,
        device_numerics,
        pack_folders: pack_folders(config, &file.path),
    };
    let mut bar = None;
    let model = Model::load_on(device, &file.path, options, &mut |done, total| {
        let bar = bar.get_or_insert_with(|| crate::output::progress_bar("packing weights", total));
        bar.set_position(done);
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(model)
}

/// Packed weights lie beside the model's file, or under the data directory where nothing can be written there.
pub fn pack_folders(config: &Config, model: &Path) -> Vec<PathBuf> {
    let beside = model.parent().map(Path::to_owned);
    beside.into_iter().chain([config.data_dir.join("packs")]).collect()
}

/// Opens the model's page file. One that cannot be used is set aside, and its KV computed again from the tokens.
fn open_pages(
    config: &Config,
    store: &Store,
    model: &Model,
    quota: Bytes,
) -> Result<(PagePool, i64, OpenPages)> {
    let identity =
        Identity { fingerprint: model.fingerprint(), tenant_salt: tenant_salt(&config.pages_dir())? };
    let layout = *model.layout();
    let page_bytes = Bytes(layout.page_bytes() as u64);
    if let Some(quota) = config.disk_quota.filter(|quota| *quota < page_bytes) {
        bail!(
            "--disk-quota {quota} holds not one page of this model, which takes {page_bytes}; give it more"
        );
    }
    let name: String = identity.fingerprint[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("{name}.pages");
    let path = config.pages_dir().join(&name);
    // Named without its folder, so that a data directory can be moved or copied.
    let file = store.page_file(Path::new(&name), identity.fingerprint, TENANT, &describe_layout(&layout))?;
    let limits = limits(config, quota);
    if !path.exists() {
        // Rows without their file name nothing; a new file must not be read through them.
        store.forget_pages(file)?;
    }
    match PagePool::open(&path, identity, layout, limits, store.load_pages(file)?, store.claims(file)?) {
        Ok((pool, report)) => Ok((pool, file, OpenPages { path, report, set_aside: None })),
        Err(error) if error.is_recoverable() => {
            let aside = dormouse_kv::set_aside(&path)?;
            tracing::warn!(%error, set_aside = %aside.display(), "a page file cannot be used; KV is computed again");
            store.forget_pages(file)?;
            let (pool, report) = PagePool::open(&path, identity, layout, limits, Vec::new(), Vec::new())?;
            Ok((pool, file, OpenPages { path, report, set_aside: Some(aside) }))
        }
        Err(error @ KvError::Locked { .. }) => Err(error).context("the data directory's lock was free, yet"),
        Err(error) => Err(error.into()),
    }
}

fn describe_layout(layout: &PageLayout) -> String {
    serde_json::json!({
        "layers": layout.layers,
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "kv_dtype": layout.dtype.name(),
    })
    .to_string()
}

/// The file's BLAKE3, from the database where the file is still the one that was hashed.
fn weights_hash(store: &Store, path: &Path) -> Result<[u8; 32]> {
    let state = weights_state(path).with_context(|| format!("cannot read {}", path.display()))?;
    if let Some(hash) = store.weights_hash(&state)? {
        return Ok(hash);
    }
    eprintln!(
        "{:<10}reading {} once, to know it by its contents ({})",
        "model",
        path.display(),
        Bytes(state.bytes)
    );
    let hash = hash_weights(path)?;
    store.remember_weights(&state, hash)?;
    Ok(hash)
}

/// A folder's state is that of its files together: total size, latest times.
fn weights_state(path: &Path) -> std::io::Result<WeightsFile> {
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    let path = fs::canonicalize(path)?;
    let own = fs::metadata(&path)?;
    let mut parts = vec![own.clone()];
    if own.is_dir() {
        parts = fs::read_dir(&path)?.map(|entry| fs::metadata(entry?.path())).collect::<Result<_, _>>()?;
    }
    Ok(WeightsFile {
        path: path.to_string_lossy().into_owned(),
        bytes: parts.iter().map(fs::Metadata::len).sum(),
        modified_ns: parts.iter().map(|part| nanoseconds(part.mtime(), part.mtime_nsec())).max().unwrap_or(0),
        changed_ns: parts.iter().map(|part| nanoseconds(part.ctime(), part.ctime_nsec())).max().unwrap_or(0),
        inode: own.ino(),
    })
}

/// Random bytes of the tenant that page ids begin with. Without the file all pages are strangers, and computed again.
fn tenant_salt(pages_dir: &Path) -> Result<[u8; 32]> {
    let path = pages_dir.join(format!("{TENANT}.salt"));
    match fs::read(&path) {
        Ok(bytes) => {
            if let Ok(salt) = bytes.try_into() {
                return Ok(salt);
            }
            tracing::warn!(path = %path.display(), "the tenant's salt is damaged; KV is computed again");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let mut salt = [0; 32];
    getrandom::fill(&mut salt).context("the operating system gives no random numbers")?;
    // Written beside and renamed, so that a half-written salt never counts.
    let beside = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&salt)?;
        file.sync_all()?;
        fs::rename(&beside, &path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(salt)
}

/// What page files may take: as configured, else 20 GiB, but never more than half of what is there for them.
pub fn quota(config: &Config) -> Result<Bytes> {
    if let Some(quota) = config.disk_quota {
        return Ok(quota);
    }
    let free = free_disk(&config.data_dir)?;
    let taken = taken_by_pages(&config.pages_dir());
    Ok(DEFAULT_QUOTA.min(Bytes(taken + free.0.saturating_sub(taken) / 2)))
}

/// Bytes that this user may still write to the disk of `path`.
pub fn free_disk(path: &Path) -> Result<Bytes> {
    let disk = rustix::fs::statvfs(path)
        .with_context(|| format!("cannot ask for the free disk at {}", path.display()))?;
    Ok(Bytes(disk.f_bavail.saturating_mul(disk.f_frsize)))
}

fn taken_by_pages(pages_dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(pages_dir) else { return 0 };
    let sizes = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    sizes.sum()
}

/// Conversations are nobody else's business.
pub fn make_private_folder(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot make the folder {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_salt_stays_the_same_and_a_damaged_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let salt = tenant_salt(folder.path()).unwrap();
        assert_eq!(tenant_salt(folder.path()).unwrap(), salt);
        fs::write(folder.path().join("default.salt"), b"short").unwrap();
        assert_ne!(tenant_salt(folder.path()).unwrap(), salt);
    }

    #[test]
    fn a_replaced_weights_file_has_another_state() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, b"one").unwrap();
        let before = weights_state(&path).unwrap();
        assert_eq!(weights_state(&path).unwrap(), before);
        let other = folder.path().join("other.gguf");
        fs::write(&other, b"two").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(weights_state(&path).unwrap(), before);
    }
}
