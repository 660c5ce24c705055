//! Park and resume: where a session's pages are. Neither changes the session.

use std::time::Instant;

use dormouse_engine::{Engine, Realm, Receipt};

use crate::api::*;
use crate::realms::realm;
use crate::records::{Settings, decode};
use crate::runtime::Runtime;

impl Runtime {
    /// Gives back the RAM of the session's pages, where no running turn uses them.
    pub async fn park(&self, tenant: &Tenant, session: &str) -> Result<ParkReceipt, SessionError> {
        let began = Instant::now();
        let (id, engine, realm, log) = self.pages_of(tenant, session).await?;
        let tokens = log.len();
        let ram_bytes_released = engine.park(realm, log).await?;
        let park_ms = began.elapsed().as_secs_f64() * 1000.0;
        Ok(ParkReceipt { session: id, tokens, ram_bytes_released, park_ms })
    }

    /// Brings the session's pages into RAM and checks them; `dry_run` says what that would take.
    pub async fn resume(
        &self,
        tenant: &Tenant,
        session: &str,
        dry_run: bool,
    ) -> Result<Receipt, SessionError> {
        let (id, engine, realm, log) = self.pages_of(tenant, session).await?;
        let receipt = engine.resume(realm, log, dry_run).await?;
        Ok(Receipt { session: id, ..receipt })
    }

    async fn pages_of(
        &self,
        tenant: &Tenant,
        session: &str,
    ) -> Result<(String, Engine, Realm, Vec<u32>), SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        let settings: Settings = decode(&self.inner.store.settings(&id).await?)?;
        let engine = self.inner.engine_of(&settings)?.clone();
        let log = self.inner.store.token_log(&id).await?;
        Ok((id, engine, realm(tenant, &settings), log))
    }
}
