//! The agent's configuration: files, fragments and flags in, one checked [`Settings`] out.
//!
//! Sources in order: `-config-file` and `-config-dir` as they stand on the command line (a directory's `.hcl` and `.json` files
//! in lexical order), then `-hcl` fragments, then flags; the later one wins. A key that nobody knows is `invalid config key x`;
//! one that Consul knows and culvert does not honour is refused by name, unless its value asks for nothing (`false`, `0`,
//! `-1`, `""`, `[]`, `{}`). Reading again gives the settings for a reload; [`Settings::fixed_changes`] names what a reload
//! cannot change.

mod apply;
mod keys;
mod settings;
mod text;

use std::fmt;
use std::path::{Path, PathBuf};

pub use settings::{CaTimes, DEFAULT_DATA_DIR, DEFAULT_DEV_DATA_DIR, EbpfSettings, Limits, LogLevel, Settings};
pub use text::{MAX_TEXT, Place};

use crate::cli::AgentArgs;
use apply::Draft;

/// Most files that one directory may hold.
const MAX_FILES: usize = 1000;

/// Where a setting comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// A place in a file.
    File {
        /// The file.
        file: String,
        /// The place.
        place: Place,
    },
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, place } => write!(f, "{file}:{place}"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory cannot be read.
    #[error("read configuration {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A directory holds more than a thousand files.
    #[error("configuration directory {} holds more than {MAX_FILES} files", .0.display())]
    TooManyFiles(PathBuf),
    /// Not HCL and not JSON.
    #[error("{origin}: {message}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What was expected.
        message: String,
    },
    /// A key that neither Consul nor culvert knows.
    #[error("{origin}: invalid config key {key}")]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// The whole key.
        key: String,
    },
    /// A key that Consul knows and culvert does not honour.
    #[error("{origin}: config key {key} is not supported by culvert yet: remove it")]
    Unsupported {
        /// Where.
        origin: Origin,
        /// The whole key.
        key: String,
    },
    /// A value that makes no sense.
    #[error("{origin}: {key}: {message}")]
    Value {
        /// Where.
        origin: Origin,
        /// The whole key.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// Settings that contradict each other or are missing.
    #[error("{0}")]
    Together(String),
}

/// Reads everything that `args` name.
///
/// # Errors
/// [`ConfigError`]: nothing is skipped, and the first error ends it.
pub fn load(args: &AgentArgs) -> Result<Settings, ConfigError> {
    let mut draft = Draft::default();
    for path in &args.config {
        for file in files(path)? {
            let text = read(&file)?;
            draft.text(&text, &file.display().to_string())?;
        }
    }
    for fragment in &args.hcl {
        draft.text(fragment, "-hcl")?;
    }
    draft.flags(args)?;
    draft.finish()
}

/// Checks one text as if it were the only file, without finishing the settings.
///
/// # Errors
/// [`ConfigError`] as [`load`] would give it.
pub fn check(text: &str, file: &str) -> Result<(), ConfigError> {
    Draft::default().text(text, file)
}

#[cfg(any(test, feature = "fuzz"))]
/// Settings of one text and nothing else.
///
/// # Errors
/// [`ConfigError`] as [`load`] would give it.
pub fn finish(text: &str, file: &str) -> Result<Settings, ConfigError> {
    let mut draft = Draft::default();
    draft.text(text, file)?;
    draft.finish()
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let limit = u64::try_from(MAX_TEXT).unwrap_or(u64::MAX).saturating_add(1);
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    std::io::Read::read_to_string(&mut std::io::Read::take(file, limit), &mut text).map_err(failed)?;
    Ok(text)
}

/// The file itself, or a directory's configuration files in lexical order.
fn files(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let wanted = file.extension().is_some_and(|extension| extension == "hcl" || extension == "json");
        if wanted && file.is_file() {
            files.push(file);
        }
        if files.len() > MAX_FILES {
            return Err(ConfigError::TooManyFiles(path.to_owned()));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
