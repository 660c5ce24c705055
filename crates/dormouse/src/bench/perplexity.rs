//! `dormouse bench perplexity`: how well the model, as computed here, predicts a text.

use anyhow::{Context, Result, bail};
use dormouse_kernels::Cpu;
use dormouse_models::likelihood::negative_log_likelihoods;
use dormouse_models::{DeviceChoice, LoadOptions, Model, Specials, hash_weights};
use serde_json::json;

use crate::assemble::pack_folders;
use crate::cli::BenchPerplexityArguments;
use crate::config::Config;
use crate::output::{outln, print_json, progress_bar};
use crate::weights;

pub async fn perplexity(config: &Config, arguments: &BenchPerplexityArguments, as_json: bool) -> Result<()> {
    let text = std::fs::read_to_string(&arguments.text)
        .with_context(|| format!("cannot read the text {}", arguments.text.display()))?;
    if matches!(config.device, DeviceChoice::Cuda(_) | DeviceChoice::Metal) {
        bail!("--device {}: perplexity is measured on the CPU alone", config.device);
    }
    let files = weights::choose(config, false).await?;
    let file = files.into_iter().next().context("there is no model to measure")?;
    let cpu = Cpu::new(config.threads).map_err(anyhow::Error::msg)?.with_precision(config.activations);
    let options = LoadOptions {
        name: file.name,
        context: config.context,
        kv_dtype: config.kv_dtype,
        weights_hash: hash_weights(&file.path)?,
        device_numerics: cpu.numerics(),
        pack_folders: pack_folders(config, &file.path),
    };
    let model = Model::load(&file.path, options, &mut |_, _| {})?;

    let decoder = model.weights().on_cpu().context("the model was loaded on another device")?;
    let tokenizer = model.tokenizer();
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let tokens = tokenizer.encode(&text, Specials::Literal, false)?;
    if tokens.len() < 2 {
        bail!("{} holds {} tokens; at least two are needed", arguments.text.display(), tokens.len());
    }
    let window = arguments.window.min(model.context() - bos.iter().len());
    let bar = progress_bar("tokens", tokens.len() as u64);
    let mut costs = Vec::with_capacity(tokens.len());
    for chunk in tokens.chunks(window) {
        let chunk: Vec<u32> = bos.into_iter().chain(chunk.iter().copied()).collect();
        // The first token of a chunk is not scored, with or without a beginning-of-sequence token before it.
        let of_chunk = negative_log_likelihoods(decoder, &cpu, config.kv_dtype, &chunk);
        costs.extend_from_slice(&of_chunk[bos.iter().len().min(of_chunk.len())..]);
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let (scored, nll) = (costs.len(), costs.iter().sum::<f64>());
    let perplexity = (nll / scored as f64).exp();
    if as_json {
        return print_json(&json!({
            "model": model.name,
            "numerics": model.numerics(),
            "tokens": scored,
            "nll": nll,
            "perplexity": perplexity,
            "token_ids": tokens,
            "logprobs": costs.iter().map(|cost| -cost).collect::<Vec<f64>>(),
        }));
    }
    outln!(
        "perplexity {perplexity:.4} over {scored} tokens ({}, windows of {})",
        model.name,
        arguments.window
    );
    Ok(())
}
