//! What the runtime and its engines count, as Prometheus text.
//!
//! | name | meaning |
//! |---|---|
//! | `dormouse_engine_healthy{model}` | 1 when this model's engine serves turns |
//! | `dormouse_engine_restarts_total{model}` | times its thread panicked and was started again |
//! | `dormouse_stuck_total{model}` | steps and commits that lasted longer than the limit |
//! | `dormouse_sessions{status}` | sessions in the database |
//! | `dormouse_healthy` | 1 when turns are served |
//! | `dormouse_turns_running{model}`, `dormouse_turns_waiting{model}` | turns in the engine |
//! | `dormouse_turns_paging_in{model}`, `dormouse_disk_bytes_per_second{model}` | turns whose pages are being read from disk, and how fast they last came |
//! | `dormouse_turns_paused{model}`, `dormouse_pauses_total{model}` | turns whose pages others needed |
//! | `dormouse_steps_total{model}` | forward passes |
//! | `dormouse_prompt_tokens_computed_total{model}` | prompt tokens computed |
//! | `dormouse_output_tokens_total{model}` | tokens generated |
//! | `dormouse_speculation_drafted_tokens_total{model}` | guessed tokens computed ahead |
//! | `dormouse_speculation_accepted_tokens_total{model}` | those of them that became output |
//! | `dormouse_restored_tokens_total{model}` | prompt tokens whose KV was found and mapped |
//! | `dormouse_recomputed_tokens_total{model}` | tokens computed although they had been before |
//! | `dormouse_restored_bytes_read_total{model}` | bytes read from disk to restore KV |
//! | `dormouse_queue_seconds{model}` | histogram: from submission to the first page |
//! | `dormouse_time_to_first_token_seconds{model}` | histogram: from submission to the first token |
//! | `dormouse_inter_token_seconds{model}` | histogram: between two tokens of a turn |
//! | `dormouse_restore_seconds{model}` | histogram: reading, mapping and checking the pages of a turn that found some |
//! | `dormouse_step_seconds{model}`, `dormouse_step_rows{model}` | histograms: forward passes, and the rows in them |
//! | `dormouse_commit_seconds{model}` | histogram: from a commit's handover to the disk's answer |
//! | `dormouse_turns_by_tier_total{model,tier}` | turns by where their KV was found: none, ram, disk, device |
//! | `dormouse_restored_tokens_by_tier_total{model,tier}` | and the tokens that were found there |
//! | `dormouse_commits_total{model}`, `dormouse_commit_failures_total{model}` | durable steps |
//! | `dormouse_kv_slots{model,state}` | page slots by state: total, used, free, claimed, pinned, in_ram, quota |
//! | `dormouse_kv_paged_out_total{model}` | pages that left RAM to stay within its budget |
//! | `dormouse_kv_slot_bytes{model}` | bytes of a page slot |
//! | `dormouse_kv_evictions_total{model,reason}` | pages evicted because the quota or the disk was full |
//! | `dormouse_kv_copies_on_write_total{model}` | tails copied |
//! | `dormouse_kv_deduplicated_total{model}`, `dormouse_kv_damaged_total{model}` | pages shared late, found damaged |
//! | `dormouse_kv_purged_total{model}` | pages deleted with their session |
//! | `dormouse_kv_committed_bytes_total{model}` | KV bytes made durable |
//! | `dormouse_written_bytes_today` | KV and tokens of the turns of this day (UTC), also of earlier processes |
//! | `dormouse_process_written_bytes_total` | all that this process made the system write to disk, the database included |
//! | `dormouse_tenant_turns_total{tenant,model}` | turns that ended |
//! | `dormouse_tenant_prompt_tokens_total{tenant,model}`, `dormouse_tenant_cached_tokens_total{tenant,model}` | their prompts, and what was restored of them |
//! | `dormouse_tenant_output_tokens_total{tenant,model}` | their answers |
//! | `dormouse_http_requests_total{tenant,status}` | answers by status, counted by the server |

