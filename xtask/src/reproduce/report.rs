//! A table's results beside the published numbers: Markdown, CSV, JSON and a plot.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::budget::Budget;
use super::execute::Failures;
use super::plan::{Plan, Settings};
use super::plot;
use super::results::{self, Outcome};
use super::stats::{Summary, paired, summary};
use super::table::{Published, Reported, Table};

/// Everything that the files of a report show.
#[derive(Serialize)]
pub(super) struct Report {
    table: String,
    title: String,
    source: String,
    budget: &'static str,
    command: String,
    reference: String,
    /// Every way in which all rows differ from the published ones.
    protocol: Vec<String>,
    teachers: Vec<Teacher>,
    pub(super) rows: Vec<ReportRow>,
}

#[derive(Serialize)]
struct Teacher {
    name: String,
    model: String,
    measured: Option<f64>,
    published: Option<f64>,
}

/// A row with its seeds.
#[derive(Serialize)]
pub(super) struct ReportRow {
    pub(super) id: String,
    pub(super) pair: String,
    pub(super) method: String,
    pub(super) runs: Vec<SeedRun>,
    /// The last epochs of all seeds, and the best ones.
    pub(super) last: Option<Summary>,
    pub(super) best: Option<Summary>,
    /// Last epoch minus the reference method's, within each seed.
    pub(super) to_reference: Option<Summary>,
    pub(super) published: Vec<Published>,
    /// Ours minus the first published number, of the kind that was published.
    pub(super) difference: Option<f64>,
    notes: Vec<String>,
    /// Why it cannot run.
    missing: Option<String>,
}

/// A row in one seed.
#[derive(Serialize)]
pub(super) struct SeedRun {
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) outcome: Option<Outcome>,
    error: Option<String>,
}

impl Report {
    /// Reads what the runs left.
    pub(super) fn new(table: &Table, plan: &Plan, settings: &Settings, failures: &Failures) -> Result<Self> {
        let mut rows: Vec<ReportRow> = plan
            .rows
            .iter()
            .map(|planned| {
                let row = &planned.row;
                let run = |seed| {
                    let place = planned.config.as_ref().ok().and_then(|c| results::find(&settings.out, seed, row, c));
                    let outcome = place.and_then(|p| Outcome::read(&p.run));
                    SeedRun { seed, error: failures.rows.get(&(row.id.clone(), seed)).filter(|_| outcome.is_none()).cloned(), outcome }
                };
                let runs: Vec<SeedRun> = (1..=settings.seeds).map(run).collect();
                let of =
                    |value: fn(&Outcome) -> f64| summary(&runs.iter().filter_map(|r| r.outcome.as_ref()).map(value).collect::<Vec<_>>());
                let (last, best) = (of(|o| o.last), of(|o| o.best));
                let difference = row.published.first().and_then(|p| {
                    let ours = if p.reported == Reported::Best { best } else { last };
                    Some(ours?.mean - p.top1)
                });
                ReportRow {
                    id: row.id.clone(),
                    pair: row.pair.clone(),
                    method: row.method.clone(),
                    last,
                    best,
                    runs,
                    to_reference: None,
                    published: row.published.clone(),
                    difference,
                    notes: row.notes.clone(),
                    missing: planned.config.as_ref().err().cloned(),
                }
            })
            .collect();
        let series = |r: &ReportRow| r.runs.iter().filter_map(|s| Some((s.seed, s.outcome.as_ref()?.last))).collect::<Vec<_>>();
        let references: BTreeMap<String, Vec<(u64, f64)>> =
            rows.iter().filter(|r| r.method == table.reference).map(|r| (r.pair.clone(), series(r))).collect();
        for row in rows.iter_mut().filter(|r| r.method != table.reference) {
            row.to_reference = references.get(&row.pair).and_then(|reference| paired(&series(row), reference));
        }
        let teachers = teachers(table, plan, &rows);
        Ok(Self {
            table: table.name.clone(),
            title: table.title.clone(),
            source: table.source.clone(),
            budget: settings.budget.name(),
            command: std::iter::once("cargo xtask".to_string()).chain(std::env::args().skip(1).map(quoted)).collect::<Vec<_>>().join(" "),
            reference: table.reference.clone(),
            protocol: protocol(table, plan, settings, &teachers, &rows),
            teachers,
            rows,
        })
    }

