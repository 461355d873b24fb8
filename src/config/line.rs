//! The grammar of one line: `KEY=VALUE` with a shell's quotes and defaults, and nothing else of a shell. Pure.

/// What one line says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// Blank or a comment.
    Nothing,
    /// A key and what stands right of its `=`, still to be given to [`value`].
    Assignment(&'a str, &'a str),
}

/// A piece of a line that is not allowed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// The piece.
    pub(super) found: String,
    /// What may stand in its place.
    pub(super) allowed: &'static str,
}

fn refused<T>(found: impl Into<String>, allowed: &'static str) -> Result<T, Refused> {
    Err(Refused { found: found.into(), allowed })
}

const NO_COMMANDS: &str = "a value, ${VAR-default} or ${VAR:-default}; commands are never run (write the value itself)";
const EXPANSION: &str = "${VAR-default} or ${VAR:-default}, and \\$ or single quotes for the character $";
const ONE_WORD: &str = "one value; a value with blanks or shell characters stands in quotes";
const NO_HOME: &str = "a path in full, or the character ~ in quotes (a shell would put a home directory in its place)";
const EQUALS: &str = "KEY=VALUE without blanks around the \"=\"";
/// What a shell takes for a blank: no other space of Unicode.
const BLANKS: [char; 2] = [' ', '\t'];

/// True for what may stand left of the `=`.
fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A line without the blanks around it.
pub(super) fn trim(line: &str) -> &str {
    line.trim_matches(BLANKS)
}

/// Splits a line at its `=`.
pub(super) fn split(line: &str) -> Result<Line<'_>, Refused> {
    let line = line.trim_start_matches(BLANKS);
    if line.is_empty() || line.starts_with('#') {
        return Ok(Line::Nothing);
    }
    let Some((key, rest)) = line.split_once('=') else {
        return refused(line, "KEY=VALUE or a comment that starts with #");
    };
    if is_name(key) && !rest.starts_with(BLANKS) {
        return Ok(Line::Assignment(key, rest));
    }
    if !is_name(key.trim_end_matches(BLANKS)) {
        return refused(key, "a key of letters, digits and _, then \"=\" and its value");
    }
    // `KEY= # comment` is an empty value, as it is for a shell.
    let rest = trim(rest);
    let empty = is_name(key) && (rest.is_empty() || rest.starts_with('#'));
    if empty { Ok(Line::Assignment(key, "")) } else { refused(line, EQUALS) }
}

/// Looks up a variable for `${VAR-default}`.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Resolves quotes, escapes and defaults.
pub(super) fn value(text: &str, lookup: Lookup<'_>) -> Result<String, Refused> {
    let mut out = String::new();
    let mut rest = text;
    // Here a shell puts a home directory in the place of a `~`.
    let mut home = true;
    while let Some(c) = rest.chars().next() {
        let tail = &rest[c.len_utf8()..];
        if home && c == '~' {
            return refused(text, NO_HOME);
        }
        home = c == ':';
        rest = match c {
            '\'' => {
                let Some((inside, after)) = tail.split_once('\'') else {
                    return refused(rest, "a closing ' on the same line");
                };
                out.push_str(inside);
                after
            }
            '"' => double_quoted(tail, &mut out, lookup)?,
            '$' => expansion(rest, &mut out, lookup)?,
            '\\' => {
                let Some(escaped) = tail.chars().next() else {
                    return refused("\\", "a value on one line");
                };
                out.push(escaped);
                &tail[escaped.len_utf8()..]
            }
            '`' => return refused(rest, NO_COMMANDS),
            ' ' | '\t' => {
                let comment = tail.trim_start_matches(BLANKS);
                return if comment.is_empty() || comment.starts_with('#') { Ok(out) } else { refused(text, ONE_WORD) };
            }
            ';' | '&' | '|' | '<' | '>' | '(' | ')' => return refused(text, ONE_WORD),
            _ => {
                out.push(c);
                tail
            }
        };
    }
    Ok(out)
}

/// The value of a line of another file that is written like ours: with quotes, escapes and a comment behind it, and
/// without variables. Blanks around it mean nothing.
///
/// # Errors
/// What may stand there, as the end of a sentence. It does not repeat what does stand there: that may be a secret.
pub fn literal(text: &str) -> Result<String, &'static str> {
    value(text.trim(), &|_| None).map_err(|refused| refused.allowed)
}

