//! Dormouse: a serving engine for agents that stop and go on.

#![forbid(unsafe_code)]

mod assemble;
mod bench;
mod cli;
mod client;
mod commands;
mod config;
mod disk;
mod faults;
mod log;
mod output;
mod reload;
mod server;
mod sizes;
mod weights;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use dormouse_models::chat_template::STACK_BYTES;

use crate::cli::{Cli, Command};
use crate::config::Config;
use crate::log::Log;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = Log::start(cli.json);
    match start(cli, log) {
        Ok(code) => code,
        // `dormouse sessions ls | head`: the reader has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dormouse: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

fn start(cli: Cli, log: Log) -> Result<ExitCode> {
    let config = Config::resolve(&cli.settings)?;
    log.set(config.log.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // HTTP and clients need little; the cores belong to the engine.
        .worker_threads(2)
        // What a chat template may need, and what the rest does.
        .thread_stack_size(STACK_BYTES + (2 << 20))
        .enable_all()
        .build()
        .context("cannot start the threads for input and output")?;
    let result = runtime.block_on(run(cli, config, &log));
    // A prompt that waits for a line, for one, would hold the process back.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

async fn run(cli: Cli, config: Config, log: &Log) -> Result<ExitCode> {
    match cli.command {
        Command::Serve(arguments) => commands::serve::serve(config, &cli.settings, arguments, log).await?,
        Command::Chat(arguments) => commands::chat::chat(&config, arguments).await?,
        Command::Run(arguments) => commands::run::run(&config, arguments, cli.json).await?,
        Command::Sessions(arguments) => commands::sessions::sessions(&config, arguments, cli.json).await?,
        Command::Keys(arguments) => commands::keys::run(&config, arguments, cli.json).await?,
        Command::Models(command) => return commands::models::models(&config, command, cli.json).await,
        Command::Bench(command) => bench::bench(&config, command, cli.json).await?,
        Command::Doctor => return commands::doctor::doctor(&config, cli.json).await,
    }
    Ok(ExitCode::SUCCESS)
}