use std::fmt::Write;

use dormouse_engine::{Engine, EngineStats, Histogram, Tier};

use crate::ids;
use crate::runtime::Runtime;
use crate::tenants::{TenantCounts, Used};

impl Runtime {
    /// Prometheus text of everything the runtime and its engines count.
    pub async fn metrics(&self) -> String {
        let mut text = Exposition::default();
        text.declare("dormouse_healthy", "gauge", "1 when turns are served");
        text.sample("dormouse_healthy", &[], u64::from(self.unhealthy().is_none()));
        match self.inner.store.session_counts().await {
            Ok(counts) => {
                text.declare("dormouse_sessions", "gauge", "Sessions in the database by status");
                for (status, count) in
                    [("idle", counts.idle), ("in_progress", counts.in_progress), ("failed", counts.failed)]
                {
                    text.sample("dormouse_sessions", &[("status", status)], count);
                }
            }
            Err(why) => tracing::warn!("counting sessions: {why}"),
        }
        let mut engines = Vec::new();
        text.watched(&self.inner.engines);
        for engine in &self.inner.engines {
            match engine.stats().await {
                Ok(stats) => engines.push((engine.model().name.clone(), stats)),
                Err(why) => tracing::warn!("statistics of model '{}': {why}", engine.model().name),
            }
        }
        text.engines(&engines);
        text.tenants(&self.inner.tenants);
        match self.inner.store.written_bytes(ids::today()).await {
            Ok(days) => {
                text.declare(
                    "dormouse_written_bytes_today",
                    "gauge",
                    "KV and tokens written by turns this day (UTC)",
                );
                text.sample("dormouse_written_bytes_today", &[], days.iter().map(|(_, bytes)| bytes).sum());
            }
            Err(why) => tracing::warn!("counting what was written: {why}"),
        }
        if let Some(bytes) = process_written_bytes() {
            let name = "dormouse_process_written_bytes_total";
            text.declare(name, "counter", "All that this process made the system write to disk");
            text.sample(name, &[], bytes);
        }
        text.0
    }
}

