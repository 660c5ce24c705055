//! What is written to the disk, by session and by day: users fear for their disks, and may look.
//!
//! A day's count lies in `meta`, beside the sequence number that every change rewrites anyway: counting writes no page more.

use rusqlite::{Connection, params};

use crate::StoreError;

const PREFIX: &str = "written_";

/// Adds what a commit writes. Days are counted since the epoch.
pub(crate) fn count(db: &Connection, session: &str, day: u64, bytes: u64) -> Result<(), StoreError> {
    if bytes == 0 {
        return Ok(());
    }
    db.prepare_cached("UPDATE sessions SET bytes_written = bytes_written + ?2 WHERE id = ?1")?
        .execute(params![session, bytes])?;
    db.prepare_cached(
        "INSERT INTO meta (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = value + ?2",
    )?
    .execute(params![name(day), bytes])?;
    Ok(())
}

/// Bytes written on each of the days from `first_day` on that have any, oldest first.
pub(crate) fn by_day(db: &Connection, first_day: u64) -> Result<Vec<(u64, u64)>, StoreError> {
    let mut statement =
        db.prepare_cached("SELECT name, value FROM meta WHERE name >= ?1 AND name < ?2 ORDER BY name")?;
    let (first, end) = (name(first_day), format!("{PREFIX}:"));
    let rows = statement.query_map([first, end], |row| Ok((row.get::<_, String>(0)?, row.get(1)?)))?;
    let mut found = Vec::new();
    for row in rows {
        let (name, bytes) = row?;
        found.extend(name.strip_prefix(PREFIX).and_then(|day| day.parse().ok()).map(|day: u64| (day, bytes)));
    }
    Ok(found)
}

/// Of one width, so that names are in the order of days.
fn name(day: u64) -> String {
    format!("{PREFIX}{day:010}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_apart_and_listed_from_the_asked_one_on() {
        let mut db = Connection::open_in_memory().unwrap();
        crate::schema::migrate(&mut db).unwrap();
        crate::schema::set_sequence(&db, 7).unwrap();
        for (day, bytes) in [(9, 5), (10, 100), (10, 20), (100, 3), (100, 0)] {
            count(&db, "sess_1", day, bytes).unwrap();
        }
        assert_eq!(by_day(&db, 10).unwrap(), [(10, 120), (100, 3)]);
        assert_eq!(by_day(&db, 0).unwrap().len(), 3);
        assert_eq!(by_day(&db, 101).unwrap(), []);
        assert_eq!(crate::schema::sequence(&db).unwrap(), 7);
    }
}
