//! Values of a label that somebody else names. Each one makes a time series, in memory here and at whoever collects them.

use std::collections::HashSet;

use parking_lot::Mutex;

/// Stands for every value past the limit.
pub(super) const OTHER: &str = "(other)";

/// A label of bounded variety: its first [`Label::MOST`] values are kept, later ones count as [`OTHER`].
#[derive(Debug, Default)]
pub(super) struct Label(Mutex<HashSet<String>>);

impl Label {
    /// More than a node has services, or a mesh has intentions that refuse somebody here.
    pub(super) const MOST: usize = 4096;
    /// Longest value, in bytes: more than two names of services and what a rule says beside them.
    const LONGEST: usize = 1024;

    pub(super) fn value(&self, value: &str) -> String {
        let mut known = self.0.lock();
        if known.contains(value) {
            return value.to_owned();
        }
        if known.len() == Self::MOST || value.len() > Self::LONGEST {
            return OTHER.to_owned();
        }
        known.insert(value.to_owned());
        value.to_owned()
    }
}
