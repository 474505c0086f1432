//! `kd-cli analyse agreement`.

use std::path::PathBuf;

use anyhow::Result;
use kd_core::{Cut, Model};
use kd_train::analysis::agreement::Confidence;
use kd_train::analysis::{Agreement as Counted, LogitCorrelation};

use super::inputs::{DataArgs, NetworkArgs, Noise, TeacherArgs};
use super::{OutputArgs, write_svg};
use crate::figure::{self, BLUE, Heat, ORANGE};
use crate::output;

/// Compares the predictions of a student with its teacher's: agreement, divergence, calibration, and the correlation of their class logits.
///
/// --svg draws the reliability diagram of both networks, --correlation-svg the difference of their correlation matrices as a heat map.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse agreement --run runs/quickstart --svg reliability.svg --correlation-svg correlation.svg
  kd-cli analyse agreement --model resnet20 --weights r20.pth --teacher-model resnet56 --teacher-weights r56.pth --data cifar100:DIR --json")]
pub(super) struct Agreement {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    teacher: TeacherArgs,
    /// Temperature of the divergence; calibration is always at 1.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Bins of the calibration error.
    #[arg(long, default_value_t = 15)]
    bins: usize,
    /// Draws the difference of the class correlations into this file.
    #[arg(long, value_name = "FILE")]
    correlation_svg: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command.
pub(super) fn run(args: &Agreement) -> Result<()> {
    anyhow::ensure!((1..=1000).contains(&args.bins), "--bins {}: must be 1 to 1000", args.bins);
    let mut counted = Counted::new(args.temperature, args.bins)?;
    let inputs = args.data.open(Noise::default())?;
    let [teacher, student] = inputs.pair(&args.network, &args.teacher)?;
    let outputs = teacher.network.spec().classes;
    let mut correlations = [LogitCorrelation::new(outputs), LogitCorrelation::new(outputs)];
    inputs.in_pool(|| {
        inputs.sweep(&[(&teacher, &[Cut::Logits]), (&student, &[Cut::Logits])], |seen| {
            let (t, s) = (seen.rows(0, Cut::Logits)?, seen.rows(1, Cut::Logits)?);
            correlations[0].add(&t)?;
            correlations[1].add(&s)?;
            counted.add(&t, &s, seen.labels)
        })
    })?;
    let Some(report) = counted.report() else { return Ok(()) };
    let difference = correlations[1].difference(&correlations[0])?;
    let pair = difference.pair.map(|k| inputs.class(k).to_string());
    let data = &inputs.data.info().name;

    write_svg(args.output.svg.as_ref(), || {
        let side = |name: &str, model: &str| format!("{name} {model}");
        let networks =
            [(side("teacher", &teacher.model), ORANGE, &report.teacher), (side("student", &student.model), BLUE, &report.student)];
        figure::reliability(&format!("Reliability on {data}"), &networks)
    })?;
    write_svg(args.correlation_svg.as_ref(), || {
        let names: Vec<String> = (0..outputs).map(|k| inputs.class(k).to_string()).collect();
        let most = difference.max.max(1e-6);
        let heat = Heat {
            y: "class",
            x: "class",
            rows: &names,
            columns: &names,
            values: &difference.matrix,
            range: [-most, most],
            diverging: true,
            scale: "correlation of the student - of the teacher",
        };
        figure::heat_map(&format!("Class correlations on {data}: {} - {}", student.model, teacher.model), &heat)
    })?;
    if args.output.json {
        let names: Vec<&str> = (0..outputs).map(|k| inputs.class(k)).collect();
        return output::json(&serde_json::json!({
            "teacher": teacher.json(), "student": student.json(), "data": inputs.source, "split": inputs.split(),
            "samples": inputs.data.len(), "temperature": args.temperature, "agreement": report,
            "class_correlation": {
                "mean": difference.mean, "max": difference.max, "pair": pair, "classes": names,
                "difference": difference.matrix.chunks(outputs.max(1)).collect::<Vec<_>>(),
            },
        }));
    }
    output::line(&format!("teacher  {}", teacher.about()))?;
    output::line(&format!("student  {}", student.about()))?;
    output::line(&format!("data     {}", inputs.about()))?;
    output::line("")?;
    let c = report.counts;
    let row =
        |name: &str, n: usize| vec![name.to_string(), output::thousands(n as u64), format!("{:.2} %", 100.0 * n as f64 / c.total as f64)];
    let rows = [
        row("both right", c.both_right),
        row("only the teacher right", c.teacher_right),
        row("only the student right", c.student_right),
        row("both wrong, in the same way", c.same_wrong),
        row("both wrong, differently", c.different_wrong),
        row("agree (same prediction)", c.agree),
    ];
    output::table(&["predictions", "samples", "share"], &[false, true, true], &rows)?;
    output::line("")?;
    let row = |name: &str, n: &Confidence| {
        vec![name.to_string(), format!("{:.2} %", 100.0 * n.accuracy), format!("{:.2} %", 100.0 * n.confidence), format!("{:.4}", n.ece)]
    };
    let rows = [row("teacher", &report.teacher), row("student", &report.student)];
    output::table(&["network", "top-1", "mean confidence", "calibration error"], &[false, true, true, true], &rows)?;
    output::line("")?;
    output::line(&format!("divergence from the teacher  {:.4} nats (KL at temperature {})", report.kl, args.temperature))?;
    output::line(&format!(
        "class correlations           differ by {:.4} on average, most {:.4} ({}, {})",
        difference.mean, difference.max, pair[0], pair[1]
    ))
}
