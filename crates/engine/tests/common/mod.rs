//! An engine over a real model, with a store and a page file of its own.

#![allow(clippy::unwrap_used)]
// Each test file uses its part.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};

use dormouse_engine::*;
use dormouse_grammar::Grammar;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS};
use dormouse_kv::{Identity, Limits, PagePool};
use dormouse_models::model::LoadOptions;
use dormouse_models::tokenizer::Specials;
use dormouse_models::{Device, Model, TokenId, Tokenizer};
use dormouse_store::{BeginTurn, Durability, FinishTurn, NewSession, PageRow, SessionRow, Store};
use tokio::sync::mpsc::UnboundedReceiver;

fn model_path() -> PathBuf {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    path
}

/// The model with this context, loaded once.
fn model(context: usize) -> Arc<Model> {
    static LOADED: LazyLock<Mutex<Vec<Arc<Model>>>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap();
    if let Some(model) = loaded.iter().find(|model| model.context() == context) {
        return Arc::clone(model);
    }
    loaded.push(model_on(&Device::Cpu, context, KvDtype::F16));
    Arc::clone(loaded.last().unwrap())
}

/// The model loaded anew, for a device.
pub fn model_on(device: &Device, context: usize, kv_dtype: KvDtype) -> Arc<Model> {
    let options = LoadOptions {
        name: "smollm2".into(),
        context: Some(context),
        kv_dtype,
        weights_hash: [1; 32],
        device_numerics: device.numerics(&Cpu::new(1).unwrap()),
        pack_folders: Vec::new(),
    };
    Arc::new(Model::load_on(device, &model_path(), options, &mut |_, _| {}).unwrap())
}

pub const CONTEXT: usize = 2048;

pub fn tokens(text: &str) -> Vec<TokenId> {
    model(CONTEXT).tokenizer().encode(text, Specials::Parse, false).unwrap()
}

/// `count` tokens of prose that begins like no other.
pub fn prose(seed: usize, count: usize) -> Vec<u32> {
    let words = ["harbour", "lantern", "winter", "copper", "letter", "garden", "thunder", "bread"];
    let line =
        |n: usize| format!("{} {} and the {} of {}. ", words[(n * 7 + seed) % 8], n, words[n * 5 % 8], seed);
    let mut prose = tokens(&(0..count).map(line).collect::<String>());
    prose.truncate(count);
    prose
}

pub const PLAIN: DraftSource = DraftSource::Speculation(Speculation::Off);
pub const NGRAM: DraftSource = DraftSource::Speculation(Speculation::Ngram);

/// What is asked of a turn besides its input.
#[derive(Clone, Debug)]
pub struct Ask {
    pub sampling: Sampling,
    pub max_tokens: usize,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub grammar: Option<Arc<Grammar>>,
    pub prompt_logprobs: Option<u8>,
}

pub fn greedy(max_tokens: usize) -> Ask {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Ask { sampling, max_tokens, stop: Vec::new(), ignore_eos: true, grammar: None, prompt_logprobs: None }
}

/// Identity, tokens and checksum.
pub type Page = ([u8; 32], Vec<TokenId>, u32);
pub type Alternatives = Vec<(TokenId, u32)>;

/// All that a turn says, log-probabilities by their bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<TokenId>,
    pub texts: Vec<String>,
    /// Of the token, and of the likeliest ones.
    pub logprobs: Vec<Option<(u32, Alternatives)>>,
    /// Of the prompt's tokens from the second on, where they were asked for.
    pub prompt: Option<Vec<(u32, Alternatives)>>,
    pub reason: Option<FinishReason>,
    pub log_len: usize,
}

fn bits(logprob: TokenLogprob) -> (u32, Alternatives) {
    let top = logprob.top.iter().map(|(token, logprob)| (*token, logprob.to_bits()));
    (logprob.logprob.to_bits(), top.collect())
}

pub fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::clone(model(CONTEXT).tokenizer()));
    &TOKENIZER
}

/// Bytes of a page of KV.
pub fn page_bytes() -> u64 {
    model(CONTEXT).layout().page_bytes() as u64
}

