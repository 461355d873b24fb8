//! Kinds of values: how each is read, written and explained. Owns no key and no line; must never look at the
//! environment.

use std::{
    net::IpAddr,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use super::{
    Audience, FirstState, LogFormat, LogLevel, NotifySeverity, Secret,
    service::{self, MOST_PORTS, PortPair, Readiness},
};

/// Longest path, in bytes. Escaped for [`super::render()`] it still fits into a line.
const MAX_PATH: usize = 512;
/// Longest common name, in characters (X.520, `ub-common-name`).
const MAX_NAME: usize = 64;
/// Length of a secret in characters: shorter ones can be guessed.
const SECRET: std::ops::RangeInclusive<usize> = 16..=256;

/// A field of the configuration together with the rules of its kind.
pub(super) enum Slot<'a> {
    /// A TCP port or empty.
    Port(&'a mut Option<u16>),
    /// One of a few words.
    Choice(&'a mut dyn Choice),
    /// An absolute path.
    Folder(&'a mut PathBuf),
    /// An absolute path or empty.
    OptionalPath(&'a mut Option<PathBuf>),
    /// The common name of a certificate or empty.
    CommonName(&'a mut Option<String>),
    /// An IP address of this host or empty.
    Address(&'a mut Option<IpAddr>),
    /// Who is answered.
    Audience(&'a mut Audience),
    /// What only those who share it may know, or empty.
    Secret(&'a mut Option<Secret>),
    /// A program with its arguments, separated by blanks, or nothing.
    Command(&'a mut Vec<String>),
    /// Ports of a service, outside and inside.
    PortPairs(&'a mut Vec<PortPair>),
    /// When a service can be used, or empty.
    Readiness(&'a mut Option<Readiness>),
    /// A user of this host or empty.
    User(&'a mut Option<String>),
    /// Patterns of paths inside of a folder.
    Patterns(&'a mut Vec<String>),
    /// Where copies go: a bucket or a folder, as a URL, or empty.
    Location(&'a mut Option<String>),
    /// A count of something.
    Count { value: &'a mut u32, min: u32, max: u32 },
    /// A page size of SQLite.
    PageSize(&'a mut u32),
    /// A size written in units of 1,048,576 bytes.
    Mebibytes { value: &'a mut u64, min: u64, max: u64 },
    /// A span of time.
    Span { value: &'a mut Duration, unit: Unit, min: u64, max: u64 },
}

/// The unit in which a span is written.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Milliseconds,
    Seconds,
}

impl Unit {
    fn span(self, number: u64) -> Duration {
        match self {
            Self::Milliseconds => Duration::from_millis(number),
            Self::Seconds => Duration::from_secs(number),
        }
    }

    fn number(self, span: Duration) -> u128 {
        match self {
            Self::Milliseconds => span.as_millis(),
            Self::Seconds => u128::from(span.as_secs()),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "milliseconds",
            Self::Seconds => "seconds",
        }
    }
}

/// A value that is one of a few words.
pub(super) trait Choice {
    /// All words.
    fn words(&self) -> &'static [&'static str];
    /// The word of the present value.
    fn word(&self) -> &'static str;
    /// Takes the value of a word; false if there is no such word.
    fn set(&mut self, word: &str) -> bool;
}

macro_rules! choice {
    ($type:ty: $($word:literal => $value:pat = $make:expr),+) => {
        impl Choice for $type {
            fn words(&self) -> &'static [&'static str] {
                &[$($word),+]
            }
            fn word(&self) -> &'static str {
                match self { $($value => $word),+ }
            }
            fn set(&mut self, word: &str) -> bool {
                *self = match word { $($word => $make,)+ _ => return false };
                true
            }
        }
    };
}

choice!(bool: "true" => true = true, "false" => false = false);
choice!(FirstState: "PRIMARY" => Self::Primary = Self::Primary, "SECONDARY" => Self::Secondary = Self::Secondary);
choice!(NotifySeverity: "info" => Self::Info = Self::Info, "warning" => Self::Warning = Self::Warning,
    "critical" => Self::Critical = Self::Critical);
choice!(LogFormat: "human" => Self::Human = Self::Human, "json" => Self::Json = Self::Json);
choice!(LogLevel: "error" => Self::Error = Self::Error, "warn" => Self::Warn = Self::Warn,
    "info" => Self::Info = Self::Info, "debug" => Self::Debug = Self::Debug, "trace" => Self::Trace = Self::Trace);

impl Slot<'_> {
    /// Takes a value; `None` if it is not allowed, and then nothing has changed.
    pub(super) fn read(self, text: &str) -> Option<()> {
        match self {
            Self::Port(value) => {
                *value = optional(text, |text| digits(text, 1, u64::from(u16::MAX)))?.map(|n| n as u16)
            }
            Self::Choice(value) => return value.set(text).then_some(()),
            Self::Folder(value) => *value = path(text)?,
            Self::OptionalPath(value) => *value = optional(text, path)?,
            Self::CommonName(value) => *value = optional(text, common_name)?,
            Self::Address(value) => *value = optional(text, address)?,
            Self::Audience(value) => *value = Audience::read(text)?,
            Self::Secret(value) => *value = optional(text, secret)?,
            Self::Command(value) => *value = optional(text, command)?.unwrap_or_default(),
            Self::PortPairs(value) => *value = PortPair::list(text)?,
            Self::Readiness(value) => *value = optional(text, Readiness::read)?,
            Self::User(value) => *value = optional(text, service::user)?,
            Self::Patterns(value) => *value = service::patterns(text)?,
            Self::Location(value) => *value = optional(text, location)?,
            Self::Count { value, min, max } => *value = digits(text, min.into(), max.into())? as u32,
            Self::PageSize(value) => {
                *value = digits(text, 512, 65536).filter(|size| size.is_power_of_two())? as u32;
            }
            Self::Mebibytes { value, min, max } => *value = digits(text, min, max)? << 20,
            Self::Span { value, unit, min, max } => *value = unit.span(digits(text, min, max)?),
        }
        Some(())
    }

    /// The value as [`Slot::read`] takes it, not yet quoted.
    pub(super) fn write(&self) -> String {
        fn shown<T: ToString>(value: Option<&T>) -> String {
            value.map(T::to_string).unwrap_or_default()
        }
        match self {
            Self::Port(value) => shown(value.as_ref()),
            Self::Choice(value) => value.word().to_owned(),
            Self::Folder(value) => value.display().to_string(),
            Self::OptionalPath(value) => value.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            Self::CommonName(value) | Self::Location(value) | Self::User(value) => shown(value.as_ref()),
            Self::PortPairs(value) => value.iter().map(PortPair::to_string).collect::<Vec<_>>().join(","),
            Self::Readiness(value) => shown(value.as_ref()),
            Self::Patterns(value) => value.join(","),
            Self::Address(value) => shown(value.as_ref()),
            Self::Audience(value) => value.to_string(),
            Self::Command(value) => value.join(" "),
            Self::Secret(value) => value.as_ref().map(|secret| secret.reveal().to_owned()).unwrap_or_default(),
            Self::Count { value, .. } | Self::PageSize(value) => value.to_string(),
            Self::Mebibytes { value, .. } => (**value >> 20).to_string(),
            Self::Span { value, unit, .. } => unit.number(**value).to_string(),
        }
    }

    /// True if a message must not repeat the value.
    pub(super) fn is_secret(&self) -> bool {
        // A location never has one, but what is refused as one may have.
        matches!(self, Self::Secret(_) | Self::Location(_))
    }

    /// What may stand there, as the end of a sentence.
    pub(super) fn allowed(&self) -> String {
        match self {
            Self::Port(_) => "a port from 1 to 65535, or empty for off".to_owned(),
            Self::Choice(value) => value.words().join(" or "),
            Self::Folder(_) => format!("an absolute path without \"..\", up to {MAX_PATH} bytes"),
            Self::OptionalPath(_) => format!("an absolute path without \"..\", up to {MAX_PATH} bytes, or empty"),
            Self::CommonName(_) => format!("a host name or IP address of up to {MAX_NAME} characters"),
            Self::Address(_) => "an IP address of this host, or empty for all interfaces".to_owned(),
            Self::Audience(_) => {
                let most = Audience::MOST;
                format!(
                    "all, or up to {most} of members, IP addresses and networks, separated by commas, or empty for this host"
                )
            }
            Self::Secret(_) => {
                let (least, most) = (SECRET.start(), SECRET.end());
                format!("{least} to {most} letters, digits and -._~+/=, or empty")
            }
            Self::Command(_) => {
                format!("an absolute path and arguments, separated by blanks, up to {MAX_PATH} bytes, or empty")
            }
            Self::PortPairs(_) => {
                format!("up to {MOST_PORTS} of OUTSIDE:INSIDE or OUTSIDE:INSIDE+proxy, separated by commas, or empty")
            }
            Self::Readiness(_) => "http://127.0.0.1:PORT/PATH, tcp:PORT or notify, or empty".to_owned(),
            Self::User(_) => "the name of a user, or empty".to_owned(),
            Self::Patterns(_) => "patterns of paths inside of SERVICE_FOLDER, separated by commas, or empty".to_owned(),
            Self::Location(_) => {
                format!("s3://BUCKET/FOLDER or file:///FOLDER, up to {MAX_PATH} bytes, without a user or key, or empty")
            }
            Self::Count { min, max, .. } => format!("a whole number from {min} to {max}"),
            Self::PageSize(_) => "a power of two from 512 to 65536".to_owned(),
            Self::Mebibytes { min, max, .. } => format!("a whole number from {min} to {max} (MiB)"),
            Self::Span { unit, min, max, .. } => format!("a whole number from {min} to {max} ({})", unit.name()),
        }
    }
}

fn optional<T>(text: &str, read: impl Fn(&str) -> Option<T>) -> Option<Option<T>> {
    if text.is_empty() { Some(None) } else { read(text).map(Some) }
}

/// Decimal digits only: no sign and no blanks, which `parse` alone would let through.
fn digits(text: &str, min: u64, max: u64) -> Option<u64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| plain && (min..=max).contains(number))
}

fn path(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let climbs = path.components().any(|part| part == Component::ParentDir);
    let named = path.components().any(|part| matches!(part, Component::Normal(_)));
    let fine = path.is_absolute() && named && !climbs && text.len() <= MAX_PATH;
    (fine && !text.chars().any(char::is_control)).then(|| path.to_owned())
}

fn common_name(text: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '*');
    (text.chars().count() <= MAX_NAME && text.chars().all(fits)).then(|| text.to_owned())
}

fn command(text: &str) -> Option<Vec<String>> {
    let words: Vec<String> = text.split_ascii_whitespace().map(str::to_owned).collect();
    let fits = text.len() <= MAX_PATH && !text.chars().any(char::is_control);
    words.first().filter(|program| fits && path(program).is_some())?;
    Some(words)
}

/// A bucket and the folders in it, or an absolute path. No user, no query: nothing that could be a secret.
fn location(text: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let segment = |part: &str| !part.is_empty() && part != "." && part != ".." && part.chars().all(fits);
    let fine = text.len() <= MAX_PATH
        && match (text.strip_prefix("s3://"), text.strip_prefix("file://")) {
            (Some(rest), _) => rest.trim_end_matches('/').split('/').all(segment),
            (_, Some(folder)) => path(folder).is_some(),
            _ => false,
        };
    fine.then(|| text.to_owned())
}

/// The characters of a bearer token (RFC 6750).
fn secret(text: &str) -> Option<Secret> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
    (SECRET.contains(&text.len()) && text.bytes().all(fits)).then(|| Secret(text.to_owned()))
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().filter(|address: &IpAddr| !address.is_unspecified() && !address.is_multicast())
}
