//! API keys: whom they stand for and what they may do. Of a key's secret only the hash is known.

use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::checksum::RowChecksum;
use crate::{Store, StoreError};

/// One API key. Times are milliseconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyRow {
    pub id: String,
    /// Unique among the keys that are not revoked.
    pub name: String,
    pub tenant: String,
    /// JSON, the caller's.
    pub scopes: String,
    /// Of the secret.
    pub hash: [u8; 32],
    pub requests_per_minute: Option<u32>,
    /// Requests that may be on their way at once.
    pub concurrency: Option<u32>,
    pub created_ms: u64,
    pub revoked_ms: Option<u64>,
}

impl KeyRow {
    fn checksum(&self) -> u32 {
        let limit = |limit: Option<u32>| limit.map_or(-1, i64::from);
        RowChecksum::of("api_keys")
            .text(&self.id)
            .text(&self.name)
            .text(&self.tenant)
            .text(&self.scopes)
            .bytes(&self.hash)
            .number(limit(self.requests_per_minute))
            .number(limit(self.concurrency))
            .number(self.created_ms as i64)
            .number(self.revoked_ms.map_or(-1, |at| at as i64))
            .finish()
    }
}

const COLUMNS: &str =
    "id, name, tenant, scopes, hash, requests_per_minute, concurrency, created_ms, revoked_ms, checksum";

fn parse(row: &Row<'_>) -> Result<KeyRow, StoreError> {
    let key = KeyRow {
        id: row.get(0)?,
        name: row.get(1)?,
        tenant: row.get(2)?,
        scopes: row.get(3)?,
        hash: row.get(4)?,
        requests_per_minute: row.get(5)?,
        concurrency: row.get(6)?,
        created_ms: row.get(7)?,
        revoked_ms: row.get(8)?,
    };
    match key.checksum() == row.get::<_, u32>(9)? {
        true => Ok(key),
        false => Err(StoreError::Damaged(format!("the row of API key '{}' fails its checksum", key.id))),
    }
}

fn save(db: &Connection, key: &KeyRow) -> Result<(), StoreError> {
    db.execute(
        &format!(
            "INSERT INTO api_keys ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
             ON CONFLICT (id) DO UPDATE SET revoked_ms = ?9, checksum = ?10"
        ),
        params![
            key.id,
            key.name,
            key.tenant,
            key.scopes,
            key.hash,
            key.requests_per_minute,
            key.concurrency,
            key.created_ms,
            key.revoked_ms,
            key.checksum(),
        ],
    )?;
    Ok(())
}

/// Every key, oldest first.
pub(crate) fn all(db: &Connection) -> Result<Vec<KeyRow>, StoreError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT {COLUMNS} FROM api_keys ORDER BY created_ms, id"))?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(parse(row)?);
    }
    Ok(found)
}

/// By id, else by the name of a key that is not revoked.
fn find(db: &Connection, id_or_name: &str) -> Result<KeyRow, StoreError> {
    let found = db
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM api_keys WHERE id = ?1 OR (name = ?1 AND revoked_ms IS NULL)
             ORDER BY id = ?1 DESC LIMIT 1"
        ))?
        .query_row([id_or_name], |row| Ok(parse(row)))
        .optional()?;
    found.ok_or_else(|| StoreError::KeyNotFound(id_or_name.to_owned()))?
}

impl Store {
    /// Errors: `KeyNameTaken`.
    pub async fn create_key(&self, key: KeyRow) -> Result<(), StoreError> {
        self.write(move |db| match find(db, &key.name) {
            Err(StoreError::KeyNotFound(_)) => save(db, &key),
            Ok(_) => Err(StoreError::KeyNameTaken(key.name.clone())),
            Err(why) => Err(why),
        })
        .await
    }

    /// Every key, oldest first, revoked ones too.
    pub async fn keys(&self) -> Result<Vec<KeyRow>, StoreError> {
        self.read(all).await
    }

    /// The key's row with the time of its revocation; of a key that was revoked before, the earlier time.
    /// Errors: `KeyNotFound`.
    pub async fn revoke_key(&self, id_or_name: &str, now_ms: u64) -> Result<KeyRow, StoreError> {
        let id_or_name = id_or_name.to_owned();
        self.write(move |db| {
            let mut key = find(db, &id_or_name)?;
            key.revoked_ms.get_or_insert(now_ms);
            save(db, &key)?;
            Ok(key)
        })
        .await
    }
}
