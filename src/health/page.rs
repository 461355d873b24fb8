//! The status page: a [`Report`] as HTML that needs no script. Must never let a text from the cluster become markup.

use std::{fmt::Write, sync::LazyLock};

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use ring::digest;

use super::report::{Report, Seen};
use crate::cluster::Role;

const STYLE: &str = include_str!("page.css");
/// Seconds after which the page asks again.
const AGAIN: u32 = 5;

/// What a browser may do with the page: show it in the style that belongs to it, and nothing else.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = BASE64_STANDARD.encode(digest::digest(&digest::SHA256, STYLE.as_bytes()));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// The report as a page.
pub(super) fn shown(code: StatusCode, report: &Report) -> Response {
    html(code, &status(report))
}

/// The page for those who may not see the other one.
pub(super) fn refused(code: StatusCode, title: &str, text: &str) -> Response {
    let body = format!("<h1 class=\"bad\">{}</h1>\n<p>{}</p>\n", escaped(title), escaped(text));
    html(code, &framed(title, "", &body))
}

fn html(code: StatusCode, text: &str) -> Response {
    let kind = HeaderValue::from_static("text/html; charset=utf-8");
    let referrer = HeaderValue::from_static("no-referrer");
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY.clone()),
        (header::REFERRER_POLICY, referrer),
    ];
    (code, headers, text.to_owned()).into_response()
}

fn framed(title: &str, head: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n{head}<title>{} · Twistlock HA</title>\n<style>{STYLE}</style>\n\
         </head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escaped(title)
    )
}

fn status(report: &Report) -> String {
    let mut body = String::new();
    // Writing into a string does not fail.
    let _ = writeln!(
        body,
        "<p class=\"quiet\">Twistlock HA · status page of <strong>{}</strong></p>",
        escaped(&report.name)
    );
    let kind = match report.verdict {
        "HEALTHY" => "good",
        "DEGRADED" => "busy",
        _ => "bad",
    };
    let _ = writeln!(body, "<h1 class=\"{kind}\">{}</h1>", escaped(&report.headline));
    let time = report.as_of.strftime("%Y-%m-%d %H:%M:%S UTC");
    let _ = writeln!(
        body,
        "<p class=\"quiet\">As of <time>{time}</time>, as this host sees it. The page asks again every {AGAIN} s.</p>"
    );
    if !report.advice.is_empty() {
        let lines: String = report.advice.iter().map(|line| format!("<li>{}</li>\n", commands(line))).collect();
        let _ = writeln!(
            body,
            "<section class=\"advice\"><h2>What is wrong, and what to do</h2>\n<ul>\n{lines}</ul></section>"
        );
    }
    body.push_str(&console(report));
    if !report.members.is_empty() {
        let rows: String = report.members.iter().map(row).collect();
        let _ = writeln!(
            body,
            "<section><h2>Members</h2>\n<table>\n<thead><tr><th scope=\"col\">Member</th><th scope=\"col\">State</th>\
             <th scope=\"col\">Address</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table></section>"
        );
    }
    let _ = writeln!(
        body,
        "<section><h2>This host</h2>\n<dl>\n<dt>State</dt><dd>{} {}</dd>\n<dt>Epoch</dt><dd>{}</dd>\n\
         <dt>Version</dt><dd>{}</dd>\n</dl></section>",
        badge(report.state),
        escaped(&report.reason),
        report.epoch,
        escaped(&report.version)
    );
    body.push_str(
        "<p class=\"quiet\">More on this host: <code>sudo twistcli ha status</code>. For programs: \
         <a href=\"/status?format=json\">this as JSON</a>, <a href=\"/readyz?verbose\">readyz</a>, \
         <a href=\"/metrics\">metrics</a>.</p>\n",
    );
    let again = format!("<meta http-equiv=\"refresh\" content=\"{AGAIN}\">\n");
    framed(&format!("{} {}", report.state, report.name), &again, &body)
}

