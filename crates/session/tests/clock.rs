//! A clock that is wrong, or jumps: nothing expires before its time has passed by the clock that is there.

mod common;

use common::{create, open_with, say, tenant};
use dormouse_session::{CreateSession, Runtime, RuntimeOptions, SessionError};

const HOUR: i64 = 3600;

fn open_at(directory: &std::path::Path, clock_offset_seconds: i64) -> Runtime {
    let options = RuntimeOptions { clock_offset_seconds, ..RuntimeOptions::default() };
    open_with(directory, "smollm2", [1; 32], None, options)
}

#[tokio::test]
async fn a_session_expires_by_the_clock_that_is_there_and_one_without_a_limit_never() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open_at(directory.path(), 0);
    let brief = CreateSession { ttl_seconds: Some(2 * HOUR as u64), ..CreateSession::default() };
    let brief = runtime.create(&tenant(), brief).await.unwrap().id;
    let lasting = create(&runtime).await.id;
    runtime.shutdown().await;
    // The clock jumps back by a month: what was written in its future waits longer, and is used as ever.
    let runtime = open_at(directory.path(), -30 * 24 * HOUR);
    assert_eq!(runtime.sweep().await.unwrap(), 0);
    say(&runtime, &lasting, "Hello", 2).await;
    assert_eq!(runtime.get(&tenant(), &brief).await.unwrap().id, brief);
    runtime.shutdown().await;
    // And forward by a day.
    let runtime = open_at(directory.path(), 24 * HOUR);
    say(&runtime, &lasting, "Hello again", 2).await;
    assert_eq!(runtime.sweep().await.unwrap(), 1);
    let gone = runtime.get(&tenant(), &brief).await;
    assert!(matches!(gone, Err(SessionError::SessionNotFound(_))), "{gone:?}");
    assert_eq!(runtime.get(&tenant(), &lasting).await.unwrap().turns, 2);
}
