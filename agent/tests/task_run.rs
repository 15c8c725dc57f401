//! Tasks under their executors, both drivers: environment, output, exit status, signals, limits, survival.

mod task_world;
mod workload_world;

use std::path::Path;
use std::time::Duration;

use culvert_agent::task::logs::{self, Stream};
use culvert_agent::task::{
    self, Adoption, Driver, Hierarchies, ProcessIdentity, Resources, Signal, TaskRecord, TaskSpec,
};
use culvert_agent::workload::Network;
use task_world::{end, executor, fail_to_start, output, run_to_end, spec, start};
use workload_world::{World, eventually, in_world};

const BOTH: [Driver; 2] = [Driver::RawExec, Driver::Exec];

/// No cgroup of the task in any hierarchy, and no process of it.
fn assert_gone(world: &World, spec: &TaskSpec, record: &TaskRecord) {
    let exists = |process: &ProcessIdentity| process.exists().expect("known");
    assert!(!exists(&record.process) && !exists(&record.executor));
    let hierarchies = Hierarchies::find().expect("cgroup2");
    let parent = Path::new(&world.cgroup_parent).join(spec.alloc_id.as_str());
    assert_eq!(task::children(&hierarchies, &parent), [] as [String; 0]);
}

#[test]
fn exit_codes_and_signals_are_told_apart() {
    in_world("exit", |world| async move {
        for driver in BOTH {
            for (script, code, signal) in [
                ("exit 0", 0, 0),
                ("exit 3", 3, 0),
                ("exit 143", 143, 0),
                ("kill -TERM $$; sleep 9", 143, 15),
                ("kill -SEGV $$; sleep 9", 139, 11),
            ] {
                let spec = spec(&world, driver, script);
                let task = start(&spec).await;
                let status = end(&task).await;
                assert_eq!((status.exit_code, status.signal), (code, signal), "{driver}: {script}");
                assert_eq!(status.success(), code == 0, "{driver}: {script}");
                assert_eq!((status.oom_killed, &status.error), (false, &None));
                assert!(status.started_at <= status.finished_at);
                assert_eq!(end(&task).await, status, "waiting again says the same");
                assert_gone(&world, &spec, task.record());
            }
        }
    });
}

#[test]
fn a_task_gets_its_own_environment_and_nothing_else() {
    in_world("environment", |world| async move {
        for driver in BOTH {
            let mut spec = spec(&world, driver, "pwd; cat; env; umask");
            spec.env.insert("GREETING".into(), "hello world\nand more".into());
            spec.env.extend(spec.dirs.env(driver).map(|(name, value)| (name.to_owned(), value)));
            let (status, text) = run_to_end(&spec).await;
            assert!(status.success(), "{text}");
            let (cwd, alloc) = match driver {
                Driver::Exec => ("/".to_owned(), "/alloc".to_owned()),
                Driver::RawExec => (spec.dirs.task.display().to_string(), spec.dirs.shared.display().to_string()),
            };
            let mut names: Vec<&str> =
                text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
            names.retain(|name| !matches!(*name, "PWD" | "_" | "SHLVL")); // the shell's own
            names.sort_unstable();
            assert_eq!(names, ["GREETING", "NOMAD_ALLOC_DIR", "NOMAD_SECRETS_DIR", "NOMAD_TASK_DIR", "PATH"], "{text}");
            assert!(text.starts_with(&format!("{cwd}\n")), "{text}");
            assert!(text.contains(&format!("NOMAD_ALLOC_DIR={alloc}\n")), "{text}");
            assert!(text.contains("hello world\nand more") && text.ends_with("0022\n"), "{text}");
            assert!(text.contains(&format!("PATH={}\n", task::DEFAULT_PATH)), "{text}");
        }
    });
}

#[test]
fn a_task_may_open_as_many_files_as_before_the_agent_raised_its_own_limit() {
    in_world("nofile", |world| async move {
        let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let low = rustix::process::Rlimit { current: Some(512), ..before };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, low).expect("lowered");
        assert_eq!(culvert_agent::task::descriptors::raise().expect("raised"), before.maximum);
        for driver in BOTH {
            let (status, text) = run_to_end(&spec(&world, driver, "ulimit -Sn")).await;
            assert_eq!((status.success(), text.trim()), (true, "512"), "{driver}");
        }
    });
}

