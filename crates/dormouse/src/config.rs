//! Settings: flags over the environment over one TOML file, resolved once into a typed [`Config`].

use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::{BoolishValueParser, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use dormouse_engine::{DEFAULT_STUCK_AFTER, Speculation};
use dormouse_kernels::{KvDtype, Precision};
use dormouse_models::DeviceChoice;
use dormouse_store::Durability;
use serde::Deserialize;

use crate::faults::Faults;
use crate::sizes::Bytes;

pub const DEFAULT_PORT: u16 = 8642;

/// Settings as flags or environment variables; every one may be absent.
#[derive(Clone, Debug, Default, Args)]
pub struct Settings {
    /// TOML file with settings; default: `dormouse/config.toml` in your configuration folder, if it exists
    #[arg(long, global = true, env = "DORMOUSE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Model to serve: a name from `dormouse models ls`, a GGUF file or a safetensors folder (repeatable)
    #[arg(long = "model", global = true, env = "DORMOUSE_MODEL", value_name = "NAME|PATH")]
    pub models: Vec<String>,
    /// Model for /v1/embeddings: a name from `dormouse models ls`, or a folder of sentence-transformers with a BERT in it
    #[arg(long, global = true, env = "DORMOUSE_EMBEDDING_MODEL", value_name = "NAME|PATH")]
    pub embedding_model: Option<String>,
    /// Address to listen on; anything but this computer needs an API key [default: 127.0.0.1]
    #[arg(long, global = true, env = "DORMOUSE_HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8642]
    #[arg(long, global = true, env = "DORMOUSE_PORT")]
    pub port: Option<u16>,
    /// Folder for sessions, pages and weights [default: `dormouse` in your data folder]
    #[arg(long, global = true, env = "DORMOUSE_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Threads to compute with [default: all cores]
    #[arg(long, global = true, env = "DORMOUSE_THREADS", value_parser = at_least_one())]
    pub threads: Option<usize>,
    /// What computes: auto takes the first GPU where there is one and this build has code for it [default: auto]
    #[arg(long, global = true, env = "DORMOUSE_DEVICE", value_name = "auto|cpu|cuda:N|metal")]
    pub device: Option<DeviceChoice>,
    /// Most memory of a GPU that KV pages may take, of each model [default: what weights leave free, but for a part]
    #[arg(long, global = true, env = "DORMOUSE_DEVICE_BUDGET", value_name = "SIZE")]
    pub device_budget: Option<Bytes>,
    /// Positions a session may have [default: what the model was trained for]
    #[arg(long = "ctx", global = true, env = "DORMOUSE_CTX", value_name = "TOKENS", value_parser = at_least_one())]
    pub context: Option<usize>,
    /// How keys and values are stored; q8_0 takes half the bytes [default: f16]
    #[arg(long, global = true, env = "DORMOUSE_KV_DTYPE", value_parser = kv_dtype_values())]
    pub kv_dtype: Option<KvDtype>,
    /// What activations are rounded to before quantised weights: int16 gives the tokens of exact arithmetic, slower [default: int8]
    #[arg(long, global = true, env = "DORMOUSE_ACTIVATIONS", value_parser = activations_values())]
    pub activations: Option<Precision>,
    /// Most RAM that KV pages may keep; idle sessions leave it first [default: what the operating system lets them]
    #[arg(long, global = true, env = "DORMOUSE_RAM_BUDGET", value_name = "SIZE")]
    pub ram_budget: Option<Bytes>,
    /// Most bytes that page files may take [default: 20GiB, at most half of the free disk]
    #[arg(long, global = true, env = "DORMOUSE_DISK_QUOTA", value_name = "SIZE")]
    pub disk_quota: Option<Bytes>,
    /// What an acknowledged token survives: loss of power, the process's end, or nothing promised [default: power]
    #[arg(long, global = true, env = "DORMOUSE_DURABILITY", value_parser = durability_values())]
    pub durability: Option<Durability>,
    /// Guess tokens ahead from the session's own text; answers stay the same, only faster [default: ngram]
    #[arg(long, global = true, env = "DORMOUSE_SPECULATION", value_parser = speculation_values())]
    pub speculation: Option<Speculation>,
    /// Health turns red when a step, a commit or reading a page lasts longer than so many seconds [default: 30]
    #[arg(long, global = true, env = "DORMOUSE_STUCK_AFTER", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stuck_after: Option<u64>,
    /// Answers that may be on their way at once; more requests are told to come again (429) [default: 256]
    #[arg(long, global = true, env = "DORMOUSE_MAX_REQUESTS", value_name = "N", value_parser = max_requests_values())]
    pub max_requests: Option<usize>,
    /// What is logged on standard error: a level (error, warn, info, debug), or targets with levels [default: warn]
    #[arg(long, global = true, env = "DORMOUSE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Key to ask a server with, and that a server takes as its owner's: clients must then send one as
    /// `Authorization: Bearer KEY`. More keys: `dormouse keys`
    #[arg(long, global = true, env = "DORMOUSE_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Ask programs on this computer for a key too
    #[arg(long, global = true, env = "DORMOUSE_REQUIRE_KEY", value_parser = BoolishValueParser::new())]
    pub require_key: bool,
    /// Let web pages of this origin use the server, e.g. https://app.example (repeatable)
    #[arg(
        long = "cors-origin",
        global = true,
        env = "DORMOUSE_CORS_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub cors_origins: Vec<String>,
}

fn durability_values() -> impl TypedValueParser<Value = Durability> {
    PossibleValuesParser::new(Durability::ALL.map(Durability::name))
        .map(|name| Durability::parse(&name).unwrap_or_default())
}

const KV_DTYPES: [KvDtype; 2] = [KvDtype::F16, KvDtype::Q8_0];

fn kv_dtype_values() -> impl TypedValueParser<Value = KvDtype> {
    PossibleValuesParser::new(KV_DTYPES.map(KvDtype::name))
        .map(|name| KvDtype::parse(&name).unwrap_or(KvDtype::F16))
}

fn activations_values() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(Precision::ALL.map(Precision::name))
        .map(|name| Precision::parse(&name).unwrap_or_default())
}

