//! `DORMOUSE_FAULT`: what tests want to go wrong, separated by commas and read once, at the start.
//!
//! | fault | what happens |
//! |---|---|
//! | `engine-panic-in-step:N` | the engine thread panics in its step N |
//! | `engine-panic-every-steps:N` | it panics in every Nth step |
//! | `compute-panic-in-step:N` | a compute thread panics in step N |
//! | `slow-step:N:MILLISECONDS` | step N takes as much longer |
//! | `commit-delay:MILLISECONDS` | every commit waits as long before it syncs its first byte |
//! | `page-in-delay:MILLISECONDS` | every KV page that has to come from disk takes as much longer |
//! | `clock-offset:SECONDS` | the clock is wrong by as much; may be negative |

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Nothing, unless a test says so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    pub engine: dormouse_engine::Faults,
    pub clock_offset_seconds: i64,
}

impl Faults {
    pub fn from_environment() -> Result<Faults> {
        match std::env::var("DORMOUSE_FAULT") {
            Ok(text) => Faults::parse(&text).with_context(|| format!("DORMOUSE_FAULT={text}")),
            Err(_) => Ok(Faults::default()),
        }
    }

    fn parse(text: &str) -> Result<Faults> {
        let mut faults = Faults::default();
        for fault in text.split(',').filter(|fault| !fault.is_empty()) {
            let parts: Vec<&str> = fault.split(':').collect();
            let engine = &mut faults.engine;
            match parts[..] {
                ["engine-panic-in-step", step] => engine.panic_in_step = Some(number(step)?),
                ["engine-panic-every-steps", steps] => engine.panic_every_steps = Some(number(steps)?),
                ["compute-panic-in-step", step] => engine.compute_panic_in_step = Some(number(step)?),
                ["slow-step", step, delay] => engine.slow_step = Some((number(step)?, milliseconds(delay)?)),
                ["commit-delay", delay] => engine.commit_delay = milliseconds(delay)?,
                ["page-in-delay", delay] => engine.page_in_delay = milliseconds(delay)?,
                ["clock-offset", seconds] => faults.clock_offset_seconds = number(seconds)?,
                _ => bail!("'{fault}' is no fault that can be asked for"),
            }
        }
        Ok(faults)
    }
}

fn number<T: FromStr>(text: &str) -> Result<T> {
    text.parse().ok().with_context(|| format!("expected a number, found '{text}'"))
}

fn milliseconds(text: &str) -> Result<Duration> {
    Ok(Duration::from_millis(number(text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_and_mistakes_in_them_are_named() {
        let faults = Faults::parse("engine-panic-in-step:5,slow-step:2:1500,clock-offset:-60").unwrap();
        assert_eq!(faults.engine.panic_in_step, Some(5));
        assert_eq!(faults.engine.slow_step, Some((2, Duration::from_millis(1500))));
        assert_eq!(faults.clock_offset_seconds, -60);
        assert_eq!(Faults::parse("").unwrap(), Faults::default());
        assert!(Faults::parse("engine-panic").unwrap_err().to_string().contains("engine-panic"));
        assert!(Faults::parse("commit-delay:soon").unwrap_err().to_string().contains("soon"));
    }
}
