//! `culvert connect ca` against a real control plane.

use super::plane::Plane;
use super::{culvert, said};

#[test]
fn the_authoritys_settings_are_shown_and_changed_and_its_root_rotated() {
    let plane = Plane::start();
    let ca = |verb: &str, args: &[&str]| culvert(&[&["connect", "ca", verb, plane.flag.as_str()], args].concat());
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let shown = ca("get-config", &[]);
    assert!(shown.code == 0 && shown.out.contains("\"LeafCertTTL\": \"72h0m0s\""), "{shown:?}");
    let good = file("good.json", r#"{"Provider": "consul", "Config": {"LeafCertTTL": "24h"}}"#);
    assert_eq!(ca("set-config", &["-config-file", &good]), said("Configuration updated!\n"));
    assert!(ca("get-config", &[]).out.contains("\"LeafCertTTL\": \"24h0m0s\""));
    // What was shown can be given back.
    let same = file("same.json", &ca("get-config", &[]).out);
    assert_eq!(ca("set-config", &["-config-file", &same]), said("Configuration updated!\n"));
    for (name, text, reason) in [
        ("short.json", r#"{"Config": {"LeafCertTTL": "1m"}}"#, "leaf cert TTL must be between 1h and 8760h"),
        ("vault.json", r#"{"Provider": "vault"}"#, "unknown CA provider \"vault\""),
        ("odd.json", r#"{"Colour": 1}"#, "odd.json"),
    ] {
        let ran = ca("set-config", &["-config-file", &file(name, text)]);
        assert!(ran.code == 1 && ran.out.is_empty() && ran.err.contains(reason), "{name}: {ran:?}");
    }
    assert_eq!(ca("set-config", &[]).code, 1);
    let rotated = ca("rotate", &[]);
    assert_eq!((rotated.code, rotated.err.as_str()), (0, ""));
    let control = plane.control.as_ref().expect("running");
    let roots = control.authority().roots().expect("rows");
    assert_eq!(rotated.out, format!("Root rotated: {} signs, 2 roots are trusted\n", roots.active_id));
}