fn at_least_one() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::new().range(1..)
}

/// More than any machine serves, and less than what counts them can count.
const MOST_REQUESTS: usize = 1_000_000;

fn max_requests_values() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::new().range(1..=MOST_REQUESTS as u64)
}

fn speculation_values() -> impl TypedValueParser<Value = Speculation> {
    PossibleValuesParser::new(Speculation::ALL.map(Speculation::name))
        .map(|name| Speculation::parse(&name).unwrap_or_default())
}

/// The TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Option<OneOrMore>,
    embedding_model: Option<String>,
    host: Option<String>,
    port: Option<u16>,
    data_dir: Option<PathBuf>,
    threads: Option<usize>,
    device: Option<String>,
    device_budget: Option<Bytes>,
    ctx: Option<usize>,
    kv_dtype: Option<String>,
    activations: Option<String>,
    ram_budget: Option<Bytes>,
    disk_quota: Option<Bytes>,
    durability: Option<Durability>,
    speculation: Option<Speculation>,
    stuck_after: Option<u64>,
    max_requests: Option<usize>,
    log: Option<String>,
    api_key: Option<String>,
    require_key: Option<bool>,
    cors_origin: Option<OneOrMore>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    fn list(this: Option<OneOrMore>) -> Vec<String> {
        match this {
            None => Vec::new(),
            Some(OneOrMore::One(one)) => vec![one],
            Some(OneOrMore::More(more)) => more,
        }
    }
}

/// Every setting, checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub models: Vec<String>,
    pub embedding_model: Option<String>,
    pub host: String,
    pub port: u16,
    pub data_dir: PathBuf,
    pub threads: usize,
    pub device: DeviceChoice,
    pub device_budget: Option<Bytes>,
    pub context: Option<usize>,
    pub kv_dtype: KvDtype,
    pub activations: Precision,
    pub ram_budget: Option<Bytes>,
    pub disk_quota: Option<Bytes>,
    pub durability: Durability,
    pub speculation: Speculation,
    /// A step, or a commit, that lasts longer turns health red.
    pub stuck_after: Duration,
    pub max_requests: usize,
    pub log: Option<String>,
    /// What tests want to go wrong.
    pub faults: Faults,
    pub api_key: Option<String>,
    pub require_key: bool,
    pub cors_origins: Vec<String>,
}

impl Config {
    pub fn resolve(flags: &Settings) -> Result<Config> {
        let file = match (&flags.config, default_config_path()) {
            (Some(path), _) => read_file(path)?,
            (None, Some(path)) if path.exists() => read_file(&path)?,
            (None, _) => File::default(),
        };
        merge(flags.clone(), file)
    }

    /// Where downloaded weights lie.
    pub fn weights_dir(&self) -> PathBuf {
        self.data_dir.join("models")
    }

    /// Where page files lie.
    pub fn pages_dir(&self) -> PathBuf {
        self.data_dir.join("pages")
    }