/// Takes the inside of double quotes, and returns what follows them.
fn double_quoted<'t>(text: &'t str, out: &mut String, lookup: Lookup<'_>) -> Result<&'t str, Refused> {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let tail = &rest[c.len_utf8()..];
        rest = match c {
            '"' => return Ok(tail),
            '$' => expansion(rest, out, lookup)?,
            '`' => return refused(rest, NO_COMMANDS),
            '\\' => match tail.chars().next() {
                Some(escaped @ ('"' | '\\' | '$' | '`')) => {
                    out.push(escaped);
                    &tail[1..]
                }
                // As in a shell: before any other character the backslash stays.
                _ => {
                    out.push(c);
                    tail
                }
            },
            _ => {
                out.push(c);
                tail
            }
        };
    }
    refused(format!("\"{text}"), "a closing \" on the same line")
}

/// Takes one `${VAR-default}` or `${VAR:-default}`, and returns what follows it.
fn expansion<'t>(text: &'t str, out: &mut String, lookup: Lookup<'_>) -> Result<&'t str, Refused> {
    if text.starts_with("$(") {
        return refused(text, NO_COMMANDS);
    }
    let Some((inside, after)) = text.strip_prefix("${").and_then(|rest| rest.split_once('}')) else {
        return refused(text, EXPANSION);
    };
    let Some((name, default)) = inside.split_once('-') else {
        return refused(text, EXPANSION);
    };
    let (name, empty_counts) = match name.strip_suffix(':') {
        Some(name) => (name, false),
        None => (name, true),
    };
    if !is_name(name) || default.contains(['$', '`', '"', '\'', '\\', '{', '~']) {
        return refused(text, EXPANSION);
    }
    match lookup(name) {
        Some(found) if empty_counts || !found.is_empty() => out.push_str(&found),
        _ => out.push_str(default),
    }
    Ok(after)
}

/// Writes a value so that [`value`] gives it back.
pub(super) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+,@%".contains(c);
    if text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<String, Refused> {
        value(text, &|name| match name {
            "SET" => Some("set".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        })
    }

    #[test]
    fn values_are_read_as_a_shell_reads_them() {
        let samples = [
            ("8083", "8083"),
            ("", ""),
            ("\"a b\"", "a b"),
            ("'a $(b) `c`'", "a $(b) `c`"),
            ("a'b'\"c\"\\ d", "abc d"),
            ("8083 # the port", "8083"),
            ("8083#1", "8083#1"),
            ("\"a \\\" \\\\ \\$ \\x\"", "a \" \\ $ \\x"),
            ("${NONE-default}", "default"),
            ("${EMPTY-default}", ""),
            ("${EMPTY:-default}", "default"),
            ("${SET:-default}/x", "set/x"),
            ("\"${NONE-a-b}\"", "a-b"),
            ("${NONE-}", ""),
            ("${NONE:-/srv}/tw", "/srv/tw"),
            ("\"/srv\"/tw", "/srv/tw"),
            ("/srv/a\\ b", "/srv/a b"),
            ("a\\ ", "a "),
            ("a \t", "a"),
            ("\"/srv/tw\" # x", "/srv/tw"),
            ("a~b'~'", "a~b~"),
        ];
        for (text, expected) in samples {
            assert_eq!(read(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn everything_else_of_a_shell_is_refused() {
        let samples = [
            "$(id)",
            "`id`",
            "\"$(id)\"",
            "\"`id`\"",
            "$HOME",
            "${HOME}",
            "${HOME:=x}",
            "${A-$(id)}",
            "${A-${B}}",
            "a b",
            "a; b",
            "a|b",
            "a>b",
            "'open",
            "\"open",
            "a\\",
            "$",
            "${",
            "${-x}",
            "$((1+1))",
            "~/tw",
            "a:~/tw",
            "${NONE-~/tw}",
        ];
        for text in samples {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn quoting_is_undone_by_reading() {
        for text in ["", "/var/lib", "/with blank", "/it's", "$(id)", "#", "\\", "ä\"`"] {
            assert_eq!(read(&quote(text)).as_deref(), Ok(text));
        }
    }

    #[test]
    fn blanks_around_the_equals_sign_are_refused() {
        for text in ["A =1", "A= 1", "A = 1"] {
            assert_eq!(split(text).unwrap_err().allowed, EQUALS, "{text}");
        }
        for text in ["A= # nothing", "A=", "A= \t", "\tA= "] {
            assert_eq!(split(text), Ok(Line::Assignment("A", "")), "{text:?}");
        }
        assert_eq!(split("  A=1 "), Ok(Line::Assignment("A", "1 ")));
        // No blank for a shell.
        assert!(split("\u{a0}A=1").is_err());
        assert!(split("1A=1").is_err());
        assert!(split("A").is_err());
    }
}
