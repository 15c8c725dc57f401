//! Go's flag syntax in front of clap.
//!
//! Consul and Nomad take `-http-addr=X`, `-http-addr X`, `--http-addr X`, `-json`, `-json=true`; clap reads `-http-addr` as a
//! cluster of short flags. So before parsing every flag is rewritten to `--name` or `--name=value`. The command tree itself
//! says which flags take a value; a value is joined to its flag, hence never mistaken for a flag whatever it looks like.
//! Left alone: everything after `--`, a lone `-` (standard input), and positional arguments.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use clap::{ArgAction, Command};

/// A flag that cannot be rewritten. The texts are those of Go's `flag` package.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum RewriteError {
    /// `-allow=perhaps`.
    #[error("invalid boolean value {value:?} for -{flag}: parse error")]
    Boolean {
        /// Its name without dashes.
        flag: String,
        /// What was given.
        value: String,
    },
    /// A flag that wants a value stands last.
    #[error("flag needs an argument: -{0}")]
    MissingValue(String),
}

/// How a flag of the present command is called, and whether it takes a value.
struct Flag {
    long: String,
    takes_value: bool,
    /// A boolean that holds unless it is denied: `-diff=false`.
    by_default: bool,
}

fn find(command: &Command, name: &str) -> Option<Flag> {
    let mut short = name.chars();
    let short = (short.next(), short.next());
    let arg = command.get_arguments().find(|arg| {
        let long = arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|names| names.contains(&name));
        long || matches!(short, (Some(letter), None) if arg.get_short() == Some(letter))
    })?;
    let by_default = arg.get_num_args().is_some_and(|values| values.min_values() == 0 && values.takes_values());
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) && !by_default;
    arg.get_long().map(|long| Flag { long: long.to_owned(), takes_value, by_default })
}

/// Splits `-name=value`; `None` for anything that is no flag.
fn split(arg: &OsStr) -> Option<(String, Option<OsString>)> {
    let bytes = arg.as_bytes();
    let bare = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
    let name_end = bare.iter().position(|byte| *byte == b'=');
    let name = &bare[..name_end.unwrap_or(bare.len())];
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty() && !name.starts_with('-'))?;
    let value = name_end.map(|end| OsString::from_vec(bare[end + 1..].to_vec()));
    Some((name.to_owned(), value))
}

