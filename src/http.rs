//! What RFC 9110 and 9112 ask of a server before a handler sees the request, beyond what the HTTP library does. Must
//! never know what is served.

use hyper::{
    HeaderMap, Method, Request, StatusCode, Version,
    header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING},
    http::uri::Authority,
};

/// Why a request is refused before anything looks at it: the status and a sentence for people. `longest` is the largest
/// body in bytes: whoever announces a longer one learns it before sending it.
pub fn refusal<B>(request: &Request<B>, longest: u64) -> Option<(StatusCode, String)> {
    let headers = request.headers();
    if request.version() == Version::HTTP_11 && !has_host(headers) {
        // RFC 9112 section 3.2.
        return Some((StatusCode::BAD_REQUEST, "a request needs exactly one valid Host field".to_owned()));
    }
    let expects = headers.get_all(EXPECT).iter();
    if expects.into_iter().any(|value| !value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        // RFC 9110 section 10.1.1.
        return Some((
            StatusCode::EXPECTATION_FAILED,
            "the only expectation that can be met is 100-continue".to_owned(),
        ));
    }
    let codings: Vec<_> = headers.get_all(TRANSFER_ENCODING).iter().collect();
    if !codings.is_empty() && !matches!(codings[..], [one] if one.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        // RFC 9112 section 6.1.
        let text = "the only transfer coding that is understood is chunked, once".to_owned();
        return Some((StatusCode::NOT_IMPLEMENTED, text));
    }
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > longest) {
        return Some((StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {longest} bytes")));
    }
    None
}

/// True for `OPTIONS *`, which asks about the server as a whole (RFC 9110 section 9.3.7).
pub fn asks_about_server<B>(request: &Request<B>) -> bool {
    request.method() == Method::OPTIONS && request.uri().path() == "*"
}

fn has_host(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    // An empty one is what a client sends whose target has no authority.
    host.is_empty() || Authority::try_from(host.as_bytes()).is_ok_and(|host| !host.as_str().contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn code(version: Version, headers: &[(&str, &str)]) -> Option<u16> {
        refusal(&request(version, headers), 100).map(|(status, _)| status.as_u16())
    }

    #[test]
    fn a_request_names_exactly_one_host() {
        let (old, new) = (Version::HTTP_10, Version::HTTP_11);
        assert_eq!(code(new, &[]), Some(400));
        assert_eq!(code(old, &[]), None, "HTTP/1.0 has no such field");
        assert_eq!(code(new, &[("host", "a"), ("host", "a")]), Some(400));
        for good in ["a", "a:8083", "[fd00::1]:8083", "127.0.0.1", ""] {
            assert_eq!(code(new, &[("host", good)]), None, "{good:?}");
        }
        for bad in ["a b", "a/b", "user@a", "a, b", "http://a/"] {
            assert_eq!(code(new, &[("host", bad)]), Some(400), "{bad:?}");
        }
    }

    #[test]
    fn what_cannot_be_met_or_taken_is_refused_before_it_comes() {
        let with = |name, value| code(Version::HTTP_11, &[("host", "a"), (name, value)]);
        assert_eq!(with("expect", "100-Continue"), None);
        assert_eq!(with("expect", "wonders"), Some(417));
        assert_eq!(with("transfer-encoding", "Chunked"), None);
        assert_eq!(with("transfer-encoding", "gzip, chunked"), Some(501));
        assert_eq!(with("content-length", "100"), None);
        assert_eq!(with("content-length", "101"), Some(413));
    }
}
