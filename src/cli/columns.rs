//! Tables, sentences and JSON on standard output, and progress on standard error. Makes harmless what came from
//! elsewhere: nothing that a terminal would act on gets through.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use super::stop::Stop;

/// When the output has colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum When {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb
    #[default]
    Auto,
    Always,
    Never,
}

/// ANSI colours, or nothing at all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(pub bool);

impl Paint {
    /// For standard output.
    pub(super) fn new(when: When) -> Self {
        // See https://no-color.org.
        let wanted = || std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self(match when {
            When::Auto => io::stdout().is_terminal() && wanted() && !is_dumb(),
            When::Always => true,
            When::Never => false,
        })
    }

    pub(super) fn text(self, code: &str, text: &str) -> String {
        if self.0 && !code.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A tick, or a cross if something is not as it must be.
    pub(super) fn mark(self, ok: bool) -> String {
        if ok { self.text("32", "✓") } else { self.text("1;31", "✗") }
    }
}

/// True if standard error is a terminal, where a person can follow the progress.
pub(super) fn watched() -> bool {
    io::stderr().is_terminal()
}

/// A terminal that says that it understands no control sequences.
pub(super) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// One cell: a text, and its colour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    text: String,
    code: &'static str,
}

impl Cell {
    pub(super) fn coloured(code: &'static str, text: &str) -> Self {
        Self { text: harmless(text), code }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::coloured("", text)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::coloured("", &text)
    }
}

/// The head of a column; those of numbers are set flush right.
pub(super) type Head = (&'static str, bool);

/// A table with a head line; each line ends with a newline.
pub(super) fn table(heads: &[Head], rows: &[Vec<Cell>], paint: Paint) -> String {
    // Some characters take two columns, and combining marks none.
    let width = |text: &str| text.width();
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, (head, _))| {
            let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| width(&cell.text));
            cells.chain([width(head)]).max().unwrap_or(0)
        })
        .collect();
    let head: Vec<Cell> = heads.iter().map(|(head, _)| Cell::coloured("1", head)).collect();
    let line = |row: &Vec<Cell>| {
        let mut out = String::new();
        for (column, cell) in row.iter().enumerate() {
            let padding = " ".repeat(widths[column] - width(&cell.text));
            let text = paint.text(cell.code, &cell.text);
            let (left, right) = if heads[column].1 { (padding.as_str(), "") } else { ("", padding.as_str()) };
            let gap = if column == 0 { "" } else { "  " };
            out.extend([gap, left, &text, right]);
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    };
    std::iter::once(&head).chain(rows).map(line).collect()
}

/// The text without anything that a terminal would act on, or that would break a line.
pub(super) fn harmless(text: &str) -> String {
    let odd = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if odd(c) { '\u{fffd}' } else { c }).collect()
}

/// A progress bar of unknown length with a message, if a person can follow it.
pub(super) fn progress_bar() -> ProgressBar {
    let bar = if watched() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {msg}") {
        bar.set_style(style.progress_chars("##-"));
    }
    bar
}

/// Prints one line, made harmless.
///
/// # Errors
/// When it cannot be written.
pub(super) fn say(text: &str) -> Result<(), Stop> {
    Ok(print(&format!("{}\n", harmless(text)))?)
}

/// Prints a text that is complete.
///
/// # Errors
/// When it cannot be written.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints a value as JSON.
///
/// # Errors
/// When it cannot be written.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Stop> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    Ok(print(&format!("{text}\n"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [vec!["ä".into(), "7".into()], vec!["abcdef".into(), Cell::coloured("31", "12345")]];
        let heads = [("NAME", false), ("SIZE", true)];
        assert_eq!(table(&heads, &rows, Paint(false)), "NAME     SIZE\nä           7\nabcdef  12345\n");
        assert!(table(&heads, &rows, Paint(true)).contains("abcdef  \x1b[31m12345\x1b[0m\n"));
        assert_eq!(table(&heads, &[], Paint(false)), "NAME  SIZE\n");
        let wide = [vec!["日本".into(), "1".into()], vec!["e\u{301}te\u{301}".into(), "2".into()]];
        assert_eq!(table(&heads, &wide, Paint(false)), "NAME  SIZE\n日本     1\ne\u{301}te\u{301}      2\n");
    }

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_act_on() {
        let text = table(&[("A", false)], &[vec!["x\x1b[2J\r\n\u{202e}y".into()]], Paint(false));
        assert_eq!(text, "A\nx\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}y\n");
    }
}
