//! The engine over a device: whatever happens to device memory and to the process, sessions go on with the same tokens. With the
//! feature `cuda`, a CUDA device, or the emulated one that `scripts/check_cuda` brings, with a model small enough for it; with
//! `metal` alone, the same code as on Metal over candle's CPU device.

#![cfg(any(feature = "cuda", feature = "metal"))]
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use dormouse_engine::{EngineError, Sampling};
use dormouse_kernels::KvDtype;
use dormouse_kv::Realm;
use dormouse_models::{Device, Model};

#[cfg(feature = "cuda")]
const KV_DTYPES: &[KvDtype] = &[KvDtype::F16, KvDtype::Q8_0];
#[cfg(not(feature = "cuda"))]
const KV_DTYPES: &[KvDtype] = &[KvDtype::F16];

#[cfg(feature = "cuda")]
fn device(budget_bytes: Option<u64>) -> Device {
    let opened = Device::open(dormouse_models::DeviceChoice::Cuda(0), budget_bytes);
    opened.unwrap_or_else(|error| panic!("{error}; scripts/check_cuda runs this without a device")).0
}

#[cfg(not(feature = "cuda"))]
fn device(budget_bytes: Option<u64>) -> Device {
    Device::Metal(dormouse_models::metal::MetalDevice::over(candle_core::Device::Cpu, budget_bytes))
}

/// The model on the device, whose pages may take the room of so many.
fn on_device(pages: Option<u64>, kv_dtype: KvDtype) -> Arc<Model> {
    let open = |budget_bytes| model_on(&device(budget_bytes), CONTEXT, kv_dtype);
    match pages {
        None => open(None),
        Some(pages) => open(Some(pages * open(None).layout().page_bytes() as u64)),
    }
}

fn rig(directory: tempfile::TempDir, model: &Arc<Model>) -> Rig {
    Rig::over(directory, PLAIN, Arc::clone(model), 1 << 30)
}

