//! What the runtime and its engines count, as Prometheus text.
//!
//! | name | meaning |
//! |---|---|
//! | `dormouse_sessions{status}` | sessions in the database |
//! | `dormouse_healthy` | 1 when turns are served |
//! | `dormouse_turns_running{model}`, `dormouse_turns_waiting{model}` | turns in the engine |
//! | `dormouse_turns_paused{model}`, `dormouse_pauses_total{model}` | turns whose pages others needed |
//! | `dormouse_steps_total{model}` | forward passes |
//! | `dormouse_prompt_tokens_computed_total{model}` | prompt tokens computed |
//! | `dormouse_output_tokens_total{model}` | tokens generated |
//! | `dormouse_speculation_drafted_tokens_total{model}` | guessed tokens computed ahead |
//! | `dormouse_speculation_accepted_tokens_total{model}` | those of them that became output |
//! | `dormouse_restored_tokens_total{model}` | prompt tokens whose KV was found and mapped |
//! | `dormouse_recomputed_tokens_total{model}` | tokens computed although they had been before |
//! | `dormouse_restored_bytes_read_total{model}` | bytes read from disk to restore KV |
//! | `dormouse_commits_total{model}`, `dormouse_commit_failures_total{model}` | durable steps |
//! | `dormouse_kv_slots{model,state}` | page slots by state: total, used, free, claimed, pinned, in_ram, quota |
//! | `dormouse_kv_paged_out_total{model}` | pages that left RAM to stay within its budget |
//! | `dormouse_kv_slot_bytes{model}` | bytes of a page slot |
//! | `dormouse_kv_evictions_total{model}`, `dormouse_kv_copies_on_write_total{model}` | pages evicted, tails copied |
//! | `dormouse_kv_deduplicated_total{model}`, `dormouse_kv_damaged_total{model}` | pages shared late, found damaged |
//! | `dormouse_kv_committed_bytes_total{model}` | KV bytes made durable |

use std::fmt::Write;

use dormouse_engine::EngineStats;

use crate::runtime::Runtime;

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
        for engine in &self.inner.engines {
            match engine.stats().await {
                Ok(stats) => engines.push((engine.model().name.clone(), stats)),
                Err(why) => tracing::warn!("statistics of model '{}': {why}", engine.model().name),
            }
        }
        text.engines(&engines);
        text.0
    }
}

/// One number of an engine: name, kind, help, and where it is.
type Metric = (&'static str, &'static str, &'static str, fn(&EngineStats) -> u64);

const METRICS: &[Metric] = &[
    ("dormouse_turns_running", "gauge", "Turns being computed", |it| it.running as u64),
    ("dormouse_turns_waiting", "gauge", "Turns waiting to be computed", |it| it.waiting as u64),
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
    ("dormouse_kv_evictions_total", "counter", "Pages evicted", |it| it.kv.evictions),
    ("dormouse_kv_copies_on_write_total", "counter", "Tail pages copied", |it| it.kv.copies_on_write),
    ("dormouse_kv_deduplicated_total", "counter", "Pages found to exist already", |it| it.kv.deduplicated),
    ("dormouse_kv_paged_out_total", "counter", "Pages that left RAM to stay within its budget", |it| {
        it.kv.paged_out
    }),
    ("dormouse_kv_damaged_total", "counter", "Pages that failed their checksum", |it| it.kv.damaged),
    ("dormouse_kv_committed_bytes_total", "counter", "KV bytes made durable", |it| it.kv.bytes_committed),
];

#[derive(Default)]
struct Exposition(String);

impl Exposition {
    fn declare(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        match labels.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
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
        assert_eq!((types.len(), count), (METRICS.len() + 1, METRICS.len() + 1));
    }
}
