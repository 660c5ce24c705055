//! `dormouse bench`: measurements from outside, on the real binary.

mod child;
mod perplexity;
mod resume;
mod text;

use anyhow::Result;

use crate::cli::BenchCommand;
use crate::config::Config;

pub async fn bench(config: &Config, command: BenchCommand, as_json: bool) -> Result<()> {
    match command {
        BenchCommand::Resume(arguments) => resume::resume(config, &arguments, as_json).await,
        BenchCommand::Perplexity(arguments) => perplexity::perplexity(config, &arguments, as_json).await,
    }
}
