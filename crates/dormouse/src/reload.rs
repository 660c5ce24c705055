//! SIGHUP: the settings file is read again, and what can change while the server runs changes.

use crate::config::Config;
use crate::log::Log;
use crate::server::Server;

/// Takes over what of `new` can change now, and says in the log what it was and what waits for a restart. Answers the
/// settings that hold from then on. One that cannot be used leaves all as it was.
pub fn reload(old: &Config, new: Config, server: &Server, log: &Log) -> anyhow::Result<Config> {
    let limits = server.running.limits(&new)?;
    server.origins.set(&new.cors_origins)?;
    log.set(new.log.as_deref())?;
    for engine in &server.running.engines {
        engine.set_limits(limits);
        engine.set_stuck_after(new.stuck_after);
    }
    let named = |all: &[(&'static str, bool)]| -> Vec<&str> {
        all.iter().filter(|(_, is_new)| *is_new).map(|(name, _)| *name).collect()
    };
    let taken = named(&[
        ("log", old.log != new.log),
        ("cors_origin", old.cors_origins != new.cors_origins),
        ("disk_quota", old.disk_quota != new.disk_quota),
        ("ram_budget", old.ram_budget != new.ram_budget),
        ("stuck_after", old.stuck_after != new.stuck_after),
    ]);
    let waiting = named(&[
        ("model", old.models != new.models),
        ("embedding_model", old.embedding_model != new.embedding_model),
        ("host", old.host != new.host),
        ("port", old.port != new.port),
        ("data_dir", old.data_dir != new.data_dir),
        ("threads", old.threads != new.threads),
        ("device", old.device != new.device),
        ("device_budget", old.device_budget != new.device_budget),
        ("ctx", old.context != new.context),
        ("kv_dtype", old.kv_dtype != new.kv_dtype),
        ("activations", old.activations != new.activations),
        ("durability", old.durability != new.durability),
        ("speculation", old.speculation != new.speculation),
        ("max_requests", old.max_requests != new.max_requests),
        ("api_key", old.api_key != new.api_key),
        ("require_key", old.require_key != new.require_key),
    ]);
    // Whoever sends a signal looks into the log for what came of it, also where that shows warnings alone.
    tracing::warn!("the settings were read again; changed: {}", list(&taken));
    if !waiting.is_empty() {
        tracing::warn!("these settings changed too, and need a restart: {}", list(&waiting));
    }
    Ok(Config {
        log: new.log,
        cors_origins: new.cors_origins,
        disk_quota: new.disk_quota,
        ram_budget: new.ram_budget,
        stuck_after: new.stuck_after,
        ..old.clone()
    })
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}
