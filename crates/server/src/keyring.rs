//! The keys that the server knows, in memory: every request looks at them, and a change counts from the next one on.

use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use dormouse_session::keys::{SECRET_PREFIX, hash_secret};
use dormouse_session::{KnownKey, Runtime, SessionError};
use subtle::ConstantTimeEq;

use crate::caller::Caller;
use crate::error::ApiError;
use crate::limits::Limits;

/// All keys of a server.
pub struct Keyring {
    /// Of the key that the server was started with, if any: its owner's.
    own: Option<[u8; 32]>,
    /// Requests without a key are refused.
    required: bool,
    keys: RwLock<Vec<Arc<Key>>>,
    /// Held while keys are changed, so that what is in memory is what was stored last.
    changing: tokio::sync::Mutex<()>,
}

/// A key that is not revoked.
struct Key {
    known: KnownKey,
    limits: Limits,
}

/// Who a request comes from.
pub struct Admitted {
    pub caller: Caller,
    key: Option<Arc<Key>>,
}

impl Admitted {
    /// The limits of the caller's key.
    pub fn limits(&self) -> Option<&Limits> {
        self.key.as_ref().map(|key| &key.limits)
    }
}

impl Keyring {
    /// `stored`: every key of the database.
    pub fn new(own_secret: Option<&str>, required: bool, stored: Vec<KnownKey>) -> Keyring {
        let keyring = Keyring {
            own: own_secret.map(hash_secret),
            required,
            keys: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
        };
        keyring.replace(stored);
        keyring
    }

    /// Keys that are still there keep what is counted of their limits.
    fn replace(&self, stored: Vec<KnownKey>) {
        // A panic between reading and writing leaves the keys as they were.
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let key = |known: KnownKey| match keys.iter().find(|key| key.known.key.id == known.key.id) {
            Some(key) => Arc::clone(key),
            None => Arc::new(Key { limits: Limits::of(&known.key), known }),
        };
        *keys = stored.into_iter().filter(|known| known.key.revoked_at.is_none()).map(key).collect();
    }

    /// Changes the keys of the runtime's database by awaiting `change`; when it returns, requests meet the keys as they are then.
    /// Whoever asked for it may leave: the change is carried to its end.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Keyring>,
        runtime: &Runtime,
        change: impl Future<Output = Result<T, SessionError>> + Send + 'static,
    ) -> Result<T, SessionError> {
        let (keyring, runtime) = (Arc::clone(self), runtime.clone());
        let changed = tokio::spawn(async move {
            let _alone = keyring.changing.lock().await;
            let outcome = change.await?;
            keyring.replace(runtime.keys().await?);
            Ok(outcome)
        });
        changed
            .await
            .map_err(|why| SessionError::Internal(format!("the keys could not be changed: {why}")))?
    }

    /// Whose the key of this request is. Clients that insist on sending some key may send any where none is needed, but
    /// one that looks like ours must be one of ours. Errors: 401.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Admitted, ApiError> {
        let Some(secret) = bearer(headers) else {
            return match self.required {
                false => Ok(Admitted { caller: Caller::owner(), key: None }),
                true => Err(unauthorized("this server needs an API key")),
            };
        };
        let hash = hash_secret(secret);
        if self.own.is_some_and(|own| own.ct_eq(&hash).into()) {
            return Ok(Admitted { caller: Caller::owner(), key: None });
        }
        // Every key is compared, and each in constant time: how long it takes tells nothing of any of them.
        let mut found = None;
        for key in self.keys.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if key.known.hash.ct_eq(&hash).into() {
                found = Some(Arc::clone(key));
            }
        }
        match found {
            Some(key) => Ok(Admitted { caller: Caller::of(&key.known.key), key: Some(key) }),
            None if self.required || secret.starts_with(SECRET_PREFIX) => {
                Err(unauthorized("the API key is none of this server's, or was revoked"))
            }
            None => Ok(Admitted { caller: Caller::owner(), key: None }),
        }
    }
}

fn unauthorized(what: &str) -> ApiError {
    let message = format!("{what}: send the header 'Authorization: Bearer KEY'");
    ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes)?;
    let (scheme, secret) = value.split_at_checked(7)?;
    let secret = std::str::from_utf8(secret).ok()?.trim();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !secret.is_empty()).then_some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dormouse_session::{ApiKey, Scope};

    fn known(id: &str, secret: &str, revoked_at: Option<u64>) -> KnownKey {
        let key = ApiKey {
            id: id.into(),
            object: "api_key",
            name: id.into(),
            tenant: format!("tenant of {id}"),
            scopes: vec![Scope::Inference],
            requests_per_minute: Some(1),
            concurrency: None,
            created_at: 0,
            revoked_at,
        };
        KnownKey { key, hash: hash_secret(secret) }
    }

    fn tenant(keyring: &Keyring, authorization: Option<&str>) -> Result<String, u16> {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        keyring.admit(&headers).map(|it| it.caller.tenant.0).map_err(|error| error.status.as_u16())
    }

    fn owner() -> Result<String, u16> {
        Ok("default".into())
    }

    #[test]
    fn where_a_key_is_required_only_a_right_one_passes() {
        let keys = vec![known("key_1", "dm_one", None), known("key_2", "dm_two", Some(5))];
        let keyring = Keyring::new(Some("mine"), true, keys);
        assert_eq!(tenant(&keyring, Some("Bearer dm_one")), Ok("tenant of key_1".into()));
        assert_eq!(tenant(&keyring, Some("bearer  mine ")), owner());
        for wrong in ["Bearer dm_two", "Bearer dm_on", "Bearer ", "Basic dm_one", "Bearer key_1", "dm_one"] {
            assert_eq!(tenant(&keyring, Some(wrong)), Err(401), "{wrong}");
        }
        assert_eq!(tenant(&keyring, None), Err(401));
    }

    #[test]
    fn where_none_is_required_clients_may_send_any_but_not_a_revoked_one() {
        let keyring = Keyring::new(None, false, vec![known("key_1", "dm_one", None)]);
        for harmless in [None, Some("Bearer none"), Some("Bearer sk-something")] {
            assert_eq!(tenant(&keyring, harmless), owner());
        }
        assert_eq!(tenant(&keyring, Some("Bearer dm_one")), Ok("tenant of key_1".into()));
        keyring.replace(vec![known("key_1", "dm_one", Some(7))]);
        assert_eq!(tenant(&keyring, Some("Bearer dm_one")), Err(401));
    }

    #[test]
    fn a_change_of_other_keys_does_not_give_a_key_its_limit_again() {
        let keyring = Keyring::new(None, true, vec![known("key_1", "dm_one", None)]);
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer dm_one"));
        let ask = || {
            let admitted = keyring.admit(&headers).unwrap();
            admitted.limits().unwrap().admit(std::time::Instant::now()).is_ok()
        };
        assert!(ask() && !ask());
        keyring.replace(vec![known("key_1", "dm_one", None), known("key_2", "dm_two", None)]);
        assert!(!ask());
    }
}