#[test]
fn output_is_rotated_and_streams_are_kept_apart() {
    in_world("rotation", |world| async move {
        let script = "i=0; while [ $i -lt 30000 ]; do echo \"line $i with some text to fill the file up to its size .........\"; \
                      i=$((i+1)); done; echo oops >&2";
        let mut spec = spec(&world, Driver::RawExec, script);
        (spec.logs.max_files, spec.logs.max_file_size_mb) = (2, 1);
        let (status, text) = run_to_end(&spec).await;
        assert!(status.success());
        let files = logs::list(&spec.dirs.logs, "web", Stream::Stdout).expect("listed");
        assert_eq!(files.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1]);
        assert!(files.iter().all(|(_, size)| *size <= 1 << 20), "{files:?}");
        assert_eq!(text.lines().count(), 30_000);
        assert!(text.lines().enumerate().all(|(number, line)| line.starts_with(&format!("line {number} "))));
        assert_eq!(output(&spec, Stream::Stderr), "oops\n");
        run_to_end(&spec).await;
        let files = logs::list(&spec.dirs.logs, "web", Stream::Stdout).expect("listed");
        assert_eq!(files.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [2, 3], "the oldest files are gone");
    });
}

#[test]
fn a_task_that_handles_its_kill_signal_ends_by_itself() {
    in_world("signal", |world| async move {
        for driver in BOTH {
            let spec = spec(&world, driver, "trap 'echo bye; exit 7' INT; echo ready; while :; do sleep 0.05; done");
            let task = start(&spec).await;
            eventually("the handler is set", async || output(&spec, Stream::Stdout).contains("ready")).await;
            let status = task.kill(spec.kill_signal, Duration::from_secs(60)).await.expect("watched");
            assert_eq!((status.exit_code, status.signal), (7, 0), "{driver}");
            assert_eq!(output(&spec, Stream::Stdout), "ready\nbye\n");
            assert!(task.signal(Signal::TERM).is_err(), "it has ended");
            assert_gone(&world, &spec, task.record());
        }
    });
}

#[test]
fn a_program_without_handlers_ends_at_once_also_in_a_sandbox() {
    in_world("plain", |world| async move {
        for driver in BOTH {
            let mut spec = spec(&world, driver, "");
            (spec.command, spec.args) = ("sleep".into(), vec!["1000".into()]);
            let task = start(&spec).await;
            let status = task.kill(Signal::INT, Duration::from_secs(3600)).await.expect("watched");
            assert_eq!((status.exit_code, status.signal), (130, 2), "{driver}: not by SIGKILL after an hour");
        }
    });
}

#[test]
fn a_task_that_ignores_its_kill_signal_is_killed_with_everything_it_started() {
    in_world("kill", |world| async move {
        for driver in BOTH {
            let script = "trap '' INT TERM; setsid sleep 1000 & sleep 1000 & echo ready; wait; sleep 1000";
            let spec = spec(&world, driver, script);
            let task = start(&spec).await;
            eventually("it runs", async || output(&spec, Stream::Stdout).contains("ready")).await;
            let status = task.kill(Signal::INT, Duration::from_millis(300)).await.expect("watched");
            assert_eq!((status.exit_code, status.signal), (137, 9), "{driver}");
            assert_gone(&world, &spec, task.record());
        }
    });
}

#[test]
fn what_a_task_leaves_running_dies_with_it() {
    in_world("rest", |world| async move {
        for driver in BOTH {
            let spec = spec(&world, driver, "setsid sleep 1000 >/dev/null 2>&1 & (sleep 1000 &) ; echo started");
            let (status, text) = run_to_end(&spec).await;
            assert_eq!((status.exit_code, text.as_str()), (0, "started\n"), "{driver}");
            let record = task::find_record(&spec.dirs.task).expect("readable").expect("left by the executor");
            assert_gone(&world, &spec, &record);
        }
    });
}

#[test]
fn a_task_runs_in_its_allocations_netns() {
    in_world("netns", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        for driver in BOTH {
            let mut spec = spec(&world, driver, "readlink /proc/self/ns/net; cat /proc/net/fib_trie");
            let workload = network.create(&spec.alloc_id).await.expect("created");
            spec.netns = Some(workload.netns);
            let (status, text) = run_to_end(&spec).await;
            assert!(status.success() && text.contains(&workload.addr4.to_string()), "{driver}: {text}");
            assert!(!text.contains("172.26.64.1\n"), "{driver}: the host's address is not there: {text}");
            network.remove(&spec.alloc_id).await.expect("removed");
        }
        let mut spec = spec(&world, Driver::Exec, "exit 0");
        spec.netns = Some("/run/netns/missing".into());
        let error = fail_to_start(&spec).await.to_string();
        assert!(error.starts_with("failed to launch command with executor: open network namespace /run/netns/missing"));
    });
}

