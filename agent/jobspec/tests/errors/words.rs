//! Words that culvert has not, and words that nobody has.

use std::collections::BTreeMap;

use culvert_jobspec::{Diagnostics, Job, parse};

use crate::{GOOD, marks, refuse};

const WORDS: &str = include_str!("../jobs/words.txt");
const LEAST: &str = include_str!("../jobs/words.nomad.hcl");

fn read(source: &str) -> Result<Job, Diagnostics> {
    parse(source, "words.nomad.hcl", &BTreeMap::new())
}

/// Why `text` in `block` is neither honoured nor refused by name at its place.
fn complaint(least: &Job, block: &str, text: &str) -> Option<String> {
    let word = text.split(' ').next().unwrap_or_default();
    let stands = |line: &str| line.trim_start().split([' ', '"']).next() == Some(word);
    if text == word {
        return (!LEAST.lines().any(stands)).then(|| "it does not stand in the least job".to_owned());
    }
    let place = format!("# {block}\n");
    assert!(LEAST.contains(&place), "the least job has no {place}");
    match read(&LEAST.replacen(&place, &format!("{text}\n"), 1)) {
        Ok(job) => (job == *least).then(|| "it is read, and changes nothing".to_owned()),
        Err(errors) => {
            let [error] = errors.errors() else { return Some(errors.to_string()) };
            let line = error.location.as_ref().map(|location| location.text.trim());
            let mut names = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|name| !name.is_empty());
            let named = names.any(|name| error.message.contains(&format!("{name:?}")));
            let refused = error.message.ends_with("is not supported by culvert yet") && named && line == Some(text);
            (!refused).then(|| errors.to_string())
        }
    }
}

#[test]
fn what_nomad_knows_is_honoured_or_refused_by_name() {
    let least = read(LEAST).unwrap_or_else(|errors| panic!("{errors}"));
    let lines = WORDS.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let words: Vec<(&str, &str)> = lines.map(|line| line.split_once(' ').expect("a block and a word")).collect();
    assert!(words.len() > 150, "the list is read: {}", words.len());
    let complaints = words.into_iter().filter_map(|(block, text)| {
        complaint(&least, block, text).map(|complaint| format!("{block} {text}: {complaint}\n"))
    });
    let complaints: String = complaints.collect();
    assert!(complaints.is_empty(), "{complaints}");
}

#[test]
fn a_word_is_refused_with_the_block_it_stands_in() {
    for (block, text, message) in [
        ("job", "update {}", "\"update\" in \"job\" is not supported by culvert yet"),
        ("check", "grpc_service = 1", "\"grpc_service\" in \"check\" is not supported by culvert yet"),
    ] {
        let errors = read(&LEAST.replacen(&format!("# {block}\n"), &format!("{text}\n"), 1)).expect_err("refused");
        let word = text.split(' ').next().unwrap_or_default();
        assert_eq!(marks(&errors), [(message.to_owned(), word.to_owned())]);
    }
}

#[test]
fn words_that_nobody_knows_get_a_hint() {
    for (from, to, message, marked, hint) in [
        ("group \"web\"", "gruop \"web\"", "\"job\" has no block named \"gruop\"", "gruop", "did you mean \"group\"?"),
        ("path     =", "pth     =", "\"check\" has no argument named \"pth\"", "pth", "did you mean \"path\"?"),
        (
            "    network",
            "    restart = 1\n    network",
            "\"group\" has no argument named \"restart\"",
            "restart",
            "\"restart\" is a block",
        ),
        ("job \"shop\"", "jbo \"shop\"", "a job file has no block named \"jbo\"", "jbo", "did you mean \"job\"?"),
        ("\"http\"\n      check", "htpp\n      check", "there is no variable named \"htpp\"", "htpp", "\"htpp\""),
        (
            "\"http\"\n      check",
            "\"htpp\"\n      check",
            "port label \"htpp\" referenced by services web does not exist",
            "\"htpp\"",
            "did you mean \"http\"?",
        ),
    ] {
        let errors = refuse(&GOOD.replacen(from, to, 1));
        let found = errors.errors().iter().zip(marks(&errors)).find(|(_, mark)| mark.0 == message);
        let (error, mark) = found.unwrap_or_else(|| panic!("{message} is not in:\n{errors}"));
        assert_eq!(mark.1, marked);
        assert!(error.hint.as_deref().unwrap_or_default().contains(hint), "{errors}");
    }
}
