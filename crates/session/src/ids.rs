//! Identifiers and time.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::SessionError;

/// `prefix` and 128 random bits in hexadecimal.
pub(crate) fn mint(prefix: &str) -> Result<String, SessionError> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)
        .map_err(|why| SessionError::Internal(format!("the system gave no random bits: {why}")))?;
    Ok(format!("{prefix}{:032x}", u128::from_be_bytes(random)))
}

/// The id of a turn's answer among the items of its session: that of the turn under another prefix, so that whoever
/// reads the answer's stream knows it, also after a crash.
pub(crate) fn item_of(turn: &str) -> String {
    format!("item_{}", turn.strip_prefix("turn_").unwrap_or(turn))
}

/// A seed for sessions and turns that name none.
pub(crate) fn random_seed() -> Result<u64, SessionError> {
    let mut random = [0u8; 8];
    getrandom::fill(&mut random)
        .map_err(|why| SessionError::Internal(format!("the system gave no random bits: {why}")))?;
    // Below 2^53: exact in every client's JSON numbers.
    Ok(u64::from_be_bytes(random) >> 11)
}

/// How far the clock is wrong, in milliseconds, where a test wants it to be.
static CLOCK_OFFSET_MS: AtomicI64 = AtomicI64::new(0);

pub(crate) fn shift_clock(seconds: i64) {
    CLOCK_OFFSET_MS.store(seconds.saturating_mul(1000), Ordering::Relaxed);
}

/// Milliseconds since the epoch; 0 on a clock that stands before it.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    now.saturating_add_signed(CLOCK_OFFSET_MS.load(Ordering::Relaxed))
}

/// The day, counted since the epoch, as commits count it.
pub(crate) fn today() -> u64 {
    const DAY_SECONDS: u64 = 24 * 3600;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() / DAY_SECONDS)
}

/// The seed of choice `index` of a request: choice 0 has the request's own.
pub(crate) fn choice_seed(seed: u64, index: usize) -> u64 {
    match index {
        0 => seed,
        _ => {
            let mut hasher = blake3::Hasher::new_derive_key("dormouse choice seed v1");
            hasher.update(&seed.to_le_bytes()).update(&(index as u64).to_le_bytes());
            let mut bytes = [0u8; 8];
            bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
            u64::from_le_bytes(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_have_128_random_bits_and_never_repeat() {
        let (one, two) = (mint("sess_").unwrap(), mint("sess_").unwrap());
        assert_eq!((one.len(), &one[..5]), (37, "sess_"));
        assert_ne!(one, two);
    }

    #[test]
    fn choices_differ_in_their_seeds_and_the_first_has_the_requests() {
        assert_eq!(choice_seed(7, 0), 7);
        assert_ne!(choice_seed(7, 1), choice_seed(7, 2));
        assert_ne!(choice_seed(7, 1), choice_seed(8, 1));
    }
}
