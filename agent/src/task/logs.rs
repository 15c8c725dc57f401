//! Output of tasks on disk: `<logs>/<task>.<stream>.<n>`, written by the executor, read by `job logs`.
//!
//! The number grows for ever; the newest `max_files` numbers exist. A reader keeps a [`Cursor`] and is told the bytes after
//! it, so following a log is reading again.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Which output of a task.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// A place in a log: just after byte `offset` of file `index`.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Cursor {
    /// Number of the file.
    pub index: u64,
    /// Bytes of it already read.
    pub offset: u64,
}

fn file_name(task: &str, stream: Stream, index: u64) -> String {
    format!("{task}.{stream}.{index}")
}

/// Numbers and sizes in bytes of the files that exist, oldest first. Empty when the task never ran.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(logs: &Path, task: &str, stream: Stream) -> io::Result<Vec<(u64, u64)>> {
    let prefix = format!("{task}.{stream}.");
    let entries = match fs::read_dir(logs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|name| name.strip_prefix(&prefix)) else { continue };
        let Ok(index) = number.parse::<u64>() else { continue };
        match entry.metadata() {
            Ok(meta) if meta.is_file() => files.push((index, meta.len())),
            Ok(_) => {}
            // Rotated away while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// The cursor after which about the last `bytes` bytes follow.
///
/// # Errors
/// As [`list`].
pub fn tail(logs: &Path, task: &str, stream: Stream, bytes: u64) -> io::Result<Cursor> {
    let mut wanted = bytes;
    let files = list(logs, task, stream)?;
    for (index, size) in files.iter().rev() {
        if *size >= wanted {
            return Ok(Cursor { index: *index, offset: size - wanted });
        }
        wanted -= size;
    }
    Ok(Cursor { index: files.first().map_or(0, |(index, _)| *index), offset: 0 })
}

/// Up to `limit` bytes after `cursor`, and the cursor after them. Nothing read means nothing there yet. Where the file of
/// the cursor has been rotated away, reading goes on with the oldest one left.
///
/// # Errors
/// When a file cannot be read.
pub fn read(logs: &Path, task: &str, stream: Stream, cursor: Cursor, limit: usize) -> io::Result<(Vec<u8>, Cursor)> {
    read_listed(logs, task, stream, &list(logs, task, stream)?, cursor, limit)
}

/// As [`read`], with the files that exist. Their sizes are those of a moment ago and mean nothing: a file that is not the
/// newest is complete, because the next one was begun after its last byte.
fn read_listed(
    logs: &Path,
    task: &str,
    stream: Stream,
    files: &[(u64, u64)],
    cursor: Cursor,
    limit: usize,
) -> io::Result<(Vec<u8>, Cursor)> {
    let mut next = cursor;
    for &(index, _) in files.iter().filter(|(index, _)| *index >= cursor.index) {
        if index > next.index {
            next = Cursor { index, offset: 0 };
        }
        // A task may write to the folder; who reads is root, and neither follows a link nor waits at a pipe.
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file = match options.open(logs.join(file_name(task, stream, index))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        file.seek(SeekFrom::Start(next.offset))?;
        let mut bytes = Vec::new();
        file.take(limit as u64).read_to_end(&mut bytes)?;
        next.offset += bytes.len() as u64;
        if !bytes.is_empty() {
            return Ok((bytes, next));
        }
    }
    Ok((Vec::new(), next))
}

/// Writes one stream into numbered files of bounded size and number. Goes on after the highest number it finds.
#[derive(Debug)]
pub(crate) struct Rotator {
    logs: PathBuf,
    task: String,
    stream: Stream,
    max_files: u64,
    max_size: u64,
    index: u64,
    size: u64,
    file: File,
}

impl Rotator {
    /// Opens the newest file of the stream for appending, or the first one. `max_files` and `max_size` (bytes) are at least 1.
    pub(crate) fn open(logs: &Path, task: &str, stream: Stream, max_files: u64, max_size: u64) -> io::Result<Self> {
        let (index, _) = list(logs, task, stream)?.last().copied().unwrap_or((0, 0));
        let file = open_file(logs, task, stream, index)?;
        let size = file.metadata()?.len();
        let (logs, task) = (logs.to_owned(), task.to_owned());
        Ok(Self { logs, task, stream, max_files, max_size, index, size, file })
    }

    /// Appends `bytes`, beginning new files where the current one is full. A file ends at a line's end where there is one.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = usize::try_from(self.max_size.saturating_sub(self.size)).unwrap_or(usize::MAX);
            let cut = if bytes.len() <= room {
                bytes.len()
            } else {
                let line_end = bytes[..room].iter().rposition(|byte| *byte == b'\n').map(|last| last + 1);
                // Without a line's end the rest of the line goes to a fresh file, unless it fits no file at all.
                line_end.unwrap_or(if self.size > 0 { 0 } else { room })
            };
            let (now, later) = bytes.split_at(cut);
            self.file.write_all(now)?;
            self.size += now.len() as u64;
            bytes = later;
            if !bytes.is_empty() {
                self.rotate()?;
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let next = self.index + 1;
        self.file = open_file(&self.logs, &self.task, self.stream, next)?;
        (self.index, self.size) = (next, 0);
        for (index, _) in list(&self.logs, &self.task, self.stream)? {
            if index + self.max_files <= next {
                fs::remove_file(self.logs.join(file_name(&self.task, self.stream, index)))?;
            }
        }
        Ok(())
    }
}

/// Never follows a link: the executor writes as root.
fn open_file(logs: &Path, task: &str, stream: Stream, index: u64) -> io::Result<File> {
    let path = logs.join(file_name(task, stream, index));
    OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: &str = "web";

    fn everything(logs: &Path, limit: usize) -> Vec<u8> {
        let (mut all, mut cursor) = (Vec::new(), Cursor::default());
        loop {
            let (bytes, next) = read(logs, TASK, Stream::Stdout, cursor, limit).expect("readable");
            if bytes.is_empty() {
                return all;
            }
            all.extend(bytes);
            cursor = next;
        }
    }

    #[test]
    fn files_are_bounded_in_size_and_number_and_end_with_a_line() {
        let directory = tempfile::tempdir().expect("a directory");
        let logs = directory.path();
        let mut rotator = Rotator::open(logs, TASK, Stream::Stdout, 3, 64).expect("opened");
        for line in 0..100 {
            rotator.write(format!("line number {line:04}\n").as_bytes()).expect("written");
        }
        let files = list(logs, TASK, Stream::Stdout).expect("listed");
        assert_eq!(files.len(), 3);
        assert!(files.iter().all(|(_, size)| *size <= 64), "{files:?}");
        let text = String::from_utf8(everything(logs, 7)).expect("text");
        assert!(text.lines().all(|line| line.len() == "line number 0000".len()), "{text}");
        assert!(text.ends_with("line number 0099\n"), "{text}");
    }

    #[test]
    fn a_line_longer_than_a_file_is_cut_and_nothing_is_lost() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut rotator = Rotator::open(directory.path(), TASK, Stream::Stdout, 100, 10).expect("opened");
        let text: Vec<u8> = (0..95).map(|number| b'a' + number % 26).collect();
        rotator.write(b"abc").expect("written");
        rotator.write(&text).expect("written");
        assert_eq!(everything(directory.path(), 1000), [b"abc".as_slice(), &text].concat());
    }

    #[test]
    fn the_next_executor_goes_on_where_the_last_one_stopped() {
        let directory = tempfile::tempdir().expect("a directory");
        for text in ["one\n", "two\n", "three\n"] {
            let mut rotator = Rotator::open(directory.path(), TASK, Stream::Stdout, 2, 8).expect("opened");
            rotator.write(text.as_bytes()).expect("written");
        }
        assert_eq!(everything(directory.path(), 100), b"one\ntwo\nthree\n");
        assert_eq!(list(directory.path(), TASK, Stream::Stderr).expect("listed"), []);
    }

    #[test]
    fn a_reader_left_behind_goes_on_with_the_oldest_file_and_tail_finds_the_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let logs = directory.path();
        let mut rotator = Rotator::open(logs, TASK, Stream::Stdout, 2, 4).expect("opened");
        rotator.write(b"aaa\nbbb\nccc\nddd\n").expect("written");
        let (bytes, cursor) = read(logs, TASK, Stream::Stdout, Cursor { index: 0, offset: 2 }, 100).expect("read");
        assert_eq!((bytes.as_slice(), cursor), (&b"ccc\n"[..], Cursor { index: 2, offset: 4 }));
        let end = tail(logs, TASK, Stream::Stdout, 6).expect("tail");
        assert_eq!(end, Cursor { index: 2, offset: 2 });
        assert_eq!(tail(logs, TASK, Stream::Stdout, 1000).expect("tail"), Cursor { index: 2, offset: 0 });
    }

    #[test]
    fn what_was_written_between_looking_and_reading_is_not_passed_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let logs = directory.path();
        let mut rotator = Rotator::open(logs, TASK, Stream::Stdout, 9, 8).expect("opened");
        rotator.write(b"aaa\n").expect("written");
        let (_, cursor) = read(logs, TASK, Stream::Stdout, Cursor::default(), 100).expect("read");
        rotator.write(b"bbb\nccc\n").expect("written");
        // As listed while the second line was being written: the first file still short, the second one there.
        let (bytes, cursor) = read_listed(logs, TASK, Stream::Stdout, &[(0, 4), (1, 4)], cursor, 100).expect("read");
        assert_eq!((bytes.as_slice(), cursor), (&b"bbb\n"[..], Cursor { index: 0, offset: 8 }));
    }

    #[test]
    fn a_link_in_place_of_a_log_is_not_followed() {
        let directory = tempfile::tempdir().expect("a directory");
        let victim = directory.path().join("victim");
        std::os::unix::fs::symlink(&victim, directory.path().join("web.stdout.0")).expect("a link");
        assert!(Rotator::open(directory.path(), TASK, Stream::Stdout, 2, 4).is_err());
        assert!(!victim.exists());
        std::fs::write(&victim, "secret").expect("written");
        assert_eq!(list(directory.path(), TASK, Stream::Stdout).expect("listed"), []);
        let listed = [(0, 6)];
        let read = read_listed(directory.path(), TASK, Stream::Stdout, &listed, Cursor::default(), 100);
        read.expect_err("made after the files were listed");
    }
}
