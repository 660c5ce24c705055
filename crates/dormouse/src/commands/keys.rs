//! `dormouse keys`: API keys, of the server that runs or, where none does, of the data directory.

use anyhow::{Result, bail};
use dormouse_session::keys::{create_key, keys, revoke_key};
use dormouse_session::{NewKey, Scope, Tenant};
use dormouse_store::Store;
use serde_json::{Value, json};

use crate::assemble::open_store;
use crate::cli::{KeysArguments, KeysCommand};
use crate::client::Client;
use crate::config::Config;
use crate::output::{ago, outln, print_json, print_table};

pub async fn run(config: &Config, arguments: KeysArguments, as_json: bool) -> Result<()> {
    let answer = match Client::find(config, arguments.server.url.as_deref())? {
        Some(client) => ask(&client, &arguments.command).await?,
        None => {
            let store = open_store(config)?;
            let answer = change(&store, &arguments.command).await;
            store.close().await?;
            answer?
        }
    };
    match arguments.command {
        _ if as_json => print_json(&answer),
        KeysCommand::Create { .. } => show_created(&answer),
        KeysCommand::Ls => show_list(&answer),
        KeysCommand::Revoke { .. } => {
            outln!("{} ({}) is revoked", text(&answer["id"]), text(&answer["name"]));
            Ok(())
        }
    }
}

/// Through the server.
async fn ask(client: &Client, command: &KeysCommand) -> Result<Value> {
    match command {
        KeysCommand::Create { name, tenant, scopes, requests_per_minute, concurrency } => {
            let body = json!({
                "name": name, "tenant": tenant, "scopes": scopes, "requests_per_minute": requests_per_minute,
                "concurrency": concurrency,
            });
            client.post(&["v1", "keys"], &[], &body).await
        }
        KeysCommand::Ls => Ok(Value::Array(client.get_all(&["v1", "keys"], &[]).await?)),
        KeysCommand::Revoke { key } => client.delete(&["v1", "keys", key]).await,
    }
}

/// In the database itself; the answers are those of the server.
async fn change(store: &Store, command: &KeysCommand) -> Result<Value> {
    match command {
        KeysCommand::Create { name, tenant, scopes, requests_per_minute, concurrency } => {
            let new = NewKey {
                name: name.clone(),
                tenant: tenant.clone().map_or_else(Tenant::default, Tenant),
                scopes: scopes.iter().filter_map(|name| Scope::parse(name)).collect(),
                requests_per_minute: *requests_per_minute,
                concurrency: *concurrency,
            };
            let (key, secret) = create_key(store, new).await?;
            let mut answer = serde_json::to_value(key)?;
            answer["secret"] = secret.into();
            Ok(answer)
        }
        KeysCommand::Ls => {
            let keys = keys(store).await?;
            Ok(serde_json::to_value(keys.into_iter().map(|known| known.key).collect::<Vec<_>>())?)
        }
        KeysCommand::Revoke { key } => Ok(serde_json::to_value(revoke_key(store, key).await?)?),
    }
}

/// Fails where keys are needed and there are none: a server that nobody can use, or that anybody could.
pub async fn check_there_is_one(config: &Config, store: &Store) -> Result<()> {
    let why = match config.key_needed()? {
        None => return Ok(()),
        Some(why) => why,
    };
    let is_usable = |known: &dormouse_session::KnownKey| known.key.revoked_at.is_none();
    if config.api_key.is_some() || keys(store).await?.iter().any(is_usable) {
        return Ok(());
    }
    bail!("{why}, and there is none: make one with `dormouse keys create NAME`, or set DORMOUSE_API_KEY")
}

/// The secret alone on standard output, so that it can be piped to where it is kept.
fn show_created(key: &Value) -> Result<()> {
    eprintln!(
        "{} ({}), tenant {}: {}",
        text(&key["id"]),
        text(&key["name"]),
        text(&key["tenant"]),
        scopes(key)
    );
    eprintln!("The secret is not shown again. Clients send it as 'Authorization: Bearer …':");
    outln!("{}", text(&key["secret"]));
    Ok(())
}

fn show_list(keys: &Value) -> Result<()> {
    let limit = |value: &Value| value.as_u64().map_or("-".into(), |limit| limit.to_string());
    let state = |key: &Value| match key["revoked_at"].as_u64() {
        Some(at) => format!("revoked {} ago", ago(at)),
        None => format!("{} old", ago(key["created_at"].as_u64().unwrap_or(0))),
    };
    let row = |key: &Value| {
        [
            text(&key["name"]).into(),
            text(&key["id"]).into(),
            text(&key["tenant"]).into(),
            scopes(key),
            limit(&key["requests_per_minute"]),
            limit(&key["concurrency"]),
            state(key),
        ]
    };
    let rows: Vec<[String; 7]> = keys.as_array().into_iter().flatten().map(row).collect();
    print_table(["NAME", "ID", "TENANT", "SCOPES", "PER MINUTE", "AT ONCE", "STATE"], &rows)
}

fn scopes(key: &Value) -> String {
    let names: Vec<&str> = key["scopes"].as_array().into_iter().flatten().map(text).collect();
    names.join(", ")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}
