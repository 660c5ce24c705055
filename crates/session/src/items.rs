//! Items put into a session, or taken out of it, by hand: what a conversation's owner does between turns.

use dormouse_store::{EditItems, History, StoreError};
use serde_json::json;

use crate::api::*;
use crate::ids;
use crate::records::{self, KnownItem, new_event};
use crate::runtime::Runtime;
use crate::turns::PLANNING_ATTEMPTS;

impl Runtime {
    /// Appends messages without generating an answer; their tokens are computed with the next turn. Errors: `Busy`.
    pub async fn add_items(
        &self,
        tenant: &Tenant,
        session: &str,
        messages: Vec<Message>,
    ) -> Result<Vec<Item>, SessionError> {
        let now_ms = ids::now_ms();
        let new = |message: Message| {
            Ok(KnownItem {
                id: ids::mint("item_")?,
                turn: None,
                message,
                generated: false,
                token_start: 0,
                token_end: 0,
                created_ms: now_ms,
            })
        };
        let new = messages.into_iter().map(new).collect::<Result<Vec<_>, SessionError>>()?;
        self.edit(tenant, session, |history| {
            let end = history.session.log_len;
            let placed =
                new.iter().map(|item| KnownItem { token_start: end, token_end: end, ..item.clone() });
            let ids: Vec<&str> = new.iter().map(|item| item.id.as_str()).collect();
            Ok(EditItems {
                keep_tokens: end,
                keep_items: history.session.items,
                items: placed.map(|item| item.to_row()).collect::<Result<_, _>>()?,
                events: vec![new_event("session.items_added", None, json!({ "items": ids }))],
                ..EditItems::default()
            })
        })
        .await?;
        Ok(new.into_iter().map(KnownItem::into_api).collect())
    }

    /// Takes an item out, or puts another message in its place. The log is cut before it: whatever came later is
    /// computed again with the next turn, as it then reads. Errors: `ItemNotFound`, `Busy`.
    pub async fn change_item(
        &self,
        tenant: &Tenant,
        session: &str,
        item: &str,
        message: Option<Message>,
    ) -> Result<Session, SessionError> {
        self.edit(tenant, session, |history| {
            let mut known = records::items(history.items.clone())?;
            let position = known.iter().position(|known| known.id == item);
            let position = position.ok_or_else(|| SessionError::ItemNotFound(item.to_owned()))?;
            // An item without tokens was added by hand, or left out of a prompt that was too long.
            let keep_tokens = match known[position].token_start < known[position].token_end {
                true => known[position].token_start.min(history.session.log_len),
                false => history.session.log_len,
            };
            let mut rest = known.split_off(position);
            match &message {
                Some(message) => rest[0].message = message.clone(),
                None => {
                    rest.remove(0);
                }
            }
            for item in rest.iter_mut().filter(|item| item.token_end > keep_tokens) {
                (item.token_start, item.token_end, item.generated) = (keep_tokens, keep_tokens, false);
            }
            let kind = if message.is_some() { "session.item_changed" } else { "session.item_deleted" };
            let tokens_before = history.session.log_len;
            let data = json!({ "item": item, "tokens": keep_tokens, "tokens_before": tokens_before });
            Ok(EditItems {
                keep_tokens,
                keep_items: position,
                items: rest.iter().map(KnownItem::to_row).collect::<Result<_, _>>()?,
                events: vec![new_event(kind, None, data)],
                ..EditItems::default()
            })
        })
        .await
    }

    /// Carries out what `plan` makes of the session's history, which may be read several times.
    async fn edit(
        &self,
        tenant: &Tenant,
        session: &str,
        plan: impl Fn(&History) -> Result<EditItems, SessionError>,
    ) -> Result<Session, SessionError> {
        let id = self.inner.store.find_session(&tenant.0, session).await?.id;
        for _ in 0..PLANNING_ATTEMPTS {
            let history = self.inner.store.history(&id).await?;
            if let Some(turn) = history.session.active_turn {
                return Err(SessionError::Busy { session: id, turn });
            }
            let (fence, now_ms) = (history.session.fence, ids::now_ms());
            let edit = EditItems { session: id.clone(), fence, now_ms, ..plan(&history)? };
            match self.inner.store.edit_items(edit).await {
                Err(StoreError::LeaseLost { .. }) => {}
                Err(why) => return Err(why.into()),
                Ok(row) => {
                    self.inner.changed(&id);
                    return Ok(self.inner.session(row, records::decode(&history.settings)?));
                }
            }
        }
        Err(SessionError::Busy { session: id, turn: "(another writer's)".into() })
    }
}
