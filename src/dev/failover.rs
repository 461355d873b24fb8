//! `dev --show-failover`: the story that the product exists for, told once with real processes. Writes a tag, kills the
//! primary with SIGKILL, and waits until another node takes a write. Must never report anything that it did not see.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{client::Client, layout::ClusterFile, process::Process, screen::Screen};

/// How long another node may take to accept a write.
const LIMIT: Duration = Duration::from_secs(30);
/// Pause between two attempts, so that a refused connection is not tried in a busy loop.
const PAUSE: Duration = Duration::from_millis(1);

/// Shows one takeover. The killed node is left to whoever restarts nodes.
///
/// # Errors
/// When the first tag is not accepted, no other node takes over in time, or an acknowledged tag is gone.
pub(super) fn show(cluster: &ClusterFile, processes: &[Process], client: &Client, screen: &mut Screen) -> Result<()> {
    let url = |index: usize| cluster.nodes[index].console_url.as_str();
    let name = |index: usize| &cluster.nodes[index].name;
    let everywhere = 0..cluster.nodes.len();
    let primary = everywhere.clone().find(|index| client.ping(url(*index))).context("find the primary")?;
    let token = client.log_in(url(primary), &cluster.user, &cluster.password)?;
    let (before, after) = ("before-the-failover", "after-the-failover");
    client.write_tag(url(primary), &token, before)?;
    screen.event(&format!("{} acknowledged the tag \"{before}\"", name(primary)));
    let start = Instant::now();
    processes[primary].kill();
    screen.event(&format!("{} is killed with SIGKILL", name(primary)));
    let next = loop {
        let others = everywhere.clone().filter(|index| *index != primary);
        if let Some(index) = others.into_iter().find(|index| client.write_tag(url(*index), &token, after).is_ok()) {
            break index;
        }
        if start.elapsed() > LIMIT {
            bail!("no other node accepted a write within {} s of the kill", LIMIT.as_secs());
        }
        std::thread::sleep(PAUSE);
    };
    let gap = start.elapsed().as_millis();
    screen.event(&format!("{} acknowledged the tag \"{after}\": {gap} ms after the kill", name(next)));
    let tags = client.tags(url(next), &token)?;
    if ![before, after].iter().all(|tag| tags.iter().any(|known| known == tag)) {
        bail!("an acknowledged tag is gone: {} has {tags:?}", name(next));
    }
    screen.event(&format!("{} has both tags, and the login is still good: nothing was lost", name(next)));
    Ok(())
}
