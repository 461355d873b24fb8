//! The page's session: a cookie that scripts cannot read, and the checks that a request with it was made by the page
//! and not by another site on behalf of the user. Must never accept the cookie alone for anything that changes
//! something.

use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header, uri::Scheme};

use super::errors::ApiError;

/// Its prefix makes browsers insist on Secure, on the path `/` and on no domain: no other host can set it.
pub(super) const COOKIE: &str = "__Host-twistlock";
/// What the page sends with each request. A page of another site cannot: the browser would ask us first, and be
/// refused.
pub(super) const PAGE: HeaderName = HeaderName::from_static("x-twistlock-page");
const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// True if the page says that it sends this request.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    headers.get(PAGE).is_some_and(|value| value == "1")
}

/// True if a browser sends this request, for our page or another: browsers say so.
pub(super) fn is_browser(headers: &HeaderMap) -> bool {
    is_page(headers) || headers.contains_key(SITE) || token(headers).is_some()
}

/// The token in the cookie, valid or not.
pub(super) fn token(headers: &HeaderMap) -> Option<&str> {
    let texts = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = texts.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter(|(name, _)| *name == COOKIE).map(|(_, token)| token).next()
}

/// The header that makes a browser keep a token for so many seconds.
pub(super) fn set(token: &str, seconds: i64) -> Result<(HeaderName, HeaderValue), ApiError> {
    let text = format!("{COOKIE}={token}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=Strict");
    let value = HeaderValue::from_str(&text).map_err(|_| ApiError::Internal)?;
    Ok((header::SET_COOKIE, value))
}

/// The header that makes a browser forget it.
pub(super) fn clear() -> Result<(HeaderName, HeaderValue), ApiError> {
    set("", 0)
}

/// Refuses what our page cannot have sent.
pub(super) fn check_page(headers: &HeaderMap) -> Result<(), ApiError> {
    if !is_page(headers) {
        return Err(ApiError::Forbidden(format!("a request with the page's cookie needs the header {PAGE}: 1")));
    }
    let site = headers.get(SITE);
    let origin = headers.get(header::ORIGIN);
    // Browsers send one of them, today's send both.
    let ours = match (site, origin) {
        (None, None) => false,
        (site, origin) => {
            site.is_none_or(|site| site == "same-origin") && origin.is_none_or(|origin| is_own(origin, headers))
        }
    };
    if !ours {
        return Err(ApiError::Forbidden("this request does not come from the Console's own page".to_owned()));
    }
    Ok(())
}

/// Refuses the page over plain HTTP: no browser would keep the cookie, and everybody on the way could.
pub(super) fn check_scheme(scheme: Option<&Scheme>) -> Result<(), ApiError> {
    if scheme == Some(&Scheme::HTTPS) {
        return Ok(());
    }
    Err(ApiError::bad("the page works over HTTPS only: use the port of MANAGEMENT_PORT_HTTPS"))
}

/// True if the origin is the host and port that the browser has in its address bar.
fn is_own(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let authority = origin.as_ref().filter(|origin| origin.scheme() == Some(&Scheme::HTTPS)).and_then(Uri::authority);
    host.zip(authority).is_some_and(|(host, authority)| authority.as_str().eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut headers = HeaderMap::new();
        headers.extend(pairs);
        headers
    }

    #[test]
    fn the_token_is_found_among_other_cookies() {
        assert_eq!(token(&headers(&[("cookie", "a=b; __Host-twistlock=xyz; c=d")])), Some("xyz"));
        assert_eq!(token(&headers(&[("cookie", "a=b"), ("cookie", "__Host-twistlock=xyz")])), Some("xyz"));
        assert_eq!(token(&headers(&[("cookie", "x__Host-twistlock=xyz; __host-twistlock=a; b")])), None);
    }

    #[test]
    fn only_our_own_page_may_change_something() {
        let good = [("host", "a:8083"), ("x-twistlock-page", "1"), ("origin", "https://a:8083")];
        check_page(&headers(&good)).unwrap();
        check_page(&headers(&[("x-twistlock-page", "1"), ("sec-fetch-site", "same-origin")])).unwrap();
        for bad in [
            &[("host", "a:8083"), ("origin", "https://a:8083")][..],
            &[("host", "a:8083"), ("x-twistlock-page", "1")],
            &[("host", "a:8083"), ("x-twistlock-page", "1"), ("origin", "https://b:8083")],
            &[("host", "a:8083"), ("x-twistlock-page", "1"), ("origin", "http://a:8083")],
            &[("host", "a:8083"), ("x-twistlock-page", "1"), ("origin", "https://a")],
            &[("host", "a:8083"), ("x-twistlock-page", "1"), ("origin", "null")],
            &[("x-twistlock-page", "1"), ("sec-fetch-site", "same-site")],
            &[("x-twistlock-page", "1"), ("sec-fetch-site", "none")],
            &[("host", "a"), ("x-twistlock-page", "1"), ("sec-fetch-site", "cross-site"), ("origin", "https://a")],
        ] {
            check_page(&headers(bad)).unwrap_err();
        }
    }
}
