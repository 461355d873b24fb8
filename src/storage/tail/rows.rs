//! Rows in page images: reads just enough of SQLite's file format (<https://www.sqlite.org/fileformat2.html>) to say
//! which rows of which table a page holds. It is for people only: must never decide anything, and never fail on any
//! input. What it cannot read, it leaves out.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
};

/// Limits: depth of a b-tree, pages read for the names of the tables, and characters shown of one row.
const MAX_DEPTH: u32 = 12;
const MAX_READS: u32 = 20_000;
const MAX_TEXT: usize = 400;
/// Types of b-tree pages: inner and leaf pages of a table, and of an index. A table WITHOUT ROWID is stored as an
/// index.
const INNER: u8 = 5;
const LEAF: u8 = 13;
const INDEX_INNER: u8 = 2;
const INDEX_LEAF: u8 = 10;

/// Returns the image of a page, if it has it.
pub(super) type Read<'a> = dyn Fn(u32) -> Option<Vec<u8>> + 'a;

/// The rows of one page, as people read them, by what identifies them: the rowid, or the row itself where it has none.
pub(super) type Rows = BTreeMap<String, String>;

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(*bytes.get(at)?) << 8 | usize::from(*bytes.get(at + 1)?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Reads one of SQLite's variable-length integers; the second number is its length.
fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for at in 0..9 {
        let byte = *bytes.get(at)?;
        if at == 8 {
            return Some((value << 8 | u64::from(byte), 9));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value, at + 1));
        }
    }
    None
}

/// The type of a page, the offset of its header, and the offsets of its cells.
fn cells(number: u32, image: &[u8]) -> Option<(u8, usize, Vec<usize>)> {
    let header = if number == 1 { 100 } else { 0 };
    let kind = *image.get(header)?;
    let first = header + if matches!(kind, INNER | INDEX_INNER) { 12 } else { 8 };
    let count = short(image, header + 3)?.min(image.len() / 2);
    Some((kind, header, (0..count).filter_map(|cell| short(image, first + 2 * cell)).collect()))
}

enum Value {
    Null,
    Integer(i64),
    Real(f64),
    Text(String),
    Blob(usize),
}

/// The columns of a record; `None` if it continues on other pages or makes no sense.
fn record(payload: &[u8]) -> Option<Vec<Value>> {
    let (length, mut at) = varint(payload)?;
    let end = usize::try_from(length).ok()?;
    let mut body = end;
    let mut values = Vec::new();
    while at < end {
        let (kind, size) = varint(payload.get(at..)?)?;
        at += size;
        let length = match kind {
            0 | 8 | 9 => 0,
            1..=4 => kind as usize,
            5 => 6,
            6 | 7 => 8,
            _ => usize::try_from(kind.checked_sub(12)? / 2).ok()?,
        };
        let bytes = payload.get(body..body.checked_add(length)?)?;
        body += length;
        let sign = if bytes.first().is_some_and(|byte| byte & 0x80 != 0) { -1 } else { 0 };
        let number = bytes.iter().take(8).fold(sign, |number: i64, byte| number << 8 | i64::from(*byte));
        values.push(match kind {
            0 => Value::Null,
            8 | 9 => Value::Integer(kind as i64 - 8),
            1..=6 => Value::Integer(number),
            7 => Value::Real(f64::from_bits(number as u64)),
            _ if kind % 2 == 1 => Value::Text(String::from_utf8_lossy(bytes).into_owned()),
            _ => Value::Blob(length),
        });
    }
    Some(values)
}

/// The rowid and the columns of a cell of a leaf; no columns if the row continues on other pages.
fn cell(image: &[u8], at: usize) -> Option<(i64, Option<Vec<Value>>)> {
    let (length, first) = varint(image.get(at..)?)?;
    let (rowid, second) = varint(image.get(at + first..)?)?;
    let start = at + first + second;
    let whole = usize::try_from(length).ok().filter(|length| *length <= image.len().saturating_sub(35));
    Some((rowid as i64, whole.and_then(|length| record(image.get(start..start.checked_add(length)?)?))))
}

fn show(values: &[Value]) -> String {
    let mut text = String::new();
    for (at, value) in values.iter().enumerate() {
        text.push_str(if at > 0 { ", " } else { "" });
        // Writing to a String cannot fail.
        let _ = match value {
            Value::Null => write!(text, "NULL"),
            Value::Integer(number) => write!(text, "{number}"),
            Value::Real(number) => write!(text, "{number}"),
            Value::Text(value) => write!(text, "{value:?}"),
            Value::Blob(length) => write!(text, "{length} bytes"),
        };
    }
    if text.chars().count() > MAX_TEXT {
        text = text.chars().take(MAX_TEXT).chain("...".chars()).collect();
    }
    text
}

