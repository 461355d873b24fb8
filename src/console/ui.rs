//! The web page: hand-written files, embedded. Owns their addresses, types and the policy under which browsers run
//! them; must never put anything into them: what they show comes from the API, and is set as text.

use std::sync::LazyLock;

use axum::{
    http::{HeaderMap, HeaderName, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use headers::{ETag, HeaderMapExt, IfMatch, IfNoneMatch};
use ring::digest;

use super::{
    errors::ApiError,
    extract::Name,
    route::{Access, Entry, route},
};

/// Nothing but the files below, run and shown from nowhere else, in no frame. Not even a mistake in them turns text
/// into a script: `require-trusted-types-for` takes away every way to do so.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        [$(File::new($name, $kind, include_bytes!(concat!("ui/", $name)))),*]
    };
}

/// One file of the page.
struct File {
    name: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
    tag: String,
}

impl File {
    fn new(name: &'static str, kind: &'static str, bytes: &'static [u8]) -> Self {
        let digest = digest::digest(&digest::SHA256, bytes);
        Self { name, kind, bytes, tag: format!("\"{}\"", BASE64_URL_SAFE_NO_PAD.encode(&digest.as_ref()[..12])) }
    }

    /// What is answered in place of the file: RFC 9110 section 13.2.2, for a file that has a tag and no date.
    fn precondition(&self, asked: &HeaderMap) -> Option<StatusCode> {
        let tag: ETag = self.tag.parse().ok()?;
        // A field that does not read as one is none.
        if asked.typed_get::<IfMatch>().is_some_and(|wanted| !wanted.precondition_passes(&tag)) {
            return Some(StatusCode::PRECONDITION_FAILED);
        }
        let has = asked.typed_get::<IfNoneMatch>().is_some_and(|known| !known.precondition_passes(&tag));
        has.then_some(StatusCode::NOT_MODIFIED)
    }

    fn response(&self, asked: &HeaderMap) -> Response {
        let headers: [(HeaderName, &str); 6] = [
            (header::CONTENT_TYPE, self.kind),
            (header::ETAG, &self.tag),
            // Asked for again each time: the next PRIMARY may run another version.
            (header::CACHE_CONTROL, "no-cache"),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        ];
        match self.precondition(asked) {
            Some(status) => (status, headers).into_response(),
            None => (headers, self.bytes).into_response(),
        }
    }
}

static FILES: LazyLock<[File; 26]> = LazyLock::new(|| {
    files! {
        "index.html": HTML,
        "style.css": STYLE,
        "icon.svg": PICTURE,
        "app.js": SCRIPT,
        "api.js": SCRIPT,
        "dom.js": SCRIPT,
        "live.js": SCRIPT,
        "lock.js": SCRIPT,
        "parts.js": SCRIPT,
        "pool.js": SCRIPT,
        "words.js": SCRIPT,
        "login.js": SCRIPT,
        "cluster.js": SCRIPT,
        "cluster-actions.js": SCRIPT,
        "cluster-picture.js": SCRIPT,
        "backups.js": SCRIPT,
        "defenders.js": SCRIPT,
        "defender-events.js": SCRIPT,
        "defender-policy.js": SCRIPT,
        "general.js": SCRIPT,
        "service.js": SCRIPT,
        "settings.js": SCRIPT,
        "users.js": SCRIPT,
        "certificates.js": SCRIPT,
        "logs.js": SCRIPT,
        "tags.js": SCRIPT,
    }
});

fn find(name: &str, asked: &HeaderMap) -> Option<Response> {
    FILES.iter().find(|file| file.name == name).map(|file| file.response(asked))
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let get = Method::GET;
    vec![
        route(get.clone(), "/", Access::Open, "The page", index).at_root().file("text/html").tag("page"),
        route(get, "/ui/{name}", Access::Open, "A part of the page", part).at_root().file("*/*").tag("page"),
    ]
}

/// `GET /`: the page.
pub(super) async fn index(asked: HeaderMap) -> Result<Response, ApiError> {
    find("index.html", &asked).ok_or(ApiError::Internal)
}

/// `GET /ui/{name}`: its parts.
pub(super) async fn part(Name(name): Name, asked: HeaderMap) -> Result<Response, ApiError> {
    find(&name, &asked).ok_or_else(|| ApiError::NotFound(format!("the page has no part {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> &'static str {
        std::str::from_utf8(FILES.iter().find(|file| file.name == name).unwrap().bytes).unwrap()
    }

    /// What a file refers to is there, and everything that is there is referred to.
    #[test]
    fn the_files_belong_together() {
        let all: String = FILES.iter().map(|file| std::str::from_utf8(file.bytes).unwrap()).collect();
        for file in FILES.iter().filter(|file| file.name != "index.html") {
            let (page, script) = (format!("/ui/{}", file.name), format!("from './{}'", file.name));
            assert!(all.contains(&page) || all.contains(&script), "nothing refers to {}", file.name);
        }
        for (begin, _) in all.match_indices("from './") {
            let name = all[begin + 8..].split('\'').next().unwrap();
            assert!(FILES.iter().any(|file| file.name == name), "there is no {name}");
        }
    }

    /// Text that comes from the cluster can only become text: what could turn it into anything else does not occur.
    #[test]
    fn nothing_turns_text_into_markup_or_code() {
        for file in FILES.iter().filter(|file| file.kind == SCRIPT) {
            for bad in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "DOMParser",
                "eval(",
                "Function(",
                "createContextualFragment",
                "srcdoc",
                "http://",
                "https://",
                "import(",
            ] {
                let found = text(file.name).contains(bad) && !(bad == "http://" && file.name == "dom.js");
                assert!(!found, "{bad} in {}", file.name);
            }
        }
        let page = text("index.html");
        for bad in ["<style", "style=", " onclick", "javascript:", "<script>"] {
            assert!(!page.contains(bad), "{bad} is refused by the policy");
        }
    }

    #[test]
    fn a_browser_that_has_a_file_is_told_so() {
        let first = find("app.js", &HeaderMap::new()).unwrap();
        assert_eq!(first.status(), StatusCode::OK);
        let tag = first.headers()[header::ETAG].to_str().unwrap().to_owned();
        let status = |name, field: HeaderName, values: &[&str]| {
            let mut asked = HeaderMap::new();
            for value in values {
                asked.append(&field, value.parse().unwrap());
            }
            find(name, &asked).unwrap().status().as_u16()
        };
        let (weak, list) = (format!("W/{tag}"), format!("\"other\",{tag} , W/\"x, y\""));
        for values in [&[tag.as_str()][..], &[&weak], &["*"], &[&list], &["\"other\"", &tag]] {
            assert_eq!(status("app.js", header::IF_NONE_MATCH, values), 304, "{values:?}");
        }
        for values in [&["\"other\""][..], &["no tag"], &[&tag[1..tag.len() - 1]]] {
            assert_eq!(status("app.js", header::IF_NONE_MATCH, values), 200, "{values:?}");
        }
        assert_eq!(status("style.css", header::IF_NONE_MATCH, &[&tag]), 200);
        for (value, code) in [(tag.as_str(), 200), ("*", 200), (&weak, 412), ("\"other\"", 412)] {
            assert_eq!(status("app.js", header::IF_MATCH, &[value]), code, "{value}");
        }
        assert!(find("../ui.rs", &HeaderMap::new()).is_none());
    }
}
