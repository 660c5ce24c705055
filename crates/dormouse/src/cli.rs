//! The command line: what can be said, not what it does.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use dormouse_session::Scope;

use crate::config::Settings;

#[derive(Debug, Parser)]
#[command(
    name = "dormouse",
    version,
    about = "Serves open-weight language models to agents that stop and go on",
    after_help = "Examples:\n  \
        dormouse serve                      start the server with the default model\n  \
        dormouse chat --session notes       talk, and go on with the same session tomorrow\n  \
        dormouse run -p 'Name three rivers' one answer on standard output\n  \
        dormouse doctor                     is everything well, and what to do if not\n\n\
        Settings are read from flags, then from the environment, then from one TOML file (--config)."
)]
pub struct Cli {
    #[command(flatten)]
    pub settings: Settings,
    /// Machine-readable output
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the server; prints `ready http://HOST:PORT` once it answers
    #[command(after_help = "Examples:\n  \
        dormouse serve --model smollm2 --embedding-model all-MiniLM-L6-v2\n  \
        dormouse serve --model ./model.gguf --port 0 --data-dir /srv/dormouse\n  \
        dormouse keys create laptop && dormouse serve --host 0.0.0.0\n  \
        dormouse serve --cors-origin https://app.example")]
    Serve(ServeArguments),
    /// Talk to a model; /help lists what can be typed
    #[command(after_help = "Examples:\n  \
        dormouse chat\n  \
        dormouse chat --session notes     the session is made at the first use, and resumed after")]
    Chat(ChatArguments),
    /// Answer one prompt on standard output
    #[command(after_help = "Examples:\n  \
        dormouse run -p 'Why is the sky blue?'\n  \
        dormouse run --session review -p 'Summarise this:' < notes.txt")]
    Run(RunArguments),
    /// List, show, fork, rewind, park, resume and delete sessions
    Sessions(SessionsArguments),
    /// Make, list and revoke API keys
    #[command(after_help = "Examples:\n  \
        dormouse keys create laptop\n  \
        dormouse keys create ci --tenant team-a --scope inference --requests-per-minute 60 --concurrency 4\n  \
        dormouse keys create ops --scope admin\n  \
        dormouse keys revoke ci                  a running server refuses it from then on\n\n\
        While a server runs, keys are changed through it, with an admin key if it needs one (--api-key).")]
    Keys(KeysArguments),
    /// List, download and inspect models
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Measure what resuming costs on this machine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check the device, the disk, the database and every KV page; exit code 1 if something is wrong
    Doctor,
}

#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Download models that are needed and missing without asking
    #[arg(long)]
    pub yes: bool,
}

/// Which server to talk to.
#[derive(Clone, Debug, Args)]
pub struct Where {
    /// Server to use; by default the one that owns the data directory, and if none runs, one in this process
    #[arg(long, global = true, env = "DORMOUSE_URL", value_name = "URL")]
    pub url: Option<String>,
}

/// How to answer.
#[derive(Clone, Debug, Args)]
pub struct Answering {
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "0..2")]
    pub temperature: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long)]
    pub seed: Option<u64>,
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens: Option<usize>,
    /// Go on where the model would end its answer, up to the longest answer
    #[arg(long)]
    pub ignore_eos: bool,
}

#[derive(Debug, Args)]
pub struct ChatArguments {
    /// Name or id of the session to go on with; a new name begins a session
    #[arg(long, value_name = "NAME")]
    pub session: Option<String>,
    #[command(flatten)]
    pub answering: Answering,
    #[command(flatten)]
    pub server: Where,
}

#[derive(Debug, Args)]
pub struct RunArguments {
    /// What to say; text on standard input is added after it
    #[arg(short, long)]
    pub prompt: Option<String>,
    /// Name or id of the session to say it in; a new name begins a session
    #[arg(long, value_name = "NAME")]
    pub session: Option<String>,
    #[command(flatten)]
    pub answering: Answering,
    #[command(flatten)]
    pub server: Where,
}

