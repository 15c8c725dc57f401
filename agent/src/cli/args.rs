//! The command tree. Flags are spelled here with clap's two dashes; [`super::rewrite`] lets users write them with one.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

/// culvert: a service mesh for Linux nodes.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, about, disable_help_subcommand = true, args_override_self = true)]
#[command(max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Runs the agent
    Agent(Box<AgentArgs>),
    /// Runs, inspects and stops jobs
    #[command(subcommand)]
    Job(JobCommand),
    /// Says which service may call which
    #[command(subcommand)]
    Intention(IntentionCommand),
    /// Looks after the mesh itself
    #[command(subcommand)]
    Connect(ConnectCommand),
    /// Shows connections as they open, close and are refused
    Observe(ObserveArgs),
    /// Shows what the agent, its worker and its kernel programs are doing
    Status(StatusArgs),
    /// Lists the services registered with the agent
    Services(ServicesArgs),
    /// Lists the members of the cluster (not supported yet)
    Members(Anything),
    /// Makes the agent read its configuration again
    Reload(PlainArgs),
    /// Makes the agent stop its jobs, remove everything it made, and end
    Leave(PlainArgs),
    /// Prints the version
    Version,
    /// Runs the data plane for one workload; takes Envoy's command line
    #[command(disable_help_flag = true)]
    Proxy(Anything),
    /// The data plane of a node; started by the agent
    #[command(hide = true, disable_help_flag = true)]
    Worker(Anything),
    /// The parent of one task; started by the agent
    #[command(hide = true, disable_help_flag = true)]
    Executor(Anything),
}

/// Arguments that are passed on, or not looked at.
#[derive(Args, Debug)]
pub(super) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(super) rest: Vec<std::ffi::OsString>,
}

/// How to reach the agent.
#[derive(Args, Debug, Default)]
pub(super) struct HttpArgs {
    /// Address of the agent: host:port, http://host:port or unix:///path [env CONSUL_HTTP_ADDR; 127.0.0.1:8500]
    #[arg(long, value_name = "ADDRESS", alias = "address")]
    pub(super) http_addr: Option<String>,
    /// Token for the request; prefer the environment or -token-file [env CONSUL_HTTP_TOKEN]
    #[arg(long, value_name = "TOKEN")]
    pub(super) token: Option<String>,
    /// File that holds the token [env CONSUL_HTTP_TOKEN_FILE]
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(super) refused: RefusedArgs,
}

/// Flags of Consul's client that culvert does not honour yet: accepted by the parser only to be refused by name.
#[derive(Args, Debug, Default)]
pub(super) struct RefusedArgs {
    #[arg(long, hide = true)]
    pub(super) ca_file: Option<String>,
    #[arg(long, hide = true)]
    pub(super) ca_path: Option<String>,
    #[arg(long, hide = true)]
    pub(super) client_cert: Option<String>,
    #[arg(long, hide = true)]
    pub(super) client_key: Option<String>,
    #[arg(long, hide = true)]
    pub(super) tls_server_name: Option<String>,
    #[arg(long, hide = true)]
    pub(super) namespace: Option<String>,
    #[arg(long, hide = true)]
    pub(super) partition: Option<String>,
}

/// What reads and writes of the control plane take besides.
#[derive(Args, Debug, Default)]
pub(super) struct ConsulArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Datacenter to ask; the agent's own unless set [env CONSUL_DATACENTER]
    #[arg(long, value_name = "NAME")]
    pub(super) datacenter: Option<String>,
    /// Let any server answer, not only the leader
    #[arg(long)]
    pub(super) stale: bool,
}

/// Of commands that only need the agent.
#[derive(Args, Debug)]
pub(super) struct PlainArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
}

