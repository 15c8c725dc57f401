//! What the commands say when they cannot set themselves up.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

/// The user that owns nothing.
const NOBODY: u32 = 65534;

fn said(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn who_is_not_root_is_told_what_needs_root_and_the_command() {
    assert!(rustix::process::geteuid().is_root(), "becoming nobody needs root; run `cargo xtask test` as root");
    let folder = tempfile::tempdir().expect("a directory");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
    let xtask = folder.path().join("xtask");
    fs::copy(env!("CARGO_BIN_EXE_xtask"), &xtask).expect("a copy");
    for command in ["demo", "test", "bench"] {
        let output = Command::new(&xtask).arg(command).current_dir("/").uid(NOBODY).gid(NOBODY).output();
        let said = said(&output.expect("start xtask"));
        assert!(said.contains("network namespaces"), "{said}");
        assert!(said.contains(&format!("needs root: sudo -E env \"PATH=$PATH\" cargo xtask {command}")), "{said}");
    }
}

#[test]
fn what_is_missing_is_named_and_not_installed_when_that_is_not_wanted() {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let said = said(&xtask.args(["test", "--no-install"]).env("PATH", "/nonexistent").output().expect("start xtask"));
    assert!(said.contains("missing: chromium (package chromium): the dashboard test in a real browser"), "{said}");
    assert!(said.contains("not installed (--no-install); as root: apt-get install -y"), "{said}");
}
