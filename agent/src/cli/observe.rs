//! `culvert observe`: connections as they open, close and are refused, one line each.

use std::time::Duration;

use anyhow::Context as _;
use culvert_api::EventRecord;
use culvert_api::client::BodyStream;
use time::OffsetDateTime;
use time::macros::format_description;

use super::args::ObserveArgs;
use super::connection::{Target, client};
use super::output::{Colour, Output};
use super::{OK, Session};

/// Longest line that is put together from pieces; events are far shorter.
const MAX_LINE: usize = 256 * 1024;

/// Widths of the columns; a longer cell moves the rest of its line.
const PAIR: usize = 36;
const BYTES: usize = 19;
const DURATION: usize = 8;

pub(super) async fn run(args: &ObserveArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let mut target = Target::new("/v1/culvert/observe");
    if args.denied {
        target = target.with("denied", "true");
    }
    let stream = client(&args.http, &session.env)?.stream(target.as_str()).await;
    let mut lines = Lines { stream: stream.context("Error observing")?, buffer: Vec::new() };
    if !args.json {
        session.output.bytes(header().as_bytes())?;
    }
    while let Some(line) = lines.next().await.context("Error observing")? {
        let line = String::from_utf8_lossy(&line);
        if args.json {
            session.output.bytes(format!("{line}\n").as_bytes())?;
            continue;
        }
        let event = EventRecord::parse(&line)?;
        let text = render(&event, args.verbose, &session.output);
        session.output.bytes(format!("{text}\n").as_bytes())?;
    }
    Ok(OK)
}

/// Lines of an answer that comes in pieces.
struct Lines {
    stream: BodyStream,
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.buffer.len() > MAX_LINE {
                anyhow::bail!("a line is longer than {MAX_LINE} bytes");
            }
            match self.stream.next().await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Ok(Some(std::mem::take(&mut self.buffer))),
            }
        }
    }
}

fn header() -> String {
    format!(
        "{:<12}  {:<6}  {:<7}  {:<7}  {:<PAIR$}  {:>BYTES$}  {:>DURATION$}  RULE\n",
        "TIME", "EVENT", "VERDICT", "PATH", "SOURCE => DESTINATION", "BYTES OUT/IN", "DURATION"
    )
}

/// One event in the columns of [`header`].
fn render(event: &EventRecord, verbose: bool, output: &Output<'_>) -> String {
    let format = format_description!("[hour]:[minute]:[second].[subsecond digits:3]");
    let time = OffsetDateTime::from(event.at.0).format(format).unwrap_or_default();
    if event.kind == "lost" {
        let text = format!("{time:<12}  {:<6}  {}", event.kind, event.detail.as_deref().unwrap_or_default());
        return output.paint(Colour::Yellow, text);
    }
    let verdict = format!("{:<7}", event.verdict);
    let colour = if event.verdict == "deny" { Colour::Red } else { Colour::Green };
    let name = |id: &Option<String>| id.as_deref().map_or("?".to_owned(), |id| identity(id, verbose));
    let source = match (&event.source, event.peer) {
        (None, Some(peer)) => peer.to_string(),
        (source, _) => name(source),
    };
    let pair = format!("{source} => {}", name(&event.destination));
    let (bytes, duration) = match event.kind.as_str() {
        "close" => (
            format!("{}/{}", event.bytes_to_destination, event.bytes_to_source),
            short(Duration::from_micros(event.duration_micros)),
        ),
        _ => ("-".to_owned(), "-".to_owned()),
    };
    format!(
        "{time:<12}  {:<6}  {}  {:<7}  {pair:<PAIR$}  {bytes:>BYTES$}  {duration:>DURATION$}  {}",
        event.kind,
        output.paint(colour, verdict),
        event.path,
        why(event)
    )
    .trim_end()
    .to_owned()
}

