//! What there is to know of this host. Must never fail: what cannot be read is left empty.

use std::fs;

use super::wire::Facts;

/// Looks at this host.
pub(super) fn facts() -> Facts {
    let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let system = ["/etc/os-release", "/usr/lib/os-release"].into_iter().map(line).find(|text| !text.is_empty());
    let uptime = line("/proc/uptime");
    Facts {
        hostname: line("/proc/sys/kernel/hostname"),
        kernel: line("/proc/sys/kernel/osrelease"),
        system: system.as_deref().and_then(pretty).unwrap_or_default(),
        architecture: std::env::consts::ARCH.to_owned(),
        uptime_sec: uptime.split('.').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0),
    }
}

/// The name in an os-release(5).
fn pretty(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_tells_what_it_is() {
        assert_eq!(
            pretty("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n").unwrap(),
            "Debian GNU/Linux 13 (trixie)"
        );
        assert_eq!(pretty("NAME=x\n"), None);
        let facts = facts();
        assert!(!facts.hostname.is_empty() && !facts.kernel.is_empty() && facts.uptime_sec > 0, "{facts:?}");
    }
}