fn new_rig(model: &Arc<Model>) -> Rig {
    rig(tempfile::tempdir().unwrap(), model)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stopped_or_was_killed_in_mid_answer_goes_on_with_the_same_tokens() {
    for &kv_dtype in KV_DTYPES {
        let model = on_device(None, kv_dtype);
        let (prompt, ask) = (prose(1, 100), greedy(36));
        let (expected, _) = new_rig(&model).answer("s", &prompt, &ask).await;
        assert_eq!(expected.tokens.len(), 36);

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let first = rig(directory, &model);
        first.create("s").await;
        let mut running = first.begin("s", 0, &prompt, &ask).await;
        let turn = running.id.clone();
        while running.said() < 28 {
            running.next().await;
        }
        let killed = copy(&path);
        first.engine.shutdown().await;
        assert!(matches!(first.failure(running).await, EngineError::Stopped));
        let stopped = copy(&path);
        drop(first);

        for (directory, most_recomputed) in [(killed, 64), (stopped, 0)] {
            let again = rig(directory, &model);
            let running = again.go_on("s", &turn, prompt.len(), &ask).await;
            let (answer, receipt) = again.finish(running).await;
            assert_eq!(answer.tokens, expected.tokens, "{kv_dtype:?}");
            assert_eq!(answer.texts, expected.texts);
            assert!(
                receipt.restored_tokens >= 64 && receipt.recomputed_tokens <= most_recomputed,
                "{receipt:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_outgrow_the_device_together_say_what_each_says_alone() {
    let plenty = on_device(None, KvDtype::F16);
    let alone = new_rig(&plenty);
    let mut expected = Vec::new();
    for n in 0..4 {
        expected.push(alone.answer(&format!("s{n}"), &prose(n, 70 + 20 * n), &greedy(6)).await.0.tokens);
    }
    // Three pages: the longest session's, and never two sessions'.
    let rig = new_rig(&on_device(Some(3), KvDtype::F16));
    let mut running = Vec::new();
    for n in 0..4 {
        let session = format!("s{n}");
        rig.create(&session).await;
        running.push(rig.begin(&session, 0, &prose(n, 70 + 20 * n), &greedy(6)).await);
    }
    for (turn, expected) in running.into_iter().zip(&expected) {
        assert_eq!(&rig.finish(turn).await.0.tokens, expected);
    }
    assert_eq!(rig.pages(), alone.pages(), "and their pages hold the same bytes");
}

/// With log-probabilities all logits come to the host; without them, tokens alone, but for steps that others share.
#[tokio::test(flavor = "multi_thread")]
async fn likeliest_tokens_are_the_same_whether_the_device_or_the_host_finds_them() {
    let rig = new_rig(&on_device(None, KvDtype::F16));
    let (prompt, mut ask) = (prose(9, 50), greedy(20));
    let (by_device, _) = rig.answer("device", &prompt, &ask).await;
    ask.sampling.logprobs = Some(0);
    assert_eq!(rig.answer("host", &prompt, &ask).await.0.tokens, by_device.tokens);
    ask.sampling = Sampling { seed: 7, ..Sampling::default() };
    rig.create("draws").await;
    rig.create("together").await;
    let draws = rig.begin("draws", 0, &prose(10, 40), &ask).await;
    let together = rig.begin("together", 0, &prompt, &greedy(20)).await;
    assert_eq!(rig.finish(together).await.0.tokens, by_device.tokens);
    assert_eq!(rig.finish(draws).await.0.tokens.len(), 20);
}

/// Copies on write, rewound and parked pages, and slots that are used again.
#[tokio::test(flavor = "multi_thread")]
async fn pages_that_change_behind_the_devices_back_are_read_again() {
    let model = on_device(None, KvDtype::F16);
    let (rig, fresh) = (new_rig(&model), new_rig(&model));
    let prompt = prose(3, 90);
    rig.answer("s", &prompt, &greedy(5)).await;
    // Others that begin alike, in the middle of a page.
    for (name, keep) in [("fork", 80), ("other", 30)] {
        let input = [&prompt[..keep], &prose(4, 40)].concat();
        let (got, _) = rig.answer(name, &input, &greedy(5)).await;
        let (expected, _) = fresh.answer(name, &input, &greedy(5)).await;
        assert_eq!(got.tokens, expected.tokens, "{name}");
    }
    let log = rig.store.token_log("s").await.unwrap();
    rig.engine.park(Realm::default(), log.clone()).await.unwrap();
    let turn = rig.begin("s", 70, &prose(5, 30), &greedy(5)).await;
    let (got, receipt) = rig.finish(turn).await;
    assert!(receipt.restored_tokens >= 64, "{receipt:?}");
    let input = [&log[..70], &prose(5, 30)].concat();
    assert_eq!(got.tokens, fresh.answer("s", &input, &greedy(5)).await.0.tokens, "rewound");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_copied_to_where_another_one_was_is_not_taken_for_it() {
    let model = on_device(None, KvDtype::F16);
    let slot_bytes = (model.layout().page_bytes() as u64).next_multiple_of(4096);
    // Three pages on disk: the second session takes what the first one had, and the third one's copy the rest.
    let rig = Rig::over(tempfile::tempdir().unwrap(), PLAIN, Arc::clone(&model), 3 * slot_bytes);
    rig.answer("first", &prose(6, 90), &greedy(2)).await;
    rig.answer("second", &prose(7, 90), &greedy(2)).await;
    let input = [&prose(7, 80)[..], &prose(8, 20)].concat();
    let (got, receipt) = rig.answer("third", &input, &greedy(5)).await;
    assert_eq!(receipt.restored_tokens, 80);
    assert!(rig.engine.stats().await.unwrap().kv.copies_on_write > 0);
    assert_eq!(got.tokens, new_rig(&model).answer("third", &input, &greedy(5)).await.0.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_the_device_cannot_hold_fails_with_what_to_do_and_those_beside_it_go_on() {
    let rig = new_rig(&on_device(Some(1), KvDtype::F16));
    rig.create("long").await;
    rig.create("short").await;
    // It outgrows the device while both decode.
    let long = rig.begin("long", 0, &prose(1, 60), &greedy(9)).await;
    let short = rig.begin("short", 0, &prose(2, 30), &greedy(9)).await;
    let error = rig.failure(long).await;
    assert!(matches!(&error, EngineError::Device(why) if why.contains("--device-budget")), "{error}");
    assert_eq!(rig.finish(short).await.0.tokens.len(), 9);
}
