//! `dormouse bench resume`: what a session costs that comes back after kill -9, against computing it again.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::child::{ChildServer, Setup, disk_bytes, page_files};
use super::text;
use crate::cli::BenchResumeArguments;
use crate::client::Client;
use crate::config::Config;
use crate::output::{print_json, print_table};
use crate::sizes::Bytes;
use crate::{disk, weights};

/// Tokens of the answer that decode steps are measured on.
const DECODE_TOKENS: usize = 32;

/// One turn, as its client saw it.
struct Measured {
    /// From sending the request to its first text.
    first_token_ms: f64,
    /// Median time from one token to the next.
    step_ms: f64,
    turn: Value,
}

impl Measured {
    fn receipt(&self, field: &str) -> f64 {
        self.turn["dormouse"][field].as_f64().unwrap_or(0.0)
    }
}

pub async fn resume(config: &Config, arguments: &BenchResumeArguments, as_json: bool) -> Result<()> {
    let model = weights::choose(config, false).await?;
    let model = model.into_iter().next().context("there is no model to measure")?;
    let scratch = arguments.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let data_dir = scratch.join(format!("dormouse-bench-{}", std::process::id()));
    let setup = Setup { data_dir: data_dir.clone(), model: model.path, config: config.clone() };
    let measured = scenario(&setup, arguments).await;
    if data_dir.exists() {
        std::fs::remove_dir_all(&data_dir)
            .with_context(|| format!("cannot remove {}", data_dir.display()))?;
    }
    let report = measured?;
    if as_json { print_json(&report) } else { print(&report) }
}

async fn scenario(setup: &Setup, arguments: &BenchResumeArguments) -> Result<Value> {
    eprintln!("building a session of {} tokens …", arguments.tokens);
    let server = setup.start()?;
    let session = create(&server.client).await?;
    let prompt = prompt_of(&server.client, arguments.tokens).await?;
    let built = turn(&server.client, &session, &prompt, 1).await?;
    let decode = turn(&server.client, &session, "Go on.", DECODE_TOKENS).await?;
    let session_object = server.client.get(&["v1", "sessions", &session], &[]).await?;
    server.kill()?;

    let (mut ready, mut warm, mut recomputed, mut new_tokens) = (Vec::new(), Vec::new(), 0.0_f64, 0.0);
    for repeat in 1..=arguments.repeats {
        eprintln!("fresh process, page cache warm: {repeat} of {} …", arguments.repeats);
        let server = setup.start()?;
        ready.push(server.ready_ms);
        let again = turn(&server.client, &session, "Go on.", 1).await?;
        warm.push(again.first_token_ms);
        recomputed = recomputed.max(again.receipt("recomputed_tokens"));
        new_tokens = again.turn["usage"]["prompt_tokens"].as_f64().unwrap_or(f64::NAN)
            - again.receipt("restored_tokens");
        server.kill()?;
    }

    let mut same = Vec::new();
    let mut same_new_tokens = f64::NAN;
    for repeat in 1..=arguments.repeats {
        eprintln!("fresh process, the same request again: {repeat} of {} …", arguments.repeats);
        let server = setup.start()?;
        let (first_token_ms, new_tokens) = same_request(&server.client, &prompt).await?;
        same.push(first_token_ms);
        same_new_tokens = new_tokens;
        server.kill()?;
    }

    eprintln!("kill -9 in the middle of an answer …");
    let interrupted = interrupted(setup, &session).await?;

    eprintln!("fresh process, page cache cold …");
    let read_mb_per_s = drop_pages(setup)?;
    let server = setup.start()?;
    let cold = turn(&server.client, &session, "Go on.", 1).await?;
    let bytes_read = cold.receipt("bytes_read");
    let at_disk_speed_ms = bytes_read / 1e6 / read_mb_per_s * 1e3 + decode.step_ms;

    eprintln!("fork, and park …");
    let fork = fork(setup, &server, &session).await?;
    server.kill()?;
    let parked = park(setup, &session).await?;

    let warm_ms = median(&mut warm);
    Ok(json!({
        "tokens": session_object["tokens"],
        "kv_bytes": session_object["kv_bytes"],
        "threads": setup.config.threads,
        "prompt_ms": built.first_token_ms,
        "decode_step_ms": decode.step_ms,
        "ready_ms": median(&mut ready),
        "warm_first_token_ms": warm_ms,
        "warm_first_token_ms_all": warm,
        "warm_new_tokens": new_tokens,
        "warm_recomputed_tokens": recomputed,
        "prompt_over_warm": built.first_token_ms / warm_ms,
        "same_request_first_token_ms": median(&mut same),
        "same_request_new_tokens": same_new_tokens,
        "interrupted": interrupted,
        "cold_first_token_ms": cold.first_token_ms,
        "cold_bytes_read": bytes_read,
        "disk_read_mb_per_s": read_mb_per_s,
        "cold_over_disk_speed": cold.first_token_ms / at_disk_speed_ms,
        "fork": fork,
        "park": parked,
    }))
}

