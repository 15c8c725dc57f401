//! What an operator can do about a file or a folder that cannot be used.

use std::io::{self, ErrorKind};

use rustix::io::Errno;

/// What to do about `error`, which an operation below the data directory returned: the end of a sentence that names the place.
#[must_use]
pub fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        // These have no stable kind.
        Some(Errno::MFILE | Errno::NFILE) => {
            return "too many files are open: raise LimitNOFILE of the service, or fs.file-max";
        }
        Some(Errno::LOOP) => return "its symbolic links lead in a circle: replace them, or set another data_dir",
        _ => {}
    }
    match error.kind() {
        // Threads that serve the network have no capability, so not even root's agent opens files of others there.
        ErrorKind::PermissionDenied => {
            "it and its folder have to belong to root and must not be write-protected: see chown, lsattr"
        }
        ErrorKind::NotFound => "it or a folder above it is missing: put it back, or set another data_dir",
        ErrorKind::InvalidFilename => "its path is too long: set a shorter data_dir",
        ErrorKind::ReadOnlyFilesystem => "its file system is read-only: mount it writable, or set another data_dir",
        ErrorKind::IsADirectory => "a folder is where a file belongs: move it away",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "a file is where a folder belongs: move it away",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "the disk is full: make room on it",
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => "it is damaged: restore it from a backup",
        _ => "see whether the disk is in order",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_fault_of_the_disk_is_not_called_one() {
        let of = |errno: Errno| remedy(&io::Error::from(errno));
        for errno in [Errno::NOENT, Errno::MFILE, Errno::NFILE, Errno::LOOP, Errno::NAMETOOLONG, Errno::ACCESS] {
            assert_ne!(of(errno), of(Errno::IO), "{errno}");
        }
        assert!(of(Errno::NAMETOOLONG).contains("too long"));
    }
}
