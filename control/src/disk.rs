//! What an operator can do about a file or a folder that cannot be used.

use std::io::{self, ErrorKind};

/// What to do about `error`, which an operation below the data directory returned: the end of a sentence that names the place.
#[must_use]
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        // Threads that serve the network have no capability, so not even root's agent opens files of others there.
        ErrorKind::PermissionDenied => {
            "it and its folder have to belong to root and must not be write-protected: see chown, lsattr"
        }
        ErrorKind::ReadOnlyFilesystem => "its file system is read-only: mount it writable, or set another data_dir",
        ErrorKind::IsADirectory => "a folder is where a file belongs: move it away",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "a file is where a folder belongs: move it away",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "the disk is full: make room on it",
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => "it is damaged: restore it from a backup",
        _ => "see whether the disk is in order",
    }
}
