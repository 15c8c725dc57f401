//! `kill -9` loses nothing that was acknowledged: a real process writes, is killed, and its file is read back.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use culvert_control::store::{Operation, RedbStore, RowKey, Store as _, Table, Transaction};

/// Tells the process that it is the writer, and where to write.
const WRITER: &str = "CULVERT_TEST_WRITER";
/// Rounds of writing and killing, each on the file that the last one left.
const ROUNDS: usize = 5;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn put(table: Table, key: &str, value: u64) -> Operation {
    Operation::Put(RowKey::new(table, key), Bytes::from(value.to_string()))
}

/// Commits for ever: each transaction writes a row of its own and, beside it, the number of the last one. Prints the number
/// after each acknowledgement.
#[test]
fn writer() {
    let Ok(path) = std::env::var(WRITER) else { return };
    let store = RedbStore::open(Path::new(&path)).expect("the store");
    let mut out = std::io::stdout().lock();
    runtime().block_on(async {
        for number in store.load().await.expect("load").revision.0 + 1.. {
            let own = put(Table::Services, &format!("n/{number}"), number);
            let operations = vec![own, put(Table::Nodes, "last", number)];
            let revision = store.commit(Transaction { guards: Vec::new(), operations }).await.expect("commit");
            assert_eq!(revision.0, number);
            writeln!(out, "acknowledged {number}").expect("the parent reads");
            out.flush().expect("the parent reads");
        }
    });
}

fn start_writer(path: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "writer", "--nocapture", "--test-threads=1"]);
    command.env(WRITER, path).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a process")
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("state.redb");
    let mut last = 0;
    for round in 1..=ROUNDS {
        let mut writer = start_writer(&path);
        let lines = BufReader::new(writer.stdout.take().expect("piped")).lines();
        // Read on after the kill: what is in the pipe was acknowledged too.
        for line in lines {
            let line = line.expect("text");
            let Some(number) = line.split_once("acknowledged ").map(|(_, number)| number) else { continue };
            last = number.trim().parse().expect("a number");
            if last % (10 * round as u64 + 7) == 0 {
                writer.kill().expect("SIGKILL");
            }
        }
        writer.wait().expect("reaped");
        assert!(last > 0, "the writer wrote");

        let store = RedbStore::open(&path).expect("a store that was killed opens again");
        let contents = runtime().block_on(store.load()).expect("load");
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).expect("text");
        let rows: BTreeMap<_, _> =
            contents.rows.iter().map(|(key, row)| ((key.table, key.key.clone()), text(&row.value))).collect();
        let kept = contents.revision.0;
        assert!(kept >= last, "acknowledged {last}, kept {kept}");
        assert!(kept <= last + 1, "at most one commit was under way");
        assert_eq!(rows[&(Table::Nodes, "last".to_owned())], kept.to_string(), "a transaction is there as a whole");
        for number in 1..=kept {
            assert_eq!(rows[&(Table::Services, format!("n/{number}"))], number.to_string());
        }
        assert_eq!(rows.len() as u64, kept + 1, "and nothing else is");
        last = kept;
    }
}