/// The values that Go's `strconv.ParseBool` takes.
fn go_bool(text: &OsStr) -> Option<bool> {
    match text.to_str()? {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

fn joined(long: &str, value: &OsStr) -> OsString {
    let mut arg = OsString::from(format!("--{long}="));
    arg.push(value);
    arg
}

/// Rewrites `args` (without the program's name) for `command`, which must have been built.
pub(super) fn rewrite(
    command: &Command,
    args: impl IntoIterator<Item = OsString>,
) -> Result<Vec<OsString>, RewriteError> {
    let (mut out, mut args) = (Vec::new(), args.into_iter());
    let mut present = command;
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(args);
            break;
        }
        let Some((name, value)) = split(&arg) else {
            if let Some(inner) = arg.to_str().and_then(|name| present.find_subcommand(name)) {
                present = inner;
            }
            out.push(arg);
            continue;
        };
        match (find(present, &name), value) {
            (Some(flag), Some(value)) if flag.takes_value => out.push(joined(&flag.long, &value)),
            (Some(flag), None) if flag.takes_value => {
                let value = args.next().ok_or(RewriteError::MissingValue(name))?;
                out.push(joined(&flag.long, &value));
            }
            (Some(flag), value) => {
                let long = OsString::from(format!("--{}", flag.long));
                let set = match &value {
                    None => true,
                    Some(text) => go_bool(text).ok_or_else(|| RewriteError::Boolean {
                        flag: name,
                        value: text.to_string_lossy().into_owned(),
                    })?,
                };
                out.retain(|earlier| *earlier != long); // the last one wins
                if flag.by_default {
                    out.push(joined(&flag.long, OsStr::new(if set { "true" } else { "false" })));
                } else if set {
                    out.push(long);
                }
            }
            // Unknown: clap says so, with its name.
            (None, Some(value)) => out.push(joined(&name, &value)),
            (None, None) => out.push(OsString::from(format!("--{name}"))),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use proptest::prelude::*;

    use super::*;
    use crate::cli::args::Cli;

    fn rewritten(args: &[&str]) -> Vec<String> {
        try_rewrite(args).expect("rewrites")
    }

    fn try_rewrite(args: &[&str]) -> Result<Vec<String>, RewriteError> {
        let mut command = Cli::command();
        command.build();
        let out = rewrite(&command, args.iter().map(OsString::from))?;
        Ok(out.into_iter().map(|arg| arg.into_string().expect("text")).collect())
    }

    #[test]
    fn one_dash_and_two_dashes_mean_the_same() {
        for flag in ["-http-addr=h:1", "--http-addr=h:1"] {
            assert_eq!(rewritten(&["reload", flag]), ["reload", "--http-addr=h:1"]);
        }
        for flag in ["-http-addr", "--http-addr"] {
            assert_eq!(rewritten(&["reload", flag, "h:1"]), ["reload", "--http-addr=h:1"]);
        }
        assert_eq!(
            rewritten(&["intention", "create", "-allow", "web", "api"]),
            ["intention", "create", "--allow", "web", "api"]
        );
    }

    #[test]
    fn values_are_never_touched() {
        assert_eq!(rewritten(&["reload", "-token", "-json"]), ["reload", "--token=-json"]);
        assert_eq!(rewritten(&["reload", "-token", "--"]), ["reload", "--token=--"]);
        assert_eq!(rewritten(&["reload", "-token="]), ["reload", "--token="]);
        assert_eq!(rewritten(&["job", "run", "-var", "a=-b=c", "f"]), ["job", "run", "--var=a=-b=c", "f"]);
        assert_eq!(rewritten(&["agent", "-hcl", "a = -1"]), ["agent", "--hcl=a = -1"]);
    }

    #[test]
    fn a_lone_dash_and_what_follows_two_dashes_stay() {
        assert_eq!(rewritten(&["job", "run", "-"]), ["job", "run", "-"]);
        assert_eq!(rewritten(&["job", "run", "--", "-detach", "-x=y"]), ["job", "run", "--", "-detach", "-x=y"]);
    }

    #[test]
    fn switches_take_gos_booleans_and_the_last_one_wins() {
        assert_eq!(rewritten(&["observe", "-json=true"]), ["observe", "--json"]);
        assert_eq!(rewritten(&["observe", "-json", "-json=0"]), ["observe"]);
        assert_eq!(rewritten(&["observe", "-json=F", "-json=T"]), ["observe", "--json"]);
        let error = try_rewrite(&["observe", "-json=perhaps"]).expect_err("no boolean");
        assert_eq!(error.to_string(), "invalid boolean value \"perhaps\" for -json: parse error");
        assert_eq!(
            try_rewrite(&["reload", "-token"]).expect_err("no value").to_string(),
            "flag needs an argument: -token"
        );
    }

    #[test]
    fn short_names_become_their_long_form() {
        assert_eq!(
            rewritten(&["job", "logs", "-f", "-n", "5", "web"]),
            ["job", "logs", "--follow", "--lines=5", "web"]
        );
        assert_eq!(rewritten(&["-h"]), ["--help"]);
    }

    proptest! {
        #[test]
        fn any_value_reaches_its_flag_unchanged(value in ".{0,20}", joined: bool) {
            let args: Vec<String> = if joined {
                vec!["reload".into(), format!("-token={value}")]
            } else {
                vec!["reload".into(), "-token".into(), value.clone()]
            };
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            prop_assert_eq!(rewritten(&args), ["reload".to_owned(), format!("--token={value}")]);
        }

        #[test]
        fn positional_arguments_stay(words in proptest::collection::vec("[^-].{0,10}|-", 0..5)) {
            let mut args = vec!["intention".to_owned(), "check".to_owned()];
            args.extend(words);
            let borrowed: Vec<&str> = args.iter().map(String::as_str).collect();
            prop_assert_eq!(rewritten(&borrowed), args);
        }

        #[test]
        fn rewriting_twice_changes_nothing_more(args in proptest::collection::vec("-{0,3}(json|token|denied|zzz|-)(=(true|x)?)?|x", 0..6)) {
            let args: Vec<&str> = std::iter::once("observe").chain(args.iter().map(String::as_str)).collect();
            if let Ok(once) = try_rewrite(&args) {
                let again: Vec<&str> = once.iter().map(String::as_str).collect();
                prop_assert_eq!(rewritten(&again), once);
            }
        }
    }
}
