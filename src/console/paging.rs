//! Lists in parts. A page begins at an offset, and all rows are counted; or at a cursor, and takes no longer at the end
//! than at the top.

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::errors::ApiError;

/// Rows of a list in one answer if the client does not say, and at most.
const PAGE: (u32, u32) = (50, 1000);
/// The header that says how long the whole list is.
const TOTAL: HeaderName = HeaderName::from_static("x-total-count");
/// The header that says where the next page of a long list begins. The last page has none.
const NEXT: HeaderName = HeaderName::from_static("x-next-cursor");
/// The cursor of the first page.
const FIRST: &str = "first";

/// Which part of a list is wanted. A query with more fields has these two itself, since a flattened one reads no
/// numbers.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
pub(super) struct Page {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    pub(super) limit: Option<u32>,
    /// This many rows of the list are skipped.
    pub(super) offset: Option<u32>,
}

impl Page {
    /// `LIMIT` and `OFFSET` for SQL. Statements say `LIMIT +?`: SQLite plans for the value of a bare parameter, and
    /// compiles the statement again each time that it is bound.
    pub(super) fn bounds(self) -> Result<(u32, u32), ApiError> {
        let limit = self.limit.unwrap_or(PAGE.0);
        if !(1..=PAGE.1).contains(&limit) {
            return Err(ApiError::bad(format!("limit must be 1 to {}", PAGE.1)));
        }
        Ok((limit, self.offset.unwrap_or(0)))
    }
}

/// The answer of a list: a part of it as a JSON array, and how many rows there are in all as `X-Total-Count`.
#[derive(Debug)]
pub(super) struct Paged<T> {
    pub(super) rows: Vec<T>,
    pub(super) total: i64,
}

impl<T: Serialize> IntoResponse for Paged<T> {
    fn into_response(self) -> Response {
        ([(TOTAL, HeaderValue::from(self.total))], axum::Json(self.rows)).into_response()
    }
}

/// As [`Paged`], of rows that SQLite has written as a JSON array.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) rows: String,
    pub(super) total: i64,
}

impl IntoResponse for Written {
    fn into_response(self) -> Response {
        const JSON: HeaderValue = HeaderValue::from_static("application/json");
        ([(TOTAL, HeaderValue::from(self.total)), (header::CONTENT_TYPE, JSON)], self.rows).into_response()
    }
}

/// The statements of a filter: a page of a list, and how many rows all pages have. Each filter has its own, because a
/// condition that may be absent keeps SQLite from using an index.
pub(super) struct Statements {
    pub(super) page: &'static str,
    pub(super) count: &'static str,
}

/// Where a page of a long list begins. `K` is the key by which the list is sorted: no two rows have the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start<K> {
    /// Behind so many rows, which are all passed over; and the rows of the whole list are counted.
    Offset(u32),
    /// Behind the row with this key, or at the first row. Such a page takes no longer than another, and nothing is
    /// counted.
    Cursor(Option<K>),
}

impl<K: DeserializeOwned> Start<K> {
    /// What the query says. A cursor is text that only [`page_headers`] makes.
    pub(super) fn of(cursor: Option<&str>, offset: Option<u32>) -> Result<Self, ApiError> {
        let Some(cursor) = cursor else { return Ok(Self::Offset(offset.unwrap_or(0))) };
        if offset.is_some() {
            return Err(ApiError::bad("a page begins at a cursor or at an offset, not at both"));
        }
        if cursor == FIRST {
            return Ok(Self::Cursor(None));
        }
        let key = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let key = key.ok_or_else(|| ApiError::bad("this list has no such cursor: begin again at 'first'"))?;
        Ok(Self::Cursor(Some(key)))
    }

    pub(super) fn is_counted(&self) -> bool {
        matches!(self, Self::Offset(_))
    }

    /// The key behind which the page begins, and `OFFSET` for SQL. `top` is before all rows.
    pub(super) fn bounds(self, top: K) -> (K, u32) {
        match self {
            Self::Offset(offset) => (top, offset),
            Self::Cursor(key) => (key.unwrap_or(top), 0),
        }
    }
}

/// The headers of a page of a long list. `rows` has one more than wanted if there is another page; it is taken away.
pub(super) fn page_headers<R, K: Serialize>(
    rows: &mut Vec<R>,
    limit: u32,
    total: Option<i64>,
    key: impl Fn(&R) -> K,
) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.extend(total.map(|total| (TOTAL, HeaderValue::from(total))));
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    if let Some(last) = rows.last().filter(|_| more) {
        let key = serde_json::to_vec(&key(last)).unwrap_or_default(); // numbers and text
        let cursor = HeaderValue::try_from(BASE64_URL_SAFE_NO_PAD.encode(key));
        headers.extend(cursor.ok().map(|cursor| (NEXT, cursor)));
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_leads_behind_the_last_row_of_a_page() {
        let key = |number: &i64| (*number, format!("of {number}"));
        let mut rows = vec![5, 4, 3];
        let headers = page_headers(&mut rows, 2, Some(9), key);
        let next = headers[NEXT].to_str().unwrap();
        assert_eq!((rows, headers[TOTAL].to_str().unwrap()), (vec![5, 4], "9"));
        let start = Start::of(Some(next), None).unwrap();
        assert_eq!((start.is_counted(), start.bounds((9, String::new()))), (false, (key(&4), 0)));
        assert!(page_headers(&mut vec![3, 2], 2, None, key).is_empty(), "the last page says nothing");
        let start = |cursor, offset| Start::<(i64, String)>::of(cursor, offset);
        assert_eq!(start(Some(FIRST), None).unwrap(), Start::Cursor(None));
        assert_eq!(start(None, Some(7)).unwrap(), Start::Offset(7));
        assert!(Start::<(i64, i64)>::of(Some(next), None).is_err(), "that of another list");
        for (cursor, offset) in [("", None), ("x", None), ("WzFd", None), ("first", Some(0)), (next, Some(1))] {
            assert!(start(Some(cursor), offset).is_err(), "{cursor} {offset:?}");
        }
    }
}
