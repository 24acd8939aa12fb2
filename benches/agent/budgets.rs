//! Bounds that a change must not exceed without saying so. They are of figures that hardly differ
//! between runs and machines: memory, disk bytes, syncs, size. Times are printed, not judged.

use crate::table::Row;

/// The works that give these figures.
pub const WORKS: [&str; 5] = ["bulk", "idle", "backlog", "syncs", "size"];

/// Work, figure, and the most that it may be.
const BOUNDS: [(&str, &str, f64); 0] = [];

/// Prints each bound beside its figure. False if one is exceeded or was not measured.
pub fn judge(rows: &[Row]) -> bool {
    let mut kept = true;
    println!("\n| budget | measured | at most | verdict |\n| --- | --- | --- | --- |");
    for (work, figure, most) in BOUNDS {
        let found = rows
            .iter()
            .find(|row| row.work == work && row.figure == figure);
        let value = found.map(|row| row.value);
        let is_kept = value.is_some_and(|value| value <= most);
        kept &= is_kept;
        println!(
            "| {work}: {figure} | {} | {most} | {} |",
            value.map_or("not measured".to_owned(), |value| format!("{value:.3}")),
            if is_kept { "kept" } else { "EXCEEDED" }
        );
    }
    kept
}