    /// Why whoever asks the server must have a key; None where they need not.
    pub fn key_needed(&self) -> Result<Option<String>> {
        if !self.is_loopback()? {
            let host = &self.host;
            return Ok(Some(format!(
                "--host {host} can be reached from other computers, so it needs an API key"
            )));
        }
        if self.require_key {
            return Ok(Some("--require-key asks every program for an API key".into()));
        }
        let own = self.api_key.as_ref().map(|_| "the server has a key of its own (--api-key)".into());
        Ok(own)
    }

    fn is_loopback(&self) -> Result<bool> {
        let addresses = (self.host.as_str(), self.port).to_socket_addrs();
        let mut addresses =
            addresses.with_context(|| format!("--host {}: no such address on this computer", self.host))?;
        Ok(addresses.all(|address| address.ip().is_loopback()))
    }
}

fn default_config_path() -> Option<PathBuf> {
    Some(directories::BaseDirs::new()?.config_dir().join("dormouse").join("config.toml"))
}

fn read_file(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the settings file {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("the settings file {} has a mistake", path.display()))
}

fn merge(flags: Settings, file: File) -> Result<Config> {
    let file_models = OneOrMore::list(file.model);
    let file_origins = OneOrMore::list(file.cors_origin);
    let cors_origins = if flags.cors_origins.is_empty() { file_origins } else { flags.cors_origins };
    cors_origins.iter().try_for_each(|origin| check_origin(origin))?;
    let data_dir = match flags.data_dir.or(file.data_dir) {
        Some(path) => path,
        None => directories::BaseDirs::new()
            .context("there is no home folder to put data into; say where with --data-dir")?
            .data_dir()
            .join("dormouse"),
    };
    let parse_dtype = |text: String| {
        let names = KV_DTYPES.map(KvDtype::name).join(" or ");
        KvDtype::parse(&text)
            .with_context(|| format!("the settings file's kv_dtype: expected {names}, found '{text}'"))
    };
    let kv_dtype = match flags.kv_dtype {
        Some(dtype) => dtype,
        None => file.kv_dtype.map(parse_dtype).transpose()?.unwrap_or(KvDtype::F16),
    };
    let parse_device =
        |text: String| text.parse().map_err(|why| anyhow::anyhow!("the settings file's device: {why}"));
    let device = match flags.device {
        Some(device) => device,
        None => file.device.map(parse_device).transpose()?.unwrap_or_default(),
    };
    let parse_precision = |text: String| {
        let names = Precision::ALL.map(Precision::name).join(" or ");
        Precision::parse(&text)
            .with_context(|| format!("the settings file's activations: expected {names}, found '{text}'"))
    };
    let activations = match flags.activations {
        Some(precision) => precision,
        None => file.activations.map(parse_precision).transpose()?.unwrap_or_default(),
    };
    let stuck_after = file.stuck_after.map(|seconds| seconds as usize);
    for (name, value) in [
        ("threads", file.threads),
        ("ctx", file.ctx),
        ("stuck_after", stuck_after),
        ("max_requests", file.max_requests),
    ] {
        if value == Some(0) {
            bail!("the settings file's {name}: expected at least 1, found 0");
        }
    }
    if let Some(most) = file.max_requests.filter(|most| *most > MOST_REQUESTS) {
        bail!("the settings file's max_requests: expected at most {MOST_REQUESTS}, found {most}");
    }
    let threads = flags.threads.or(file.threads).unwrap_or_else(default_threads);
    let log = flags.log.or(file.log).filter(|filter| !filter.is_empty());
    log.as_deref().map(crate::log::parse).transpose()?;
    let api_key = flags.api_key.or(file.api_key);
    if api_key.as_ref().is_some_and(|key| key.trim().is_empty()) {
        bail!("the API key is empty: leave it out, or set one");
    }
    let config = Config {
        models: if flags.models.is_empty() { file_models } else { flags.models },
        embedding_model: flags.embedding_model.or(file.embedding_model),
        host: flags.host.or(file.host).unwrap_or_else(|| "127.0.0.1".into()),
        port: flags.port.or(file.port).unwrap_or(DEFAULT_PORT),
        data_dir: std::path::absolute(&data_dir)
            .with_context(|| format!("--data-dir {} is no usable path", data_dir.display()))?,
        threads,
        device,
        device_budget: flags.device_budget.or(file.device_budget),
        context: flags.context.or(file.ctx),
        kv_dtype,
        activations,
        ram_budget: flags.ram_budget.or(file.ram_budget),
        disk_quota: flags.disk_quota.or(file.disk_quota),
        durability: flags.durability.or(file.durability).unwrap_or_default(),
        speculation: flags.speculation.or(file.speculation).unwrap_or_default(),
        stuck_after: flags.stuck_after.or(file.stuck_after).map_or(DEFAULT_STUCK_AFTER, Duration::from_secs),
        max_requests: flags
            .max_requests
            .or(file.max_requests)
            .unwrap_or(dormouse_server::DEFAULT_MAX_RUNNING),
        log,
        faults: Faults::from_environment()?,
        api_key,
        require_key: flags.require_key || file.require_key.unwrap_or(false),
        cors_origins,
    };
    Ok(config)
}