/// One number of an engine: name, kind, help, and where it is.
type Metric = (&'static str, &'static str, &'static str, fn(&EngineStats) -> u64);

const METRICS: &[Metric] = &[
    ("dormouse_turns_running", "gauge", "Turns being computed", |it| it.running as u64),
    ("dormouse_turns_waiting", "gauge", "Turns waiting to be computed", |it| it.waiting as u64),
    ("dormouse_turns_paging_in", "gauge", "Turns whose pages are being read from disk", |it| {
        it.paging_in as u64
    }),
    ("dormouse_disk_bytes_per_second", "gauge", "How fast pages last came from disk", |it| {
        it.disk_bytes_per_second as u64
    }),
    ("dormouse_turns_paused", "gauge", "Turns whose pages others needed", |it| it.paused as u64),
    ("dormouse_pauses_total", "counter", "Times a turn gave its pages to others", |it| it.pauses),
    ("dormouse_steps_total", "counter", "Forward passes", |it| it.steps),
    ("dormouse_prompt_tokens_computed_total", "counter", "Prompt tokens computed", |it| {
        it.prompt_tokens_computed
    }),
    ("dormouse_output_tokens_total", "counter", "Tokens generated", |it| it.output_tokens),
    ("dormouse_speculation_drafted_tokens_total", "counter", "Guessed tokens computed ahead", |it| {
        it.drafted_tokens
    }),
    ("dormouse_speculation_accepted_tokens_total", "counter", "Guessed tokens that became output", |it| {
        it.accepted_tokens
    }),
    ("dormouse_restored_tokens_total", "counter", "Prompt tokens whose KV was mapped", |it| {
        it.restored_tokens
    }),
    ("dormouse_recomputed_tokens_total", "counter", "Tokens computed again", |it| it.recomputed_tokens),
    ("dormouse_restored_bytes_read_total", "counter", "Bytes read to restore KV", |it| {
        it.restored_bytes_read
    }),
    ("dormouse_commits_total", "counter", "Durable steps", |it| it.commits),
    ("dormouse_commit_failures_total", "counter", "Steps that could not be made durable", |it| {
        it.commit_failures
    }),
    ("dormouse_kv_slot_bytes", "gauge", "Bytes of a page slot", |it| it.kv.slot_bytes),
    ("dormouse_kv_copies_on_write_total", "counter", "Tail pages copied", |it| it.kv.copies_on_write),
    ("dormouse_kv_deduplicated_total", "counter", "Pages found to exist already", |it| it.kv.deduplicated),
    ("dormouse_kv_paged_out_total", "counter", "Pages that left RAM to stay within its budget", |it| {
        it.kv.paged_out
    }),
    ("dormouse_kv_damaged_total", "counter", "Pages that failed their checksum", |it| it.kv.damaged),
    ("dormouse_kv_purged_total", "counter", "Pages deleted with their session", |it| it.kv.purged),
    ("dormouse_kv_committed_bytes_total", "counter", "KV bytes made durable", |it| it.kv.bytes_committed),
];

type Distribution = (&'static str, &'static str, fn(&EngineStats) -> &Histogram);

const DISTRIBUTIONS: &[Distribution] = &[
    ("dormouse_queue_seconds", "From submission to the first page", |it| &it.distributions.queue_seconds),
    ("dormouse_time_to_first_token_seconds", "From submission to the first token", |it| {
        &it.distributions.time_to_first_token_seconds
    }),
    ("dormouse_inter_token_seconds", "Between two tokens of a turn", |it| {
        &it.distributions.inter_token_seconds
    }),
    ("dormouse_restore_seconds", "Reading, mapping and checking the pages of a turn that found some", |it| {
        &it.distributions.restore_seconds
    }),
    ("dormouse_step_seconds", "Forward passes", |it| &it.distributions.step_seconds),
    ("dormouse_step_rows", "Rows computed together", |it| &it.distributions.step_rows),
    ("dormouse_commit_seconds", "From a commit's handover to the disk's answer", |it| {
        &it.distributions.commit_seconds
    }),
];

/// As the kernel counts; None where it does not.
fn process_written_bytes() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/self/io").ok()?;
    counts.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.trim().parse().ok())
}

/// Prometheus text as it grows.
#[derive(Default)]
pub struct Exposition(String);

impl Exposition {
    /// The whole text.
    pub fn text(self) -> String {
        self.0
    }

