//! `kill -9` of agent and worker at random points, under traffic: nothing denied ever gets through, nothing leaves a
//! workload in plain text that must not, and no connection fails but those that a killed worker carried.
//!
//! The seed is printed; `CULVERT_SEED` repeats it. What the machine does between is not repeated.

#![expect(clippy::print_stdout, reason = "the seed and the rounds are what a failing test is repeated by")]

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use culvert_tests::{
    App, Apps, GREETING, Node, NodeOptions, Pair, Sniffer, World, binary, calls, echo, eventually, group, is_direct,
    service, upstream, upstream6,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Beside one of each kind of fault.
const MORE_ROUNDS: usize = 4;
/// What the lasting connection carries, beside numbers.
const MARKER: &[u8] = b"culvert-carries-this";
const TOKEN: &[u8] = b"stranger";

#[derive(Clone, Copy, Debug)]
enum Fault {
    Worker,
    Agent,
    Both,
    AgentInReload,
    AgentInJobRun,
    AgentInJobStop,
}

const FAULTS: [Fault; 6] =
    [Fault::Worker, Fault::AgentInJobRun, Fault::Agent, Fault::AgentInReload, Fault::Both, Fault::AgentInJobStop];

/// xorshift64*: enough to choose, and the same everywhere.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = std::env::var("CULVERT_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.subsec_nanos().into());
        let seed: u64 = given.unwrap_or_else(clock);
        println!("CULVERT_SEED={seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn pause(&mut self, most_millis: u64) {
        thread::sleep(Duration::from_millis(self.below(most_millis)));
    }
}

/// What the threads know of each other.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    worker_kills: AtomicUsize,
    successes: AtomicUsize,
    failures: AtomicUsize,
    lasting_rounds: AtomicUsize,
    stranger_attempts: AtomicUsize,
    violations: Mutex<Vec<String>>,
}

impl Shared {
    fn goes_on(&self) -> bool {
        !self.stop.load(SeqCst)
    }

    fn violation(&self, text: String) {
        println!("{text}");
        self.violations.lock().expect("no panic").push(text);
    }
}

/// Both ways to the called service, in turns.
fn ways() -> impl Iterator<Item = SocketAddr> {
    [upstream(), upstream6()].into_iter().cycle()
}

fn short(app: &App, to: SocketAddr) -> io::Result<bool> {
    let mut stream = app.greeted(to)?;
    echo(&mut stream, b"caller")?;
    Ok(is_direct(&stream))
}

