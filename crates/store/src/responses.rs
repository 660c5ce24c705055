//! Responses: the ids under which the Responses API knows turns, and what their requests said.

use rusqlite::{Connection, OptionalExtension, params};

use crate::checksum::RowChecksum;
use crate::history::ItemRow;
use crate::{Store, StoreError, history, sessions};

/// One response: a turn of a session, and what its object repeats of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseRow {
    pub id: String,
    pub tenant: String,
    pub session: String,
    pub turn: String,
    pub created_ms: u64,
    /// JSON, the server's.
    pub record: String,
}

impl ResponseRow {
    fn checksum(&self) -> u32 {
        RowChecksum::of("responses")
            .text(&self.id)
            .text(&self.tenant)
            .text(&self.session)
            .text(&self.turn)
            .number(self.created_ms as i64)
            .text(&self.record)
            .finish()
    }
}

impl Store {
    /// A tenant's response; None when there is none of this id.
    pub async fn response(&self, tenant: &str, id: &str) -> Result<Option<ResponseRow>, StoreError> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| {
            let found = select(db, "tenant = ?1 AND id = ?2", &[&tenant, &id])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Whether any response is a turn of this session.
    pub async fn has_responses(&self, session: &str) -> Result<bool, StoreError> {
        let session = session.to_owned();
        self.read(move |db| {
            let mut statement =
                db.prepare_cached("SELECT EXISTS (SELECT 1 FROM responses WHERE session = ?1)")?;
            Ok(statement.query_row([&session], |row| row.get(0))?)
        })
        .await
    }

    /// Forgets a response's id; its turn stays. False when there is none of this id.
    pub async fn delete_response(&self, tenant: &str, id: &str) -> Result<bool, StoreError> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.write(move |db| {
            let mut statement = db.prepare_cached("DELETE FROM responses WHERE tenant = ?1 AND id = ?2")?;
            Ok(statement.execute([&tenant, &id])? > 0)
        })
        .await
    }

    /// An item of any of the tenant's sessions; forks of a session hold the same items, and each is as good.
    pub async fn find_item(&self, tenant: &str, id: &str) -> Result<Option<ItemRow>, StoreError> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| {
            let holder: Option<String> = db
                .prepare_cached(
                    "SELECT sessions.id FROM items JOIN sessions ON sessions.id = items.session
                     WHERE items.id = ?1 AND sessions.tenant = ?2 ORDER BY sessions.id LIMIT 1",
                )?
                .query_row([&id, &tenant], |row| row.get(0))
                .optional()?;
            let Some(holder) = holder else { return Ok(None) };
            let items = history::items(db, &sessions::load(db, &holder)?)?;
            Ok(items.into_iter().find(|item| item.id == id))
        })
        .await
    }
}

fn select(
    db: &Connection,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<ResponseRow>, StoreError> {
    let mut statement = db.prepare_cached(&format!(
        "SELECT id, tenant, session, turn, created_ms, record, checksum FROM responses WHERE {condition} ORDER BY id"
    ))?;
    let mut rows = statement.query(values)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let response = ResponseRow {
            id: row.get(0)?,
            tenant: row.get(1)?,
            session: row.get(2)?,
            turn: row.get(3)?,
            created_ms: row.get(4)?,
            record: row.get(5)?,
        };
        if response.checksum() != row.get::<_, u32>(6)? {
            return Err(StoreError::Damaged(format!("response {} fails its checksum", response.id)));
        }
        found.push(response);
    }
    Ok(found)
}

pub(crate) fn put(db: &Connection, response: &ResponseRow) -> Result<(), StoreError> {
    db.prepare_cached(
        "INSERT INTO responses (id, tenant, session, turn, created_ms, record, checksum)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?
    .execute(params![
        response.id,
        response.tenant,
        response.session,
        response.turn,
        response.created_ms,
        response.record,
        response.checksum(),
    ])?;
    Ok(())
}

/// Forgets the responses of a session whose turns are gone.
pub(crate) fn forget_lost_turns(db: &Connection, session: &str) -> Result<(), StoreError> {
    db.prepare_cached(
        "DELETE FROM responses WHERE session = ?1 AND turn NOT IN (SELECT id FROM turns WHERE session = ?1)",
    )?
    .execute([session])?;
    Ok(())
}

/// Checks every response.
pub(crate) fn check(db: &Connection) -> Result<(), StoreError> {
    select(db, "1 = 1", &[]).map(|_| ())
}
