//! Who asks: the tenant, and what the key may do.

use axum::http::StatusCode;
use dormouse_session::{ApiKey, Scope, Tenant};

use crate::error::ApiError;

/// Whoever sent a request.
#[derive(Clone, Debug)]
pub struct Caller {
    pub tenant: Tenant,
    scopes: Vec<Scope>,
}

impl Caller {
    /// The user of this computer, or the owner of the server's own key.
    pub fn owner() -> Caller {
        Caller { tenant: Tenant::default(), scopes: vec![Scope::Admin] }
    }

    pub fn of(key: &ApiKey) -> Caller {
        Caller { tenant: Tenant(key.tenant.clone()), scopes: key.scopes.clone() }
    }

    /// Errors: 403 with the scope's name. Administrators may do everything.
    pub fn require(&self, scope: Scope) -> Result<(), ApiError> {
        if self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin) {
            return Ok(());
        }
        let has: Vec<&str> = self.scopes.iter().map(|scope| scope.name()).collect();
        let message = format!(
            "this needs an API key with the scope '{}'; the key that was sent has: {}",
            scope.name(),
            has.join(", ")
        );
        Err(ApiError::new(StatusCode::FORBIDDEN, Some("insufficient_scope"), message))
    }
}

/// What a path asks of its caller; None where any key will do.
pub fn required(path: &str) -> Option<Scope> {
    let within =
        |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if within("/v1/keys") || within("/metrics") {
        Some(Scope::Admin)
    } else if within("/v1/sessions") || within("/v1/conversations") {
        Some(Scope::Sessions)
    } else if within("/v1") && !within("/v1/models") {
        Some(Scope::Inference)
    } else {
        None
    }
}

/// Paths that say nothing about anybody: readiness probes and generators of clients have no key.
pub fn is_public(path: &str) -> bool {
    matches!(path, "/health" | "/openapi.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(scopes: &[Scope]) -> Caller {
        Caller { tenant: Tenant("t".into()), scopes: scopes.to_vec() }
    }

    #[test]
    fn a_missing_scope_is_refused_by_its_name_and_administrators_may_everything() {
        let error = caller(&[Scope::Inference]).require(Scope::Sessions).unwrap_err();
        assert_eq!((error.status, error.code), (StatusCode::FORBIDDEN, Some("insufficient_scope")));
        assert!(error.message.contains("'sessions'") && error.message.contains("inference"));
        for scope in Scope::ALL {
            assert!(caller(&[scope]).require(scope).is_ok() && Caller::owner().require(scope).is_ok());
        }
    }

    #[test]
    fn every_path_of_the_api_asks_for_something() {
        for (path, scope) in [
            ("/v1/sessions", Some(Scope::Sessions)),
            ("/v1/sessions/x/turns", Some(Scope::Sessions)),
            ("/v1/sessionsx", Some(Scope::Inference)),
            ("/v1/conversations/c/items", Some(Scope::Sessions)),
            ("/v1/chat/completions", Some(Scope::Inference)),
            ("/v1/what/comes", Some(Scope::Inference)),
            ("/v1/models/a", None),
            ("/v1/keys", Some(Scope::Admin)),
            ("/metrics", Some(Scope::Admin)),
        ] {
            assert_eq!(required(path), scope, "{path}");
        }
    }
}