async fn create(client: &Client) -> Result<String> {
    let session = client.post(&["v1", "sessions"], &[], &json!({})).await?;
    Ok(session["id"].as_str().context("the server's session has no id")?.to_string())
}

/// A text that makes a prompt of about `tokens` tokens, after measuring how many tokens a word and the chat
/// template around it make.
async fn prompt_of(client: &Client, tokens: usize) -> Result<String> {
    const FEW_WORDS: usize = 10;
    const SOME_WORDS: usize = 210;
    let mut sampled = [0.0; 2];
    for (words, sampled) in [FEW_WORDS, SOME_WORDS].into_iter().zip(&mut sampled) {
        let session = create(client).await?;
        let sample = turn(client, &session, &text::words(words), 1).await?;
        client.delete(&["v1", "sessions", &session]).await?;
        let counted = sample.turn["usage"]["prompt_tokens"].as_f64();
        *sampled = counted.context("the server counted no prompt tokens")?;
    }
    let tokens_per_word = (sampled[1] - sampled[0]) / (SOME_WORDS - FEW_WORDS) as f64;
    let template_tokens = sampled[0] - FEW_WORDS as f64 * tokens_per_word;
    let words = ((tokens as f64 - template_tokens) / tokens_per_word).round();
    if !words.is_finite() || words < 1.0 {
        bail!("a prompt of {tokens} tokens is too short to measure; ask for more with --tokens");
    }
    Ok(text::words(words as usize))
}

/// Runs a turn and measures it.
async fn turn(client: &Client, session: &str, input: &str, max_tokens: usize) -> Result<Measured> {
    let body = json!({
        "input": input, "stream": true, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    });
    let begun = Instant::now();
    let mut events = client.post_events(&["v1", "sessions", session, "turns"], &body).await?;
    let mut arrivals = Vec::new();
    while let Some(event) = events.next().await? {
        match event["type"].as_str() {
            Some("session.turn.output_text.delta") => arrivals.push(begun.elapsed().as_secs_f64() * 1e3),
            Some("session.turn.completed") => {
                // A token that is only a part of a character makes no text; the turn's end is then the first sign.
                let first_token_ms = arrivals.first().copied().unwrap_or(begun.elapsed().as_secs_f64() * 1e3);
                let mut steps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
                return Ok(Measured {
                    first_token_ms,
                    step_ms: median(&mut steps),
                    turn: event["turn"].clone(),
                });
            }
            Some("session.turn.failed") => bail!("the turn failed: {}", event["turn"]["error"]),
            _ => {}
        }
    }
    bail!("the server stopped in the middle of a turn")
}

