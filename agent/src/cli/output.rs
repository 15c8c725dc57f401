//! Where commands print: one place for text, errors, colour and tables, so that tests read what users see.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};
use std::time::SystemTime;

/// Standard output and error of one command.
pub(super) struct Output<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    colour: bool,
}

/// Colours of the eight basic ones that read well on any background.
#[derive(Clone, Copy)]
pub(super) enum Colour {
    Green,
    Red,
    Yellow,
}

impl<'a> Output<'a> {
    /// Prints to these two; colours only when asked.
    pub(super) fn new(out: &'a mut dyn Write, err: &'a mut dyn Write, colour: bool) -> Self {
        Self { out, err, colour }
    }

    /// Does standard output take colours? Not when it is no terminal, and not under `NO_COLOR` (no-color.org).
    pub(super) fn wants_colour(no_color: Option<&str>, term: Option<&str>) -> bool {
        no_color.is_none_or(str::is_empty) && term != Some("dumb") && io::stdout().is_terminal()
    }

    /// No colours from here on.
    pub(super) fn without_colour(&mut self) {
        self.colour = false;
    }

    /// One line on standard output.
    pub(super) fn line(&mut self, text: impl fmt::Display) -> io::Result<()> {
        writeln!(self.out, "{text}")
    }

    /// Text as it is, at once.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.flush()
    }

    /// One line on standard error.
    pub(super) fn error(&mut self, text: impl fmt::Display) {
        // Nobody is left to be told when standard error is closed.
        drop(writeln!(self.err, "{text}"));
    }

    /// Makes what was printed visible.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// `text` in a colour, if colours are wanted.
    pub(super) fn paint(&self, colour: Colour, text: impl fmt::Display) -> String {
        if !self.colour {
            return text.to_string();
        }
        let code = match colour {
            Colour::Green => 32,
            Colour::Red => 31,
            Colour::Yellow => 33,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }

    /// Prints JSON, indented as Consul's commands do.
    pub(super) fn json(&mut self, value: &impl serde::Serialize) -> io::Result<()> {
        let mut text = Vec::new();
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))?;
        text.push(b'\n');
        self.bytes(&text)
    }
}

/// Rows of cells in aligned columns, two blanks between them and none at the end of a line.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a first row.
    pub(super) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row.
    pub(super) fn row<const N: usize>(&mut self, cells: [&dyn fmt::Display; N]) {
        self.rows.push(cells.iter().map(ToString::to_string).collect());
    }

    /// Is there nothing but the header?
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    /// Prints it.
    pub(super) fn print(&self, output: &mut Output<'_>) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            output.line(cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Pairs in the form of Consul's and Nomad's detail views: names padded to one column.
pub(super) fn pairs(output: &mut Output<'_>, separator: &str, pairs: &[(&str, String)]) -> io::Result<()> {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, value) in pairs {
        output.line(format!("{name:<width$}{separator}{value}").trim_end())?;
    }
    Ok(())
}

/// How long ago, as Nomad's tables say it: `5s ago`, `2m3s ago`, `1h4m ago`, `3d2h ago`.
pub(super) fn ago(then: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(then).map_or(0, |passed| passed.as_secs());
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |whole: u64, unit: &str, rest: u64, small: &str| match rest {
        0 => format!("{whole}{unit} ago"),
        rest => format!("{whole}{unit}{rest}{small} ago"),
    };
    match () {
        () if days > 0 => two(days, "d", hours % 24, "h"),
        () if hours > 0 => two(hours, "h", minutes % 60, "m"),
        () if minutes > 0 => two(minutes, "m", seconds % 60, "s"),
        () => format!("{seconds}s ago"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn printed(colour: bool, print: impl Fn(&mut Output<'_>) -> io::Result<()>) -> String {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        print(&mut Output::new(&mut out, &mut err, colour)).expect("memory takes everything");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_have_no_blanks_at_the_end() {
        let text = printed(false, |output| {
            let mut table = Table::new(&["ID", "Source", "Action"]);
            table.row([&"", &"web", &"allow"]);
            table.row([&"é1", &"dashboard", &""]);
            table.print(output)
        });
        assert_eq!(text, "ID  Source     Action\n    web        allow\né1  dashboard\n");
    }

    #[test]
    fn pairs_line_up_behind_the_longest_name() {
        let text = printed(false, |output| pairs(output, " = ", &[("ID", "web".into()), ("Status", String::new())]));
        assert_eq!(text, "ID     = web\nStatus =\n");
    }

    #[test]
    fn colour_is_only_used_when_wanted() {
        assert_eq!(printed(false, |output| output.line(output.paint(Colour::Red, "x"))), "x\n");
        assert_eq!(printed(true, |output| output.line(output.paint(Colour::Red, "x"))), "\u{1b}[31mx\u{1b}[0m\n");
        assert!(!Output::wants_colour(Some("1"), None));
        assert!(!Output::wants_colour(None, Some("dumb")));
    }

    #[test]
    fn ages_name_two_units_at_most() {
        for (seconds, text) in
            [(0, "0s ago"), (59, "59s ago"), (60, "1m ago"), (3725, "1h2m ago"), (7200, "2h ago"), (90_000, "1d1h ago")]
        {
            let then = SystemTime::UNIX_EPOCH;
            assert_eq!(ago(then, then + Duration::from_secs(seconds)), text);
        }
        assert_eq!(ago(SystemTime::UNIX_EPOCH + Duration::from_secs(9), SystemTime::UNIX_EPOCH), "0s ago");
    }
}
