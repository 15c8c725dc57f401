//! Envoy's command line, as Nomad and operators use it.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

/// What `--help` prints.
pub const HELP: &str = "\
culvert as a sidecar, with Envoy's command line.

  -c, --config-path FILE       bootstrap file, JSON, as `consul connect envoy -bootstrap` prints it
  -l, --log-level LEVEL        trace, debug, info (default), warning, error, critical, off
      --concurrency N          worker threads (default: one per CPU)
      --admin-address-path FILE  write the admin address to this file
      --drain-time-s SECONDS   longest time for open connections to end at a stop (default 600)
      --mode MODE              serve (default), or validate: check the bootstrap file and exit
      --version, --help

Accepted without effect, since there is no hot restart and no access log: --disable-hot-restart, --base-id,
--use-dynamic-base-id, --restart-epoch 0, --parent-shutdown-time-s, --skip-hot-restart-on-no-parent,
--skip-hot-restart-parent-stats, --socket-path, --socket-mode, --file-flush-interval-msec, --file-flush-min-size-kb,
--cpuset-threads, --ignore-unknown-dynamic-fields. Envoy's other flags are refused.
";

/// Envoy's default of `--drain-time-s`.
const DRAIN_TIME: Duration = Duration::from_secs(600);

/// What the command line asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Command {
    /// Serve.
    Serve(Args),
    /// Check the bootstrap file, say so, exit.
    Validate(Args),
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
}

/// How a sidecar is to be run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Args {
    /// The bootstrap file.
    pub config_path: PathBuf,
    /// What to log.
    pub log_level: Level,
    /// Worker threads; `None`: one per CPU.
    pub concurrency: Option<NonZeroUsize>,
    /// Where to write the address of the admin interface.
    pub admin_address_path: Option<PathBuf>,
    /// Longest time for open connections to end at a stop.
    pub drain_time: Duration,
}

/// Envoy's log levels.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Level {
    /// Everything.
    Trace,
    /// Much.
    Debug,
    /// What happens.
    #[default]
    Info,
    /// What may be wrong.
    Warning,
    /// What is wrong.
    Error,
    /// What ends the process: as errors.
    Critical,
    /// Nothing.
    Off,
}

impl Level {
    /// The word of `tracing`.
    #[must_use]
    pub fn as_filter(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warn",
            Self::Error | Self::Critical => "error",
            Self::Off => "off",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "trace" => Self::Trace,
            "debug" => Self::Debug,
            "info" => Self::Info,
            "warning" | "warn" => Self::Warning,
            "error" => Self::Error,
            "critical" => Self::Critical,
            "off" => Self::Off,
            _ => return None,
        })
    }
}

/// Why a command line is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ArgsError {
    /// A flag of Envoy that would change behaviour.
    #[error("{0}: not supported by culvert; see --help")]
    Unsupported(String),
    /// No flag of Envoy.
    #[error("unknown argument {0:?}; see --help")]
    Unknown(String),
    /// Its value is missing.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// Given to a flag that takes none.
    #[error("{0} takes no value")]
    NoValueWanted(&'static str),
    /// Not a value for this flag.
    #[error("{flag}: {value:?} is not {expected}")]
    Value {
        /// Which flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What it has to be.
        expected: &'static str,
    },
    /// The same flag again.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// There is no default bootstrap file.
    #[error("-c is missing: the path of a bootstrap file")]
    NoConfig,
}

/// What is done with a flag.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Use {
    /// Read, with a value.
    Value,
    /// Without effect, with a value.
    InertValue,
    /// Without effect, without a value.
    InertSwitch,
    /// Ends parsing.
    Special,
    /// Refused.
    Refused,
}