#[test]
fn failures_to_start_are_in_the_words_users_know_and_leave_nothing() {
    in_world("failures", |world| async move {
        for driver in BOTH {
            let with =
                |command: &str| TaskSpec { command: command.into(), args: Vec::new(), ..spec(&world, driver, "") };
            let missing = with("/no/such/program");
            let expected = match driver {
                Driver::RawExec => "binary \"/no/such/program\" could not be found".to_owned(),
                Driver::Exec => format!("file /no/such/program not found under path {}", missing.dirs.task.display()),
            };
            let error = fail_to_start(&missing).await;
            assert_eq!(error.to_string(), format!("failed to launch command with executor: {expected}"));
            assert!(!error.recoverable());
            let unknown = fail_to_start(&with("no-such-program")).await.to_string();
            assert!(unknown.contains("no-such-program"), "{unknown}");
            let denied = fail_to_start(&with("/etc/passwd")).await.to_string();
            let expected = "failed to launch command with executor: fork/exec /etc/passwd: ";
            assert!(
                denied.to_lowercase().starts_with(expected) && denied.to_lowercase().contains("permission denied"),
                "{denied}"
            );
            let user = TaskSpec { user: Some("no-such-user".into()), ..with("/bin/true") };
            let error = fail_to_start(&user).await.to_string();
            assert_eq!(error, "failed to launch command with executor: unknown user \"no-such-user\"");
            for spec in [&missing, &user] {
                let hierarchies = Hierarchies::find().expect("cgroup2");
                let parent = Path::new(&world.cgroup_parent).join(spec.alloc_id.as_str());
                assert_eq!(task::children(&hierarchies, &parent), [] as [String; 0]);
            }
        }
        let root = TaskSpec { user: Some("root".into()), ..spec(&world, Driver::Exec, "id") };
        let error = fail_to_start(&root).await.to_string();
        assert_eq!(error, "failed to launch command with executor: running as user \"root\" is disallowed");
        let nul = TaskSpec { args: vec!["a\0b".into()], ..spec(&world, Driver::RawExec, "") };
        assert!(fail_to_start(&nul).await.to_string().contains("NUL"));
        let mut gone = executor();
        gone.program = "/no/such/culvert".into();
        let error = task::start(spec(&world, Driver::RawExec, ""), &gone).await.expect_err("no executor");
        assert!(error.recoverable() && error.to_string().contains("/no/such/culvert"), "{error}");
    });
}

#[test]
fn a_program_is_found_in_the_tasks_own_directory_first() {
    in_world("lookup", |world| async move {
        for driver in BOTH {
            let mut spec = spec(&world, driver, "");
            let program = spec.dirs.local.join("id");
            std::fs::write(&program, "#!/bin/sh\necho own program, called $0 $1\n").expect("written");
            std::os::unix::fs::chown(&program, Some(65_534), Some(65_534)).expect("owned");
            std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .expect("executable");
            (spec.command, spec.args) = ("id".into(), vec!["-u".into()]);
            let (_, text) = run_to_end(&spec).await;
            assert!(text.starts_with("own program"), "{driver}: {text}");
            spec.command = "local/id".into();
            let (_, text) = run_to_end(&spec).await;
            assert!(text.starts_with("own program"), "{driver}: {text}");
            std::fs::remove_file(&program).expect("removed");
            spec.command = "id".into();
            let (_, text) = run_to_end(&spec).await;
            let last = text.lines().last();
            assert_eq!(last, Some(if driver == Driver::Exec { "65534" } else { "0" }), "{text}");
        }
    });
}

#[test]
fn raw_exec_runs_as_another_user_when_asked() {
    in_world("user", |world| async move {
        let user = TaskSpec { user: Some("daemon".into()), ..spec(&world, Driver::RawExec, "id -un; id -Gn") };
        let (status, text) = run_to_end(&user).await;
        assert!(status.success());
        assert_eq!(text, "daemon\ndaemon\n");
    });
}

