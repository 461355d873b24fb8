//! Changes some keys of a file and leaves every other line as it is. Reads through [`super::reader`] alone, and proves
//! that each key still means what it meant. Pure: must never touch the disk or ask the environment by itself.

use std::collections::BTreeMap;

use super::{
    ConfigErrors, Environment, Loaded,
    line::{self, Line, quote},
    reader::{self, Assigned},
};

/// A new `twistlock.cfg` that is being put together. What depended on the environment is written out: whoever reads the
/// file later, in whatever environment, reads the same.
#[derive(Clone)]
pub struct Draft {
    lines: Vec<String>,
    /// What the file is to mean.
    meant: BTreeMap<String, String>,
}

impl Draft {
    /// Starts from the text of a file; `file` is its name for messages.
    ///
    /// # Errors
    /// [`ConfigErrors::Invalid`] with all problems of the text.
    pub fn new(text: &[u8], file: &str, env: Environment<'_>) -> Result<Self, ConfigErrors> {
        let assigned = reader::assigned(text, file, env)?;
        let lines = reader::lines(text).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        let meant = assigned.into_iter().map(|(key, Assigned { value, .. })| (key, value)).collect();
        let mut draft = Self { lines, meant };
        while draft.lines.last().is_some_and(String::is_empty) {
            draft.lines.pop();
        }
        Ok(draft)
    }

    /// What a key is set to, if it is.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.meant.get(key).map(String::as_str)
    }

    /// Sets a key.
    pub fn set(&mut self, key: &str, value: &str) {
        self.put(key, &quote(value));
        self.meant.insert(key.to_owned(), value.to_owned());
    }

    /// Takes over those keys of another file that are `wanted`, written as they are there.
    ///
    /// # Errors
    /// [`ConfigErrors::Invalid`] with all problems of the other file. Nothing has changed then.
    pub fn copy_from(
        &mut self,
        text: &[u8],
        file: &str,
        env: Environment<'_>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), ConfigErrors> {
        for (key, Assigned { value, raw }) in reader::assigned(text, file, env)? {
            if wanted(&key) {
                self.put(&key, &raw);
                self.meant.insert(key, value);
            }
        }
        Ok(())
    }

    /// Returns the text, which means what it should in any environment, and what it says.
    ///
    /// # Errors
    /// [`ConfigErrors::Invalid`] with all problems of the new text. Their line numbers are those of the new text.
    pub fn finish(mut self, file: &str) -> Result<(String, Loaded), ConfigErrors> {
        // A value can depend on the environment or on a line that is elsewhere now. Writing one out can change another.
        for _ in 0..=self.meant.len() {
            let found = reader::assigned(self.text().as_bytes(), file, &|_| None)?;
            let same = |key: &String, value: &String| found.get(key).is_some_and(|found| found.value == *value);
            let wrong: Vec<_> = self.meant.iter().filter(|(key, value)| !same(key, value)).collect();
            if wrong.is_empty() {
                break;
            }
            let wrong: Vec<_> = wrong.into_iter().map(|(key, value)| (key.clone(), quote(value))).collect();
            wrong.iter().for_each(|(key, raw)| self.put(key, raw));
        }
        let text = self.text();
        let loaded = reader::parse(&text, file, &|_| None)?;
        Ok((text, loaded))
    }

    fn text(&self) -> String {
        self.lines.join("\n") + "\n"
    }

    /// Replaces the line of a key, or adds one.
    fn put(&mut self, key: &str, raw: &str) {
        let new = format!("{key}={raw}");
        let mut place = None;
        let mut at = 0;
        self.lines.retain_mut(|line| {
            if matches!(line::split(line), Ok(Line::Assignment(name, _)) if name == key) {
                if place.is_some() {
                    // A second line of the same key would win over the first.
                    return false;
                }
                place = Some(at);
                line.clone_from(&new);
            }
            at += 1;
            true
        });
        if place.is_none() {
            self.lines.push(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(text: &str) -> Draft {
        Draft::new(text.as_bytes(), "new", &|_| None).unwrap()
    }

    #[test]
    fn a_key_is_replaced_where_it_stands_and_its_other_lines_go() {
        let mut draft = draft("# a\nLEASE_MS=400 # one\n  LEASE_MS=410\nLOG_LEVEL=info\n\n");
        draft.set("LEASE_MS", "420");
        draft.set("OTHER", "a b");
        let (text, loaded) = draft.finish("new").unwrap();
        assert_eq!(text, "# a\nLEASE_MS=420\nLOG_LEVEL=info\nOTHER='a b'\n");
        assert_eq!(loaded.config.lease.as_millis(), 420);
    }

    #[test]
    fn what_is_kept_is_written_as_it_was_where_that_means_the_same() {
        let old =
            "\u{feff}DATA_FOLDER=/x/tw   # big disk\r\n  CONSOLE_CN='a'\r\nLOG_LEVEL= debug\n".replace("= d", "=d");
        let mut draft = draft("LOG_LEVEL=info\nDATA_FOLDER=/var/lib/twistlock\n");
        draft.copy_from(old.as_bytes(), "old", &|_| None, |key| key != "CONSOLE_CN").unwrap();
        let (text, _) = draft.finish("new").unwrap();
        assert_eq!(text, "LOG_LEVEL=debug\nDATA_FOLDER=/x/tw   # big disk\n");
    }

    #[test]
    fn what_depends_on_the_environment_or_on_another_line_is_written_out() {
        let env = |name: &str| (name == "DISK").then(|| "/mnt".to_owned());
        let old =
            b"BASE=/srv\nDATA_FOLDER=${BASE-/x}/tw\nDATA_RECOVERY_VOLUME=${DISK:-/y}/backup\nLEASE_MS=${NONE-410}\n";
        // Here BASE would come behind the line that asks for it.
        let mut draft = draft("DATA_FOLDER=/var/lib/twistlock\n");
        draft.copy_from(old, "old", &env, |_| true).unwrap();
        let (text, loaded) = draft.finish("new").unwrap();
        assert!(
            text.contains("DATA_FOLDER=/srv/tw\n") && text.contains("DATA_RECOVERY_VOLUME=/mnt/backup\n"),
            "{text}"
        );
        assert!(text.contains("LEASE_MS=${NONE-410}\n"), "{text}");
        assert_eq!(loaded.config.data_folder.to_str(), Some("/srv/tw"));
    }

    #[test]
    fn the_line_of_the_host_name_is_kept() {
        let example = super::super::render(&super::super::Config::default());
        let mut draft = draft("CONSOLE_CN=another\n");
        draft.copy_from(example.as_bytes(), "old", &|_| None, |key| key == "CONSOLE_CN").unwrap();
        assert!(draft.finish("new").unwrap().1.config.console_cn.is_none());
    }
}
