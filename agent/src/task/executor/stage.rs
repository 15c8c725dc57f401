//! The stage: a child of the executor that joins the task's cgroups and netns and then becomes the task (`raw_exec`), or
//! builds the sandbox, gives up every privilege and stays in it as init (`exec`).
//!
//! Init starts the program, passes signals on to it, buries orphans and reports the program's end. It is the sandbox's
//! pid 1, so that the program is not: a pid 1 without handlers ignores SIGTERM and SIGINT.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{AccessFlags, Pid, access, setsid};

use super::privileges::TaskUser;
use super::protocol::{StageReply, StageSpec, Words as _, read_message};
use super::{sandbox, supervise};
use crate::task::spec::{DEFAULT_PATH, Driver, TaskSpec};

/// File mode creation mask of every task.
const UMASK: u32 = 0o022;

/// The stage's `main`.
pub(super) fn run() -> ExitCode {
    let (spec, mut control) = match take_orders() {
        Ok(orders) => orders,
        // Nobody to tell: the executor is gone, or is not one.
        Err(_) => return ExitCode::FAILURE,
    };
    // Until the program can take them, signals wait; a pid 1 without handlers would lose them.
    let blocked = SigSet::all().thread_block().words("block signals");
    crate::sys::default_signal_actions();
    let outcome = blocked.and_then(|()| prepare(&spec)).and_then(|user| match spec.task.driver {
        Driver::RawExec => Err(become_task(&spec.task, &user)),
        Driver::Exec => run_sandboxed(&spec.task, &user, &mut control),
    });
    match outcome {
        Ok(code) => code,
        Err(reason) => {
            let _told = report(&mut control, &StageReply::Failed { reason });
            ExitCode::FAILURE
        }
    }
}

/// Reads the orders from the socket on stdin and moves it out of the task's way, close-on-exec.
fn take_orders() -> io::Result<(StageSpec, UnixStream)> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdin(fs::File::open("/dev/null")?)?;
    Ok((read_message(&control)?, control))
}

fn report(control: &mut UnixStream, reply: &StageReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    control.write_all(&line)
}

/// What both drivers need, as root: the executor's death is ours, cgroups, session, netns.
fn prepare(spec: &StageSpec) -> Result<TaskUser, String> {
    prctl::set_pdeathsig(Signal::SIGKILL).words("tie the task to its executor")?;
    umask(Mode::from_bits_truncate(UMASK));
    let user = TaskUser::resolve(spec.task.driver, spec.task.user.as_deref())?;
    for file in &spec.procs_files {
        let join = fs::OpenOptions::new().write(true).open(file).and_then(|mut procs| procs.write_all(b"0"));
        join.words(format_args!("join cgroup {}", file.display()))?;
    }
    // Only a session leader is refused, and this process leads none.
    setsid().words("make a session")?;
    if let Some(path) = &spec.task.netns {
        let netns = fs::OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path);
        let netns = netns.words(format_args!("open network namespace {}", path.display()))?;
        setns(netns, CloneFlags::CLONE_NEWNET).words(format_args!("join network namespace {}", path.display()))?;
    }
    Ok(user)
}

/// `raw_exec`: replaces this process. Returns only why it could not.
fn become_task(task: &TaskSpec, user: &TaskUser) -> String {
    let own = task.dirs.task.as_path();
    let program = match find_program(task, &[own.join("local"), own.to_owned()]) {
        Ok(program) => program,
        Err(reason) => return reason,
    };
    if let Err(reason) = user.become_user() {
        return reason;
    }
    // A change of user cancels it.
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
        return format!("tie the task to its executor: {error}");
    }
    let error = command(task, &program).current_dir(own).exec();
    format!("fork/exec {}: {error}", program.display())
}

/// `exec`: builds the sandbox, runs the program in it and returns when it has ended.
fn run_sandboxed(task: &TaskSpec, user: &TaskUser, control: &mut UnixStream) -> Result<ExitCode, String> {
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(own).words("make mount, ipc and uts namespaces")?;
    sandbox::enter(task)?;
    user.confine()?;
    prctl::set_pdeathsig(Signal::SIGKILL).words("tie the sandbox to its executor")?;
    let program = find_program(task, &[PathBuf::from("/local"), PathBuf::from("/")])?;
    let child = command(task, &program).current_dir("/").process_group(0).spawn();
    let child = child.words(format_args!("fork/exec {}", program.display()))?;
    let child = i32::try_from(child.id()).map(Pid::from_raw).map_err(|error| error.to_string())?;
    report(control, &StageReply::Started).words("report the start")?;
    let (code, signal) = serve_as_init(child)?;
    report(control, &StageReply::Exited { code, signal }).words("report the end")?;
    Ok(ExitCode::SUCCESS)
}

/// Passes signals on and buries the dead until `child` has ended.
fn serve_as_init(child: Pid) -> Result<(i32, i32), String> {
    let all = SigSet::all();
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match status.pid() {
                Some(pid) if pid == child => return Ok(supervise::exit_of(status)),
                Some(_) => {}
                None => break, // nobody has ended
            }
        }
        match all.wait().words("wait for a signal")? {
            Signal::SIGCHLD => {}
            // ESRCH: it has ended, and the next round sees it.
            signal => drop(kill(child, signal)),
        }
    }
}

/// The program with its arguments and nothing but its own environment.
fn command(task: &TaskSpec, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(&task.args).env_clear().envs(&task.env);
    // The name it was asked for, as a shell has it; the path may be another after lookup.
    command.arg0(&task.command);
    if !task.env.contains_key("PATH") {
        command.env("PATH", DEFAULT_PATH);
    }
    crate::sys::unblock_signals(&mut command);
    command
}

/// Finds the program as Nomad does: an absolute path as it is; else in the task's own directories; else, without a slash,
/// along the task's PATH.
fn find_program(task: &TaskSpec, own: &[PathBuf]) -> Result<PathBuf, String> {
    let name = Path::new(&task.command);
    let missing = || match task.driver {
        Driver::RawExec => format!("binary {:?} could not be found", task.command),
        Driver::Exec => format!("file {} not found under path {}", task.command, task.dirs.task.display()),
    };
    if name.is_absolute() {
        return if name.exists() { Ok(name.to_owned()) } else { Err(missing()) };
    }
    let plain = name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let path = task.env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
    let search = if task.command.contains('/') { "" } else { path };
    let places = search.split(':').filter(|place| place.starts_with('/')).map(PathBuf::from);
    let own = own.iter().filter(|_| plain).cloned();
    let mut candidates = own.chain(places).map(|place| place.join(name)).filter(|path| path.is_file());
    let first = candidates.next().ok_or_else(missing)?;
    // Like a shell: prefer what can be started, but name what was found when nothing can.
    let executable = |path: &PathBuf| access(path, AccessFlags::X_OK).is_ok();
    Ok(std::iter::once(first.clone()).chain(candidates).find(executable).unwrap_or(first))
}
