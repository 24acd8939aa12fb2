//! Bounds that a change must not exceed without saying so. They are of figures that hardly differ
//! between runs and machines: memory, disk bytes, syncs, size. Times are printed, not judged.

use crate::table::Row;

/// The works that give these figures.
pub const WORKS: [&str; 5] = ["bulk", "idle", "backlog", "syncs", "size"];

/// Work, figure, and the most that it may be, for the default release build of x86_64 with glibc and
/// the gateway: it has some 3 MiB more of code than the static build of a device.
const BOUNDS: [(&str, &str, f64); 11] = [
    ("64 MiB of output", "peak resident", 12.5),
    ("64 MiB of output", "disk bytes a byte", 1.10),
    ("idle, connected", "resident", 11.5),
    ("idle, connected", "of it neither code nor files", 3.5),
    ("idle, connected", "threads", 12.0),
    ("48 MiB waiting while offline", "resident above idle", 1.0),
    ("48 MiB waiting while offline", "disk bytes a byte", 1.10),
    ("its replay", "peak above idle", 1.25),
    // A commit carries up to eight chunks; how many depends on the disk.
    ("16 MiB of output, traced", "syncs a chunk", 0.5),
    // Each chunk is one commit; beside it the start of the task and its final.
    ("20 lines a second, traced", "syncs a chunk", 1.5),
    ("binary", "size", 9.25),
];

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
