//! API keys: who may ask, for whom, and how much. A key's secret is shown once; only its hash is stored.

use dormouse_store::{KeyRow, Store};
use serde::{Deserialize, Serialize};

use crate::api::{SessionError, Tenant};
use crate::ids;
use crate::records::{decode, encode};
use crate::runtime::Runtime;

/// What every secret begins with, so that people and scanners of leaked secrets know one when they see it.
pub const SECRET_PREFIX: &str = "dm_";

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Chat, completions, responses, embeddings, and the list of models.
    Inference,
    /// The tenant's sessions and conversations as objects.
    Sessions,
    /// The keys and metrics of the whole server, and all of the above for its own tenant.
    Admin,
}

impl Scope {
    pub const ALL: [Scope; 3] = [Scope::Inference, Scope::Sessions, Scope::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Scope::Inference => "inference",
            Scope::Sessions => "sessions",
            Scope::Admin => "admin",
        }
    }

    pub fn parse(text: &str) -> Option<Scope> {
        Scope::ALL.into_iter().find(|scope| scope.name() == text)
    }
}

/// A key to make.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub name: String,
    pub tenant: Tenant,
    pub scopes: Vec<Scope>,
    pub requests_per_minute: Option<u32>,
    /// Requests that may be on their way at once.
    pub concurrency: Option<u32>,
}

/// A key as it is shown: without its secret.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ApiKey {
    pub id: String,
    /// Always "api_key".
    pub object: &'static str,
    pub name: String,
    pub tenant: String,
    pub scopes: Vec<Scope>,
    pub requests_per_minute: Option<u32>,
    pub concurrency: Option<u32>,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub revoked_at: Option<u64>,
}

/// A key, and how to know its secret.
#[derive(Clone, Debug)]
pub struct KnownKey {
    pub key: ApiKey,
    /// [`hash_secret`] of its secret.
    pub hash: [u8; 32],
}

/// Secrets have 256 random bits, so there is nothing that a slow hash could protect.
pub fn hash_secret(secret: &str) -> [u8; 32] {
    blake3::derive_key("dormouse api key v1", secret.as_bytes())
}

impl NewKey {
    fn check(&self) -> Result<(), SessionError> {
        let invalid = |param: &str, message: String| {
            Err(SessionError::Invalid { param: param.into(), message: format!("{param}: {message}") })
        };
        let (name, tenant) = (&self.name, &self.tenant.0);
        let is_label = !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\' | '?' | '#'));
        if !(1..=100).contains(&name.chars().count())
            || !is_label
            || name.trim() != name
            || name.starts_with("key_")
        {
            return invalid(
                "name",
                format!(
                    "expected 1 to 100 characters without slashes, '?', '#', control characters or spaces around, and not \
                     beginning with 'key_', found {name:?}"
                ),
            );
        }
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if !(1..=64).contains(&tenant.len()) || !tenant.chars().all(is_plain) {
            return invalid(
                "tenant",
                format!("expected 1 to 64 letters, digits, '_', '-' or '.', found {tenant:?}"),
            );
        }
        if self.scopes.is_empty() {
            let names = Scope::ALL.map(Scope::name).join(", ");
            return invalid("scopes", format!("expected at least one of {names}"));
        }
        for (param, limit) in
            [("requests_per_minute", self.requests_per_minute), ("concurrency", self.concurrency)]
        {
            if limit == Some(0) {
                return invalid(param, "expected at least 1, or none for no limit, found 0".into());
            }
        }
        Ok(())
    }
}

fn known(row: KeyRow) -> Result<KnownKey, SessionError> {
    let key = ApiKey {
        id: row.id,
        object: "api_key",
        name: row.name,
        tenant: row.tenant,
        scopes: decode(&row.scopes)?,
        requests_per_minute: row.requests_per_minute,
        concurrency: row.concurrency,
        created_at: row.created_ms / 1000,
        revoked_at: row.revoked_ms.map(|at| at / 1000),
    };
    Ok(KnownKey { key, hash: row.hash })
}