/// Origins are compared as browsers write them, so they must be written just so. `*` is none: it would let every page that
/// is ever opened here use the server.
fn check_origin(origin: &str) -> Result<()> {
    let Some((scheme, host)) = origin.split_once("://") else {
        bail!("--cors-origin {origin}: expected an origin as browsers send it, e.g. https://app.example")
    };
    let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']' | '_');
    let is_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if scheme.is_empty() || host.is_empty() || !scheme.chars().all(is_scheme) || !host.chars().all(is_host) {
        bail!("--cors-origin {origin}: expected scheme://host or scheme://host:port and nothing after it")
    }
    if origin.chars().any(|c| c.is_ascii_uppercase()) {
        bail!(
            "--cors-origin {origin}: browsers write origins in small letters: {}",
            origin.to_ascii_lowercase()
        )
    }
    Ok(())
}

/// The cores of this machine, all of them: the engine's threads park when there is nothing to do.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn flags_come_before_the_file_and_the_file_before_defaults() {
        let flags = Settings { port: Some(1), data_dir: Some("/data".into()), ..Settings::default() };
        let config =
            merge(flags, file("port = 2\nthreads = 3\nmodel = \"smollm2\"\ndisk_quota = \"1GiB\"\nembedding_model = \"mini\"")).unwrap();
        assert_eq!(config.embedding_model.as_deref(), Some("mini"));
        assert_eq!((config.port, config.threads, config.models), (1, 3, vec!["smollm2".to_string()]));
        assert_eq!((config.disk_quota, config.durability), (Some(Bytes(1 << 30)), Durability::Power));
        assert_eq!(config.host, "127.0.0.1");
    }

    #[test]
    fn a_mistake_in_the_file_is_named() {
        let error = toml::from_str::<File>("prot = 5").unwrap_err().to_string();
        assert!(error.contains("prot") && error.contains("port"), "{error}");
        assert!(toml::from_str::<File>("durability = \"strong\"").is_err());
    }

    #[test]
    fn values_of_the_file_that_cannot_be_used_are_named() {
        for (text, name) in [
            ("kv_dtype = \"f64\"", "f16 or q8_0"),
            ("activations = \"f64\"", "int8 or int16"),
            ("threads = 0", "threads"),
            ("ctx = 0", "ctx"),
            ("max_requests = 0", "max_requests"),
            ("max_requests = 2000000", "1000000"),
        ] {
            let flags = Settings { data_dir: Some("/data".into()), ..Settings::default() };
            let error = merge(flags, file(text)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn only_a_loopback_host_goes_without_a_key() {
        let config = |host: &str, key: Option<&str>| {
            let flags = Settings {
                host: Some(host.into()),
                api_key: key.map(String::from),
                data_dir: Some("/data".into()),
                ..Settings::default()
            };
            merge(flags, File::default()).unwrap()
        };
        let needed = |host: &str, key: Option<&str>| config(host, key).key_needed().unwrap().is_some();
        assert!(!needed("127.0.0.1", None) && !needed("::1", None));
        assert!(
            needed("0.0.0.0", None) && needed("0.0.0.0", Some("key")) && needed("127.0.0.1", Some("key"))
        );
    }

    #[test]
    fn origins_are_as_browsers_write_them() {
        let origins = |list: &[&str]| {
            let flags = Settings {
                cors_origins: list.iter().map(|origin| origin.to_string()).collect(),
                data_dir: Some("/data".into()),
                ..Settings::default()
            };
            merge(flags, file("cors_origin = \"https://file.example\"")).map(|config| config.cors_origins)
        };
        assert_eq!(origins(&[]).unwrap(), ["https://file.example"]);
        for good in
            ["https://app.example", "http://localhost:3000", "http://[::1]:5", "chrome-extension://abc"]
        {
            assert_eq!(origins(&[good]).unwrap(), [good]);
        }
        for bad in
            ["*", "null", "app.example", "https://app.example/", "https://*.example", "https://App.example"]
        {
            assert!(origins(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_key_is_a_mistake_and_not_an_open_door() {
        let flags =
            Settings { api_key: Some(String::new()), data_dir: Some("/d".into()), ..Settings::default() };
        assert!(merge(flags, File::default()).is_err());
    }
}
