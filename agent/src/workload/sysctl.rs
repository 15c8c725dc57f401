//! Kernel settings below `/proc/sys`. Those below `net` belong to the netns of the calling thread.

use std::fs;
use std::io;
use std::path::Path;

/// A kernel setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{doing} kernel setting {name}{hint}")]
pub struct SysctlError {
    doing: &'static str,
    name: String,
    hint: &'static str,
    #[source]
    source: io::Error,
}

/// Reads `name`, written with slashes: `net/ipv4/ip_forward`.
pub(super) fn read(name: &str) -> Result<String, SysctlError> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name));
    let text = text.map_err(|source| SysctlError { doing: "read", name: name.to_owned(), hint: "", source })?;
    Ok(text.trim().to_owned())
}

/// Makes `name` be `value`; writes only when it is not, so a read-only `/proc/sys` with the right values is fine.
pub(super) fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    if read(name)? == value {
        return Ok(());
    }
    let hint = " (is /proc/sys read-only? then set it from outside)";
    fs::write(Path::new("/proc/sys").join(name), value).map_err(|source| SysctlError {
        doing: "write",
        name: name.to_owned(),
        hint,
        source,
    })
}

/// Is there such a setting in this kernel?
pub(super) fn exists(name: &str) -> bool {
    Path::new("/proc/sys").join(name).exists()
}

/// Interfaces that `net/<family>/conf` knows, without `all` and `default`.
pub(super) fn interfaces(family: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(Path::new("/proc/sys/net").join(family).join("conf")) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name != "all" && name != "default").collect()
}