/// Short connections, one after the other. `proxied` says that the worker carries them, and that they end with it.
fn short_ones(app: &App, proxied: bool, shared: &Shared) {
    let mut kills_before = 0;
    for to in ways().take_while(|_| shared.goes_on()) {
        let kills = shared.worker_kills.load(SeqCst);
        match short(app, to) {
            Ok(direct) => {
                if direct == proxied {
                    shared.violation(format!("a connection to {to} took the other path; direct: {direct}"));
                }
                kills_before = kills;
                shared.successes.fetch_add(1, SeqCst);
            }
            Err(error) => {
                shared.failures.fetch_add(1, SeqCst);
                if !proxied || shared.worker_kills.load(SeqCst) == kills_before {
                    shared.violation(format!("a short connection to {to} failed: {error}"));
                }
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// A connection that is never closed: numbered echoes of 4 KiB. A proxied one ends with its worker, and only so.
fn lasting_one(app: &App, to: SocketAddr, proxied: bool, shared: &Shared) {
    let mut kills_before = 0;
    while shared.goes_on() {
        let Err(error) = app.greeted(to).and_then(|stream| keep(stream, &mut kills_before, shared)) else {
            continue;
        };
        if !proxied || shared.worker_kills.load(SeqCst) == kills_before {
            shared.violation(format!("the lasting connection to {to} ended: {error}"));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn keep(mut stream: TcpStream, kills_before: &mut usize, shared: &Shared) -> io::Result<()> {
    let mut message = MARKER.repeat(4096 / MARKER.len());
    while shared.goes_on() {
        let kills = shared.worker_kills.load(SeqCst);
        message[..8].copy_from_slice(&shared.lasting_rounds.load(SeqCst).to_le_bytes());
        echo(&mut stream, &message)?;
        *kills_before = kills;
        shared.lasting_rounds.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Somebody who is denied tries without end, and talks without being asked.
fn stranger(app: &App, shared: &Shared) {
    for to in ways().take_while(|_| shared.goes_on()) {
        if let Ok(mut stream) = app.connect(to) {
            drop(stream.write_all(TOKEN));
            if matches!(stream.read(&mut [0; 1]), Ok(1)) {
                shared.violation("a denied connection was greeted".to_owned());
            }
        }
        shared.stranger_attempts.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(20));
    }
}

/// A node under attack.
struct Attack<'a> {
    node: &'a mut Node,
    shared: &'a Shared,
    random: Random,
    jobs: usize,
}

impl Attack<'_> {
    fn round(&mut self, fault: Fault) {
        println!("{fault:?}");
        let worker = self.node.worker().expect("a worker");
        self.random.pause(800);
        match fault {
            Fault::Worker => self.kill_worker(worker),
            Fault::Agent => self.kill_agent(),
            Fault::Both => {
                self.kill_worker(worker);
                self.kill_agent();
            }
            Fault::AgentInReload => self.kill_agent_in(&["reload"]),
            Fault::AgentInJobRun => {
                let file = self.another_job();
                self.kill_agent_in(&["job", "run", &file]);
            }
            Fault::AgentInJobStop => self.kill_agent_in(&["job", "stop", "other"]),
        }
        if !matches!(fault, Fault::Worker) {
            self.random.pause(1500);
            self.node.spawn();
        }
        // The next round begins with a whole node; for a moment the agent still names the worker that was killed.
        let killed = matches!(fault, Fault::Worker | Fault::Both).then_some(worker);
        eventually("a worker is known again", || {
            let now = self.node.worker();
            now.is_some() && now != killed
        });
        self.more("short connections", &self.shared.successes, 2);
        self.more("the lasting connection", &self.shared.lasting_rounds, 2);
    }

    fn more(&self, what: &str, counter: &AtomicUsize, more: usize) {
        let before = counter.load(SeqCst);
        eventually(&format!("{what} go on; log:\n{}", self.node.log()), || counter.load(SeqCst) >= before + more);
    }

    fn kill_worker(&self, pid: i32) {
        self.shared.worker_kills.fetch_add(1, SeqCst);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill the worker");
    }

    fn kill_agent(&mut self) {
        self.node.kill();
    }

    fn kill_agent_in(&mut self, command: &[&str]) {
        let mut client = self.client(command);
        self.random.pause(300);
        self.kill_agent();
        client.wait().expect("the command ends with its agent");
    }

    fn client(&self, command: &[&str]) -> Child {
        let mut culvert = Command::new(binary("culvert"));
        culvert.args(command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start culvert")
    }

    /// A job file that differs from the one before.
    fn another_job(&mut self) -> String {
        self.jobs += 1;
        let text = format!(
            "job \"other\" {{\n meta {{ run = \"{}\" }}\n{}\n}}\n",
            self.jobs,
            group("other", 9009, &calls("called", 8080))
        );
        self.node.write_job("other", &text)
    }
}

/// Traffic and faults; both have been seen to work when it returns.
fn under_attack(node: &mut Node, pair: &Pair, proxied: bool) -> Shared {
    let (shared, mut random) = (Shared::default(), Random::new());
    let faults: Vec<Fault> = FAULTS
        .into_iter()
        .chain((0..MORE_ROUNDS).map(|_| FAULTS[random.below(FAULTS.len() as u64) as usize]))
        .collect();
    thread::scope(|scope| {
        let stop = StopOnDrop(&shared);
        scope.spawn(|| short_ones(&pair.caller, proxied, &shared));
        for to in ways().take(2) {
            let shared = &shared;
            scope.spawn(move || lasting_one(&pair.caller, to, proxied, shared));
        }
        scope.spawn(|| stranger(&pair.stranger, &shared));
        let mut attack = Attack { node, shared: &shared, random, jobs: 0 };
        attack.more("short connections", &shared.successes, 1);
        attack.more("the lasting connection", &shared.lasting_rounds, 1);
        faults.into_iter().for_each(|fault| attack.round(fault));
        drop(stop);
    });
    shared
}

/// A panic of the test must not leave its threads at work.
struct StopOnDrop<'a>(&'a Shared);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

fn chaos(name: &str, encryption: &'static str) {
    let proxied = encryption == "always";
    let world = World::new(name);
    let mut node = Node::start(&world, NodeOptions { encryption, server: true, ..NodeOptions::default() });
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    node.culvert(&["intention", "create", "-allow", "caller", "called"]);
    node.culvert(&["intention", "create", "-deny", "stranger", "called"]);
    let server = pair.called.serve(&service());
    for to in ways().take(2) {
        eventually("the path is there", || short(&pair.caller, to).is_ok_and(|direct| direct != proxied));
    }
    let sniffers = [pair.called.v4.into(), pair.called.v6.into()]
        .map(|address| Sniffer::start(&[address], &[MARKER, GREETING, TOKEN]).expect("a packet socket"));

    let shared = under_attack(&mut node, &pair, proxied);

    let violations = shared.violations.into_inner().expect("no panic");
    let (successes, failures) = (shared.successes.into_inner(), shared.failures.into_inner());
    println!("{successes} connections, {failures} failed; {:?} attempts denied", shared.stranger_attempts);
    assert!(violations.is_empty(), "{violations:#?}\n{}", node.log());
    let [v4, v6] = sniffers.map(|sniffer| sniffer.finish().expect("packets"));
    if proxied {
        // Sidecars are reached by IPv4, whichever way the caller took.
        assert!(v4.tls > 0 && v4.plain + v6.plain == 0, "plain text on the wire: {v4:?}, {v6:?}");
    } else {
        assert!(v4.plain > 0 && v6.plain > 0, "the packet sockets prove nothing: {v4:?}, {v6:?}");
    }
    let heard = server.accepted().iter().filter(|accepted| accepted.first.starts_with(TOKEN)).count();
    assert_eq!(heard, 0, "the application heard who is denied");

    node.culvert(&["intention", "create", "-replace", "-deny", "caller", "called"]);
    eventually("the caller is denied", || short(&pair.caller, upstream()).is_err());
    for to in ways().take(2) {
        short(&pair.caller, to).expect_err("denied, and let through once more");
    }
    node.culvert(&["intention", "create", "-replace", "-allow", "stranger", "called"]);
    eventually("who was denied all the time is allowed", || short(&pair.stranger, upstream6()).is_ok());
    let people = node.people();
    drop((server, apps));
    node.leave();
    world.assert_nothing_left(&people);
}

#[test]
fn with_mutual_tls_everywhere_nothing_is_let_through_or_shown_whatever_is_killed() {
    chaos("chaos-always", "always");
}

#[test]
fn direct_connections_outlive_everything_and_nothing_denied_is_let_through() {
    chaos("chaos-direct", "between-nodes");
}
