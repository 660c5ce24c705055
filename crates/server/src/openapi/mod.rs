//! `/openapi.json`: what the server answers, for generators of clients and for tests. The schemas are made from types that
//! describe requests and answers; tests hold them to the real ones.

// The types say what there is; nothing is made of them but the document.
#![allow(dead_code)]

mod common;
mod inference;
mod operation;
mod operations;
mod responses;
mod sessions;

use std::sync::LazyLock;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa::ToSchema;
use utoipa::openapi::path::{Paths, PathsBuilder};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref,
    ResponseBuilder,
};

use crate::error::ApiError;
use common::ErrorBody;

static DOCUMENT: LazyLock<Result<String, String>> =
    LazyLock::new(|| document().to_json().map_err(|error| error.to_string()));

/// The document.
pub async fn show() -> Response {
    match &*DOCUMENT {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response(),
        Err(error) => {
            let message = format!("the OpenAPI document could not be written: {error}");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message).into_response()
        }
    }
}

fn document() -> OpenApi {
    let mut components = ComponentsBuilder::new();
    let mut paths: Paths = PathsBuilder::new().build();
    let mut schemas = vec![(ErrorBody::name().into_owned(), <ErrorBody as utoipa::PartialSchema>::schema())];
    ErrorBody::schemas(&mut schemas);
    for operation in operations::all() {
        schemas.extend(operation.schemas);
        paths.add_path_operation(operation.path, vec![operation.method], operation.builder.build());
    }
    for (name, schema) in schemas {
        components = components.schema(name, schema);
    }
    for (name, says) in
        [("Refused", "The request cannot be served as it is."), ("Failed", "The server failed.")]
    {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
        let response = ResponseBuilder::new().description(says).content("application/json", content);
        components = components.response(name, response.build());
    }
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A key made with `dormouse keys create`. On loopback none is needed by default."))
        .build();
    let components = components.security_scheme("key", SecurityScheme::Http(bearer)).build();
    let licence = LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title("Dormouse")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Open-weight language models for agents that stop and go on. Unknown fields of requests are ignored, and a \
             field that is null counts as absent.",
        ))
        .license(Some(licence))
        .build();
    OpenApiBuilder::new()
        .info(info)
        .paths(paths)
        .components(Some(components))
        .security(Some([SecurityRequirement::new("key", [""; 0]), SecurityRequirement::default()]))
        .build()
}

#[cfg(test)]
mod tests;