/// The rows that a page of a table holds. An index looks like a table without rowids: [`tables`] tells which it is.
pub(super) fn rows(number: u32, image: &[u8]) -> Rows {
    let Some((kind, _, cells)) = cells(number, image) else { return Rows::new() };
    let numbered = |at: usize| {
        let (rowid, values) = cell(image, at)?;
        let row = values.map_or_else(|| "a row too long for one page".to_owned(), |values| show(&values));
        Some((format!("row {rowid}"), row))
    };
    let whole = |at: usize| {
        let (length, size) = varint(image.get(at..)?)?;
        let start = at + size;
        // Less fits into a page of an index than into one of a table; the rest is elsewhere.
        let local = image.len().saturating_sub(12) * 64 / 255;
        let length = usize::try_from(length).ok().filter(|length| length + 23 <= local)?;
        let row = show(&record(image.get(start..start.checked_add(length)?)?)?);
        Some((row, String::new()))
    };
    match kind {
        LEAF => cells.into_iter().filter_map(numbered).collect(),
        INDEX_LEAF => cells.into_iter().filter_map(whole).collect(),
        INDEX_INNER => cells.into_iter().filter_map(|at| whole(at.checked_add(4)?)).collect(),
        _ => Rows::new(),
    }
}

/// Which table each page belongs to, as far as can be found out within the limits.
pub(super) fn tables(read: &Read<'_>) -> HashMap<u32, String> {
    let (mut names, mut reads) = (HashMap::new(), 0);
    let schema = pages(1, read, &mut reads);
    for page in &schema {
        names.insert(*page, "sqlite_schema".to_owned());
    }
    for leaf in schema {
        let Some(image) = read(leaf) else { continue };
        let Some((LEAF, _, cells)) = cells(leaf, &image) else { continue };
        for values in cells.into_iter().filter_map(|at| cell(&image, at)?.1) {
            if let [Value::Text(kind), Value::Text(name), _, Value::Integer(root), ..] = values.as_slice()
                && kind == "table"
                && let Ok(root) = u32::try_from(*root)
            {
                let found = pages(root, read, &mut reads);
                names.extend(found.into_iter().map(|leaf| (leaf, name.clone())));
            }
        }
    }
    names
}

/// The pages of a table's b-tree. All leaves have the same depth, so only the path to the first one has to be read to
/// its end.
fn pages(root: u32, read: &Read<'_>, reads: &mut u32) -> Vec<u32> {
    let mut inner = |number: u32| -> Option<Vec<u32>> {
        *reads += 1;
        let image = read(number).filter(|_| *reads < MAX_READS)?;
        let (kind, header, cells) = cells(number, &image)?;
        let children = cells.into_iter().filter_map(|at| word(&image, at)).chain(word(&image, header + 8));
        matches!(kind, INNER | INDEX_INNER).then(|| children.collect())
    };
    let (mut level, mut all) = (vec![root], vec![root]);
    for _ in 0..MAX_DEPTH {
        let Some(first) = level.first().and_then(|first| inner(*first)) else { break };
        let others: Vec<u32> = level[1..].iter().filter_map(|page| inner(*page)).flatten().collect();
        level = [first, others].concat();
        all.extend(&level);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};

    use super::*;

    /// A database that SQLite made, large enough for inner pages.
    fn database() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true).pragma("page_size", "512");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut connection = options.connect().await.unwrap();
            let statement = "CREATE TABLE tags (name TEXT, n INTEGER, r REAL, b BLOB);
                 CREATE TABLE other (x);
                 CREATE TABLE keyed (k TEXT PRIMARY KEY, v) WITHOUT ROWID;
                 WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 300)
                 INSERT INTO tags SELECT 'tag-' || i, -i * 1000, 0.5, x'0102' FROM c;
                 INSERT INTO keyed SELECT name, n FROM tags;
                 INSERT INTO other VALUES (NULL), (printf('%2000s', 'long'))";
            sqlx::raw_sql(statement).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        });
        std::fs::read(path).unwrap()
    }

    #[test]
    fn rows_and_tables_of_a_real_database_are_found() {
        let bytes = database();
        let read = |number: u32| bytes.chunks(512).nth(number as usize - 1).map(<[u8]>::to_vec);
        let tables = tables(&read);
        let mut found = BTreeMap::new();
        for (page, _) in tables.iter().filter(|(_, name)| *name == "tags") {
            found.extend(rows(*page, &read(*page).unwrap()));
        }
        assert_eq!(found.len(), 300);
        assert_eq!(found["row 7"], "\"tag-7\", -7000, 0.5, 2 bytes");
        let mut keyed = Rows::new();
        for (page, _) in tables.iter().filter(|(_, name)| *name == "keyed") {
            keyed.extend(super::rows(*page, &read(*page).unwrap()));
        }
        assert_eq!(keyed.len(), 300);
        assert!(keyed.contains_key("\"tag-7\", -7000"));
        let other = tables.iter().find(|(_, name)| *name == "other").unwrap().0;
        let rows = rows(*other, &read(*other).unwrap());
        assert_eq!((rows["row 1"].as_str(), rows["row 2"].as_str()), ("NULL", "a row too long for one page"));
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..1024), kind in 0usize..4, number in 1u32..3) {
            let mut bytes = bytes;
            let at = if number == 1 { 100 } else { 0 };
            if let Some(first) = bytes.get_mut(at) {
                *first = [INNER, LEAF, INDEX_INNER, INDEX_LEAF][kind];
            }
            rows(number, &bytes);
            tables(&|_| Some(bytes.clone()));
        }
    }
}
