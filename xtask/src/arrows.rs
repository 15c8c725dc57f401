//! The direction of dependencies between our crates, down only; and that each takes the workspace's lints.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::command::{cargo, output};

/// What each crate of ours may depend on. A crate that is missing here is an error: decide where it belongs first.
const ALLOWED: &[(&str, &[&str])] = &[
    ("culvert-types", &[]),
    ("culvert-ebpf-common", &[]),
    ("culvert-jobspec", &["culvert-types"]),
    ("culvert-api", &["culvert-types"]),
    ("culvert-proxy", &["culvert-types", "culvert-api"]),
    ("culvert-control", &["culvert-types", "culvert-api"]),
    (
        "culvert-agent",
        &["culvert-control", "culvert-proxy", "culvert-api", "culvert-types", "culvert-ebpf-common", "culvert-jobspec"],
    ),
    (
        "culvert-tests",
        &[
            "culvert-agent",
            "culvert-control",
            "culvert-proxy",
            "culvert-api",
            "culvert-types",
            "culvert-ebpf-common",
            "culvert-jobspec",
        ],
    ),
    ("culvert-bench", &["culvert-tests"]),
    ("counter-api", &[]),
    ("counter-dashboard", &[]),
    ("xtask", &[]),
];

/// Fails when a crate depends on one that is not below it.
pub(crate) fn check() -> anyhow::Result<()> {
    let metadata = output(cargo().args(["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    let wrong = turned_back(&metadata);
    if !wrong.is_empty() {
        bail!("arrows that turn back (ARCHITECTURE.md, \"Code map\"):\n  {}", wrong.join("\n  "));
    }
    let lax = without_lints(&metadata)?;
    if !lax.is_empty() {
        bail!("crates without the workspace's lints ([lints] workspace = true): {}", lax.join(", "));
    }
    println!("arrows point down only");
    Ok(())
}

fn without_lints(metadata: &Value) -> anyhow::Result<Vec<String>> {
    let mut lax = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let manifest = package["manifest_path"].as_str().context("manifest_path")?;
        let text = std::fs::read_to_string(manifest).with_context(|| manifest.to_owned())?;
        if !text.contains("[lints]\nworkspace = true\n") {
            lax.push(manifest.to_owned());
        }
    }
    Ok(lax)
}

fn turned_back(metadata: &Value) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ours: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(below) = allowed.get(name) else {
            wrong.push(format!("{name} has no place in xtask/src/arrows.rs"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
        // What tests share depends on none of ours itself, and is part of nothing that ships.
        let shipped = |dependency: &&Value| dependency["kind"] != "dev" || dependency["name"] != "culvert-tests";
        let names = dependencies.iter().filter(shipped).filter_map(|dependency| dependency["name"].as_str());
        wrong.extend(
            names
                .filter(|dependency| ours.contains(dependency) && !below.contains(dependency))
                .map(|dependency| format!("{name} -> {dependency}")),
        );
    }
    wrong
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn workspace(from: &str, to: &str) -> Value {
        json!({"packages": [{"name": from, "dependencies": [{"name": to}, {"name": "serde"}]}, {"name": to, "dependencies": []}]})
    }

    #[test]
    fn an_arrow_that_turns_back_is_named() {
        assert_eq!(turned_back(&workspace("culvert-control", "culvert-proxy")), ["culvert-control -> culvert-proxy"]);
        assert_eq!(turned_back(&workspace("culvert-types", "culvert-api")), ["culvert-types -> culvert-api"]);
        assert!(turned_back(&workspace("culvert-agent", "culvert-proxy")).is_empty());
    }

    #[test]
    fn only_the_tests_of_a_crate_use_what_tests_share() {
        let mut workspace = workspace("culvert-control", "culvert-tests");
        assert_eq!(turned_back(&workspace), ["culvert-control -> culvert-tests"]);
        workspace["packages"][0]["dependencies"][0]["kind"] = "dev".into();
        assert!(turned_back(&workspace).is_empty());
    }

    #[test]
    fn a_crate_with_lints_of_its_own_is_named() {
        let folder = tempfile::tempdir().expect("a directory");
        let manifest = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("a manifest");
            json!({"manifest_path": path})
        };
        let good = manifest("good.toml", "[package]\n\n[lints]\nworkspace = true\n");
        let lax = manifest("lax.toml", "[package]\n");
        let found = without_lints(&json!({"packages": [good, lax]})).expect("readable");
        assert!(matches!(&found[..], [one] if one.ends_with("lax.toml")), "{found:?}");
    }

    #[test]
    fn a_new_crate_must_be_given_a_place() {
        let wrong = turned_back(&json!({"packages": [{"name": "culvert-utils", "dependencies": []}]}));
        assert_eq!(wrong, ["culvert-utils has no place in xtask/src/arrows.rs"]);
    }
}
