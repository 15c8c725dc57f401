//! Prints a difference as `nomad job plan` does.

use super::{DiffKind, FieldDiff, GroupDiff, JobDiff, ObjectDiff, TaskDiff, Updates};
use std::fmt::{self, Write};

/// Blanks per level.
const INDENT: usize = 2;

impl JobDiff {
    /// Nomad's text. Blocks that are wholly new or gone show only their name, unless `verbose`.
    #[must_use]
    pub fn render(&self, verbose: bool) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        self.write(&mut out, verbose).unwrap_or_default();
        out
    }

    fn write(&self, out: &mut impl Write, verbose: bool) -> fmt::Result {
        writeln!(out, "{}Job: \"{}\"", marker(self.kind), self.id)?;
        if verbose || self.kind == DiffKind::Edited {
            write_body(out, &self.fields, &self.objects, 0, None)?;
        }
        for group in &self.groups {
            group.write(out, verbose)?;
        }
        Ok(())
    }
}

impl fmt::Display for JobDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, false)
    }
}

impl GroupDiff {
    fn write(&self, out: &mut impl Write, verbose: bool) -> fmt::Result {
        writeln!(out, "{}Task Group: \"{}\"{}", marker(self.kind), self.name, self.updates)?;
        if verbose || self.kind == DiffKind::Edited {
            write_body(out, &self.fields, &self.objects, INDENT, Some(self.updates))?;
        }
        let width = self.tasks.iter().map(|task| marker(task.kind).len()).max().unwrap_or(0);
        for task in &self.tasks {
            task.write(out, width, verbose)?;
        }
        Ok(())
    }
}

impl TaskDiff {
    fn write(&self, out: &mut impl Write, width: usize, verbose: bool) -> fmt::Result {
        let forces = match self.kind {
            DiffKind::None => "",
            DiffKind::Added => " (forces create)",
            DiffKind::Deleted => " (forces destroy)",
            DiffKind::Edited => " (forces create/destroy update)",
        };
        let sidecar = if self.sidecar { " (sidecar, served by culvert's worker)" } else { "" };
        let name = &self.name;
        writeln!(out, "{:INDENT$}{:<width$}Task: \"{name}\"{forces}{sidecar}", "", marker(self.kind))?;
        let whole = matches!(self.kind, DiffKind::Added | DiffKind::Deleted);
        if self.kind == DiffKind::None || (whole && !verbose) {
            return Ok(());
        }
        write_body(out, &self.fields, &self.objects, 2 * INDENT, None)
    }
}

impl fmt::Display for Updates {
    /// ` (1 create, 2 ignore)`, or nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.create, "create"),
            (self.destroy, "destroy"),
            (self.replace, "create/destroy update"),
            (self.ignore, "ignore"),
        ];
        let parts = parts.iter().filter(|(count, _)| *count > 0);
        let text: Vec<String> = parts.map(|(count, what)| format!("{count} {what}")).collect();
        if text.is_empty() { Ok(()) } else { write!(f, " ({})", text.join(", ")) }
    }
}

fn marker(kind: DiffKind) -> &'static str {
    match kind {
        DiffKind::None => "",
        DiffKind::Added => "+ ",
        DiffKind::Deleted => "- ",
        DiffKind::Edited => "+/- ",
    }
}

/// Fields and blocks, their names aligned. `group` is set where a changed count says what it forces.
fn write_body(
    out: &mut impl Write,
    fields: &[FieldDiff],
    objects: &[ObjectDiff],
    indent: usize,
    group: Option<Updates>,
) -> fmt::Result {
    let markers = fields.iter().map(|field| field.kind).chain(objects.iter().map(|object| object.kind));
    let width = markers.map(|kind| marker(kind).len()).max().unwrap_or(0);
    let longest = fields.iter().map(|field| field.name.chars().count()).max().unwrap_or(0);
    for field in fields {
        let forces = match group {
            Some(updates) if field.name == "Count" && updates.create > 0 => " (forces create)",
            Some(updates) if field.name == "Count" && updates.destroy > 0 => " (forces destroy)",
            _ => "",
        };
        let value = match field.kind {
            DiffKind::Edited => format!("\"{}\" => \"{}\"", shown(&field.old), shown(&field.new)),
            DiffKind::Deleted => format!("\"{}\"", shown(&field.old)),
            DiffKind::Added | DiffKind::None => format!("\"{}\"", shown(&field.new)),
        };
        let name = format!("{}:", field.name);
        let longest = longest + 1;
        writeln!(out, "{:indent$}{:<width$}{name:<longest$} {value}{forces}", "", marker(field.kind))?;
    }
    for object in objects {
        writeln!(out, "{:indent$}{:<width$}{} {{", "", marker(object.kind), object.name)?;
        write_body(out, &object.fields, &object.objects, indent + INDENT, None)?;
        // Nomad closes a block below its name.
        writeln!(out, "{:indent$}{:width$}}}", "", "")?;
    }
    Ok(())
}

/// A value on one line; nothing in it can move the cursor of a terminal.
fn shown(value: &str) -> String {
    value.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}
