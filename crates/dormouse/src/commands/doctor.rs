//! `dormouse doctor`: is everything well, and if not, what to do.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use dormouse_kernels::{Cpu, Isa};
use dormouse_models::Device;
use dormouse_models::device::accelerators;
use dormouse_models::machine::{Memory, processor_name};
use serde_json::{Map, Value, json};

use crate::assemble::{self, assemble_pages};
use crate::client::{Client, running_server};
use crate::config::Config;
use crate::disk::{measure_disk, measure_memory};
use crate::output::{outln, print_json};
use crate::sizes::Bytes;
use crate::weights;

/// Below this, a turn can run out of disk in the middle.
const LOW_DISK: Bytes = Bytes(1 << 30);
/// Slower than this, waiting for the disk at each commit is what a user feels.
const SLOW_SYNC_MS: f64 = 50.0;

/// What was looked at, and what is wrong.
#[derive(Default)]
struct Findings {
    facts: Map<String, Value>,
    problems: Vec<String>,
}

impl Findings {
    fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.insert(name.into(), value.into());
    }

    fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }
}

pub async fn doctor(config: &Config, as_json: bool) -> Result<ExitCode> {
    let mut findings = Findings::default();
    look_at_machine(config, &mut findings);
    if let Err(error) = look_at_disk(config, &mut findings) {
        findings.problem(format!(
            "{error:#}; check that the folder can be written, or choose another --data-dir"
        ));
    }
    match running_server(&config.data_dir) {
        Err(error) => findings.problem(format!("{error:#}")),
        Ok(Some(address)) => ask_server(config, &address, &mut findings).await,
        Ok(None) if config.data_dir.exists() => {
            findings.fact("server", "none runs on this data directory");
            if let Err(error) = look_at_data(config, &mut findings).await {
                findings.problem(format!("{error:#}"));
            }
        }
        Ok(None) => findings.fact("server", "none has run on this data directory yet"),
    }
    print(&findings, as_json)?;
    Ok(if findings.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look_at_machine(config: &Config, findings: &mut Findings) {
    findings.fact("version", env!("CARGO_PKG_VERSION"));
    findings.fact("device", config.device.to_string());
    look_at_devices(config, findings);
    findings.fact("processor", processor_name().unwrap_or_else(|| std::env::consts::ARCH.into()));
    let tiers: Vec<&str> = Isa::ALL.into_iter().filter(|isa| isa.available()).map(Isa::name).collect();
    findings.fact("isa_tiers", tiers);
    match Cpu::new(1) {
        Ok(cpu) => findings.fact("numerics", cpu.numerics()),
        Err(error) => findings.problem(error),
    }
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    findings.fact("cores", cores);
    findings.fact("threads", config.threads);
    if config.threads > cores {
        findings.problem(format!(
            "{} threads on {cores} cores wait for each other; set --threads {cores} or less",
            config.threads
        ));
    }
    findings.fact("memory", Bytes(Memory::here().total).to_string());
    findings.fact("memory_read_gb_per_s", round(measure_memory(config.threads)));
}

/// GPUs, and whether what the settings ask for is there.
fn look_at_devices(config: &Config, findings: &mut Findings) {
    let found = match accelerators() {
        Ok(found) => found,
        Err(why) => {
            findings.fact("gpus", why);
            Vec::new()
        }
    };
    for gpu in found {
        let gigabytes = |rate: f64| round(rate / 1e9);
        let mut facts = json!({
            "name": gpu.name,
            "memory": Bytes(gpu.memory_bytes).to_string(),
        });
        if let (Some(capability), Some(driver)) = (gpu.compute_capability, gpu.driver) {
            facts["compute_capability"] = capability.into();
            facts["driver"] = driver.into();
        }
        match gpu.copies {
            Ok((up, down)) => {
                facts["to_device_gb_per_s"] = gigabytes(up).into();
                facts["to_host_gb_per_s"] = gigabytes(down).into();
            }
            Err(why) => facts["unusable"] = why.into(),
        }
        findings.fact(&gpu.device, facts);
    }
    if let Err(error) = Device::open(config.device, None) {
        findings.problem(error.to_string());
    }
}

fn look_at_disk(config: &Config, findings: &mut Findings) -> Result<()> {
    findings.fact("data_dir", config.data_dir.display().to_string());
    assemble::make_private_folder(&config.data_dir)?;
    let free = assemble::free_disk(&config.data_dir)?;
    findings.fact("disk_free", free.to_string());
    findings.fact("disk_quota", assemble::quota(config)?.to_string());
    if free < LOW_DISK {
        findings.problem(format!("only {free} of disk are free; make room, or choose another --data-dir"));
        return Ok(());
    }
    let speed = measure_disk(&config.data_dir)?;
    findings.fact("disk_write_mb_per_s", round(speed.write_mb_per_s));
    findings.fact("disk_read_mb_per_s", round(speed.read_mb_per_s));
    findings.fact("disk_fdatasync_ms", round(speed.fdatasync_ms));
    if speed.fdatasync_ms > SLOW_SYNC_MS {
        findings.problem(format!(
            "making a write durable takes {:.0} ms on this disk; use a faster disk, or --durability process if losing \
             the last seconds at a loss of power is acceptable",
            speed.fdatasync_ms
        ));
    }
    Ok(())
}

async fn ask_server(config: &Config, address: &str, findings: &mut Findings) {
    findings.fact("server", address);
    let health = match Client::new(address, config.api_key.clone()) {
        Ok(client) => client.get(&["health"], &[]).await,
        Err(error) => Err(error),
    };
    match health {
        Ok(health) => findings.fact("health", health["status"].clone()),
        Err(error) => findings.problem(format!(
            "the server at {address} is not well: {error:#}; its log says more, and a restart checks every page it uses"
        )),
    }
    findings.fact("pages", "not checked: the running server owns them and checks each at its first use");
}

/// Checks the database and every page, as nobody else uses them.
async fn look_at_data(config: &Config, findings: &mut Findings) -> Result<()> {
    let store = assemble::open_store(config)?;
    let mut found = store.health().await?;
    for text in store.verify().await? {
        // What was found at opening is told again.
        if !found.contains(&text) {
            found.push(text);
        }
    }
    findings.fact("database", if found.is_empty() { "sound" } else { "damage was found" });
    found.into_iter().for_each(|text| findings.problem(format!("database: {text}")));
    let counts = store.session_counts().await?;
    findings.fact("sessions", counts.idle + counts.in_progress + counts.failed);
    let today = store.written_bytes(0).await?;
    let written = |days: &[(u64, u64)]| Bytes(days.iter().map(|(_, bytes)| bytes).sum()).to_string();
    // Days without work are not listed.
    findings.fact("written_on_the_last_day", written(&today[today.len().saturating_sub(1)..]));
    findings.fact("written_in_all", written(&today));
    findings.fact("unfinished_turns", store.interrupted_turns().await?.len());
    look_at_pages(config, &store, findings).await?;
    store.close().await?;
    Ok(())
}

/// The pages of the configured models, or of the default one.
async fn look_at_pages(
    config: &Config,
    store: &dormouse_store::Store,
    findings: &mut Findings,
) -> Result<()> {
    if !weights::are_here(config)? {
        let how = "`dormouse models pull smollm2` fetches the default model's, --model PATH names others";
        findings.fact("pages", format!("not checked: the weights they belong to are not here; {how}"));
        return Ok(());
    }
    let mut checked = Vec::new();
    for file in weights::choose(config, false).await? {
        let (pool, opened) = assemble_pages(config, store, &file)?;
        let report = pool.verify_all();
        checked.push(json!({ "model": file.name, "pages": report.pages, "bytes": report.bytes }));
        let dropped = opened.report.dropped_orphans
            + opened.report.dropped_mismatched
            + opened.report.dropped_beyond_end;
        let damaged = report.damaged.len() + dropped;
        if let Some(aside) = &opened.set_aside {
            findings.problem(set_aside_text(&opened.path, aside));
        }
        if damaged > 0 {
            findings.problem(format!(
                "{damaged} KV pages of '{}' are damaged; nothing is lost and nothing needs to be done: they are never \
                 used, and computed again when their session goes on (if it happens again, check the disk)",
                file.name
            ));
        }
    }
    findings.fact("pages", checked);
    Ok(())
}

fn set_aside_text(path: &Path, aside: &Path) -> String {
    format!(
        "the page file {} could not be used and is now {}; its KV is computed again, and the old file can be deleted",
        path.display(),
        aside.display()
    )
}

fn round(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

fn print(findings: &Findings, as_json: bool) -> Result<()> {
    if as_json {
        return print_json(&json!({ "facts": findings.facts, "problems": findings.problems }));
    }
    for (name, value) in &findings.facts {
        outln!("{name:<22}{}", value.as_str().map_or_else(|| value.to_string(), String::from));
    }
    if findings.problems.is_empty() {
        outln!("\nall is well");
    }
    for problem in &findings.problems {
        outln!("\nproblem: {problem}");
    }
    Ok(())
}
