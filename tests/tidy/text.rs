//! The sources as text: what is code in them, where its words, blocks and tests are. Knows no rule.

use std::ops::Range;

/// A source file, and the same text with comments, strings and characters blanked out (positions stay the same).
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) raw: String,
    pub(crate) code: String,
}

impl Source {
    pub(crate) fn new(path: &str, raw: &str) -> Self {
        Self { path: path.to_owned(), raw: raw.to_owned(), code: blank_text(raw) }
    }

    /// The same with everything under `#[cfg(test)]` blanked out.
    pub(crate) fn without_tests(&self) -> Self {
        let mut code = self.code.clone().into_bytes();
        let mut raw = self.raw.clone().into_bytes();
        for region in test_regions(&self.code) {
            blank(&mut code, region.clone());
            blank(&mut raw, region);
        }
        Self { path: self.path.clone(), raw: text(raw), code: text(code) }
    }

    pub(crate) fn at(&self, position: usize, what: &str) -> String {
        let line = self.raw.as_bytes()[..position].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("{}:{line}: {what}", self.path)
    }
}

pub(crate) fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("only whole characters are blanked out")
}

pub(crate) fn blank(bytes: &mut [u8], range: Range<usize>) {
    for byte in bytes[range].iter_mut().filter(|byte| **byte != b'\n') {
        *byte = b' ';
    }
}

pub(crate) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// Where the comment, string or character that begins at `i` ends; `None` if none begins there.
pub(crate) fn end_of_text(bytes: &[u8], i: usize) -> Option<usize> {
    let rest = &bytes[i..];
    let find = |from: usize, what: &[u8]| rest[from..].windows(what.len()).position(|w| w == what).map(|at| from + at);
    let all = rest.len();
    let length = match rest[0] {
        b'/' if rest.starts_with(b"//") => find(0, b"\n").unwrap_or(all),
        b'/' if rest.starts_with(b"/*") => {
            let (mut depth, mut at) = (1, 2);
            while depth > 0 && at < all {
                (depth, at) = match &rest[at..] {
                    [b'/', b'*', ..] => (depth + 1, at + 2),
                    [b'*', b'/', ..] => (depth - 1, at + 2),
                    _ => (depth, at + 1),
                };
            }
            at
        }
        b'r' if i == 0 || !is_word(bytes[i - 1]) || (matches!(bytes[i - 1], b'b' | b'c')) => {
            let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
            if rest.get(1 + hashes) != Some(&b'"') {
                return None;
            }
            let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
            find(2 + hashes, &close).map_or(all, |at| at + close.len())
        }
        quote @ (b'"' | b'\'') => {
            // A lifetime is a quote, a word and no closing quote.
            let character = rest.get(1) == Some(&b'\\') || {
                let first = String::from_utf8_lossy(&rest[1..all.min(5)]).chars().next().map_or(1, char::len_utf8);
                rest.get(1 + first) == Some(&b'\'')
            };
            if quote == b'\'' && !character {
                return None;
            }
            let mut at = 1;
            while at < all && rest[at] != quote {
                at += if rest[at] == b'\\' { 2 } else { 1 };
            }
            (at + 1).min(all)
        }
        _ => return None,
    };
    Some(i + length)
}

pub(crate) fn blank_text(raw: &str) -> String {
    let mut bytes = raw.as_bytes().to_vec();
    let mut i = 0;
    while i < bytes.len() {
        match end_of_text(&bytes, i) {
            Some(end) => {
                blank(&mut bytes, i..end);
                i = end;
            }
            None => i += 1,
        }
    }
    text(bytes)
}

/// Positions of a whole word.
pub(crate) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = at.checked_sub(1).is_none_or(|i| !is_word(bytes[i]));
        before && bytes.get(at + word.len()).is_none_or(|byte| !is_word(*byte))
    })
}

pub(crate) fn skip_blanks(code: &str, at: usize) -> usize {
    at + code[at..].len() - code[at..].trim_start().len()
}

pub(crate) fn word_at(code: &str, at: usize) -> &str {
    let end = code.as_bytes()[at..].iter().position(|byte| !is_word(*byte)).map_or(code.len(), |n| at + n);
    &code[at..end]
}

/// The position behind the bracket that closes the one at `open`.
pub(crate) fn behind_block(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (i, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' | b'[' | b'(' => depth += 1,
            b'}' | b']' | b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    code.len()
}

/// The position of the `{` that opens the body of the item at `at`; `None` if it has none.
pub(crate) fn body(code: &str, at: usize) -> Option<usize> {
    let mut i = at;
    while i < code.len() {
        i = match code.as_bytes()[i] {
            b'{' => return Some(i),
            b';' => return None,
            b'(' | b'[' => behind_block(code, i),
            _ => i + 1,
        };
    }
    None
}

pub(crate) fn test_regions(code: &str) -> Vec<Range<usize>> {
    let starts = ["#[cfg(test)]", "#[cfg(all(test,"].into_iter().flat_map(|mark| code.match_indices(mark));
    starts
        .map(|(start, _)| {
            let behind_attribute = behind_block(code, start + 1);
            let end = match body(code, behind_attribute) {
                Some(open) => behind_block(code, open),
                None => code[behind_attribute..].find(';').map_or(code.len(), |n| behind_attribute + n + 1),
            };
            start..end
        })
        .collect()
}

#[test]
fn blanking_keeps_code_and_positions() {
    let samples = [
        ("a // b\nc", "a     \nc"),
        ("a /* /* b */ c */ d", "a                 d"),
        ("\"a\\\"b\" c", "       c"),
        ("r#\"a\"b\"# c", "         c"),
        ("br\"\\\" c", "b     c"),
        ("'a' 'b '\\'' '\"' c", "    'b          c"),
        ("&'static str", "&'static str"),
        ("r#type", "r#type"),
        ("'ä' b", "     b"),
    ];
    for (raw, code) in samples {
        assert_eq!(blank_text(raw), code, "{raw}");
    }
}