/// A client that knows nothing of sessions sends the session's first message again: what of it was computed before is
/// found by its tokens, and one token remains to compute. Milliseconds to its first word, and tokens computed for it.
async fn same_request(client: &Client, prompt: &str) -> Result<(f64, f64)> {
    let body = json!({
        "messages": [{"role": "user", "content": prompt}], "stream": true, "max_tokens": 1, "temperature": 0,
        "ignore_eos": true, "stream_options": {"include_usage": true},
    });
    let begun = Instant::now();
    let mut events = client.post_events(&["v1", "chat", "completions"], &body).await?;
    let (mut first_token_ms, mut new_tokens) = (None, f64::NAN);
    while let Some(chunk) = events.next().await? {
        if chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()) {
            first_token_ms.get_or_insert(begun.elapsed().as_secs_f64() * 1e3);
        }
        let usage = &chunk["usage"];
        if let (Some(prompt), Some(cached)) =
            (usage["prompt_tokens"].as_f64(), usage["prompt_tokens_details"]["cached_tokens"].as_f64())
        {
            new_tokens = prompt - cached;
        }
    }
    Ok((first_token_ms.context("the answer has no text")?, new_tokens))
}

/// Kills the server in the middle of an answer and starts it again: nobody asks it to go on. Times from its start to
/// its readiness and to the first token that the killed one had not said.
async fn interrupted(setup: &Setup, session: &str) -> Result<Value> {
    let server = setup.start()?;
    let body = json!({
        "input": "Tell me more.", "stream": true, "max_tokens": 4 * DECODE_TOKENS, "temperature": 0, "ignore_eos": true,
    });
    let mut events = server.client.post_events(&["v1", "sessions", session, "turns"], &body).await?;
    let (mut turn, mut seen) = (String::new(), 0);
    for _ in 0..DECODE_TOKENS {
        let event = events.next().await?.context("the answer ended before it could be interrupted")?;
        if let Some(id) = event["turn"].as_str() {
            turn = id.to_string();
        }
        seen = event["sequence_number"].as_u64().context("an event has no sequence number")?;
    }
    server.kill()?;

    let begun = Instant::now();
    let server = setup.start()?;
    let cursor = seen.to_string();
    let query = [("stream", "true"), ("starting_after", cursor.as_str())];
    let mut events = server.client.get_events(&["v1", "sessions", session, "turns", &turn], &query).await?;
    let next = events.next().await?.context("the answer did not go on")?;
    let start_to_next_token_ms = begun.elapsed().as_secs_f64() * 1e3;
    if next["type"] != "session.turn.output_text.delta" {
        bail!("the answer did not go on, but said {next}");
    }
    let mut last = next;
    while let Some(event) = events.next().await? {
        last = event;
    }
    let receipt = &last["turn"]["dormouse"];
    let (ready_ms, restored, again) =
        (server.ready_ms, receipt["restored_tokens"].clone(), receipt["recomputed_tokens"].clone());
    server.kill()?;
    Ok(json!({
        "ready_ms": ready_ms,
        "start_to_next_token_ms": start_to_next_token_ms,
        "ready_to_next_token_ms": start_to_next_token_ms - ready_ms,
        "restored_tokens": restored,
        "recomputed_tokens": again,
    }))
}

/// Puts the page files out of RAM, measures how fast the disk reads them, and puts them out again.
fn drop_pages(setup: &Setup) -> Result<f64> {
    let mut fastest: f64 = 0.0;
    for path in page_files(&setup.data_dir.join("pages"))? {
        let mut file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        file.sync_all().with_context(|| format!("cannot flush {}", path.display()))?;
        disk::drop_cache(&file)?;
        fastest = fastest.max(disk::read_speed(&mut file)?);
        disk::drop_cache(&file)?;
    }
    Ok(fastest)
}

async fn fork(setup: &Setup, server: &ChildServer, session: &str) -> Result<Value> {
    let before = disk_bytes(&setup.data_dir)?;
    let begun = Instant::now();
    let fork = server.client.post(&["v1", "sessions", session, "fork"], &[], &json!({})).await?;
    let fork_ms = begun.elapsed().as_secs_f64() * 1e3;
    let growth = disk_bytes(&setup.data_dir)?.saturating_sub(before);
    let id = fork["id"].as_str().context("the fork has no id")?;
    let first = turn(&server.client, id, "Go on.", 1).await?;
    Ok(json!({
        "fork_ms": fork_ms,
        "disk_growth_bytes": growth,
        "disk_growth_over_session": growth as f64 / fork["kv_bytes"].as_f64().unwrap_or(f64::NAN),
        "recomputed_tokens": fork["dormouse"]["recomputed_tokens"],
        "first_turn_recomputed_tokens": first.receipt("recomputed_tokens"),
    }))
}