/// Command line of `culvert agent`. What is `None`, empty or `false` here was not given: configuration files decide.
#[derive(Args, Clone, Debug, Default, Eq, PartialEq)]
pub struct AgentArgs {
    /// Server and agent in one process, loopback only, state in memory
    #[arg(long)]
    pub dev: bool,
    /// Hold the state of the mesh
    #[arg(long)]
    pub server: bool,
    /// Configuration file, or directory of .hcl and .json files; may be repeated
    #[arg(long = "config-file", alias = "config-dir", value_name = "PATH")]
    pub config: Vec<PathBuf>,
    /// A piece of configuration, as in a file; may be repeated
    #[arg(long, value_name = "FRAGMENT")]
    pub hcl: Vec<String>,
    /// Directory of the agent's state [/var/lib/culvert; with -dev /run/culvert]
    #[arg(long, value_name = "DIRECTORY")]
    pub data_dir: Option<PathBuf>,
    /// Name of this node [the host's name]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Datacenter [dc1]
    #[arg(long, value_name = "NAME")]
    pub datacenter: Option<String>,
    /// Address for the cluster [0.0.0.0; with -dev 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    pub bind: Option<String>,
    /// Addresses of the HTTP API, separated by blanks [127.0.0.1]
    #[arg(long, value_name = "ADDRESSES")]
    pub client: Option<String>,
    /// Address under which other nodes reach this one
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Option<String>,
    /// Port of the HTTP API [8500]
    #[arg(long, value_name = "PORT", allow_negative_numbers = true)]
    pub http_port: Option<i64>,
    /// Port of xDS over gRPC, -1 for none [-1; with -dev 8502]
    #[arg(long, value_name = "PORT", allow_negative_numbers = true)]
    pub grpc_port: Option<i64>,
    /// trace, debug, info, warn or error [info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// always, or between-nodes: whether bytes that stay on a node are encrypted [always]
    #[arg(long, value_name = "WHEN")]
    pub encryption: Option<String>,
    /// allow or deny: what holds without an intention [deny; with -dev allow]
    #[arg(long, value_name = "ACTION")]
    pub default_intention_policy: Option<String>,
    /// Do without eBPF: every connection goes through the worker
    #[arg(long)]
    pub no_ebpf: bool,
    /// Directory for pinned kernel programs [/sys/fs/bpf/culvert]
    #[arg(long, value_name = "DIRECTORY")]
    pub bpf_dir: Option<PathBuf>,
    /// Name of the cgroup that holds all workloads [culvert]
    #[arg(long, value_name = "NAME")]
    pub cgroup_parent: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum JobCommand {
    /// Checks a job file
    Validate(JobFileArgs),
    /// Shows what running a job file would change; exits 0 without changes, 1 with, 255 on errors
    Plan(JobPlanArgs),
    /// Runs a job, and waits until it is healthy
    Run(JobRunArgs),
    /// Lists jobs, or shows one
    Status(JobStatusArgs),
    /// Stops a job
    Stop(JobStopArgs),
    /// Shows what a task prints
    Logs(JobLogsArgs),
}

#[derive(Args, Debug)]
pub(super) struct JobFileArgs {
    /// Value of a variable, key=value; may be repeated
    #[arg(long = "var", value_name = "KEY=VALUE")]
    pub(super) variables: Vec<String>,
    #[arg(long, hide = true)]
    pub(super) var_file: Vec<PathBuf>,
    #[arg(long, hide = true)]
    pub(super) hcl1: bool,
    /// Print without colours
    #[arg(long)]
    pub(super) no_color: bool,
    /// Job file; - is standard input
    #[arg(value_name = "FILE")]
    pub(super) file: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct JobPlanArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Print the plan as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Print the difference; -diff=false leaves it out
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, default_value_t = true, overrides_with = "diff")]
    pub(super) diff: bool,
    #[command(flatten)]
    pub(super) file: JobFileArgs,
}

#[derive(Args, Debug)]
pub(super) struct JobRunArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Do not wait for the job to become healthy
    #[arg(long)]
    pub(super) detach: bool,
    /// Print whole IDs
    #[arg(long)]
    pub(super) verbose: bool,
    /// Print the agent's answer as JSON; implies -detach
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) file: JobFileArgs,
}

#[derive(Args, Debug)]
pub(super) struct JobStatusArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Print whole IDs
    #[arg(long)]
    pub(super) verbose: bool,
    /// Accepted; nothing is coloured
    #[arg(long, hide = true)]
    pub(super) no_color: bool,
    /// Job; all of them without it
    pub(super) job: Option<String>,
}

#[derive(Args, Debug)]
pub(super) struct JobStopArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Forget the job, too
    #[arg(long)]
    pub(super) purge: bool,
    /// Accepted; nothing is asked anyway
    #[arg(long, hide = true)]
    pub(super) yes: bool,
    /// Accepted; nothing is coloured
    #[arg(long, hide = true)]
    pub(super) no_color: bool,
    /// Job
    pub(super) job: String,
}

