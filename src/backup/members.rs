//! The backups of all members: each keeps its own in its folder, and whoever lists them asks the others. Must never
//! wait for one that does not answer for longer than a question may take, nor pass over it in silence.

use std::{collections::HashSet, sync::Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinSet;

use super::{Backup, BackupError, BackupId, Backups, MemberBackups, folder::Mark};
use crate::{
    ask::{AskError, Topic},
    clock::unix_time,
    mutex::locked,
};

/// How many backups an answer to another member names: the newest. Older ones are only counted.
const TOLD: usize = 2000;

/// What a member has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shelf {
    /// `DATA_RECOVERY_VOLUME`.
    folder: String,
    /// `DATA_RECOVERY_ENABLED`.
    enabled: bool,
    /// The newest first.
    backups: Vec<(Backup, Mark)>,
    /// How many there are besides.
    more: u32,
}

/// How the members answered when somebody asked last.
#[derive(Debug, Default)]
pub(super) struct Round(Mutex<Vec<MemberBackups>>);

impl Round {
    pub fn picture(&self) -> Vec<MemberBackups> {
        locked(&self.0).clone()
    }

    fn keep(&self, members: Vec<MemberBackups>) {
        *locked(&self.0) = members;
    }
}

/// What can be done with a backup that lies on another member.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way<'a> {
    /// This command, on the host where it lies.
    There(&'a str),
    /// Nothing there: it is needed on this host.
    Here,
}

impl Backups {
    /// The backups in the folder of this host, for another member.
    ///
    /// # Errors
    /// [`BackupError::Io`] when the folder cannot be read, [`BackupError::Hangs`] when it does not answer.
    pub async fn for_member(&self) -> Result<Value, BackupError> {
        let mut shelf = self.shelf().await?;
        shelf.more = u32::try_from(shelf.backups.len().saturating_sub(TOLD)).unwrap_or(u32::MAX);
        shelf.backups.truncate(TOLD);
        serde_json::to_value(shelf).map_err(|error| BackupError::Unknown(error.to_string()))
    }

    async fn shelf(&self) -> Result<Shelf, BackupError> {
        let (folder, enabled) = (self.config.folder.display().to_string(), self.config.enabled);
        Ok(Shelf { folder, enabled, backups: self.in_folder(|folder| folder.marked()).await?, more: 0 })
    }

    /// All backups of this host, and what the other members answer, newest first. [`Self::state`] says who did not
    /// answer.
    ///
    /// # Errors
    /// [`BackupError::Io`] when this host's own folder cannot be read, [`BackupError::Hangs`] when it does not answer.
    pub async fn all(&self) -> Result<Vec<Backup>, BackupError> {
        let (me, membership) = (self.node.status().borrow().node, self.node.membership().borrow().clone());
        let own = self.shelf().await?;
        let mut asked = JoinSet::new();
        // Whoever is no member (any more) would be refused everywhere.
        for member in membership.roster.members.iter().filter(|member| member.id != me && membership.get(me).is_some())
        {
            let (asker, id, name) = (self.asker.clone(), member.id, member.name.clone());
            asked.spawn(async move { (id, name, asker.ask::<Shelf>(id, Topic::Backups, &Value::Null).await) });
        }
        let name = membership.get(me).map_or_else(|| self.node.status().borrow().name.clone(), |own| own.name.clone());
        let mut answers = asked.join_all().await;
        answers.sort_by_key(|(id, ..)| *id);
        answers.insert(0, (me, name, Ok(own)));
        let (all, members) = gathered(answers.into_iter().map(|(_, name, answer)| (name, answer)), unix_time());
        self.round.keep(members);
        Ok(all)
    }

    /// The result; for a backup that is not here, the error says where it is.
    pub(super) async fn or_where<T>(
        &self,
        id: &str,
        way: Way<'_>,
        result: Result<T, BackupError>,
    ) -> Result<T, BackupError> {
        let Err(BackupError::NotFound(why)) = result else { return result };
        // No member is asked about what cannot be a backup.
        let known = if BackupId::parse(id).is_some() { self.all().await.ok() } else { None };
        let place = known.and_then(|all| self.place(id, way, &all, &self.round.picture()));
        Err(BackupError::NotFound(match place {
            Some(place) => format!("{why}. {place}"),
            None => why,
        }))
    }

