//! `kd-cli analyse decompose`.

use anyhow::Result;
use kd_core::Cut;
use kd_train::analysis::Decompose as Parts;

use super::inputs::{DataArgs, NetworkArgs, Noise, TeacherArgs};
use super::{OutputArgs, class_table, write_svg};
use crate::figure::{self, BLUE, ORANGE, Panel, Series};
use crate::output;

/// Takes the KD loss of a student apart as NKD does: cross-entropy of the label weighted by the teacher, and the rest.
///
/// The non-target probabilities of teacher and student have unequal sums, so the student cannot match the rest; NKD normalises both and keeps only
/// the shape. All values are means per sample in nats, without the factor T^2.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse decompose --run runs/quickstart
  kd-cli analyse decompose --model resnet20 --weights r20.pth --teacher-model resnet56 --teacher-weights r56.pth --data cifar100:DIR --temperature 4 --svg sums.svg")]
pub(super) struct Decompose {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    teacher: TeacherArgs,
    /// Temperature of both networks' probabilities.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Prints every class, not only the ends of a long list.
    #[arg(long)]
    all_classes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command.
pub(super) fn run(args: &Decompose) -> Result<()> {
    let mut parts = Parts::new(args.temperature)?;
    let inputs = args.data.open(Noise::default())?;
    let [teacher, student] = inputs.pair(&args.network, &args.teacher)?;
    inputs.in_pool(|| {
        inputs.sweep(&[(&teacher, &[Cut::Logits]), (&student, &[Cut::Logits])], |seen| {
            parts.add(&seen.rows(0, Cut::Logits)?, &seen.rows(1, Cut::Logits)?, seen.labels)
        })
    })?;
    let Some(report) = parts.report(inputs.classes()) else { return Ok(()) };
    write_svg(args.output.svg.as_ref(), || {
        let series = |name: &str, colour, value: fn(&kd_train::analysis::decompose::Sample) -> f64| Series {
            name: name.to_string(),
            colour,
            values: parts.samples().iter().map(value).collect(),
        };
        let panels = [
            Panel {
                title: "sums of the non-target probabilities".to_string(),
                axis: format!("1 - probability of the label at T = {}", args.temperature),
                series: vec![series("teacher", ORANGE, |s| s.teacher_sum), series("student", BLUE, |s| s.student_sum)],
            },
            Panel {
                title: "their difference".to_string(),
                axis: "student - teacher (probability)".to_string(),
                series: vec![series("student - teacher", BLUE, |s| s.student_sum - s.teacher_sum)],
            },
        ];
        figure::histograms(&format!("{} beside {} on {}", student.model, teacher.model, inputs.data.info().name), &panels, &[], "")
    })?;
    if args.output.json {
        let classes: Vec<_> =
            report.classes.iter().enumerate().map(|(k, p)| serde_json::json!({"class": inputs.class(k), "parts": p})).collect();
        return output::json(&serde_json::json!({
            "teacher": teacher.json(), "student": student.json(), "data": inputs.source, "split": inputs.split(),
            "samples": inputs.data.len(), "temperature": args.temperature, "all": report.all, "classes": classes,
        }));
    }
    let all = &report.all;
    let share = |v: f64| format!("{:5.1} %", 100.0 * v / all.kd);
    output::line(&format!("teacher      {}", teacher.about()))?;
    output::line(&format!("student      {}", student.about()))?;
    output::line(&format!("data         {}", inputs.about()))?;
    output::line(&format!("temperature  {}", args.temperature))?;
    output::line("")?;
    let row = |name: &str, value: f64, share: String, formula: &str| {
        vec![name.to_string(), format!("{value:.4}"), share.trim().to_string(), formula.to_string()]
    };
    let rows = [
        row("KD, as cross-entropy", all.kd, share(all.kd), "-sum_k q_k log p_k"),
        row("  target", all.target, share(all.target), "-q_y log p_y"),
        row("  rest", all.rest, share(all.rest), "-sum_{k!=y} q_k log p_k"),
        row("    of which shape", all.rest_shape, share(all.rest_shape), "(1-q_y) H(q^, p^)"),
        row("    of which sum", all.rest_sum, share(all.rest_sum), "-(1-q_y) log(1-p_y)"),
        row("KD, as divergence", all.kl, String::new(), "KL(q || p)"),
        row("NKD's non-target", all.normalised, String::new(), "H(q^, p^)"),
        row("NKD's, as divergence", all.normalised_kl, String::new(), "KL(q^ || p^)"),
    ];
    output::table(&["part", "mean (nats)", "of KD", ""], &[false, true, true, false], &rows)?;
    output::line("")?;
    let sum = |name: &str, value: f64, formula: &str| vec![name.to_string(), format!("{value:.4}"), formula.to_string()];
    let rows = [
        sum("teacher", all.teacher_sum, "1-q_y"),
        sum("student", all.student_sum, "1-p_y"),
        sum("mean distance", all.sum_gap, "|p_y-q_y|"),
        sum("share of samples whose student's is larger", all.student_larger, ""),
    ];
    output::table(&["sum of the non-target probabilities", "mean", ""], &[false, true, false], &rows)?;
    let classes = report.classes.iter().enumerate().filter_map(|(k, p)| {
        let p = p.as_ref()?;
        let mut cells = vec![inputs.class(k).to_string(), p.n.to_string()];
        cells.extend([p.target, p.rest, p.normalised, p.teacher_sum, p.student_sum, p.sum_gap].map(|v| format!("{v:.4}")));
        Some((p.sum_gap, cells))
    });
    let header = ["class", "n", "target", "rest", "H(q^, p^)", "1-q_y", "1-p_y", "distance"];
    class_table(&header, classes.collect(), args.all_classes)
}
