//! The comparison runs from end to end, with a real Envoy, and reports on everybody. Nothing is asserted about speed.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

const WORKS: [&str; 6] = [
    "echo 64 B",
    "echo 1 KiB",
    "echo 16 KiB",
    "throughput, 1 connection",
    "throughput, 8 connections",
    "new connections",
];

#[test]
fn a_short_comparison_reports_on_every_contender() {
    let envoy = std::env::var_os("CULVERT_ENVOY").expect("CULVERT_ENVOY names Envoy's binary; run `cargo xtask test`");
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_culvert-bench"));
    bench.args(["compare", "--rounds=1", "--millis=50", "--held=20", "--flips=2"]).arg("--out").arg(&out);
    let output = bench.arg("--envoy").arg(envoy).output().expect("start the bench");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let report = std::fs::read_to_string(out.join("bench.json")).expect("bench.json");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let phases = report["phases"].as_array().expect("phases");
    assert_eq!(phases.iter().map(|phase| phase["pinned"] == true).collect::<Vec<_>>(), [true, false]);
    let table = String::from_utf8(output.stdout).expect("a table");
    let contenders = ["plain TCP", "culvert direct", "culvert mTLS", "Envoy mTLS"];
    for phase in phases {
        for work in WORKS {
            let results = phase["results"].as_array().expect("results").iter();
            let did: Vec<_> = results.filter(|result| result["work"] == work).collect();
            assert_eq!(did.iter().map(|result| &result["contender"]).collect::<Vec<_>>(), contenders, "{work}");
            assert!(did.iter().all(|result| result["rate"].as_f64() > Some(0.0)), "{work}: {did:?}");
            // Whoever stands between has to work for it: time that is not counted would flatter.
            assert!(did[2..].iter().all(|result| result["cpu_nanos"].as_f64() > Some(0.0)), "{work}: {did:?}");
            if work.starts_with("echo") {
                let p999 = |result: &Value| result["latency"]["p999"].as_f64().expect("p99.9");
                let p50 = |result: &Value| result["latency"]["p50"].as_f64().expect("p50");
                assert!(did.iter().all(|result| p999(result) >= p50(result) && p50(result) > 0.0), "{work}: {did:?}");
            }
            assert!(table.contains(work), "{table}");
        }
        let memory = phase["memory"].as_array().expect("memory");
        assert_eq!(memory.iter().map(|one| &one["contender"]).collect::<Vec<_>>(), contenders[2..]);
        assert!(memory.iter().all(|one| one["idle"].as_u64() > Some(0)), "{memory:?}");
        let intentions = phase["intentions"].as_array().expect("intentions");
        assert_eq!(intentions.iter().map(|one| &one["contender"]).collect::<Vec<_>>(), contenders[1..3]);
    }
    for goal in ["p50 ≤ 1.05 × plain TCP", "p99 ahead of Envoy's", "CPU for each echo ahead", "a deny ends live"] {
        assert!(table.contains(goal), "{table}");
    }
    let chart = std::fs::read_to_string(out.join("bench.svg")).expect("bench.svg");
    assert!(chart.starts_with("<svg") && chart.ends_with("</svg>\n"), "{chart}");
    assert!(contenders.iter().all(|name| chart.contains(name)), "{chart}");
}