/// A turn under way.
pub struct Running {
    pub id: String,
    session: SessionRow,
    events: UnboundedReceiver<Event>,
    answer: Answer,
}

impl Running {
    /// Waits for one more event; the receipt if it was the last.
    pub async fn next(&mut self) -> Option<Receipt> {
        let answer = &mut self.answer;
        match self.events.recv().await.unwrap() {
            Event::Started(_) => {}
            Event::Prompt(scores) => {
                assert!(answer.tokens.is_empty() && answer.prompt.is_none());
                answer.prompt = Some(scores.into_iter().map(bits).collect());
            }
            Event::Token(output) => {
                assert_eq!(output.index, answer.tokens.len());
                let logprob = output.logprob.map(bits);
                answer.tokens.push(output.token);
                answer.texts.push(output.text);
                answer.logprobs.push(logprob);
            }
            Event::Finished(finish) => {
                assert_eq!(finish.output_tokens, answer.tokens.len());
                answer.texts.push(finish.text);
                (answer.reason, answer.log_len) = (Some(finish.reason), finish.log_len);
                return Some(finish.receipt);
            }
            Event::Failed(error) => panic!("the turn failed: {error}"),
        }
        None
    }

    pub fn said(&self) -> usize {
        self.answer.tokens.len()
    }
}

pub struct Rig {
    pub engine: Engine,
    pub store: Store,
    file: i64,
    _directory: tempfile::TempDir,
}

impl Rig {
    pub fn new(guesser: DraftSource) -> Rig {
        Rig::open(tempfile::tempdir().unwrap(), guesser, CONTEXT)
    }

    pub fn open(directory: tempfile::TempDir, guesser: DraftSource, context: usize) -> Rig {
        Rig::within(directory, guesser, context, 1 << 30)
    }

    /// With a page file that may grow to `quota_bytes`.
    pub fn within(
        directory: tempfile::TempDir,
        options: impl Into<EngineOptions>,
        context: usize,
        quota_bytes: u64,
    ) -> Rig {
        Rig::over(directory, options, model(context), quota_bytes)
    }

    /// Of this model.
    pub fn over(
        directory: tempfile::TempDir,
        options: impl Into<EngineOptions>,
        model: Arc<Model>,
        quota_bytes: u64,
    ) -> Rig {
        let durability = Durability::Process;
        let store = Store::open(directory.path(), durability).unwrap();
        let cpu = Cpu::new(2).unwrap();
        let identity = Identity { fingerprint: model.fingerprint(), tenant_salt: [7; 32] };
        let path = directory.path().join("test.pages");
        let name = Path::new("test.pages");
        let file = store.page_file(name, identity.fingerprint, "default", "{}").unwrap();
        let limits = Limits { quota_bytes, ram_bytes: None };
        let (rows, claims) = (store.load_pages(file).unwrap(), store.claims(file).unwrap());
        let (pool, _) = PagePool::open(&path, identity, *model.layout(), limits, rows, claims).unwrap();
        let engine = Engine::start(model, cpu, pool, file, store.clone(), durability, options).unwrap();
        Rig { engine, store, file, _directory: directory }
    }

    pub async fn create(&self, session: &str) {
        let new = NewSession { id: session.into(), tenant: "default".into(), ..NewSession::default() };
        self.store.create_session(new).await.unwrap();
    }

    /// Begins a turn after the session's first `keep` tokens.
    pub async fn begin(&self, session: &str, keep: usize, input: &[TokenId], ask: &Ask) -> Running {
        let before = self.store.session(session).await.unwrap();
        let turn = format!("{session}_{}", before.turns);
        let begin = BeginTurn {
            session: session.into(),
            turn: turn.clone(),
            fence: before.fence,
            keep_tokens: keep,
            tokens: input.to_vec(),
            record: "{}".into(),
            ..BeginTurn::default()
        };
        let row = self.store.begin_turn(begin).await.unwrap();
        let output_start = row.log_len;
        self.submit(row, turn, output_start, ask).await
    }

