//! The agent of the demo, and what is asked of it and of the dashboard.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{DASHBOARD, interrupt};
use crate::command::{cache, root};

/// Where the agent's API listens.
const API: &str = "127.0.0.1:8500";
/// How long the agent may take to serve.
const START: Duration = Duration::from_secs(30);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A running demo.
pub(crate) struct Demo {
    agent: std::cell::RefCell<Child>,
    binary: PathBuf,
    settings: PathBuf,
    log: PathBuf,
}

impl Demo {
    /// Starts `culvert agent -dev`. Whatever comes then, [`Demo::leave`] has to follow.
    pub(crate) fn start(bin: &Path) -> anyhow::Result<Self> {
        let folder = cache().join("demo");
        std::fs::create_dir_all(&folder)?;
        let (settings, log) = (folder.join("agent.hcl"), folder.join("agent.log"));
        std::fs::write(&settings, "encryption = \"always\"\n")?;
        let binary = bin.join("culvert");
        let mut command = Command::new(&binary);
        command.args(["agent", "-dev", "-config-file"]).arg(&settings).stdin(Stdio::null());
        let file = File::create(&log)?;
        // Of a terminal's signals it hears by us, who ask it to leave.
        command.stdout(file.try_clone()?).stderr(file).process_group(0);
        println!("+ culvert agent -dev -config-file {}   (log: {})", settings.display(), log.display());
        let agent = std::cell::RefCell::new(command.spawn().context("start the agent")?);
        Ok(Self { agent, binary, settings, log })
    }

    pub(crate) fn wait_served(&self) -> anyhow::Result<()> {
        self.until("the agent serves", START, || self.get(API, "/v1/culvert/status").is_ok())
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    pub(crate) fn settings(&self) -> &Path {
        &self.settings
    }

    /// Runs a `culvert` command as a user would.
    pub(crate) fn culvert(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.binary).args(arguments).current_dir(root()).output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("culvert {} ended with {}: {text}", arguments.join(" "), output.status);
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Shows the first lines of `culvert observe`.
    pub(crate) fn observe(&self, lines: usize, patience: Duration) -> anyhow::Result<()> {
        let mut observer = Command::new(&self.binary);
        let mut observer = observer.arg("observe").stdout(Stdio::piped()).spawn().context("start culvert observe")?;
        let shown = self.show(&mut observer, lines, patience);
        observer.kill()?;
        observer.wait().context("culvert observe")?;
        shown
    }

    fn show(&self, observer: &mut Child, lines: usize, patience: Duration) -> anyhow::Result<()> {
        let output = observer.stdout.take().context("its output")?;
        let (send, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let output = BufReader::new(output);
            output.lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let (mut shown, mut ended) = (0, false);
        self.until(&format!("culvert observe shows {lines} lines"), patience, || {
            while shown < lines && !ended {
                match seen.try_recv() {
                    Ok(line) => {
                        println!("  {line}");
                        shown += 1;
                    }
                    Err(TryRecvError::Empty) => return false,
                    Err(TryRecvError::Disconnected) => ended = true,
                }
            }
            true
        })?;
        ensure!(shown == lines, "culvert observe ended after {shown} lines");
        Ok(())
    }

    pub(crate) fn run_job(&self, bin: &Path, file: &Path) -> anyhow::Result<()> {
        let variable = format!("bin={}", bin.display());
        let file = file.to_string_lossy();
        println!("+ culvert job run -var {variable} {file}");
        print!("{}", self.culvert(&["job", "run", "-var", &variable, &file])?);
        Ok(())
    }

    /// Changes `encryption` live.
    pub(crate) fn encrypt(&self, value: &str) -> anyhow::Result<()> {
        println!("+ encryption = {value:?}, culvert reload");
        std::fs::write(&self.settings, format!("encryption = {value:?}\n"))?;
        self.culvert(&["reload"]).map(drop)
    }

    /// The dashboard's view of its connection.
    pub(crate) fn state(&self) -> anyhow::Result<Value> {
        let body = self.get(DASHBOARD, "/state")?;
        serde_json::from_str(&body).context("the dashboard's state")
    }

    /// Waits until the dashboard is connected; returns its count.
    pub(crate) fn wait_connected(&self, patience: Duration) -> anyhow::Result<u64> {
        let mut count = 0;
        self.until("the dashboard is connected", patience, || {
            let state = self.state().unwrap_or_default();
            count = state["count"].as_u64().unwrap_or_default();
            state["connected"] == true
        })?;
        Ok(count)
    }

    /// GET, body as text.
    pub(crate) fn get(&self, address: &str, path: &str) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        if !head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
            bail!("GET http://{address}{path}: {}", head.lines().next().unwrap_or_default());
        }
        Ok(body.to_owned())
    }

    /// The API of the agent.
    pub(crate) fn api(&self, path: &str) -> anyhow::Result<Value> {
        serde_json::from_str(&self.get(API, path)?).with_context(|| path.to_owned())
    }

    /// Waits until `done`; ends with the agent's log when it takes too long or the agent ended.
    pub(crate) fn until(&self, what: &str, patience: Duration, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
        let started = Instant::now();
        while !done() {
            interrupt::check()?;
            if let Some(status) = self.agent.borrow_mut().try_wait()? {
                bail!("the agent ended with {status} while waiting: {what}\n{}", self.log_tail());
            }
            if started.elapsed() > patience {
                bail!("waited {patience:?} in vain: {what}\n{}", self.log_tail());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Waits until somebody asks the demo to end, or the agent to leave.
    pub(crate) fn wait_for_interrupt(&self) -> anyhow::Result<()> {
        while !interrupt::asked() {
            match self.agent.borrow_mut().try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the agent ended with {status}\n{}", self.log_tail()),
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
        Ok(())
    }

    /// Has the agent remove everything and end.
    pub(crate) fn leave(&self) -> anyhow::Result<()> {
        if self.agent.borrow_mut().try_wait()?.is_some() {
            return Ok(());
        }
        println!("+ culvert leave");
        if let Err(error) = self.culvert(&["leave"]) {
            // It starts or ends already. Told by a signal, a `-dev` agent leaves as well.
            println!("{error:#}");
            let agent = i32::try_from(self.agent.borrow().id())?;
            kill(Pid::from_raw(agent), Signal::SIGTERM).context("end the agent")?;
        }
        let status = self.agent.borrow_mut().wait()?;
        if !status.success() {
            bail!("the agent ended with {status}\n{}", self.log_tail());
        }
        Ok(())
    }
}