#[test]
fn a_task_above_its_memory_limit_is_killed_and_says_so() {
    in_world("memory", |world| async move {
        let hog = "echo start; tail -c 300m /dev/zero | wc -c; head -c 300m /dev/zero | tail -c 300m >/dev/null; echo survived";
        let mut spec = spec(&world, Driver::Exec, &format!("exec 2>/dev/null; {hog}"));
        // The shell itself is the hog, so that it is the task that dies.
        spec.args[1] = "a=$(head -c 200m /dev/zero | tr '\\0' x); echo survived ${#a}".into();
        spec.resources = Resources { memory_mb: 64, ..Resources::default() };
        let task = start(&spec).await;
        if let Some(note) = task.record().notes.iter().find(|note| note.starts_with("memory limit not enforced")) {
            assert!(std::env::var_os("CI").is_none(), "CI has a memory controller: {note}");
            return;
        }
        let status = end(&task).await;
        assert!(status.oom_killed, "{status:?} {}", output(&spec, Stream::Stdout));
        assert!(!output(&spec, Stream::Stdout).contains("survived"));
    });
}

#[test]
fn a_task_has_the_weight_and_the_limits_that_it_asks_for() {
    in_world("knobs", |world| async move {
        let mut spec = spec(&world, Driver::Exec, "exec sleep 60");
        spec.resources = Resources { cpu_mhz: 512, memory_mb: 64, ..Resources::default() };
        let task = start(&spec).await;
        let group = format!("{}/{}/{}", world.cgroup_parent, spec.alloc_id.as_str(), spec.task);
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("readable");
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|point| point.contains("cgroup"));
        let mounts: Vec<&str> = mounts.collect();
        let read = |file: &str| {
            let text = mounts.iter().find_map(|mount| std::fs::read_to_string(format!("{mount}/{group}/{file}")).ok());
            text.unwrap_or_default().trim().to_owned()
        };
        // cgroup v1 or cgroup2, whichever has the controller.
        for (files, values) in [
            (["cpu.shares", "cpu.weight"], ["512", "20"]),
            (["memory.limit_in_bytes", "memory.max"], ["67108864", "67108864"]),
            (["pids.max", "pids.max"], ["8192", "8192"]),
        ] {
            let found = files.map(read);
            let told = found.iter().zip(values).any(|(found, value)| found == value);
            assert!(told, "{files:?} hold {found:?}; notes: {:?}", task.record().notes);
        }
        for (file, value) in [("memory.memsw.limit_in_bytes", "67108864"), ("memory.swap.max", "0")] {
            let found = read(file);
            assert!(found.is_empty() || found == value, "{file}: {found}");
        }
        task.signal(Signal::KILL).expect("delivered");
        end(&task).await;
    });
}

#[test]
fn a_task_cannot_start_more_processes_than_its_limit() {
    in_world("pids", |world| async move {
        let script = "i=0; while [ $i -lt 40 ]; do sleep 30 & i=$((i+1)); done; echo all started";
        let mut limited = spec(&world, Driver::Exec, script);
        limited.resources.pids_max = 16;
        let task = start(&limited).await;
        if task.record().notes.iter().any(|note| note.starts_with("pids limit not enforced")) {
            assert!(std::env::var_os("CI").is_none(), "CI has a pids controller");
            return;
        }
        let status = end(&task).await;
        assert!(!status.success() && !output(&limited, Stream::Stdout).contains("all started"), "{status:?}");
    });
}

#[test]
fn the_next_agent_adopts_a_running_task_and_learns_the_end_of_one_that_ended() {
    in_world("survival", |world| async move {
        for driver in BOTH {
            let spec = spec(&world, driver, "trap 'echo bye; exit 4' INT; echo ready; while :; do sleep 0.05; done");
            let first = start(&spec).await;
            let record = first.record().clone();
            drop(first); // nothing ends with the agent's handle
            eventually("it runs", async || output(&spec, Stream::Stdout).contains("ready")).await;
            let found = task::find_record(&spec.dirs.task).expect("readable").expect("the executor's own record");
            assert_eq!(found, record, "an agent that died before it kept the record finds it");
            let Adoption::Running(task) = task::adopt(record.clone()).await.expect("adopted") else {
                panic!("{driver}: it runs");
            };
            task.signal(Signal::INT).expect("delivered");
            let status = end(&task).await;
            assert_eq!(status.exit_code, 4, "{driver}");
            assert_eq!(output(&spec, Stream::Stdout), "ready\nbye\n", "output went on");
            let Adoption::Ended(again) = task::adopt(record).await.expect("judged") else { panic!("it has ended") };
            assert_eq!(again, status);
        }
    });
}