    /// Takes an interrupted turn over.
    pub async fn go_on(&self, session: &str, turn: &str, output_start: usize, ask: &Ask) -> Running {
        let row = self.store.take_over(session).await.unwrap();
        self.submit(row, turn.to_owned(), output_start, ask).await
    }

    /// The failure of a turn that is taken over.
    pub async fn resubmit(&self, session: &str, turn: &str, output_start: usize, ask: &Ask) -> EngineError {
        let running = self.go_on(session, turn, output_start, ask).await;
        self.failure(running).await
    }

    async fn submit(&self, row: SessionRow, turn: String, output_start: usize, ask: &Ask) -> Running {
        let spec = TurnSpec {
            session: row.id.clone(),
            turn: turn.clone(),
            fence: row.fence,
            log: self.store.token_log(&row.id).await.unwrap(),
            output_start,
            covered: row.kv_len,
            claim: row.leaf_slot,
            pinned: false,
            sampling: ask.sampling.clone(),
            max_tokens: ask.max_tokens,
            stop: ask.stop.clone(),
            realm: Default::default(),
            prompt_logprobs: ask.prompt_logprobs,
            shown: Vec::new(),
            grammar: ask.grammar.clone(),
            ignore_eos: ask.ignore_eos,
            priority: Priority::Interactive,
        };
        let (listener, events) = tokio::sync::mpsc::unbounded_channel();
        self.engine.submit(spec, listener).unwrap();
        Running { id: turn, session: row, events, answer: Answer::default() }
    }

    pub async fn finish(&self, mut running: Running) -> (Answer, Receipt) {
        let receipt = loop {
            if let Some(receipt) = running.next().await {
                break receipt;
            }
        };
        let finish = FinishTurn {
            session: running.session.id,
            turn: running.id,
            fence: running.session.fence,
            record: "{}".into(),
            ..FinishTurn::default()
        };
        let row = self.store.finish_turn(finish).await.unwrap();
        assert_eq!(row.log_len, running.answer.log_len);
        (running.answer, receipt)
    }

    /// The error that ends a turn.
    pub async fn failure(&self, mut running: Running) -> EngineError {
        loop {
            match running.events.recv().await.unwrap() {
                Event::Failed(error) => return error,
                Event::Finished(finish) => panic!("the turn went well: {finish:?}"),
                _ => {}
            }
        }
    }

    /// One turn of a new session.
    pub async fn answer(&self, session: &str, prompt: &[TokenId], ask: &Ask) -> (Answer, Receipt) {
        self.create(session).await;
        let running = self.begin(session, 0, prompt, ask).await;
        self.finish(running).await
    }

    /// The catalog's pages, whatever slots they are in.
    pub fn pages(&self) -> Vec<Page> {
        let page = |row: PageRow| (row.id, row.tokens, row.checksum);
        let mut pages: Vec<_> = self.store.load_pages(self.file).unwrap().into_iter().map(page).collect();
        pages.sort();
        pages
    }

    /// Pages of the same tokens hold the same bytes, and all full ones are in both catalogs. Which beginnings of a page
    /// are there besides depends on who came when, where sessions begin alike.
    pub fn assert_same_pages(&self, other: &Rig) {
        let (ours, theirs) = (self.pages(), other.pages());
        for (id, tokens, checksum) in &ours {
            match theirs.iter().find(|page| page.0 == *id) {
                Some(page) => assert_eq!((tokens, checksum), (&page.1, &page.2)),
                None => assert!(tokens.len() < PAGE_TOKENS, "nobody else has {tokens:?}"),
            }
        }
        let full = |pages: &[Page]| pages.iter().filter(|page| page.1.len() == PAGE_TOKENS).count();
        assert_eq!(full(&ours), full(&theirs));
    }
}

/// The files as a kill -9 at this moment would leave them: pages are written before the catalog names them, and so are copied after it.
pub fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let mut entries: Vec<_> = std::fs::read_dir(from).unwrap().map(Result::unwrap).collect();
    entries
        .sort_by_key(|entry| (entry.path().extension().is_some_and(|it| it == "pages"), entry.file_name()));
    for entry in entries {
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
        }
    }
    to
}