    /// Writes the four files.
    pub(super) fn write(&self, out: &Path) -> Result<()> {
        fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
        let write = |name: &str, text: &str| {
            let (path, scratch) = (out.join(name), out.join(format!("{name}.part")));
            fs::write(&scratch, text).and_then(|()| fs::rename(&scratch, &path)).with_context(|| format!("writing {}", path.display()))
        };
        write("report.md", &self.markdown())?;
        write("report.csv", &self.csv())?;
        write("report.json", &serde_json::to_string_pretty(self)?)?;
        if let Some(svg) = plot::svg(&self.title, &self.rows)? {
            write("report.svg", &svg)?;
        }
        Ok(())
    }

    /// As a page.
    pub(super) fn markdown(&self) -> String {
        let mut page = format!(
            "# {}\n\n`{}`\n\nPublished numbers: {}. Top-1 accuracy on the test set in percent.\n",
            self.title, self.command, self.source
        );
        if !self.teachers.is_empty() {
            page.push_str("\n| teacher | network | here | published |\n|---|---|---:|---:|\n");
            for t in &self.teachers {
                let _ = writeln!(page, "| {} | {} | {} | {} |", t.name, t.model, number(t.measured), number(t.published));
            }
        }
        let mut footnotes: Vec<&str> = vec![];
        let mut pairs: Vec<&str> = vec![];
        for row in &self.rows {
            if !pairs.contains(&row.pair.as_str()) {
                pairs.push(&row.pair);
            }
        }
        for pair in pairs {
            let _ = write!(
                page,
                "\n## {pair}\n\n| method | last epoch | 95 % interval | best epoch | seeds, last | minus {} | published | difference |\n|---|---:|---:|---:|---|---:|---:|---:|\n",
                self.reference
            );
            for row in self.rows.iter().filter(|r| r.pair == pair) {
                let mut marks = String::new();
                for note in &row.notes {
                    let at = footnotes.iter().position(|n| n == note).unwrap_or_else(|| {
                        footnotes.push(note);
                        footnotes.len() - 1
                    });
                    let _ = write!(marks, " [{}]", at + 1);
                }
                let _ = writeln!(page, "| {}{marks} | {} |", row.method, row.cells().join(" | "));
            }
        }
        page.push_str("\n± is the standard deviation over the seeds; intervals are Student's t; \"minus\" is paired within each seed, ± half its 95 % interval.\n");
        if self.rows.iter().any(|r| r.best.is_some()) {
            page.push_str("The best epoch is chosen on the test set, so it flatters.\n");
        }
        let mut list = |title: &str, items: &[String]| {
            if !items.is_empty() {
                let _ = write!(page, "\n## {title}\n\n");
                items.iter().for_each(|item| {
                    let _ = writeln!(page, "- {item}");
                });
            }
        };
        list("How this differs from the published protocol", &self.protocol);
        list("Notes", &footnotes.iter().enumerate().map(|(i, n)| format!("[{}] {n}", i + 1)).collect::<Vec<_>>());
        list("Not run, or not to its end", &self.gaps());
        page
    }

    /// Rows without numbers and why, those with the same reason together.
    fn gaps(&self) -> Vec<String> {
        let mut reasons: Vec<(&str, Vec<String>)> = vec![];
        let mut add = |reason, row: String| match reasons.iter_mut().find(|(r, _)| *r == reason) {
            Some((_, rows)) => rows.push(row),
            None => reasons.push((reason, vec![row])),
        };
        for row in &self.rows {
            if let Some(reason) = &row.missing {
                add(reason, row.id.clone());
            }
            for run in &row.runs {
                if let Some(error) = &run.error {
                    add(error, format!("{} (seed {})", row.id, run.seed));
                }
            }
        }
        reasons.into_iter().map(|(reason, rows)| format!("{}: {reason}", rows.join(", "))).collect()
    }

    /// A line for each row and seed.
    fn csv(&self) -> String {
        let mut text = "table,budget,pair,method,seed,last,best,best_epochs,epochs,steps,teacher,seconds,images_per_second,published,published_source\n".to_string();
        for row in &self.rows {
            for run in &row.runs {
                let published = row.published.first();
                let numbers = match &run.outcome {
                    Some(o) => format!(
                        "{},{},{},{},{},{},{:.1},{:.1}",
                        o.last,
                        o.best,
                        o.best_epochs,
                        o.epochs,
                        o.steps,
                        o.teacher.map_or(String::new(), |t| t.to_string()),
                        o.seconds,
                        o.images_per_second
                    ),
                    None => ",,,,,,,".to_string(),
                };
                let _ = writeln!(
                    text,
                    "{},{},{},{},{},{numbers},{},{}",
                    self.table,
                    self.budget,
                    field(&row.pair),
                    field(&row.method),
                    run.seed,
                    published.map_or(String::new(), |p| p.top1.to_string()),
                    field(published.map_or("", |p| &p.source))
                );
            }
        }
        text
    }
}

