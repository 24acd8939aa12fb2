//! Figures, what they should be, and how they are shown.

use serde_json::{Value, json};

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// Only shown.
    None,
}

impl Target {
    fn is_met(self, value: f64) -> Option<bool> {
        match self {
            Target::AtMost(most) => Some(value <= most),
            Target::AtLeast(least) => Some(value >= least),
            Target::None => None,
        }
    }

    fn shown(self) -> String {
        match self {
            Target::AtMost(most) => format!("≤ {}", number(most)),
            Target::AtLeast(least) => format!("≥ {}", number(least)),
            Target::None => "–".to_owned(),
        }
    }
}

/// One figure of one work.
#[derive(Debug, Clone)]
pub struct Row {
    pub work: &'static str,
    pub figure: &'static str,
    pub value: f64,
    pub unit: &'static str,
    pub target: Target,
    /// The physical limit that it is compared with.
    pub limit: Option<(&'static str, f64)>,
}

pub fn row(
    work: &'static str,
    figure: &'static str,
    value: f64,
    unit: &'static str,
    target: Target,
) -> Row {
    Row {
        work,
        figure,
        value,
        unit,
        target,
        limit: None,
    }
}

impl Row {
    pub fn of_limit(mut self, name: &'static str, limit: f64) -> Row {
        self.limit = Some((name, limit));
        self
    }

    pub fn is_missed(&self) -> bool {
        self.target.is_met(self.value) == Some(false)
    }

    fn verdict(&self) -> &'static str {
        match self.target.is_met(self.value) {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "–",
        }
    }

    pub fn to_json(&self) -> Value {
        json!({
            "work": self.work,
            "figure": self.figure,
            "value": self.value,
            "unit": self.unit,
            "target": self.target.shown(),
            "verdict": self.verdict(),
            "limit": self.limit.map(|(name, limit)| json!({
                "name": name,
                "value": limit,
                "fraction": self.value / limit,
            })),
        })
    }
}

/// A table of Markdown.
pub fn print(rows: &[Row]) {
    println!("| work | figure | measured | target | verdict | of the limit |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let limit = row.limit.map_or("–".to_owned(), |(name, limit)| {
            format!(
                "{:.0}% of {} ({name})",
                100.0 * row.value / limit,
                number(limit)
            )
        });
        println!(
            "| {} | {} | {} {} | {} | {} | {limit} |",
            row.work,
            row.figure,
            number(row.value),
            row.unit,
            row.target.shown(),
            row.verdict()
        );
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        hundreds if hundreds >= 100.0 => format!("{value:.0}"),
        tens if tens >= 10.0 => format!("{value:.1}"),
        units if units >= 0.1 || units == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