/// Envoy's flags (its documentation, "Command line options").
const FLAGS: &[(&str, Use)] = &[
    ("--config-path", Use::Value),
    ("--log-level", Use::Value),
    ("--concurrency", Use::Value),
    ("--admin-address-path", Use::Value),
    ("--drain-time-s", Use::Value),
    ("--mode", Use::Value),
    ("--restart-epoch", Use::Value),
    ("--version", Use::Special),
    ("--help", Use::Special),
    ("--disable-hot-restart", Use::InertSwitch),
    ("--use-dynamic-base-id", Use::InertSwitch),
    ("--skip-hot-restart-on-no-parent", Use::InertSwitch),
    ("--skip-hot-restart-parent-stats", Use::InertSwitch),
    ("--cpuset-threads", Use::InertSwitch),
    ("--ignore-unknown-dynamic-fields", Use::InertSwitch),
    ("--base-id", Use::InertValue),
    ("--parent-shutdown-time-s", Use::InertValue),
    ("--socket-path", Use::InertValue),
    ("--socket-mode", Use::InertValue),
    ("--file-flush-interval-msec", Use::InertValue),
    ("--file-flush-min-size-kb", Use::InertValue),
    ("--allow-unknown-fields", Use::Refused),
    ("--allow-unknown-static-fields", Use::Refused),
    ("--reject-unknown-dynamic-fields", Use::Refused),
    ("--base-id-path", Use::Refused),
    ("--component-log-level", Use::Refused),
    ("--config-yaml", Use::Refused),
    ("--disable-extensions", Use::Refused),
    ("--drain-strategy", Use::Refused),
    ("--enable-core-dump", Use::Refused),
    ("--enable-fine-grain-logging", Use::Refused),
    ("--enable-mutex-tracing", Use::Refused),
    ("--hot-restart-version", Use::Refused),
    ("--local-address-ip-version", Use::Refused),
    ("--log-format", Use::Refused),
    ("--log-format-escaped", Use::Refused),
    ("--log-path", Use::Refused),
    ("--service-cluster", Use::Refused),
    ("--service-node", Use::Refused),
    ("--service-zone", Use::Refused),
    ("--stats-tag", Use::Refused),
];

impl Command {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// [`ArgsError`] naming the flag.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut arguments = arguments.into_iter();
        let mut given = Given::default();
        while let Some(argument) = arguments.next() {
            let text = argument.to_string_lossy();
            let (name, inline) = match text.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(OsString::from(value))),
                _ => (&*text, None),
            };
            let Some(&(flag, used)) = FLAGS.iter().find(|(flag, _)| *flag == long(name)) else {
                return Err(ArgsError::Unknown(text.into_owned()));
            };
            match used {
                Use::Refused => return Err(ArgsError::Unsupported(flag.to_owned())),
                Use::Special if flag == "--version" => return Ok(Self::Version),
                Use::Special => return Ok(Self::Help),
                Use::InertSwitch if inline.is_some() => return Err(ArgsError::NoValueWanted(flag)),
                Use::InertSwitch => {}
                Use::InertValue => drop(inline.or_else(|| arguments.next()).ok_or(ArgsError::NoValue(flag))?),
                Use::Value => {
                    let value = inline.or_else(|| arguments.next()).ok_or(ArgsError::NoValue(flag))?;
                    given.set(flag, value)?;
                }
            }
        }
        given.command()
    }
}

/// The long form of a short flag.
fn long(name: &str) -> &str {
    match name {
        "-c" => "--config-path",
        "-l" => "--log-level",
        "-h" => "--help",
        other => other,
    }
}

/// Flags with values, as given.
#[derive(Default)]
struct Given(Vec<(&'static str, OsString)>);

impl Given {
    fn set(&mut self, flag: &'static str, value: OsString) -> Result<(), ArgsError> {
        if self.get(flag).is_some() {
            return Err(ArgsError::Twice(flag));
        }
        self.0.push((flag, value));
        Ok(())
    }

    fn get(&self, flag: &str) -> Option<&OsString> {
        self.0.iter().find(|(name, _)| *name == flag).map(|(_, value)| value)
    }

    /// Reads a value by `read`.
    fn read<T>(
        &self,
        flag: &'static str,
        expected: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ArgsError> {
        let Some(value) = self.get(flag) else { return Ok(None) };
        let parsed = value.to_str().and_then(read);
        let wrong = || ArgsError::Value { flag, value: value.to_string_lossy().into_owned(), expected };
        parsed.map(Some).ok_or_else(wrong)
    }

    fn command(&self) -> Result<Command, ArgsError> {
        let levels = "one of trace, debug, info, warning, error, critical, off";
        let log_level = self.read("--log-level", levels, Level::parse)?.unwrap_or_default();
        let concurrency = self.read("--concurrency", "a number of threads", |text| text.parse::<usize>().ok())?;
        let drain = self.read("--drain-time-s", "a number of seconds", |text| text.parse::<u32>().ok())?;
        self.read("--restart-epoch", "0: there is no hot restart", |text| (text == "0").then_some(()))?;
        let validate = self.read("--mode", "serve or validate", |text| match text {
            "serve" => Some(false),
            "validate" => Some(true),
            _ => None,
        })?;
        let args = Args {
            config_path: self.get("--config-path").ok_or(ArgsError::NoConfig)?.into(),
            log_level,
            concurrency: concurrency.map(|threads| NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)), // as Envoy
            admin_address_path: self.get("--admin-address-path").map(PathBuf::from),
            drain_time: drain.map_or(DRAIN_TIME, |seconds| Duration::from_secs(seconds.into())),
        };
        Ok(if validate == Some(true) { Command::Validate(args) } else { Command::Serve(args) })
    }
}
