//! One operation of the document, said in a few words.

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::{ContentBuilder, HttpMethod, Ref, RefOr, Required, Response, ResponseBuilder, Schema};

use super::common::ServerSentEvent;

/// Schemas that an operation names, to be listed once.
pub type Schemas = Vec<(String, RefOr<Schema>)>;

pub struct Operation {
    pub path: &'static str,
    pub method: HttpMethod,
    pub builder: OperationBuilder,
    pub schemas: Schemas,
}

/// A value of the query string.
#[derive(Clone, Copy)]
pub struct Query {
    pub name: &'static str,
    pub kind: Kind,
    pub says: &'static str,
}

#[derive(Clone, Copy)]
pub enum Kind {
    Text,
    Flag,
    Number { least: u32, most: Option<u32> },
    OneOf(&'static [&'static str]),
}

impl Query {
    fn schema(self) -> Schema {
        let object = ObjectBuilder::new();
        match self.kind {
            Kind::Text => object.schema_type(Type::String),
            Kind::Flag => object.schema_type(Type::Boolean),
            Kind::OneOf(names) => object.schema_type(Type::String).enum_values(Some(names.iter().copied())),
            Kind::Number { least, most } => {
                object.schema_type(Type::Integer).minimum(Some(least)).maximum(most)
            }
        }
        .into()
    }
}

impl Operation {
    /// `id` is what generated clients call it; `tag` the chapter that it belongs to.
    pub fn new(method: HttpMethod, path: &'static str, id: &str, tag: &str, says: &str) -> Operation {
        let mut builder = OperationBuilder::new().operation_id(Some(id)).tag(tag).summary(Some(says));
        for name in path.split('{').skip(1).filter_map(|rest| rest.split('}').next()) {
            let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1));
            let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path);
            builder = builder.parameter(parameter.required(Required::True).schema(Some(text)));
        }
        // An error is the same everywhere; docs/api.md has the codes.
        for (status, response) in [("4XX", "Refused"), ("5XX", "Failed")] {
            builder = builder.response(status, Ref::from_response_name(response));
        }
        Operation { path, method, builder, schemas: Vec::new() }
    }

    /// Whoever asks needs no key.
    pub fn open(mut self) -> Operation {
        self.builder = self.builder.security(SecurityRequirement::default());
        self
    }

    pub fn query(mut self, queries: &[Query]) -> Operation {
        for query in queries {
            let parameter = ParameterBuilder::new().name(query.name).parameter_in(ParameterIn::Query);
            let parameter = parameter.required(Required::False).description(Some(query.says));
            self.builder = self.builder.parameter(parameter.schema(Some(query.schema())));
        }
        self
    }

    fn named<T: ToSchema>(&mut self) -> Ref {
        let name = T::name().into_owned();
        self.schemas.push((name.clone(), T::schema()));
        T::schemas(&mut self.schemas);
        Ref::from_schema_name(name)
    }

    /// A body of JSON; `optional` where none is as good as `{}`.
    pub fn takes<T: ToSchema>(mut self, optional: bool, example: Value) -> Operation {
        let content = ContentBuilder::new().schema(Some(self.named::<T>())).example(Some(example)).build();
        let required = if optional { Required::False } else { Required::True };
        let body = RequestBodyBuilder::new().required(Some(required)).content("application/json", content);
        self.builder = self.builder.request_body(Some(body.build()));
        self
    }

    pub fn answers<T: ToSchema>(mut self, status: u16, says: &str) -> Operation {
        let content = ContentBuilder::new().schema(Some(self.named::<T>())).build();
        self.answer(
            status,
            ResponseBuilder::new().description(says).content("application/json", content).build(),
        )
    }

    /// A page of a list.
    pub fn lists<T: ToSchema>(mut self, says: &str) -> Operation {
        let data = ArrayBuilder::new().items(self.named::<T>());
        let text = || ObjectBuilder::new().schema_type(Type::String);
        let id = || {
            ObjectBuilder::new()
                .schema_type(utoipa::openapi::schema::SchemaType::from_iter([Type::String, Type::Null]))
        };
        let list = ObjectBuilder::new()
            .property("object", text().enum_values(Some(["list"])))
            .property("data", data)
            .property("first_id", id())
            .property("last_id", id())
            .property("has_more", ObjectBuilder::new().schema_type(Type::Boolean));
        let list = ["object", "data", "first_id", "last_id", "has_more"]
            .iter()
            .fold(list, |list, name| list.required(*name));
        let content = ContentBuilder::new().schema(Some(Schema::from(list.build()))).build();
        self.answer(
            200,
            ResponseBuilder::new().description(says).content("application/json", content).build(),
        )
    }

    /// Both as JSON and, where the request asks for it, as server-sent events.
    pub fn answers_or_streams<T: ToSchema>(mut self, status: u16, says: &str) -> Operation {
        let whole = ContentBuilder::new().schema(Some(self.named::<T>())).build();
        let events = ContentBuilder::new().schema(Some(self.named::<ServerSentEvent>())).build();
        let response = ResponseBuilder::new().description(says);
        let response = response.content("application/json", whole).content("text/event-stream", events);
        self.answer(status, response.build())
    }

    pub fn answer(mut self, status: u16, response: Response) -> Operation {
        self.builder = self.builder.response(status.to_string(), response);
        self
    }
}
