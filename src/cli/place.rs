//! Where a Console is: the address at which it is asked.

use std::fmt;

use ureq::http::Uri;

/// `MANAGEMENT_PORT_HTTPS` if nothing else is known.
pub(super) const HTTPS_PORT: u16 = 8083;

/// `https://HOST:PORT` of a Console, or of what stands in front of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    host: String,
    port: Option<u16>,
}

impl Place {
    /// # Errors
    /// When it is not such a URL.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("found {text:?}, allowed: https://HOST:PORT, as https://console.example.com:8083");
        let uri: Uri = text.trim().parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let plain = matches!(uri.path(), "" | "/") && uri.query().is_none() && !authority.as_str().contains('@');
        // A colon without a number, or with one that is no port, would pass for no port.
        let odd = authority.as_str() != authority.host() && authority.port_u16().is_none();
        let odd = odd || authority.host().is_empty();
        if uri.scheme_str() != Some("https") || !plain || odd {
            return Err(wrong());
        }
        Ok(Self { host: authority.host().to_owned(), port: authority.port_u16() })
    }

    /// The Console of a member.
    pub(super) fn of(address: &str, port: Option<u16>) -> Self {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        Self { host, port }
    }

    /// The port, if one was named.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "https://{}:{port}", self.host),
            None => write!(f, "https://{}", self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_https_urls_and_nothing_else() {
        let url = |text: &str| Place::parse(text).map(|place| place.to_string()).ok();
        for (text, expected) in [
            ("https://a.example:8083", "https://a.example:8083"),
            ("https://a.example:8083/", "https://a.example:8083"),
            (" https://192.0.2.1", "https://192.0.2.1"),
            ("https://[2001:db8::1]:8083/", "https://[2001:db8::1]:8083"),
        ] {
            assert_eq!(url(text).as_deref(), Some(expected), "{text}");
        }
        for bad in [
            "",
            "host",
            "host:8083",
            "http://host:8083",
            "https://",
            "https://host:8083/x",
            "https://host?x",
            "https://u:p@host",
            "https://host:99999",
            "https://host:",
            "https://a b",
            "https://host\r\nx",
        ] {
            assert_eq!(url(bad), None, "{bad:?}");
        }
    }
}
