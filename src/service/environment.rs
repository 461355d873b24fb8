//! The environment of a service: what its file says, and what it is told of this node. Nothing of the daemon's own
//! environment gets there. Must never show a value: some are passwords.

use std::{fs::File, io::Read, path::Path};

/// Largest file, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// What a service finds when its file says nothing.
fn usual(folder: &Path) -> Vec<(String, String)> {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let pairs = [("PATH", path.to_owned()), ("LANG", "C.UTF-8".to_owned()), ("HOME", folder.display().to_string())];
    pairs.map(|(name, value)| (name.to_owned(), value)).into()
}

/// The environment of a service that is started in `folder`: the usual, then the lines of its file, then `told`.
///
/// # Errors
/// When the file cannot be read, or says something else than `NAME=VALUE`: names the file and the line.
pub(super) fn environment(
    file: Option<&Path>,
    folder: &Path,
    told: Vec<(String, String)>,
) -> Result<Vec<(String, String)>, String> {
    let mut all = usual(folder);
    if let Some(file) = file {
        let refused = |why: &str| format!("{}: {why} (SERVICE_ENVIRONMENT_FILE)", file.display());
        let mut text = String::new();
        let read = File::open(file).and_then(|opened| opened.take(MAX_FILE + 1).read_to_string(&mut text));
        read.map_err(|error| refused(&format!("cannot be read: {error}")))?;
        if text.len() as u64 > MAX_FILE {
            return Err(refused(&format!("it is larger than {MAX_FILE} bytes")));
        }
        for (number, line) in (1..).zip(text.lines()) {
            match pair(line) {
                Ok(Some(pair)) => set(&mut all, pair),
                Ok(None) => {}
                Err(why) => return Err(format!("{}:{number}: {why} (SERVICE_ENVIRONMENT_FILE)", file.display())),
            }
        }
    }
    told.into_iter().for_each(|pair| set(&mut all, pair));
    Ok(all)
}

fn set(all: &mut Vec<(String, String)>, pair: (String, String)) {
    all.retain(|(name, _)| *name != pair.0);
    all.push(pair);
}

fn pair(line: &str) -> Result<Option<(String, String)>, &'static str> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, value) = line.split_once('=').ok_or("NAME=VALUE is allowed")?;
    let letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    let fits =
        name.bytes().next().is_some_and(letter) && name.bytes().all(|byte| letter(byte) || byte.is_ascii_digit());
    if !fits {
        return Err("a name of letters, digits and _ is allowed");
    }
    if value.contains('\0') {
        return Err("a value without a zero byte is allowed");
    }
    let quoted = ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
    Ok(Some((name.to_owned(), quoted.unwrap_or(value).to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("environment");
        std::fs::write(&file, text).unwrap();
        let told = vec![("TWISTLOCK_EPOCH".to_owned(), "7".to_owned())];
        environment(Some(&file), Path::new("/srv/a"), told)
            .map_err(|why| why.replace(&file.display().to_string(), "FILE"))
    }

    #[test]
    fn the_file_is_read_and_what_we_tell_comes_last() {
        let all = read("# comment\n\nA=1\nB='two words'\nA=\"3\"\nHOME=/x\nTWISTLOCK_EPOCH=9\n").unwrap();
        let of = |name: &str| {
            all.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(
            (of("A"), of("B"), of("HOME"), of("TWISTLOCK_EPOCH")),
            (vec!["3"], vec!["two words"], vec!["/x"], vec!["7"])
        );
        assert_eq!(of("LANG"), ["C.UTF-8"]);
        assert_eq!(environment(None, Path::new("/srv"), vec![]).unwrap().len(), 3);
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_and_without_its_value() {
        for (text, why) in [("A=1\nsecret\n", "NAME=VALUE"), ("A=1\n1x=secret\n", "a name of")] {
            let told = read(text).unwrap_err();
            assert!(told.starts_with("FILE:2: ") && told.contains(why) && !told.contains("secret"), "{told}");
        }
        assert!(read(&"#".repeat(70_000)).unwrap_err().contains("larger than"));
        assert!(
            environment(Some(Path::new("/no/such")), Path::new("/"), vec![])
                .unwrap_err()
                .contains("/no/such: cannot be read")
        );
    }
}
