//! A runtime over a real model, as the binary puts it together.

#![allow(clippy::unwrap_used, dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_engine::{Engine, Sampling, Speculation};
use dormouse_kernels::{Cpu, KvDtype};
use dormouse_kv::{Identity, Limits, PagePool};
use dormouse_models::Model;
use dormouse_models::model::LoadOptions;
use dormouse_session::*;
use dormouse_store::Store;
use serde_json::{Map, Value};

fn model_path() -> PathBuf {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    path
}

pub fn open(directory: &Path) -> Runtime {
    open_as(directory, [1; 32], None)
}

/// `weights` stands for the weights' identity, so that a test can replace the model.
pub fn open_as(directory: &Path, weights: [u8; 32], context: Option<usize>) -> Runtime {
    open_named(directory, "smollm2", weights, context)
}

pub fn open_named(directory: &Path, name: &str, weights: [u8; 32], context: Option<usize>) -> Runtime {
    open_with(directory, name, weights, context, RuntimeOptions::default())
}

pub fn open_with(
    directory: &Path,
    name: &str,
    weights: [u8; 32],
    context: Option<usize>,
    runtime: RuntimeOptions,
) -> Runtime {
    let store = Store::open(directory, dormouse_store::Durability::Process).unwrap();
    let cpu = Cpu::new(2).unwrap();
    let options = LoadOptions {
        name: name.into(),
        context,
        kv_dtype: KvDtype::F16,
        weights_hash: weights,
        device_numerics: cpu.numerics(),
        pack_folders: Vec::new(),
    };
    let model = Arc::new(Model::load(&model_path(), options, &mut |_, _| {}).unwrap());
    let identity = Identity { fingerprint: model.fingerprint(), tenant_salt: [7; 32] };
    let path = directory.join(format!("{}.pages", weights[0]));
    let file = store.page_file(&path, identity.fingerprint, "default", "{}").unwrap();
    let limits = Limits { quota_bytes: 1 << 30, ram_bytes: None };
    let (rows, claims) = (store.load_pages(file).unwrap(), store.claims(file).unwrap());
    let (pool, _) = PagePool::open(&path, identity, *model.layout(), limits, rows, claims).unwrap();
    let durability = dormouse_store::Durability::Process;
    let engine =
        Engine::start(model, cpu, pool, file, store.clone(), durability, Speculation::Ngram).unwrap();
    Runtime::open(store, vec![engine], runtime).unwrap()
}

pub fn tenant() -> Tenant {
    Tenant::default()
}

pub fn message(role: &str, content: &str) -> Message {
    Map::from_iter([("role".to_owned(), Value::from(role)), ("content".to_owned(), Value::from(content))])
}

pub fn generation(max_tokens: usize) -> Generation {
    let sampling = Sampling { temperature: 0.0, seed: 3, ..Sampling::default() };
    Generation { sampling, max_tokens: Some(max_tokens), ..Generation::default() }
}

pub fn request(text: &str, max_tokens: usize) -> TurnRequest {
    TurnRequest {
        input: vec![message("user", text)],
        tools: None,
        generation: generation(max_tokens),
        background: false,
    }
}

pub fn chat(messages: Vec<Message>, max_tokens: usize) -> ChatRequest {
    ChatRequest {
        cache_salt: None,
        model: None,
        messages,
        session: None,
        tools: None,
        generation: generation(max_tokens),
        n: 1,
        store: true,
    }
}

/// All events of a stream, and the turn as it ended.
pub async fn collect(mut stream: TurnStream) -> (Vec<TurnEvent>, Turn) {
    let mut events = Vec::new();
    while let Some(event) = stream.events.recv().await {
        events.push(event);
    }
    let turn = match &events.last().unwrap().body {
        TurnEventBody::Completed { turn }
        | TurnEventBody::Cancelled { turn }
        | TurnEventBody::Failed { turn } => (**turn).clone(),
        other => panic!("the stream ended with {other:?}"),
    };
    (events, turn)
}

/// What a client sees of events: numbers and text.
pub fn shown(events: &[TurnEvent]) -> Vec<(u64, String)> {
    let text = |body: &TurnEventBody| match body {
        TurnEventBody::Delta { delta, token, .. } => format!("{token} {delta}"),
        body => serde_json::to_value(body).unwrap()["type"].to_string(),
    };
    events.iter().map(|event| (event.sequence_number, text(&event.body))).collect()
}

pub async fn say(runtime: &Runtime, session: &str, text: &str, max_tokens: usize) -> Turn {
    let stream = runtime.start_turn(&tenant(), session, request(text, max_tokens)).await.unwrap();
    collect(stream).await.1
}

pub async fn create(runtime: &Runtime) -> Session {
    runtime.create(&tenant(), CreateSession::default()).await.unwrap()
}

/// The files as a kill -9 at this moment would leave them.
pub fn snapshot(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
        }
    }
    to
}
