//! `kd-cli analyse directions`.

use anyhow::Result;
use kd_core::{Cut, Model};
use kd_train::analysis::directions::{Direction, Sample, lengths};
use kd_train::analysis::{DirectionReport, Directions as Measured};

use super::inputs::{DataArgs, Inputs, NetworkArgs, Noise, TeacherArgs};
use super::{OutputArgs, class_table, number, write_svg};
use crate::figure::{self, BLUE, ORANGE, Panel, Series};
use crate::output;

/// Measures the length of each embedding and its angle to the mean embedding of its class, for student and teacher.
///
/// The teacher's class means over the training set are what KD++ pulls the student to: its claim is that a student gains from embeddings that are longer and
/// nearer in direction. A student of another width is only held against its own class means, since KD++'s adapter is not part of an exported student.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse directions --run runs/quickstart --svg directions.svg
  kd-cli analyse directions --model resnet20 --weights r20.pth --teacher-model resnet56 --teacher-weights r56.pth --data cifar100:DIR")]
pub(super) struct Directions {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    teacher: TeacherArgs,
    /// Prints every class, not only the ends of a long list.
    #[arg(long)]
    all_classes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// One network against one set of means.
struct Line {
    network: &'static str,
    means: &'static str,
    measured: Measured,
}

/// Runs the command.
pub(super) fn run(args: &Directions) -> Result<()> {
    let inputs = args.data.open(Noise::default())?;
    let teacher = inputs.need_teacher(&args.teacher)?;
    let student = inputs.network(&args.network, "student")?;
    let lines = inputs.in_pool(|| {
        let teacher_means = Measured::new(&inputs.class_means(&teacher)?)?;
        let own_means = Measured::new(&inputs.class_means(&student)?)?;
        let same_width = teacher_means.width() == own_means.width();
        let mut lines = vec![Line { network: "teacher", means: "teacher's", measured: teacher_means.clone() }];
        if same_width {
            lines.push(Line { network: "student", means: "teacher's", measured: teacher_means });
        }
        lines.push(Line { network: "student", means: "its own", measured: own_means });
        inputs.sweep(&[(&teacher, &[Cut::Embedding]), (&student, &[Cut::Embedding])], |seen| {
            let (t, s) = (seen.rows(0, Cut::Embedding)?, seen.rows(1, Cut::Embedding)?);
            let norms = lengths(&t);
            for line in &mut lines {
                // KD++'s loss is that of the student at the teacher's means.
                match (line.network, line.means) {
                    ("teacher", _) => line.measured.add(&t, seen.labels, None)?,
                    (_, "teacher's") => line.measured.add(&s, seen.labels, Some(&norms))?,
                    _ => line.measured.add(&s, seen.labels, None)?,
                }
            }
            Ok(())
        })?;
        Ok(lines)
    })?;
    let reports: Vec<DirectionReport> = lines.iter().filter_map(|l| l.measured.report()).collect();

    write_svg(args.output.svg.as_ref(), || figure(&inputs, &lines))?;
    if args.output.json {
        let found: Vec<_> = lines
            .iter()
            .zip(&reports)
            .map(|(line, r)| {
                let classes: Vec<_> =
                    r.classes.iter().enumerate().map(|(k, d)| serde_json::json!({"class": inputs.class(k), "direction": d})).collect();
                serde_json::json!({"network": line.network, "means": line.means, "all": r.all, "classes": classes})
            })
            .collect();
        return output::json(&serde_json::json!({
            "teacher": teacher.json(), "student": student.json(), "data": inputs.source, "split": inputs.split(),
            "samples": inputs.data.len(), "against": found,
        }));
    }
    output::line(&format!("teacher  {}", teacher.about()))?;
    output::line(&format!("student  {}", student.about()))?;
    output::line(&format!("data     {}; class means over the training set", inputs.about()))?;
    if student.network.spec().embedding != teacher.network.spec().embedding {
        let (s, t) = (student.network.spec().embedding, teacher.network.spec().embedding);
        output::line(&format!("note     embeddings of width {s} and {t}: the student is held against its own class means only"))?;
    }
    output::line("")?;
    let row = |line: &Line, d: &Direction| {
        vec![
            line.network.to_string(),
            line.means.to_string(),
            format!("{:.3}", d.ratio.mean),
            format!("{:.3}", d.ratio.sd),
            format!("{:.2}", d.angle.mean),
            format!("{:.2}", d.angle.sd),
            format!("{:.4}", d.cosine.mean),
            format!("{:.2} %", 100.0 * d.nearest),
            number(d.nd, 4),
        ]
    };
    let rows: Vec<_> = lines.iter().zip(&reports).map(|(l, r)| row(l, &r.all)).collect();
    let header = ["network", "class means", "|f|/|c|", "sd", "angle (deg)", "sd", "cosine", "own class nearest", "KD++ loss"];
    output::table(&header, &[false, false, true, true, true, true, true, true, true], &rows)?;
    // Of each class: the student at the means that both share, else at its own.
    let at = lines.iter().position(|l| l.network == "student").unwrap_or(0);
    let (t, s) = (&reports[0], &reports[at]);
    let classes = t.classes.iter().zip(&s.classes).enumerate().filter_map(|(k, (t, s))| {
        let (t, s) = (t.as_ref()?, s.as_ref()?);
        let cell = |v: f64, digits: usize| format!("{v:.digits$}");
        let cells = vec![
            inputs.class(k).to_string(),
            s.angle.n.to_string(),
            cell(t.angle.mean, 2),
            cell(s.angle.mean, 2),
            cell(t.ratio.mean, 3),
            cell(s.ratio.mean, 3),
        ];
        Some((s.angle.mean, cells))
    });
    let header = ["class", "n", "teacher angle", "student angle", "teacher |f|/|c|", "student |f|/|c|"];
    class_table(&header, classes.collect(), args.all_classes)
}

fn figure(inputs: &Inputs, lines: &[Line]) -> Result<String> {
    // The lines that share the teacher's means, or each network at its own.
    let shared = lines.iter().filter(|l| l.means == "teacher's").count() > 1;
    let drawn = lines.iter().filter(|l| !shared || l.means == "teacher's");
    let series = |value: fn(&Sample) -> f64| -> Vec<Series> {
        drawn
            .clone()
            .map(|l| Series {
                name: l.network.to_string(),
                colour: if l.network == "teacher" { ORANGE } else { BLUE },
                values: l.measured.samples().iter().map(value).collect(),
            })
            .collect()
    };
    let means = if shared { "the teacher's class mean" } else { "the network's own class mean" };
    let panels = [
        Panel { title: "direction".to_string(), axis: format!("angle to {means} (degrees)"), series: series(Sample::angle) },
        Panel { title: "length".to_string(), axis: format!("norm / norm of {means}"), series: series(|s| s.ratio) },
    ];
    figure::histograms(&format!("Embeddings against class means on {}", inputs.data.info().name), &panels, &[], "")
}
