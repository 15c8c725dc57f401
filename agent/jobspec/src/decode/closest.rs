//! "Did you mean": the nearest known word.

/// Longest word that is compared; the work is the product of two lengths.
const MAX_WORD: usize = 64;

/// The candidate that is a typo away from `word`: at most two edits, one for short words.
pub(crate) fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    if word.len() > MAX_WORD {
        return None;
    }
    let allowed = if word.chars().count() <= 4 { 1 } else { 2 };
    let ranked = candidates.into_iter().filter(|candidate| candidate.len() <= MAX_WORD);
    let ranked = ranked.map(|candidate| (distance(&word, &candidate.to_lowercase()), candidate));
    ranked.filter(|(distance, _)| *distance <= allowed).min_by_key(|(distance, _)| *distance).map(|(_, found)| found)
}

/// Edits (insert, delete, replace, swap of neighbours) from `a` to `b`: optimal string alignment.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_typos_and_nothing_else() {
        let words = ["service", "network", "count", "task", "user"];
        assert_eq!(closest("servcie", words), Some("service"));
        assert_eq!(closest("Count", words), Some("count"));
        assert_eq!(closest("tsak", words), Some("task"));
        assert_eq!(closest("usr", words), Some("user"));
        assert_eq!(closest("colour", words), None);
        assert_eq!(closest(&"x".repeat(10_000), words), None);
    }
}