#[derive(Args, Debug)]
pub(super) struct JobLogsArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Standard output (the default)
    #[arg(long, conflicts_with = "stderr")]
    pub(super) stdout: bool,
    /// Standard error
    #[arg(long)]
    pub(super) stderr: bool,
    /// Go on as more comes
    #[arg(long, short = 'f')]
    pub(super) follow: bool,
    /// Only the end: 10 lines, or what -n or -c say
    #[arg(long)]
    pub(super) tail: bool,
    /// So many lines of the end
    #[arg(long, short = 'n', value_name = "LINES", conflicts_with = "bytes")]
    pub(super) lines: Option<usize>,
    /// So many bytes of the end
    #[arg(long, short = 'c', value_name = "BYTES")]
    pub(super) bytes: Option<u64>,
    /// Task, where there are several
    #[arg(long = "task", value_name = "TASK", id = "task_flag")]
    pub(super) task_flag: Option<String>,
    /// Accepted; nothing is coloured
    #[arg(long, hide = true)]
    pub(super) no_color: bool,
    /// Job, or the beginning of an allocation's ID
    #[arg(value_name = "JOB|ALLOCATION")]
    pub(super) target: String,
    /// Task, where there are several
    #[arg(value_name = "TASK", conflicts_with = "task_flag")]
    pub(super) task: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum IntentionCommand {
    /// Makes an intention
    Create(IntentionCreateArgs),
    /// Asks whether a connection is allowed; exits 0 when allowed, 1 when denied, 2 on errors
    Check(PairArgs),
    /// Lists the intentions that apply to a source or destination, in the order of precedence
    Match(IntentionMatchArgs),
    /// Shows an intention
    Get(IntentionIdArgs),
    /// Lists intentions
    List(IntentionListArgs),
    /// Removes an intention
    Delete(IntentionIdArgs),
}

#[derive(Args, Debug)]
pub(super) struct IntentionCreateArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// Allow connections (the default)
    #[arg(long)]
    pub(super) allow: bool,
    /// Deny connections
    #[arg(long)]
    pub(super) deny: bool,
    /// The arguments are JSON files, one intention in each
    #[arg(long, short = 'f')]
    pub(super) file: bool,
    /// Replace an intention for the same pair
    #[arg(long)]
    pub(super) replace: bool,
    /// Metadata, key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) meta: Vec<String>,
    /// Source and destination, or files
    #[arg(value_name = "SRC DST")]
    pub(super) args: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct PairArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// Source and destination
    #[arg(value_name = "SRC DST")]
    pub(super) args: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct IntentionMatchArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// The name is a source
    #[arg(long)]
    pub(super) source: bool,
    /// The name is a destination (the default)
    #[arg(long)]
    pub(super) destination: bool,
    /// Name of a service
    #[arg(value_name = "NAME")]
    pub(super) args: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct IntentionIdArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// Source and destination, or an ID
    #[arg(value_name = "SRC DST|ID")]
    pub(super) args: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct IntentionListArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConnectCommand {
    /// Settings and root of the certificate authority
    #[command(subcommand)]
    Ca(CaCommand),
}

#[derive(Debug, Subcommand)]
pub(super) enum CaCommand {
    /// Shows the settings
    GetConfig(CaArgs),
    /// Changes the settings that a file names
    SetConfig(CaSetConfigArgs),
    /// Makes a new root; the old one stays trusted until everything that it signed has ended
    Rotate(CaArgs),
}

#[derive(Args, Debug)]
pub(super) struct CaArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
}

#[derive(Args, Debug)]
pub(super) struct CaSetConfigArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// JSON file: {"Provider": "consul", "Config": {"LeafCertTTL": "24h"}}
    #[arg(long, value_name = "FILE")]
    pub(super) config_file: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct ObserveArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Print the events as JSON, one per line
    #[arg(long)]
    pub(super) json: bool,
    /// Only what was refused, or ended by a change of policy
    #[arg(long)]
    pub(super) denied: bool,
    /// Print whole SPIFFE IDs instead of service names
    #[arg(long)]
    pub(super) verbose: bool,
}

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub(super) http: HttpArgs,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct ServicesArgs {
    #[command(flatten)]
    pub(super) consul: ConsulArgs,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}