#[derive(Debug, Args)]
pub struct SessionsArguments {
    #[command(subcommand)]
    pub command: SessionsCommand,
    #[command(flatten)]
    pub server: Where,
}

#[derive(Debug, Subcommand)]
pub enum SessionsCommand {
    /// All sessions, the newest first
    Ls {
        /// Also those that chat requests made for themselves
        #[arg(long)]
        all: bool,
    },
    /// One session and its messages
    Show { session: String },
    /// A new session that shares everything up to a place
    Fork {
        session: String,
        /// Id of a turn (the place after it) or a token position; default: the end
        #[arg(long)]
        at: Option<String>,
        /// Name of the new session
        #[arg(long)]
        name: Option<String>,
    },
    /// Take back everything after a place
    Rewind {
        session: String,
        /// Id of a turn (the place after it) or a token position
        #[arg(long)]
        to: String,
    },
    /// Give the session's RAM back; it stays on disk
    Park { session: String },
    /// Read the session's pages into RAM, ready to go on
    Resume {
        session: String,
        /// Only say what it would take
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete sessions and the pages that nobody else uses
    Rm {
        #[arg(required = true)]
        sessions: Vec<String>,
    },
    /// The session's log
    Events {
        session: String,
        /// Only events with a higher number
        #[arg(long, value_name = "NUMBER")]
        starting_after: Option<u64>,
        /// Stay and print events as they happen
        #[arg(long)]
        follow: bool,
    },
}

#[derive(Debug, Args)]
pub struct KeysArguments {
    #[command(subcommand)]
    pub command: KeysCommand,
    #[command(flatten)]
    pub server: Where,
}

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// A new key; its secret is printed once, and only its hash is kept
    Create {
        /// What the key is called in lists
        name: String,
        /// Whose sessions it sees, and nobody else's [default: default]
        #[arg(long)]
        tenant: Option<String>,
        /// What it may do: chat and its like, sessions as objects, or everything (repeatable)
        #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',', default_values = ["inference", "sessions"],
              value_parser = PossibleValuesParser::new(Scope::ALL.map(Scope::name)))]
        scopes: Vec<String>,
        /// Most requests in a minute [default: no limit]
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        requests_per_minute: Option<u32>,
        /// Most requests on their way at once [default: no limit]
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=10_000))]
        concurrency: Option<u32>,
    },
    /// All keys, revoked ones too
    Ls,
    /// Take a key back, by name or id; a running server refuses it at once
    Revoke { key: String },
}

#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Known models, and which of them are here
    Ls,
    /// Download a model's weights: resumes, and checks the sum
    Pull { name: String },
    /// What is in a model, what memory it needs, and whether it will run here
    Inspect { model: String },
    /// Pack a model's quantised weights for this program's kernels, which `serve` does by itself when it is needed
    Pack { model: String },
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Build a session, kill the server, and measure how it comes back
    #[command(after_help = "Example:\n  dormouse bench resume --model smollm2 --threads 2 --tokens 4000")]
    Resume(BenchResumeArguments),
    /// How well the model predicts a text: exp of the mean of -ln p(token)
    #[command(after_help = "Example:\n  dormouse bench perplexity --model smollm2 --text README.md")]
    Perplexity(BenchPerplexityArguments),
}

#[derive(Debug, Args)]
pub struct BenchPerplexityArguments {
    /// UTF-8 text to predict
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// The context starts anew after this many tokens; the first of each window is not scored
    #[arg(long, default_value_t = 512, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..))]
    pub window: usize,
}

#[derive(Debug, Args)]
pub struct BenchResumeArguments {
    /// Length of the session's prompt
    #[arg(long, default_value_t = 4000)]
    pub tokens: usize,
    /// Fresh processes to measure a warm resume with
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub repeats: u16,
    /// Folder for the benchmark's data; default: the system's folder for temporary files
    #[arg(long, value_name = "FOLDER")]
    pub scratch: Option<PathBuf>,
}
