//! Model files as they should not be: cut, flipped, spliced, with numbers that cannot be right. Whatever a file says, the
//! answer is a model or an error with words, never a panic, and memory stays within a small multiple of the file.
//!
//! `DORMOUSE_TEST_MUTATIONS` says how many mutations of each file are tried, `DORMOUSE_TEST_SEED` plays others.

#![allow(clippy::unwrap_used)]

mod allocations;
mod cases;
mod folder;
mod gguf;
mod mutations;
#[path = "../rig/mod.rs"]
mod rig;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use dormouse_kernels::{Cpu, KvDtype};
use dormouse_models::decoder::Decoder;
use dormouse_models::pack::{HeldBytes, PackedWeights};
use dormouse_models::{ChatTemplate, ModelError, ModelSource, Specials, Tokenizer};
use rig::Rig;

/// Memory that opening a file may take: so many times its size, and what tokenizers and templates take however small they
/// are (most of it is regular expressions).
const TIMES_SIZE: usize = 24;
const FIXED_BYTES: usize = 16 << 20;

struct Opened {
    source: ModelSource,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

/// Everything that `serve` does with a model's files before the first request, but for hashing and packing.
fn open(path: &Path) -> Result<Opened, ModelError> {
    let source = ModelSource::open(path)?;
    let config = source.config();
    // A description that is wrong does not keep the tokenizer from being looked at.
    let tokenizer = source.tokenizer();
    let (config, tokenizer) = (config?, tokenizer?);
    let tokenizer = tokenizer.limited_to(config.vocab)?;
    let template = source.chat_template(&tokenizer)?;
    HeldBytes::of(&source);
    Decoder::new(&source, &PackedWeights::without_contents(&source)?, config)?;
    Ok(Opened { source, tokenizer, template })
}

/// What a first request does.
fn answer(opened: &Opened) {
    let user = serde_json::json!({"role": "user", "content": "Hello <s> wörld\n\n 12345 \u{2581}"});
    let rendered = opened.template.render(&[user.as_object().unwrap().clone()], &[], true);
    for text in ["a b", "", &rendered.unwrap_or_default()] {
        for specials in [Specials::Parse, Specials::Literal] {
            // Some normalisers of the library fail on some texts: an error then, and a request's only.
            if let Ok(ids) = opened.tokenizer.encode(text, specials, true) {
                assert!(ids.iter().all(|id| opened.tokenizer.token_bytes(*id).is_some()));
            }
        }
    }
    let config = opened.source.config().unwrap();
    let packed = PackedWeights::in_memory(&opened.source).unwrap();
    let last = config.vocab as u32 - 1;
    let decoder = Decoder::new(&opened.source, &packed, config).unwrap();
    let cpu = Cpu::new(1).unwrap();
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let mut rig = Rig::new(&decoder, dtype, 8);
        rig.append(&cpu, &[0, last, 0]);
        rig.append(&cpu, &[last]);
    }
}

/// Opens the model at `path`, which has `size` bytes, and answers with it where that goes well. Panics, with `what` it was,
/// where a promise is broken.
fn hold_to_account(path: &Path, size: usize, what: &str) -> Result<(), String> {
    silence_the_library();
    let (opened, peak) = allocations::peak(|| catch_unwind(AssertUnwindSafe(|| open(path))));
    let opened = opened.unwrap_or_else(|_| panic!("{what}: opening panicked {}", LAST_PANIC.take()));
    assert!(
        peak <= TIMES_SIZE * size + FIXED_BYTES,
        "{what}: {peak} bytes were allocated for a file of {size} ({:?})",
        opened.as_ref().map(|_| ()).map_err(ToString::to_string)
    );
    let opened = opened.map_err(|error| error.to_string())?;
    catch_unwind(AssertUnwindSafe(|| answer(&opened)))
        .unwrap_or_else(|_| panic!("{what}: answering panicked {}", LAST_PANIC.take()));
    Ok(())
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// The tokenizers library panics on some files, which is caught where it is called. Its panics are told only where they are
/// not, and no memory is spent on telling where they come from.
fn silence_the_library() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.location().is_some_and(|place| place.file().contains("/tokenizers-")) {
                LAST_PANIC.replace(panic.to_string());
            } else {
                usual(panic);
            }
        }));
    });
}

/// Mutations of each file.
fn mutations() -> u64 {
    std::env::var("DORMOUSE_TEST_MUTATIONS").map_or(1500, |count| count.parse().unwrap())
}

fn seed() -> u64 {
    std::env::var("DORMOUSE_TEST_SEED").map_or(1, |seed| seed.parse().unwrap())
}