#[test]
fn a_task_survives_the_death_of_the_process_that_started_it() {
    in_world("orphan", |world| async move {
        // This test's process plays the next agent; the one that starts the task is a child that is killed.
        let spec = spec(&world, Driver::Exec, "while :; do sleep 0.05; done");
        let mut agent = std::process::Command::new("sh")
            .args(["-c", "\"$0\" executor >/dev/null; sleep 1000", env!("CARGO_BIN_EXE_culvert")])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let orders = serde_json::to_vec(&spec).expect("JSON");
        std::io::Write::write_all(&mut agent.stdin.take().expect("a pipe"), &orders).expect("written");
        let mut record = None;
        eventually("the executor leaves its record", async || {
            record = task::find_record(&spec.dirs.task).expect("readable");
            record.is_some()
        })
        .await;
        agent.kill().expect("killed");
        agent.wait().expect("dead");
        let record = record.expect("just seen");
        let Adoption::Running(task) = task::adopt(record).await.expect("adopted") else { panic!("it runs") };
        let status = task.kill(Signal::TERM, Duration::from_secs(60)).await.expect("watched");
        assert_eq!(status.signal, 15);
    });
}

#[test]
fn a_task_dies_with_its_executor_and_the_agent_says_why() {
    in_world("executor", |world| async move {
        for driver in BOTH {
            let spec = spec(&world, driver, "setsid sleep 1000 & echo ready; sleep 1000");
            let task = start(&spec).await;
            eventually("it runs", async || output(&spec, Stream::Stdout).contains("ready")).await;
            let executor = i32::try_from(task.record().executor.pid).expect("a pid");
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(executor), nix::sys::signal::Signal::SIGKILL)
                .expect("sent");
            let status = end(&task).await;
            assert!(status.error.as_ref().is_some_and(|error| error.contains("without an exit status")), "{status:?}");
            assert!(!status.success());
            eventually("its processes are gone", async || task.record().process.exists().is_ok_and(|exists| !exists))
                .await;
            assert_gone(&world, &spec, task.record());
        }
    });
}

#[test]
fn a_process_that_merely_got_the_pid_is_not_adopted() {
    in_world("pidreuse", |world| async move {
        let spec = spec(&world, Driver::RawExec, "exit 5");
        let task = start(&spec).await;
        let status = end(&task).await;
        let own = ProcessIdentity::of(std::process::id()).expect("this process");
        let imposter = ProcessIdentity { start_time: task.record().executor.start_time, ..own };
        let record = TaskRecord { executor: imposter, ..task.record().clone() };
        let Adoption::Ended(judged) = task::adopt(record).await.expect("judged") else { panic!("not the executor") };
        assert!(judged.error.is_some(), "the status on disk is another executor's: {status:?} {judged:?}");
    });
}

#[test]
fn an_executor_that_is_asked_to_end_ends_its_task_first() {
    in_world("shutdown", |world| async move {
        let spec = spec(&world, Driver::Exec, "trap 'echo bye; exit 0' INT; echo ready; while :; do sleep 0.05; done");
        let task = start(&spec).await;
        eventually("it runs", async || output(&spec, Stream::Stdout).contains("ready")).await;
        let executor = i32::try_from(task.record().executor.pid).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(executor), nix::sys::signal::Signal::SIGTERM).expect("sent");
        assert!(end(&task).await.success());
        assert_eq!(output(&spec, Stream::Stdout), "ready\nbye\n");
    });
}

#[test]
fn the_smallest_memory_limit_leaves_room_for_the_task() {
    in_world("smallest", |world| async move {
        // Nomad's minimum is 10 MB; the sandbox's init lives inside the limit.
        let mut spec = spec(&world, Driver::Exec, "echo ok");
        spec.resources = Resources { memory_mb: 10, ..Resources::default() };
        let (status, text) = run_to_end(&spec).await;
        assert!(status.success() && text == "ok\n", "{status:?} {text}");
    });
}
