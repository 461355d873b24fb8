//! `settings/certs` and `settings/custom-certs`: the certificates that the Consoles serve. Owns the HTTP side; what is
//! done is up to [`crate::admin`]. Must never show a key, or keep one longer than the request.

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ConsoleServices,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, node},
    user::{Role, User},
};
use crate::admin::{Certificates, Custom};

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let (get, post) = (Method::GET, Method::POST);
    vec![
        node(get.clone(), "/settings/certs", ADMINISTRATORS, "The certificates that the Consoles serve", certificates)
            .answer::<Certificates>(),
        node(post.clone(), "/settings/certs", ADMINISTRATORS, "Set the names of the Consoles' certificates", set_names)
            .operates("set", "settings/certs")
            .body::<Names>()
            .answer::<Names>(),
        node(
            get,
            "/settings/custom-certs",
            ADMINISTRATORS,
            "The certificate that was uploaded for the Consoles",
            custom,
        )
        .answer::<Option<Custom>>(),
        node(post, "/settings/custom-certs", ADMINISTRATORS, "Upload a certificate for the Consoles", set_custom)
            .operates("set", "settings/custom-certs")
            .body::<Upload>()
            .answer::<Custom>(),
        node(
            Method::DELETE,
            "/settings/custom-certs",
            ADMINISTRATORS,
            "Return to the cluster's own certificates",
            remove,
        )
        .operates("delete", "settings/custom-certs")
        .answer::<Names>(),
    ]
}

/// The names that every Console's certificate is valid for, besides those of its own host.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Names {
    /// Host names and IP addresses.
    #[serde(rename = "consoleSAN")]
    pub names: Vec<String>,
}

/// A certificate for the Consoles.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upload {
    /// PEM: the chain, with the Console's own certificate first, and the private key.
    pub certificate: String,
}

/// `GET settings/certs`.
async fn certificates(State(services): State<ConsoleServices>) -> Result<Json<Certificates>, ApiError> {
    Ok(Json(services.admin.certificates()))
}

/// `POST settings/certs`: all members reissue their certificates and serve them at once.
async fn set_names(
    State(services): State<ConsoleServices>,
    user: User,
    Body(Names { names }): Body<Names>,
) -> Result<Json<Names>, ApiError> {
    let admin = &services.admin;
    let names = admin.set_console_names(names, &user.actor()).await?;
    Ok(Json(Names { names }))
}

/// `GET settings/custom-certs`: null if there is none.
async fn custom(State(services): State<ConsoleServices>) -> Result<Json<Option<Custom>>, ApiError> {
    Ok(Json(services.admin.certificates().custom))
}

/// `POST settings/custom-certs`. A refusal lists all names that the certificate lacks.
async fn set_custom(
    State(services): State<ConsoleServices>,
    user: User,
    Body(upload): Body<Upload>,
) -> Result<Json<Custom>, ApiError> {
    let admin = &services.admin;
    Ok(Json(admin.set_certificate(&upload.certificate, &user.actor()).await?))
}

/// `DELETE settings/custom-certs`. Answers with the names that the cluster's own certificates have in common.
async fn remove(State(services): State<ConsoleServices>, user: User) -> Result<Json<Names>, ApiError> {
    let admin = &services.admin;
    admin.remove_certificate(&user.actor()).await?;
    Ok(Json(Names { names: admin.certificates().console_names }))
}
