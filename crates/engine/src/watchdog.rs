//! Notices work that does not end, and says so once; health says so as long as it lasts.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::condition::{Condition, Pulse};

/// Between two looks: a quarter of the limit, within these.
const LOOK_LEAST: Duration = Duration::from_millis(50);
const LOOK_MOST: Duration = Duration::from_secs(5);

/// Watches an engine's threads from one of its own, until the engine is gone.
pub(crate) fn watch(model: String, condition: &Arc<Condition>) -> std::io::Result<()> {
    let condition = Arc::downgrade(condition);
    thread::Builder::new().name("dormouse-watchdog".into()).spawn(move || look(&model, &condition))?;
    Ok(())
}

fn look(model: &str, condition: &Weak<Condition>) {
    let (mut engine, mut disk, mut pager) = (None, None, None);
    while let Some(condition) = condition.upgrade() {
        let limit = condition.stuck_after();
        compare(model, &condition, &condition.engine, &mut engine);
        compare(model, &condition, &condition.disk, &mut disk);
        compare(model, &condition, &condition.pager, &mut pager);
        drop(condition);
        thread::sleep((limit / 4).clamp(LOOK_LEAST, LOOK_MOST));
    }
}

/// `told`: the beginning of the work that was found stuck, and reported.
fn compare(model: &str, condition: &Condition, pulse: &Pulse, told: &mut Option<u64>) {
    let overdue = pulse.overdue(condition.stuck_after());
    let since = overdue.as_ref().map(|overdue| overdue.since);
    if since == *told {
        return;
    }
    if told.is_some() {
        tracing::warn!(model, "what had lasted too long is over");
    }
    if let Some(overdue) = overdue {
        condition.stuck.fetch_add(1, Ordering::Relaxed);
        tracing::error!(model, "{overdue}; requests wait for it");
    }
    *told = since;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::Work;

    #[test]
    fn stuck_work_is_reported_once() {
        let condition = Condition::new(Duration::ZERO);
        let mut told = None;
        let mut look = || compare("m", &condition, &condition.engine, &mut told);
        look();
        condition.engine.begin(Work::Step { rows: 1 });
        look();
        look();
        assert_eq!(condition.stuck.load(Ordering::Relaxed), 1);
        condition.engine.end();
        look();
        thread::sleep(Duration::from_micros(10));
        condition.engine.begin(Work::Pages);
        look();
        assert_eq!(condition.stuck.load(Ordering::Relaxed), 2);
    }
}