    fn place(&self, id: &str, way: Way<'_>, all: &[Backup], members: &[MemberBackups]) -> Option<String> {
        let found = all.iter().find(|backup| backup.id == id);
        let Some(node) = found.map(|backup| &backup.node) else {
            let silent: Vec<_> = members.iter().filter_map(|member| member.problem.clone()).collect();
            return (!silent.is_empty())
                .then(|| format!("Whether another member has it is unknown: {}", silent.join("; ")));
        };
        let folder = members.iter().find(|member| member.node == *node).and_then(|member| member.folder.as_deref());
        let folder = folder.unwrap_or_default();
        Some(match way {
            Way::There(command) => format!("It lies on {node}, in {folder}. Run there: sudo twistcli backup {command}"),
            Way::Here => format!(
                "It lies on {node}, in {folder}. Copy the file from there into {} of this host, or make {node} PRIMARY: twistcli ha \
                 switchover --to {node}",
                self.config.folder.display()
            ),
        })
    }
}

/// All that was answered, and how each member answered. A file in a folder that members share counts once.
fn gathered(
    answers: impl Iterator<Item = (String, Result<Shelf, AskError>)>,
    time: u64,
) -> (Vec<Backup>, Vec<MemberBackups>) {
    let (mut all, mut members, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for (node, answer) in answers {
        let mut told = MemberBackups { node: node.clone(), time, ..MemberBackups::default() };
        match answer {
            Ok(Shelf { folder, enabled, backups, more }) => {
                told.backups = Some(u32::try_from(backups.len()).unwrap_or(u32::MAX).saturating_add(more));
                told.newest = backups.iter().map(|(backup, _)| backup.time).max();
                (told.folder, told.enabled) = (Some(folder), Some(enabled));
                let new = backups.into_iter().filter(|(backup, mark)| known.insert((backup.id.clone(), *mark)));
                all.extend(new.map(|(backup, _)| Backup { node: node.clone(), ..backup }));
            }
            Err(error) => told.problem = Some(format!("{node} {error}")),
        }
        members.push(told);
    }
    all.sort_by(|one: &Backup, other| (other.time, &one.id, &one.node).cmp(&(one.time, &other.id, &other.node)));
    (all, members)
}

#[cfg(test)]
mod tests {
    use super::{super::folder::describe, *};

    fn shelf(ids: &[(&str, u64)]) -> Result<Shelf, AskError> {
        let backup = |(id, inode): &(&str, u64)| {
            (describe(&BackupId::parse(id).unwrap(), 5), Mark { inode: *inode, changed: 1, bytes: 5 })
        };
        let backups = ids.iter().map(backup).collect();
        Ok(Shelf { folder: "/backup".to_owned(), enabled: true, backups, more: 0 })
    }

    #[test]
    fn each_backup_is_listed_with_its_member_and_who_is_silent_is_named() {
        let answers = [
            ("node1", shelf(&[("daily-0.1.0-9.tar.gz", 7), ("mine-0.1.0-5.tar.gz", 8)])),
            ("node2", shelf(&[("daily-0.1.0-9.tar.gz", 7), ("daily-0.1.0-8.tar.gz", 7), ("mine-0.1.0-5.tar.gz", 3)])),
            ("node3", Err(AskError::Silent("nothing came within 3 s".to_owned()))),
        ];
        let (all, members) = gathered(answers.into_iter().map(|(node, answer)| (node.to_owned(), answer)), 100);
        let all: Vec<_> = all.iter().map(|backup| (backup.node.as_str(), backup.id.as_str())).collect();
        let expected = [
            // The same file in a folder of both.
            ("node1", "daily-0.1.0-9.tar.gz"),
            ("node2", "daily-0.1.0-8.tar.gz"),
            ("node1", "mine-0.1.0-5.tar.gz"),
            ("node2", "mine-0.1.0-5.tar.gz"),
        ];
        assert_eq!(all, expected);
        assert_eq!((members[1].backups, members[1].newest, members[1].time), (Some(3), Some(9), 100));
        assert_eq!(members[2].problem.as_deref(), Some("node3 does not answer: nothing came within 3 s"));
        assert_eq!((members[2].backups, members[2].folder.as_deref()), (None, None));
    }
}