/// RAM of the process before a session is brought in, with it, and after it was parked.
async fn park(setup: &Setup, session: &str) -> Result<Value> {
    let server = setup.start()?;
    // Another session's turn first, so that weights and buffers are in RAM before the comparison begins.
    let other = create(&server.client).await?;
    turn(&server.client, &other, "Hello.", 1).await?;
    let without = server.resident_bytes()?;
    let path = |action| ["v1", "sessions", session, action];
    server.client.post(&path("resume"), &[], &json!({})).await?;
    let resumed = server.resident_bytes()?;
    let receipt = server.client.post(&path("park"), &[], &json!({})).await?;
    let parked = server.resident_bytes()?;
    server.kill()?;
    Ok(json!({
        "resident_without_bytes": without,
        "resident_resumed_bytes": resumed,
        "resident_parked_bytes": parked,
        "held_while_parked_bytes": parked.saturating_sub(without),
        "released_bytes": receipt["ram_bytes_released"],
    }))
}

/// The middle value; sorts the values. 0 for none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn print(report: &Value) -> Result<()> {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let bytes = |value: &Value| Bytes(number(value) as u64).to_string();
    let ms = |value: &Value| format!("{:.1} ms", number(value));
    let (fork, park) = (&report["fork"], &report["park"]);
    let rows = [
        ["session".into(), format!("{} tokens, {} of KV", report["tokens"], bytes(&report["kv_bytes"]))],
        ["read the prompt, to first token".into(), ms(&report["prompt_ms"])],
        ["one decode step".into(), ms(&report["decode_step_ms"])],
        ["after kill -9: exec to ready".into(), ms(&report["ready_ms"])],
        [
            format!(
                "fresh process, cache warm: request with {} new tokens to first token",
                report["warm_new_tokens"]
            ),
            ms(&report["warm_first_token_ms"]),
        ],
        ["  tokens computed again".into(), report["warm_recomputed_tokens"].to_string()],
        [
            "  times faster than reading the prompt".into(),
            format!("{:.0}", number(&report["prompt_over_warm"])),
        ],
        [
            format!(
                "fresh process, the same request again ({} new token) to first token",
                report["same_request_new_tokens"]
            ),
            ms(&report["same_request_first_token_ms"]),
        ],
        [
            "killed in mid-answer: exec to its next new token".into(),
            ms(&report["interrupted"]["start_to_next_token_ms"]),
        ],
        ["  of which after ready".into(), ms(&report["interrupted"]["ready_to_next_token_ms"])],
        ["  tokens computed again".into(), report["interrupted"]["recomputed_tokens"].to_string()],
        ["fresh process, cache cold: request to first token".into(), ms(&report["cold_first_token_ms"])],
        [
            "  read from disk".into(),
            format!(
                "{} at {:.0} MB/s",
                bytes(&report["cold_bytes_read"]),
                number(&report["disk_read_mb_per_s"])
            ),
        ],
        [
            "  over (bytes ÷ bandwidth + one step)".into(),
            format!("{:.2}", number(&report["cold_over_disk_speed"])),
        ],
        ["fork".into(), ms(&fork["fork_ms"])],
        [
            "  disk growth".into(),
            format!(
                "{} ({:.2} %)",
                bytes(&fork["disk_growth_bytes"]),
                number(&fork["disk_growth_over_session"]) * 100.0
            ),
        ],
        ["  tokens computed again".into(), fork["first_turn_recomputed_tokens"].to_string()],
        ["parked: RAM given back".into(), bytes(&park["released_bytes"])],
        ["  RAM held still".into(), bytes(&park["held_while_parked_bytes"])],
    ];
    print_table(["WHAT", "MEASURED"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut []), 0.0);
    }
}
