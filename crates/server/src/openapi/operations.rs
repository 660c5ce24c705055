//! Every operation.

use serde_json::json;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{ContentBuilder, HttpMethod, ResponseBuilder};

use super::common::*;
use super::inference::*;
use super::operation::{Kind, Operation, Query};
use super::responses::*;
use super::sessions::*;

const AFTER: Query = Query { name: "after", kind: Kind::Text, says: "Id after which the page begins" };
const STREAM: Query = Query { name: "stream", kind: Kind::Flag, says: "As server-sent events" };
const STARTING_AFTER: Query = Query {
    name: "starting_after",
    kind: Kind::Number { least: 0, most: None },
    says: "Only events with a higher number",
};
const ORDER: Query =
    Query { name: "order", kind: Kind::OneOf(&["asc", "desc"]), says: "Oldest or newest first" };
const DRY_RUN: Query = Query { name: "dry_run", kind: Kind::Flag, says: "Only say what it would take" };
const IMPLICIT: Query =
    Query { name: "implicit", kind: Kind::Flag, says: "Also those that chat requests made for themselves" };
const STATUS: Query = Query {
    name: "status",
    kind: Kind::OneOf(&["idle", "in_progress", "requires_action", "failed"]),
    says: "Only sessions of this status",
};

fn limit(most: u32) -> Query {
    Query { name: "limit", kind: Kind::Number { least: 1, most: Some(most) }, says: "Entries of a page" }
}

fn get(path: &'static str, id: &str, tag: &str, says: &str) -> Operation {
    Operation::new(HttpMethod::Get, path, id, tag, says)
}

fn post(path: &'static str, id: &str, tag: &str, says: &str) -> Operation {
    Operation::new(HttpMethod::Post, path, id, tag, says)
}

fn patch(path: &'static str, id: &str, tag: &str, says: &str) -> Operation {
    Operation::new(HttpMethod::Patch, path, id, tag, says)
}

fn delete(path: &'static str, id: &str, tag: &str, says: &str) -> Operation {
    Operation::new(HttpMethod::Delete, path, id, tag, says)
}

/// In the order in which they are shown.
pub fn all() -> Vec<Operation> {
    [models(), inference(), openai_responses(), conversations(), sessions(), turns(), keys(), server()]
        .into_iter()
        .flatten()
        .collect()
}

fn models() -> Vec<Operation> {
    vec![
        get("/v1/models", "listModels", "models", "Loaded models, and those that could be")
            .answers::<ModelList>(200, "The models"),
        get("/v1/models/{model}", "showModel", "models", "One model").answers::<Model>(200, "The model"),
    ]
}