impl ReportRow {
    fn cells(&self) -> [String; 7] {
        let spread = |s: Option<Summary>| {
            s.map_or(String::new(), |s| format!("{:.2}{}", s.mean, s.deviation.map_or(String::new(), |d| format!(" ± {d:.2}"))))
        };
        let interval = |s: Summary| s.half_interval.map(|h| format!("{:.2} to {:.2}", s.mean - h, s.mean + h));
        let seeds: Vec<String> =
            self.runs.iter().map(|r| r.outcome.as_ref().map_or("-".to_string(), |o| format!("{:.2}", o.last))).collect();
        let versus = |s: Summary| match s.half_interval {
            Some(h) => format!("{:+.2} ± {h:.2}", s.mean),
            None => format!("{:+.2}", s.mean),
        };
        let published: Vec<String> = self
            .published
            .iter()
            .enumerate()
            .map(|(i, p)| if i == 0 { format!("{:.2}", p.top1) } else { format!("{:.2} ({})", p.top1, p.source) })
            .collect();
        let kind = match self.published.first().map(|p| p.reported) {
            Some(Reported::Best) => " (best)",
            Some(Reported::Last) => " (last)",
            _ => "",
        };
        [
            spread(self.last),
            self.last.and_then(interval).unwrap_or_default(),
            spread(self.best),
            if self.last.is_some() { seeds.join(" ") } else { "not run".to_string() },
            self.to_reference.map_or(String::new(), versus),
            published.join(", "),
            self.difference.map_or(String::new(), |d| format!("{d:+.2}{kind}")),
        ]
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |v| format!("{v:.2}"))
}

/// A field of a CSV line.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

fn quoted(argument: String) -> String {
    if argument.contains([' ', '*', '?', '\'', '"']) { format!("'{argument}'") } else { argument }
}

fn teachers(table: &Table, plan: &Plan, rows: &[ReportRow]) -> Vec<Teacher> {
    let mut all: Vec<Teacher> = vec![];
    for (planned, row) in plan.rows.iter().zip(rows) {
        let Some(name) = &planned.row.teacher else { continue };
        let measured = row.runs.iter().find_map(|r| r.outcome.as_ref()?.teacher);
        match all.iter_mut().find(|t| t.name == *name) {
            Some(known) => known.measured = known.measured.or(measured),
            None => all.push(Teacher {
                name: name.clone(),
                model: table.model_of(name).to_string(),
                measured,
                published: table.teacher[name].top1,
            }),
        }
    }
    all
}

/// Every way in which all rows differ from the published ones.
fn protocol(table: &Table, plan: &Plan, settings: &Settings, teachers: &[Teacher], rows: &[ReportRow]) -> Vec<String> {
    let mut list = vec![];
    let configs = || plan.rows.iter().filter_map(|p| p.config.as_ref().ok());
    match settings.budget {
        Budget::Smoke => list.push("smoke: two steps on a few made-up images; no accuracy here means anything".to_string()),
        _ => {
            let mut epochs: Vec<(u64, u64)> = configs().map(|c| (c.epochs, c.paper_epochs)).filter(|(ours, paper)| ours != paper).collect();
            epochs.sort_unstable();
            epochs.dedup();
            list.extend(epochs.iter().map(|(ours, paper)| {
                format!(
                    "{ours} epochs of {paper}; milestones, warm-ups and initial phases of losses scaled alike, rounded, at least one epoch"
                )
            }));
            if plan.train_limit > 0 {
                list.push(format!("trained on a class-balanced subset of {} images, drawn anew for each seed", plan.train_limit));
            }
        }
    }
    let name = |spec: &str| spec.split(':').next().unwrap_or_default().to_string();
    if settings.budget != Budget::Smoke && name(&plan.source) != name(&table.data) {
        list.push(format!("data: {} in place of {}", name(&plan.source), table.data));
    }
    for t in teachers {
        match (t.measured, t.published) {
            (Some(here), Some(paper)) if (here - paper).abs() >= 0.005 => {
                list.push(format!("teacher {}: {here:.2} here, {paper:.2} there ({:+.2})", t.name, here - paper));
            }
            (Some(here), None) => list.push(format!("teacher {}: {here:.2} here, no published accuracy", t.name)),
            _ => {}
        }
        if plan.teachers.contains_key(&t.name) && !table.teacher[&t.name].own {
            list.push(format!("teacher {}: trained here, one for all seeds", t.name));
        }
    }
    if rows.iter().any(|r| !r.published.is_empty()) {
        list.push(format!("{} here; how many runs a published number is the mean of is stated by few sources", seeds(settings.seeds)));
        list.push(match table.reported {
            Reported::Last => "published: the last epoch; the difference is to our last epoch".to_string(),
            Reported::Best => "published: the best epoch on the test set; the difference is to our best epoch".to_string(),
            Reported::Unknown => {
                "whether the published numbers are of the last or the best epoch is unknown; the difference is to our last epoch"
                    .to_string()
            }
        });
    }
    let mut every: Vec<(usize, u64)> = rows
        .iter()
        .flat_map(|r| &r.runs)
        .filter_map(|r| r.outcome.as_ref())
        .map(|o| (o.evaluations, o.epochs))
        .filter(|(n, e)| (*n as u64) < *e)
        .collect();
    every.sort_unstable();
    every.dedup();
    list.extend(every.iter().map(|(n, e)| format!("evaluated {n} times in {e} epochs: the best epoch is the best of those")));
    list.extend(table.notes.iter().cloned());
    list
}