/// The rule that decided, then what went wrong.
fn why(event: &EventRecord) -> String {
    let rule = event.rule.clone().unwrap_or_default();
    let wrong = match (&event.reason, &event.detail) {
        (Some(reason), Some(detail)) => format!("[{reason}: {detail}]"),
        (Some(reason), None) => format!("[{reason}]"),
        (None, Some(detail)) => format!("[{detail}]"),
        (None, None) => String::new(),
    };
    let both = format!("{rule} {wrong}");
    both.trim().to_owned()
}

/// A service's name, or the whole SPIFFE ID.
fn identity(id: &str, verbose: bool) -> String {
    if verbose {
        return id.to_owned();
    }
    culvert_types::ServiceIdentity::parse(id).map_or_else(|_| id.to_owned(), |identity| identity.service.to_string())
}

/// Three digits and a unit.
fn short(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match () {
        () if seconds < 0.001 => format!("{}µs", duration.as_micros()),
        () if seconds < 1.0 => format!("{:.1}ms", seconds * 1e3),
        () if seconds < 100.0 => format!("{seconds:.2}s"),
        () if seconds < 6000.0 => format!("{:.1}m", seconds / 60.0),
        () => format!("{:.1}h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_api::Timestamp;
    use std::time::SystemTime;

    const SOURCE: &str = "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/count-dashboard";

    fn event(kind: &str, verdict: &str) -> EventRecord {
        EventRecord {
            at: Timestamp(SystemTime::UNIX_EPOCH + Duration::from_millis(12_345)),
            kind: kind.to_owned(),
            path: "direct".to_owned(),
            verdict: verdict.to_owned(),
            source: Some(SOURCE.to_owned()),
            destination: Some(SOURCE.replace("dashboard", "api")),
            reporter: "x".to_owned(),
            rule: Some("count-dashboard => count-api (allow, precedence 9)".to_owned()),
            bytes_to_destination: 64,
            bytes_to_source: 16384,
            duration_micros: 1_500_000,
            ..EventRecord::default()
        }
    }

    fn line(event: &EventRecord, verbose: bool) -> String {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        render(event, verbose, &Output::new(&mut out, &mut err, false))
    }

    #[test]
    fn columns_of_events_stand_under_the_header() {
        let mut refused = event("refuse", "deny");
        refused.reason = Some("intention".to_owned());
        refused.rule = Some("default".to_owned());
        refused.path = "proxied".to_owned();
        let text = format!("{}{}\n{}", header(), line(&event("close", "allow"), false), line(&refused, false));
        assert_eq!(
            text,
            "TIME          EVENT   VERDICT  PATH     SOURCE => DESTINATION                        BYTES OUT/IN  DURATION  RULE\n\
             00:00:12.345  close   allow    direct   count-dashboard => count-api                     64/16384     1.50s  count-dashboard => count-api (allow, precedence 9)\n\
             00:00:12.345  refuse  deny     proxied  count-dashboard => count-api                            -         -  default [intention]"
        );
    }

    #[test]
    fn verbose_lines_carry_whole_identities() {
        assert!(line(&event("open", "allow"), true).contains(SOURCE));
    }

    #[test]
    fn an_unknown_source_is_named_by_its_address() {
        let mut unknown = event("refuse", "deny");
        (unknown.source, unknown.peer) = (None, Some("192.0.2.7:4000".parse().expect("an address")));
        assert!(line(&unknown, false).contains("192.0.2.7:4000 => count-api"));
    }

    #[test]
    fn lost_events_are_told() {
        let text = line(&EventRecord::lost(7), false);
        assert!(text.contains("lost") && text.contains("7 events"), "{text}");
    }

    #[test]
    fn durations_keep_three_digits() {
        for (micros, text) in
            [(7, "7µs"), (1_500, "1.5ms"), (2_340_000, "2.34s"), (600_000_000, "10.0m"), (7_200_000_000, "2.0h")]
        {
            assert_eq!(short(Duration::from_micros(micros)), text);
        }
    }
}