    /// What the samples that follow are: kinds are `counter`, `gauge` and `histogram`.
    pub fn declare(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// One number, with its labels by name.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        match labels.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    /// What is known of engines without asking their threads, which may be stuck.
    fn watched(&mut self, engines: &[Engine]) {
        type Watched = (&'static str, &'static str, &'static str, fn(&Engine) -> u64);
        let all: [Watched; 3] = [
            ("dormouse_engine_healthy", "gauge", "1 when this model's engine serves turns", |it| {
                u64::from(it.unhealthy().is_none())
            }),
            (
                "dormouse_engine_restarts_total",
                "counter",
                "Times the engine thread panicked and was started again",
                |it| it.restarts(),
            ),
            (
                "dormouse_stuck_total",
                "counter",
                "Steps and commits that lasted longer than the limit",
                |it| it.stuck(),
            ),
        ];
        for (name, kind, help, value) in all {
            self.declare(name, kind, help);
            for engine in engines {
                self.sample(name, &[("model", engine.model().name.as_str())], value(engine));
            }
        }
    }

    fn histogram(&mut self, name: &str, model: &str, values: &Histogram) {
        let model = escaped(model);
        for (bound, count) in values.cumulative() {
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".into() };
            self.line(format_args!("{name}_bucket{{model=\"{model}\",le=\"{bound}\"}} {count}"));
        }
        self.line(format_args!("{name}_sum{{model=\"{model}\"}} {}", values.sum()));
        self.line(format_args!("{name}_count{{model=\"{model}\"}} {}", values.count()));
    }

    fn tenants(&mut self, counts: &TenantCounts) {
        let counts = counts.all();
        type Count = (&'static str, &'static str, fn(&Used) -> u64);
        let all: [Count; 4] = [
            ("dormouse_tenant_turns_total", "Turns that ended", |it| it.turns),
            ("dormouse_tenant_prompt_tokens_total", "Tokens of their prompts", |it| it.prompt_tokens),
            ("dormouse_tenant_cached_tokens_total", "Of them, those restored", |it| it.cached_tokens),
            ("dormouse_tenant_output_tokens_total", "Tokens of their answers", |it| it.output_tokens),
        ];
        for (name, help, value) in all {
            self.declare(name, "counter", help);
            for ((tenant, model), used) in &counts {
                self.sample(name, &[("tenant", tenant), ("model", model)], value(used));
            }
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing into a String cannot fail.
        writeln!(self.0, "{line}").ok();
    }

    fn engines(&mut self, engines: &[(String, EngineStats)]) {
        for (name, kind, help, value) in METRICS {
            self.declare(name, kind, help);
            for (model, stats) in engines {
                self.sample(name, &[("model", model)], value(stats));
            }
        }
        for (name, help, value) in DISTRIBUTIONS {
            self.declare(name, "histogram", help);
            for (model, stats) in engines {
                self.histogram(name, model, value(stats));
            }
        }
        self.declare("dormouse_turns_by_tier_total", "counter", "Turns by where their KV was found");
        for (model, stats) in engines {
            for (tier, counts) in Tier::ALL.iter().zip(stats.tiers) {
                let labels = [("model", model.as_str()), ("tier", tier.name())];
                self.sample("dormouse_turns_by_tier_total", &labels, counts.turns);
            }
        }
        self.declare(
            "dormouse_restored_tokens_by_tier_total",
            "counter",
            "Prompt tokens by where their KV was found",
        );
        for (model, stats) in engines {
            for (tier, counts) in Tier::ALL.iter().zip(stats.tiers).skip(1) {
                let labels = [("model", model.as_str()), ("tier", tier.name())];
                self.sample("dormouse_restored_tokens_by_tier_total", &labels, counts.tokens);
            }
        }
        let name = "dormouse_kv_evictions_total";
        self.declare(name, "counter", "Pages evicted to make room, by what was full");
        for (model, stats) in engines {
            let disk_full = stats.kv.evictions_disk_full;
            for (reason, pages) in [("quota", stats.kv.evictions - disk_full), ("disk_full", disk_full)] {
                self.sample(name, &[("model", model), ("reason", reason)], pages);
            }
        }
        self.declare("dormouse_kv_slots", "gauge", "Page slots by state");
        for (model, stats) in engines {
            let kv = &stats.kv;
            for (state, slots) in [
                ("total", kv.slots_total),
                ("quota", kv.slots_quota),
                ("used", kv.slots_used),
                ("free", kv.slots_free),
                ("claimed", kv.slots_claimed),
                ("pinned", kv.slots_pinned),
                ("in_ram", kv.slots_in_ram),
            ] {
                self.sample("dormouse_kv_slots", &[("model", model), ("state", state)], slots as u64);
            }
        }
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_declared_once_and_labels_are_escaped() {
        let mut text = Exposition::default();
        let stats = EngineStats { output_tokens: 7, ..EngineStats::default() };
        text.engines(&[("a\"b".into(), stats), ("c".into(), EngineStats::default())]);
        assert!(text.0.contains("dormouse_output_tokens_total{model=\"a\\\"b\"} 7\n"));
        let mut types: Vec<&str> = text.0.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let count = types.len();
        types.dedup();
        let declared = METRICS.len() + DISTRIBUTIONS.len() + 4;
        assert_eq!((types.len(), count), (declared, declared));
    }
}