fn seeds(n: u64) -> String {
    if n == 1 {
        "one seed".to_string()
    } else {
        format!("{n} seeds; order, augmentation and initialisation vary across seeds and are shared within one")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(last: f64, best: f64) -> Outcome {
        Outcome {
            last,
            best,
            best_epochs: 1,
            epochs: 2,
            steps: 10,
            evaluations: 2,
            teacher: Some(72.0),
            seconds: 1.0,
            images_per_second: 1.0,
        }
    }

    fn row(method: &str, last: &[f64], published: Option<f64>) -> ReportRow {
        let runs = last.iter().enumerate();
        ReportRow {
            id: format!("p.{method}"),
            pair: "p".to_string(),
            method: method.to_string(),
            runs: runs.map(|(i, v)| SeedRun { seed: i as u64 + 1, outcome: Some(outcome(*v, v + 0.5)), error: None }).collect(),
            last: summary(last),
            best: summary(&last.iter().map(|v| v + 0.5).collect::<Vec<_>>()),
            to_reference: None,
            published: published.into_iter().map(|top1| Published { top1, source: "a, b".to_string(), reported: Reported::Best }).collect(),
            difference: published.zip(summary(last)).map(|(p, s)| s.mean + 0.5 - p),
            notes: vec!["weights tuned per pair".to_string()],
            missing: None,
        }
    }

    fn report(rows: Vec<ReportRow>) -> Report {
        Report {
            table: "t".to_string(),
            title: "T".to_string(),
            source: "S".to_string(),
            budget: "short",
            command: "c".to_string(),
            reference: "kd".to_string(),
            protocol: vec!["24 epochs of 240".to_string()],
            teachers: vec![],
            rows,
        }
    }

    #[test]
    fn a_page_has_every_number_and_every_reason() {
        let mut gap = row("crd", &[], Some(71.16));
        (gap.last, gap.best, gap.difference, gap.missing) = (None, None, None, Some("method missing".to_string()));
        gap.runs = vec![SeedRun { seed: 1, outcome: None, error: None }];
        let page = report(vec![row("kd", &[70.0, 71.0], Some(70.66)), gap]).markdown();
        assert!(
            page.contains("| kd [1] | 70.50 ± 0.71 | 64.15 to 76.85 | 71.00 ± 0.71 | 70.00 71.00 |  | 70.66 | +0.34 (best) |"),
            "{page}"
        );
        assert!(page.contains("| crd [1] |  |  |  | not run |  | 71.16 |  |"), "{page}");
        assert!(page.contains("- [1] weights tuned per pair") && page.contains("- p.crd: method missing"), "{page}");
        assert!(page.contains("- 24 epochs of 240"), "{page}");
    }

    #[test]
    fn csv_has_a_line_for_each_seed() {
        let csv = report(vec![row("kd", &[70.0, 71.0], Some(70.66))]).csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[2], "t,short,p,kd,2,71,71.5,1,2,10,72,1.0,1.0,70.66,\"a, b\"");
        assert!(lines.iter().all(|l| l.replace("\"a, b\"", "").split(',').count() == lines[0].split(',').count()));
    }
}
