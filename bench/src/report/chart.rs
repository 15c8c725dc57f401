//! The chart: for each piece of work one row of bars, as multiples of plain TCP, on one processor.

use std::fmt::Write as _;

use super::Report;
use crate::compare::{Outcome, is_base};

/// One measure of the chart.
struct Panel {
    title: &'static str,
    hint: &'static str,
    /// Beginning of the names of its pieces of work.
    works: &'static str,
    value: fn(&Outcome) -> Option<f64>,
}

const PANELS: [Panel; 4] = [
    Panel {
        title: "round trip, p50",
        hint: "× plain TCP, shorter is better",
        works: "echo",
        value: |outcome| Some(outcome.latency?.p50_ratio),
    },
    Panel {
        title: "round trip, p99",
        hint: "× plain TCP, shorter is better",
        works: "echo",
        value: |outcome| Some(outcome.latency?.p99_ratio),
    },
    Panel {
        title: "throughput",
        hint: "× plain TCP, longer is better",
        works: "throughput",
        value: |outcome| Some(outcome.rate_ratio),
    },
    Panel {
        title: "new connections per second",
        hint: "× plain TCP, longer is better",
        works: "new",
        value: |outcome| Some(outcome.rate_ratio),
    },
];
/// Fill of each contender's bars, in the order of reports. Distinct in lightness, too.
const COLOURS: [&str; 4] = ["#9aa5b1", "#0b7285", "#2f9e44", "#e8590c"];

/// Pixels.
const WIDTH: f64 = 760.0;
const LABELS: f64 = 190.0;
const BAR: f64 = 14.0;
const GAP: f64 = 10.0;
/// Room for the figure behind a bar.
const FIGURES: f64 = 60.0;

/// The whole picture.
pub(super) fn draw(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 24.0;
    let results = report.phases.iter().find(|phase| phase.pinned).map(|phase| phase.results.as_slice());
    let results = results.unwrap_or_default();
    for panel in &PANELS {
        draw_panel(&mut body, panel, results, &mut y).expect("writing to a string cannot fail");
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" viewBox=\"0 0 {WIDTH} {y}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#212529\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

fn draw_panel(text: &mut String, panel: &Panel, results: &[Outcome], y: &mut f64) -> std::fmt::Result {
    let shown: Vec<(&Outcome, f64)> = results
        .iter()
        .filter(|outcome| outcome.work.starts_with(panel.works))
        .filter_map(|outcome| Some((outcome, (panel.value)(outcome)?)))
        .collect();
    let longest = shown.iter().map(|(_, value)| *value).fold(1.0, f64::max);
    let scale = (WIDTH - LABELS - FIGURES) / longest;
    let Panel { title, hint, .. } = panel;
    writeln!(text, "<text x=\"12\" y=\"{y}\" font-size=\"14\" font-weight=\"bold\">{title}</text>")?;
    writeln!(text, "<text x=\"{:.0}\" y=\"{y}\" text-anchor=\"end\" fill=\"#868e96\">{hint}</text>", WIDTH - 12.0)?;
    *y += GAP;
    let (mut work, mut place) = ("", 0);
    for (outcome, value) in shown {
        if outcome.work != work {
            (work, place) = (&outcome.work, 0);
            *y += GAP / 2.0;
            writeln!(text, "<text x=\"12\" y=\"{:.1}\" fill=\"#495057\">{work}</text>", *y + BAR - 3.0)?;
            *y += BAR + 2.0;
        }
        let (colour, name) = (COLOURS[place % COLOURS.len()], &outcome.contender);
        let (width, middle) = (value * scale, *y + BAR - 3.0);
        let weight = if is_base(name) { "normal" } else { "bold" };
        writeln!(text, "<text x=\"{:.0}\" y=\"{middle:.1}\" text-anchor=\"end\">{name}</text>", LABELS - 8.0)?;
        writeln!(
            text,
            "<rect x=\"{LABELS}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.0}\" fill=\"{colour}\"/>",
            BAR - 2.0
        )?;
        let behind = LABELS + width + 6.0;
        writeln!(text, "<text x=\"{behind:.1}\" y=\"{middle:.1}\" font-weight=\"{weight}\">{value:.2}</text>")?;
        place += 1;
        *y += BAR;
    }
    *y += 3.0 * GAP;
    Ok(())
}