/// Makes a key; answers it with its secret, which nobody can show again.
pub async fn create_key(store: &Store, new: NewKey) -> Result<(ApiKey, String), SessionError> {
    new.check()?;
    let mut random = [0u8; 32];
    getrandom::fill(&mut random)
        .map_err(|why| SessionError::Internal(format!("the system gave no random bits: {why}")))?;
    let secret = format!("{SECRET_PREFIX}{}", crate::records::hex(&random));
    let mut scopes = new.scopes;
    scopes.sort_by_key(|scope| *scope as u8);
    scopes.dedup();
    let row = KeyRow {
        id: ids::mint("key_")?,
        name: new.name,
        tenant: new.tenant.0,
        scopes: encode(&scopes)?,
        hash: hash_secret(&secret),
        requests_per_minute: new.requests_per_minute,
        concurrency: new.concurrency,
        created_ms: ids::now_ms(),
        revoked_ms: None,
    };
    store.create_key(row.clone()).await?;
    Ok((known(row)?.key, secret))
}

/// Every key, oldest first, revoked ones too.
pub async fn keys(store: &Store) -> Result<Vec<KnownKey>, SessionError> {
    store.keys().await?.into_iter().map(known).collect()
}

/// Takes a key back, by id or name. A key that was revoked before stays as it is.
pub async fn revoke_key(store: &Store, id_or_name: &str) -> Result<ApiKey, SessionError> {
    Ok(known(store.revoke_key(id_or_name, ids::now_ms()).await?)?.key)
}

impl Runtime {
    /// [`create_key`] in this runtime's database.
    pub async fn create_key(&self, new: NewKey) -> Result<(ApiKey, String), SessionError> {
        create_key(&self.inner.store, new).await
    }

    /// [`keys`] of this runtime's database.
    pub async fn keys(&self) -> Result<Vec<KnownKey>, SessionError> {
        keys(&self.inner.store).await
    }

    /// [`revoke_key`] in this runtime's database.
    pub async fn revoke_key(&self, id_or_name: &str) -> Result<ApiKey, SessionError> {
        revoke_key(&self.inner.store, id_or_name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dormouse_store::Durability;

    fn new(name: &str) -> NewKey {
        NewKey {
            name: name.into(),
            tenant: Tenant::default(),
            scopes: vec![Scope::Sessions, Scope::Inference, Scope::Sessions],
            requests_per_minute: Some(5),
            concurrency: None,
        }
    }

    #[tokio::test]
    async fn a_secret_is_known_by_its_hash_alone_and_a_revoked_name_is_free_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Durability::Process).unwrap();
        let (key, secret) = create_key(&store, new("ci")).await.unwrap();
        assert!(secret.starts_with(SECRET_PREFIX) && secret.len() == SECRET_PREFIX.len() + 64);
        assert_eq!(key.scopes, [Scope::Inference, Scope::Sessions]);
        assert!(matches!(create_key(&store, new("ci")).await, Err(SessionError::KeyNameTaken(_))));
        let found = keys(&store).await.unwrap();
        assert_eq!((found.len(), &found[0].key, found[0].hash), (1, &key, hash_secret(&secret)));
        let revoked = revoke_key(&store, "ci").await.unwrap();
        assert!(revoked.revoked_at.is_some());
        assert_eq!(revoke_key(&store, &key.id).await.unwrap(), revoked);
        assert!(matches!(revoke_key(&store, "ci").await, Err(SessionError::KeyNotFound(_))));
        let (again, other) = create_key(&store, new("ci")).await.unwrap();
        assert!(again.id != key.id && other != secret);
        store.close().await.unwrap();
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
        }
    }

    #[tokio::test]
    async fn what_a_key_may_be_is_checked_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Durability::Process).unwrap();
        let bad = [
            ("name", NewKey { name: "key_1".into(), ..new("") }),
            ("name", new("")),
            ("tenant", NewKey { tenant: Tenant("../x".into()), ..new("a") }),
            ("scopes", NewKey { scopes: Vec::new(), ..new("a") }),
            ("concurrency", NewKey { concurrency: Some(0), ..new("a") }),
        ];
        for (field, key) in bad {
            match create_key(&store, key).await {
                Err(SessionError::Invalid { param, .. }) => assert_eq!(param, field),
                other => panic!("{other:?}"),
            }
        }
    }
}
