//! `openapi.json`: the description of the API for programs, made from the table of routes and nothing else.

use std::sync::OnceLock;

use axum::http::{Method, header};
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    route::{Access, Content, Entry, Trace, route},
    user::Role,
};
use crate::cluster::program_version;

/// The routes of this file, which describes all that are in the table.
pub(super) fn routes(table: fn() -> Vec<Entry>) -> Vec<Entry> {
    let document = move || async move { document(table) };
    vec![
        route(Method::GET, "/openapi.json", Access::Any, "This document", document)
            .answer::<Map<String, Value>>()
            .tag("version"),
    ]
}

/// `GET openapi.json`.
fn document(table: fn() -> Vec<Entry>) -> ([(header::HeaderName, &'static str); 1], &'static str) {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| describe(&table()).to_string());
    ([(header::CONTENT_TYPE, "application/json")], text)
}

/// The document of a table.
pub(super) fn describe(table: &[Entry]) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for entry in table {
        let operation = operation(entry, &mut generator);
        let path = paths.entry(entry.full_path()).or_insert_with(|| json!({}));
        path[entry.method.as_str().to_ascii_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Twistlock HA",
            "version": program_version(),
            "description": "The API of the Console. Errors are `{\"err\": \"...\"}`. Only the PRIMARY answers.",
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "basic": { "type": "http", "scheme": "basic" },
                "page": { "type": "apiKey", "in": "cookie", "name": super::cookie::COOKIE },
            },
            "responses": { "error": {
                "description": "A refusal: nothing was changed, unless it is a 503 that says otherwise",
                "content": { "application/json": { "schema": {
                    "type": "object", "required": ["err"], "properties": { "err": { "type": "string" } },
                } } },
            } },
        },
    })
}

fn operation(entry: &Entry, generator: &mut SchemaGenerator) -> Value {
    let mut success = json!({ "description": "Done" });
    match entry.content {
        Content::Nothing => {}
        Content::Json(schema) => success["content"] = json!({ "application/json": { "schema": schema(generator) } }),
        Content::File(media_type) => {
            success["content"] = json!({ media_type: { "schema": { "type": "string" } } });
        }
    }
    if let Some(media_type) = entry.also {
        success["content"][media_type] = json!({ "schema": { "type": "string" } });
    }
    if entry.paged {
        let schema = json!({ "description": "Rows of the whole list", "schema": { "type": "integer", "minimum": 0 } });
        success["headers"] = json!({ "X-Total-Count": schema });
    }
    let parameters = parameters(entry, generator);
    if parameters.iter().any(|parameter| parameter["name"] == "cursor") {
        let schema =
            json!({ "description": "The cursor of the next page, if there is one", "schema": { "type": "string" } });
        success["headers"]["X-Next-Cursor"] = schema;
    }
    let mut operation = json!({
        "summary": entry.summary,
        "operationId": format!("{} {}", entry.method, entry.path),
        "tags": [entry.tag],
        "parameters": parameters,
        "responses": { entry.status.as_str(): success, "default": { "$ref": "#/components/responses/error" } },
    });
    if let Some((schema, required)) = entry.body {
        let content = json!({ "application/json": { "schema": schema(generator) } });
        operation["requestBody"] = json!({ "required": required, "content": content });
    }
    match entry.trace {
        Trace::Reads => {}
        Trace::Own(action, _) | Trace::Operation(action, _) => operation["x-audit"] = json!(action),
        Trace::Handler => operation["x-audit"] = json!("handler"),
    }
    let roles: Vec<_> = entry.access.roles().iter().copied().map(Role::name).collect();
    if entry.access == Access::Open {
        operation["security"] = json!([]);
    } else if entry.access == Access::Drill {
        operation["security"] = json!([{ "bearer": [] }]);
    } else {
        operation["security"] = json!([{ "bearer": [] }, { "basic": [] }, { "page": [] }]);
        operation["x-roles"] = json!(roles);
    }
    operation
}

fn parameters(entry: &Entry, generator: &mut SchemaGenerator) -> Vec<Value> {
    let mut all = Vec::new();
    let parts = entry.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    for name in parts {
        all.push(json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }));
    }
    if let Some(query) = entry.query {
        // Behind a reference: a query's own fields are wanted.
        let reference = query(generator);
        let name = reference.get("$ref").and_then(Value::as_str).and_then(|name| name.rsplit('/').next());
        let schema = name.and_then(|name| generator.definitions().get(name)).cloned().unwrap_or(reference.to_value());
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            let required = required.iter().any(|required| required == name);
            all.push(json!({ "name": name, "in": "query", "required": required, "schema": schema }));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{super::table::of_ports, *};

    #[test]
    fn the_document_says_of_every_route_what_the_table_says() {
        let table: Vec<_> = of_ports().collect();
        let document = describe(&table);
        let mut ids = HashSet::new();
        for entry in &table {
            let operation = &document["paths"][entry.full_path()][entry.method.as_str().to_ascii_lowercase()];
            assert_eq!(operation["summary"], entry.summary, "{} {}", entry.method, entry.path);
            assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()));
            assert_eq!(operation["requestBody"].is_object(), entry.body.is_some());
            assert!(operation["responses"][entry.status.as_str()].is_object());
            let open = operation["security"] == json!([]);
            assert_eq!(open, entry.access == Access::Open);
            let roles: Vec<_> = entry.access.roles().iter().map(|role| role.name()).collect();
            assert!(open || entry.access == Access::Drill || operation["x-roles"] == json!(roles));
        }
        let operations = document["paths"].as_object().unwrap().values().map(|path| path.as_object().unwrap().len());
        assert_eq!(operations.sum::<usize>(), table.len());
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        fn walk(value: &Value, root: &Value, found: &mut usize) {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                assert!(root.pointer(reference.strip_prefix('#').unwrap()).is_some(), "{reference}");
                *found += 1;
            }
            match value {
                Value::Object(fields) => fields.values().for_each(|value| walk(value, root, found)),
                Value::Array(values) => values.iter().for_each(|value| walk(value, root, found)),
                _ => {}
            }
        }
        let document = describe(&of_ports().collect::<Vec<_>>());
        let mut found = 0;
        walk(&document, &document, &mut found);
        assert!(found > 20, "{found}");
    }

    #[test]
    fn the_fields_of_a_query_are_parameters() {
        let document = describe(&of_ports().collect::<Vec<_>>());
        let parameters = &document["paths"]["/api/v1/audits/mgmt"]["get"]["parameters"];
        let names: Vec<_> = parameters.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(HashSet::from_iter(names), HashSet::from(["limit", "offset", "cursor", "user", "since", "format"]));
    }
}