fn inference() -> Vec<Operation> {
    vec![
        post("/v1/chat/completions", "createChatCompletion", "inference", "Answers a conversation")
            .takes::<ChatRequest>(
                false,
                json!({"messages": [{"role": "user", "content": "Name one river."}], "max_tokens": 8, "temperature": 0}),
            )
            .answers_or_streams::<ChatCompletion>(200, "The answer, or with `stream` its chunks"),
        post("/v1/completions", "createCompletion", "inference", "Goes on with a text")
            .takes::<CompletionRequest>(
                false,
                json!({"prompt": "The capital of Italy is", "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0}),
            )
            .answers_or_streams::<Completion>(200, "The continuation, or with `stream` its chunks"),
        post("/v1/embeddings", "createEmbeddings", "inference", "Texts to vectors")
            .takes::<EmbeddingRequest>(false, json!({"input": ["A dormouse sleeps."]}))
            .answers::<Embeddings>(200, "The vectors"),
    ]
}

fn openai_responses() -> Vec<Operation> {
    vec![
        post("/v1/responses", "createResponse", "responses", "Answers, as OpenAI's Responses API does")
            .takes::<ResponseRequest>(
                false,
                json!({"input": "Name one river.", "max_output_tokens": 8, "temperature": 0}),
            )
            .answers_or_streams::<ResponseObject>(200, "The response, or with `stream` its events"),
        post("/v1/responses/input_tokens", "countInputTokens", "responses", "How long the prompt would be")
            .takes::<ResponseRequest>(false, json!({"input": "Name one river."}))
            .answers::<InputTokens>(200, "The number of tokens"),
        get("/v1/responses/{response}", "showResponse", "responses", "A response, or its events")
            .query(&[STREAM, STARTING_AFTER])
            .answers_or_streams::<ResponseObject>(200, "The response, or with `stream` its events"),
        delete("/v1/responses/{response}", "deleteResponse", "responses", "Forgets a response")
            .answers::<Deleted>(200, "It is gone"),
        post("/v1/responses/{response}/cancel", "cancelResponse", "responses", "Stops a response")
            .answers::<ResponseObject>(200, "The response as it is then"),
        get("/v1/responses/{response}/input_items", "listInputItems", "responses", "What it answered")
            .query(&[AFTER, limit(100), ORDER])
            .lists::<ResponseItem>("The items"),
    ]
}

fn conversations() -> Vec<Operation> {
    const ONE: &str = "/v1/conversations/{conversation}";
    const ITEMS: &str = "/v1/conversations/{conversation}/items";
    const ITEM: &str = "/v1/conversations/{conversation}/items/{item}";
    let item = json!({"type": "message", "role": "user", "content": "My name is Ann."});
    vec![
        post("/v1/conversations", "createConversation", "conversations", "Begins a conversation")
            .takes::<CreateConversation>(true, json!({"items": [item], "metadata": {"topic": "names"}}))
            .answers::<Conversation>(200, "The conversation"),
        get(ONE, "showConversation", "conversations", "A conversation")
            .answers::<Conversation>(200, "The conversation"),
        post(ONE, "updateConversation", "conversations", "Changes its metadata")
            .takes::<UpdateConversation>(false, json!({"metadata": {"topic": "people"}}))
            .answers::<Conversation>(200, "The conversation"),
        delete(ONE, "deleteConversation", "conversations", "Deletes a conversation")
            .answers::<Deleted>(200, "It is gone"),
        get(ITEMS, "listConversationItems", "conversations", "What was said")
            .query(&[AFTER, limit(100), ORDER])
            .lists::<ResponseItem>("The items"),
        post(ITEMS, "createConversationItems", "conversations", "Adds items")
            .takes::<CreateItems>(false, json!({"items": [item]}))
            .lists::<ResponseItem>("The new items"),
        get(ITEM, "showConversationItem", "conversations", "One item")
            .answers::<ResponseItem>(200, "The item"),
        delete(ITEM, "deleteConversationItem", "conversations", "Takes an item out")
            .answers::<Conversation>(200, "The conversation"),
    ]
}

fn sessions() -> Vec<Operation> {
    const ONE: &str = "/v1/sessions/{session}";
    vec![
        get("/v1/sessions", "listSessions", "sessions", "All sessions, the newest first")
            .query(&[AFTER, limit(100), STATUS, IMPLICIT])
            .lists::<Session>("The sessions"),
        post("/v1/sessions", "createSession", "sessions", "Begins a session")
            .takes::<CreateSession>(
                true,
                json!({"instructions": "You answer in one short sentence.", "seed": 7}),
            )
            .answers::<Session>(201, "The session"),
        get(ONE, "showSession", "sessions", "A session, by id or name")
            .answers::<Session>(200, "The session"),
        patch(ONE, "updateSession", "sessions", "Renames or annotates")
            .takes::<UpdateSession>(true, json!({"metadata": {"project": "x"}, "pinned": true}))
            .answers::<Session>(200, "The session"),
        delete(ONE, "deleteSession", "sessions", "Deletes it, and pages that nobody else uses")
            .answers::<Deleted>(200, "It is gone"),
        get("/v1/sessions/{session}/items", "listSessionItems", "sessions", "Its messages")
            .query(&[AFTER, limit(1000)])
            .lists::<SessionItem>("The items"),
        get(
            "/v1/sessions/{session}/events",
            "listSessionEvents",
            "sessions",
            "Its durable log, or a stream of it",
        )
        .query(&[STARTING_AFTER, limit(1000), STREAM])
        .lists::<SessionEvent>("The events, or with `stream` all of them as they happen"),
        post("/v1/sessions/{session}/fork", "forkSession", "sessions", "A new session that shares its pages")
            .takes::<Fork>(true, json!({"at": 0}))
            .answers::<Forked>(201, "The new session"),
        post("/v1/sessions/{session}/rewind", "rewindSession", "sessions", "Forgets what came after a place")
            .takes::<Rewind>(false, json!({"to": 0}))
            .answers::<Session>(200, "The session"),
        post("/v1/sessions/{session}/park", "parkSession", "sessions", "Gives its RAM back")
            .answers::<ParkReceipt>(200, "What was given back"),
        post("/v1/sessions/{session}/resume", "resumeSession", "sessions", "Brings its pages into RAM")
            .query(&[DRY_RUN])
            .answers::<Receipt>(200, "What it took"),
    ]
}

fn turns() -> Vec<Operation> {
    const ALL: &str = "/v1/sessions/{session}/turns";
    const ONE: &str = "/v1/sessions/{session}/turns/{turn}";
    vec![
        get(ALL, "listTurns", "turns", "Its turns, the oldest first")
            .query(&[AFTER, limit(1000)])
            .lists::<Turn>("The turns"),
        post(ALL, "createTurn", "turns", "Says something and lets it answer")
            .takes::<TurnRequest>(
                false,
                json!({"input": "What is a fjord?", "max_tokens": 8, "temperature": 0}),
            )
            .answers_or_streams::<Turn>(200, "The turn, or with `stream` its events")
            .answers::<Turn>(202, "The turn, which goes on in the background"),
        get(ONE, "showTurn", "turns", "A turn, or its events at any age")
            .query(&[STREAM, STARTING_AFTER])
            .answers_or_streams::<Turn>(200, "The turn, or with `stream` its events"),
        post(
            "/v1/sessions/{session}/turns/{turn}/cancel",
            "cancelTurn",
            "turns",
            "Stops it; what was said stays",
        )
        .answers::<Turn>(200, "The turn as it is then"),
    ]
}

fn keys() -> Vec<Operation> {
    const ONE: &str = "/v1/keys/{key}";
    vec![
        get("/v1/keys", "listKeys", "keys", "All API keys, revoked ones too")
            .query(&[AFTER, limit(1000)])
            .lists::<ApiKey>("The keys"),
        post("/v1/keys", "createKey", "keys", "A new API key; its secret is shown this once")
            .takes::<NewApiKey>(
                false,
                json!({"name": "ci", "scopes": ["inference"], "requests_per_minute": 60}),
            )
            .answers::<CreatedApiKey>(201, "The key and its secret"),
        get(ONE, "showKey", "keys", "A key, by id or name").answers::<ApiKey>(200, "The key"),
        delete(ONE, "revokeKey", "keys", "Takes a key back, at once")
            .answers::<ApiKey>(200, "The revoked key"),
    ]
}

fn server() -> Vec<Operation> {
    let text = || ContentBuilder::new().schema(Some(ObjectBuilder::new().schema_type(Type::String))).build();
    let any = || ContentBuilder::new().schema(Some(ObjectBuilder::new().schema_type(Type::Object))).build();
    let metrics = ResponseBuilder::new().description("Prometheus text").content("text/plain", text()).build();
    let document =
        ResponseBuilder::new().description("OpenAPI 3.1").content("application/json", any()).build();
    vec![
        get("/health", "health", "server", "Whether requests can be served")
            .open()
            .answers::<Health>(200, "They can")
            .answers::<Health>(503, "They cannot, and why"),
        get("/metrics", "metrics", "server", "What is counted").answer(200, metrics),
        get("/openapi.json", "openapi", "server", "This document").open().answer(200, document),
    ]
}
