//! Reads `/proc/self/mountinfo`: what is mounted where (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One line of mountinfo.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mount {
    /// Where it is mounted, escapes undone.
    pub point: PathBuf,
    /// Per-mount options: `rw`, `nosuid`, …
    pub options: Vec<String>,
    /// File system type.
    pub kind: String,
    /// Options of the file system itself: for cgroup v1 the controllers.
    pub super_options: Vec<String>,
}

/// All mounts of the calling thread's mount namespace, in the order they were made.
///
/// # Errors
/// When `/proc` is not there.
pub fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// Mount points strictly below `path`, in the order they were made.
///
/// # Errors
/// As [`all`].
pub fn below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let inside = |mount: Mount| (mount.point.starts_with(&path) && mount.point != path).then_some(mount.point);
    Ok(all()?.into_iter().filter_map(inside).collect())
}

/// Parses mountinfo; a line that does not look like one is skipped.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
    let options = list(fields.next()?);
    // Optional fields end at a lone hyphen.
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let super_options = list(fields.nth(1)?);
    Some(Mount { point, options, kind, super_options })
}

fn list(field: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(field).split(',').map(str::to_owned).collect()
}

/// Undoes the kernel's escapes: space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let escape = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        plain.push(escape.unwrap_or(*first));
        rest = if escape.is_some() { &rest[4..] } else { tail };
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_escapes_optional_fields_and_controllers() {
        let text = b"36 35 98:0 / /with\\040space rw,nosuid master:1 propagate_from:2 - ext4 /dev/vda rw\n\
                     40 36 0:3 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                     half a line\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].point, Path::new("/with space"));
        assert_eq!(mounts[0].options, ["rw", "nosuid"]);
        assert_eq!(
            (mounts[1].kind.as_str(), mounts[1].super_options.as_slice()),
            ("cgroup", &["rw".into(), "memory".into()][..])
        );
    }

    #[test]
    fn this_machine_has_a_proc() {
        assert!(
            all().expect("mountinfo").iter().any(|mount| mount.point == Path::new("/proc") && mount.kind == "proc")
        );
    }

    proptest! {
        #[test]
        fn any_path_survives_the_kernels_escapes(path in prop::collection::vec(1_u8..=255, 1..40)) {
            let escaped: Vec<u8> = path
                .iter()
                .flat_map(|byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                    other => vec![*other],
                })
                .collect();
            let line = [b"36 35 98:0 / /".as_slice(), &escaped, b" rw - tmpfs none rw"].concat();
            let expected = PathBuf::from(OsString::from_vec([b"/".as_slice(), &path].concat()));
            prop_assert_eq!(&parse(&line)[0].point, &expected);
        }

        #[test]
        fn no_text_is_too_strange_to_be_skipped(text in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&text).len() <= text.len());
        }
    }
}