/// Where the Console is, or why it is nowhere.
fn console(report: &Report) -> String {
    let text = match (&report.primary, &report.console) {
        (Some(primary), Some(url)) => {
            let url = escaped(url);
            format!("{} is PRIMARY. Its Console: <a href=\"{url}\">{url}</a>", escaped(primary))
        }
        (Some(primary), None) => format!("{} is PRIMARY. It has no HTTPS port.", escaped(primary)),
        (None, _) => "This host knows of no PRIMARY, so it knows of no Console.".to_owned(),
    };
    format!("<section><h2>Console</h2>\n<p>{text}</p></section>\n")
}

fn row(member: &Seen) -> String {
    let name = escaped(&member.name);
    let name = match member.here || member.status.is_empty() {
        true => format!("<strong>{name}</strong>"),
        false => format!("<a href=\"{}\"><strong>{name}</strong></a>", escaped(&member.status)),
    };
    let (badge, words, address) = (badge(member.state), escaped(&member.words), escaped(&member.address));
    format!("<tr><td>{name}</td><td>{badge} {words}</td><td class=\"mono\">{address}</td></tr>\n")
}

fn badge(state: Role) -> String {
    let kind = match state {
        Role::Primary | Role::Secondary => "good",
        Role::Down | Role::Unknown | Role::Removed => "bad",
        _ => "busy",
    };
    format!("<span class=\"badge {kind}\">{state}</span>")
}

/// A sentence whose commands stand between backquotes.
fn commands(line: &str) -> String {
    let parts = line.split('`').enumerate();
    parts
        .map(|(at, part)| if at % 2 == 1 { format!("<code>{}</code>", escaped(part)) } else { escaped(part) })
        .collect()
}

/// A text as the content of an element or as the value of an attribute in quotes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            letter if letter.is_control() => out.push('\u{fffd}'),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::health::report::tests::report;

    #[test]
    fn no_text_becomes_markup() {
        const HOSTILE: &str = "\"'><svg onload=alert(1)>&`<script>`";
        let page = status(&report(
            |status| {
                let texts = [&mut status.name, &mut status.reason, &mut status.version];
                texts.into_iter().for_each(|text| *text = HOSTILE.to_owned());
                status.warnings.push(HOSTILE.to_owned());
                for (shown, member) in status.members.iter_mut().zip(&mut status.membership.roster.members) {
                    (shown.name, shown.address, shown.version) = (HOSTILE.into(), HOSTILE.into(), HOSTILE.into());
                    (member.name, member.address) = (HOSTILE.into(), HOSTILE.into());
                }
            },
            Duration::ZERO,
            true,
        ));
        assert!(page.contains("&lt;svg onload=alert(1)&gt;&amp;"), "{page}");
        let begins: Vec<&str> = page.match_indices('<').map(|(at, _)| &page[at..page.len().min(at + 8)]).collect();
        assert!(!begins.iter().any(|tag| tag.starts_with("<svg") || tag.starts_with("<script")), "{begins:?}");
        // No quotation mark ends an attribute early: each tag has an even number.
        let odd = |tag: &str| tag.split('>').next().unwrap_or_default().matches('"').count() % 2 == 1;
        assert!(!page.split('<').any(odd), "{page}");
    }

    #[test]
    fn the_page_needs_nothing_but_itself() {
        let page = status(&report(|_| {}, Duration::ZERO, true));
        assert!(!page.contains("<script") && !page.contains("<link") && !page.contains("src="), "{page}");
        assert!(!page.contains(" style="), "the policy refuses it");
        assert!(page.contains("<a href=\"https://127.0.0.1:8083/\">") && page.contains("http-equiv=\"refresh\""));
        assert!(page.contains("<a href=\"http://127.0.0.2:8085/status\">"), "{page}");
        assert!(POLICY.to_str().unwrap().contains("style-src 'sha256-"));
        assert_eq!(commands("run `a <b>` here"), "run <code>a &lt;b&gt;</code> here");
    }
}
