//! Asks on the terminal for what must not be seen there. Own code, because the crates for it show their question before
//! they turn the echo off: what is typed in between stands on the screen. Must always give the terminal back as it was.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
};

use nix::sys::termios::{self, LocalFlags, SetArg, Termios};

use super::stop::{EX_USAGE, Stop};

/// Longest line that is read, in bytes.
const LONGEST: usize = 4096;
/// The exit code of a program that Ctrl-C has ended, as a shell has it.
const INTERRUPTED: u8 = 130;

/// Reads one line that is not shown while it is typed.
///
/// # Errors
/// When there is no terminal, or the user breaks off.
pub(super) fn hidden(question: &str) -> Result<String, Stop> {
    let tty = OpenOptions::new().read(true).write(true).open("/dev/tty").map_err(|_| {
        let why = "there is no terminal on which to ask for the password: give it in TWISTLOCK_PASSWORD, or a token in TWISTLOCK_TOKEN";
        Stop::tell(EX_USAGE, why)
    })?;
    let mut quiet = Quiet::new(tty)?;
    quiet.tty.write_all(question.as_bytes())?;
    let line = read_line(&mut quiet.tty);
    quiet.tty.write_all(b"\n")?;
    match line? {
        Some(line) => Ok(line),
        None => Err(Stop::Told(INTERRUPTED)),
    }
}

/// A terminal that shows nothing and hands over each byte, even Ctrl-C: nothing may end this program before the echo is
/// on again.
struct Quiet {
    tty: File,
    before: Termios,
}

impl Quiet {
    fn new(tty: File) -> io::Result<Self> {
        let before = termios::tcgetattr(&tty)?;
        let mut quiet = before.clone();
        quiet.local_flags -= LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::ISIG;
        // This also drops what was typed before the question was shown.
        termios::tcsetattr(&tty, SetArg::TCSAFLUSH, &quiet)?;
        Ok(Self { tty, before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _ = termios::tcsetattr(&self.tty, SetArg::TCSAFLUSH, &self.before);
    }
}

/// The line without its end; none after Ctrl-C, or Ctrl-D at its beginning.
fn read_line(input: &mut impl Read) -> io::Result<Option<String>> {
    let mut line: Vec<u8> = Vec::new();
    // Byte by byte: what follows the line is for whoever reads next.
    for _ in 0..LONGEST {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        match byte[0] {
            b'\r' | b'\n' => return text(line),
            0x03 => return Ok(None),
            0x04 if line.is_empty() => return Ok(None),
            0x04 => return text(line),
            // Erase: a whole character, whatever its length.
            0x7f | 0x08 => while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {},
            0x15 => line.clear(),
            byte => line.push(byte),
        }
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the line does not end"))
}

fn text(line: Vec<u8>) -> io::Result<Option<String>> {
    let text = String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "that is not UTF-8"));
    text.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_edited_as_on_any_terminal() {
        let read = |typed: &[u8]| read_line(&mut &typed[..]).ok().flatten();
        assert_eq!(read(b"abc\n").as_deref(), Some("abc"));
        assert_eq!(read("aä\u{7f}b\r".as_bytes()).as_deref(), Some("ab"));
        assert_eq!(read(b"wrong\x15right\n").as_deref(), Some("right"));
        assert_eq!(read(b"\x7f\x7fa\x04").as_deref(), Some("a"));
        for none in [&b"ab\x03"[..], b"\x04", b"", b"ab", &[b'a'; LONGEST + 1], b"\xff\n"] {
            assert_eq!(read(none), None, "{none:?}");
        }
    }
}
