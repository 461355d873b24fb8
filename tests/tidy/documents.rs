//! The rule that documents name only what there is: files, what is in them, and places in other documents.
//! A name in code font with a path is checked, as `src/node/driver.rs:run`; so is a link to a file of this repository.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{
    root,
    text::{Source, skip_blanks, word_at, words},
};

/// Where a path must begin to be one of this repository.
const FOLDERS: &[&str] = &["src/", "tests/", "docs/", "scripts/", "packaging/", "benches/"];
/// What a name may be the name of.
const ITEMS: &[&str] = &["fn", "struct", "enum", "trait", "type", "const", "static", "macro_rules"];

/// A document, and what it may name.
struct House<'a> {
    exists: &'a dyn Fn(&str) -> bool,
    read: &'a dyn Fn(&str) -> Option<String>,
}

impl House<'_> {
    /// Everything that a document names and that is not there.
    fn findings(&self, path: &str, text: &str) -> Vec<String> {
        let mut bad = Vec::new();
        for (number, line) in lines_of_text(text) {
            let named = line.split('`').skip(1).step_by(2).filter_map(|name| self.missing(name));
            let linked = links(line).filter_map(|link| self.broken((path, text), link));
            bad.extend(named.chain(linked).map(|what| format!("{path}:{number}: {what}: change the document")));
        }
        bad
    }

    /// What is wrong with a name in code font.
    fn missing(&self, name: &str) -> Option<String> {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
        if !FOLDERS.iter().any(|folder| name.starts_with(folder)) || !name.chars().all(is_path) {
            return None;
        }
        let (file, item) = name.split_once(':').unwrap_or((name, ""));
        if !(self.exists)(file) {
            return Some(format!("there is no {file}"));
        }
        if item.is_empty() {
            return None;
        }
        let source = Source::new(file, &(self.read)(file).unwrap_or_default());
        (!names(&source, item)).then(|| format!("{file} has no {item}"))
    }

    /// What is wrong with a link from a document.
    fn broken(&self, (from, text): (&str, &str), link: &str) -> Option<String> {
        if link.contains("://") {
            return None;
        }
        let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = resolved(from, file);
        if !file.is_empty() && !(self.exists)(&target) {
            return Some(format!("a link to {target}, which is not there"));
        }
        let other = if file.is_empty() { Some(text.to_owned()) } else { (self.read)(&target) };
        let known = anchor.is_empty() || other.is_some_and(|text| anchors(&text).contains(anchor));
        (!known).then(|| format!("a link to {link}, where there is no such heading"))
    }
}

/// True if the source defines something of that name.
fn names(source: &Source, name: &str) -> bool {
    words(&source.code, name).any(|at| {
        let before = source.code[..at].trim_end().trim_end_matches('!').trim_end();
        ITEMS
            .iter()
            .any(|item| before.ends_with(item) && words(before, item).any(|word| word + item.len() == before.len()))
            && word_at(&source.code, skip_blanks(&source.code, at)) == name
    })
}

/// The lines that are not code, with their numbers.
fn lines_of_text(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut code = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        code ^= line.starts_with("```");
        !code && !line.starts_with("```")
    })
}

/// The targets of `[text](target)`.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
}

/// A link from a document, as a path below the root.
fn resolved(from: &str, link: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The anchors of all headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = lines_of_text(text).filter(|(_, line)| line.starts_with('#'));
    let anchor = |line: &str| -> String {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-' || *c == '_');
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(|(_, line)| anchor(line)).collect()
}

/// The documents of the repository: those at its top, and all below `docs` and `packaging`.
fn documents(folder: &str, out: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(root().join(folder)) else { return };
    for entry in entries {
        let name = entry.expect("read a folder").file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        if root().join(&path).is_dir() {
            if !folder.is_empty() {
                documents(&path, out);
            }
        } else if path.ends_with(".md") {
            out.push(path);
        }
    }
}

#[test]
fn documents_name_what_there_is() {
    let mut all = Vec::new();
    for folder in ["", "docs", "packaging"] {
        documents(folder, &mut all);
    }
    all.sort();
    assert!(all.iter().any(|path| path == "docs/design.md"), "the documents were not found: {all:?}");
    let read = |path: &str| fs::read_to_string(root().join(path)).ok();
    let exists = |path: &str| Path::new(&root()).join(path).exists();
    let house = House { exists: &exists, read: &read };
    let bad: Vec<String> =
        all.iter().flat_map(|path| house.findings(path, &read(path).expect("read a document"))).collect();
    assert!(bad.is_empty(), "{} findings:\n{}", bad.len(), bad.join("\n"));
}

#[test]
fn what_is_not_there_is_found() {
    let read = |path: &str| {
        let text = match path {
            "src/a.rs" => {
                "// fn gone() {}\npub(super) fn run() {}\nconst MOST: u8 = 1;\nstruct Part;\nmacro_rules! all { () => {} }\n"
            }
            "docs/b.md" => "# B\n## Two words, and `code`\n",
            _ => return None,
        };
        Some(text.to_owned())
    };
    let exists = |path: &str| read(path).is_some();
    let house = House { exists: &exists, read: &read };
    let said = |text: &str| house.findings("docs/c.md", text).join("\n");
    for fine in [
        "`src/a.rs`, `src/a.rs:run`, `src/a.rs:MOST`, `src/a.rs:Part` and `src/a.rs:all`",
        "`cargo test`, `src/*.rs`, `of/another`",
        "[b](b.md), [b](b.md#two-words-and-code), [up](../docs/b.md), [elsewhere](https://example.com/#no)",
        "# Here\n[here](#here)",
        "```\n`src/no.rs` [no](no.md)\n```",
    ] {
        assert_eq!(said(fine), "", "{fine}");
    }
    assert_eq!(said("a\n`src/no.rs`"), "docs/c.md:2: there is no src/no.rs: change the document");
    for bad in ["`src/a.rs:gone`", "`src/a.rs:ru`", "`src/a.rs:u8`", "[no](no.md)", "[b](b.md#three)", "[here](#here)"]
    {
        assert!(said(bad).starts_with("docs/c.md:1: "), "{bad}");
    }
}
