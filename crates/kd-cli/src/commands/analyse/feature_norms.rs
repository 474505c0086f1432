//! `kd-cli analyse feature-norms`.

use std::path::PathBuf;

use anyhow::Result;
use kd_core::{Cut, Model};
use kd_train::analysis::norms::Sample;
use kd_train::analysis::{FeatureNorms as Norms, NormReport, Summary};

use super::inputs::{DataArgs, Inputs, Loaded, NetworkArgs, Noise};
use super::{OutputArgs, class_table, number, sheet, write, write_svg};
use crate::figure::{self, BLUE, ORANGE, Panel, Range, Series};
use crate::output;

/// Measures the length of the embeddings (the classifier's input): over all samples, of right and wrong predictions, by class.
///
/// FNKD divides by this length in place of a temperature, since short embeddings belong to images that are hard to tell. --sheet shows them:
/// the shortest in the upper row, the longest in the lower one. --label-noise asks whether the length finds wrong labels: it draws the labels
/// that a run with `data.label_noise` and the same seed has; the network should be one that was trained on them (--run takes both from the run).
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse feature-norms --model resnet56 --weights resnet56.pth --data cifar100:DIR --split train --limit 10000
  kd-cli analyse feature-norms --weights student.safetensors --data digits --sheet norms.png --svg norms.svg
  kd-cli analyse feature-norms --run runs/noisy --split train         with the run's own data.label_noise
  kd-cli analyse feature-norms --run runs/quickstart --of teacher --json")]
pub(super) struct FeatureNorms {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    /// Which network of the run; default: the student.
    #[arg(long, value_enum)]
    of: Option<Part>,
    /// Share of training labels that are replaced by another class, as `data.label_noise` of a run; default: the run's, else 0.
    #[arg(long, value_name = "SHARE")]
    label_noise: Option<f64>,
    /// Seed of the label noise; default: the run's, else 1.
    #[arg(long)]
    seed: Option<u64>,
    /// Writes the images with the smallest and largest norms into this PNG file.
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Images in a row of the sheet.
    #[arg(long, default_value_t = 10)]
    count: usize,
    /// Two rows of the sheet for each of these classes, by name, in place of two for all.
    #[arg(long, value_delimiter = ',', requires = "sheet")]
    classes: Vec<String>,
    /// Prints every class, not only the ends of a long list.
    #[arg(long)]
    all_classes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Part {
    Student,
    Teacher,
    Baseline,
}

/// One image of the sheet.
#[derive(serde::Serialize)]
struct Shown {
    row: usize,
    column: usize,
    end: &'static str,
    sample: usize,
    record: u32,
    norm: f64,
    label: String,
    predicted: String,
}

/// Runs the command.
pub(super) fn run(args: &FeatureNorms) -> Result<()> {
    let inputs = args.data.open(Noise { share: args.label_noise, seed: args.seed })?;
    let network = match args.of {
        Some(Part::Student) => inputs.part("student", &args.network)?,
        Some(Part::Teacher) => inputs.part("teacher", &args.network)?,
        Some(Part::Baseline) => inputs.part("baseline", &args.network)?,
        None => inputs.network(&args.network, "network")?,
    };
    let wanted = wanted_classes(&args.classes, &inputs)?;
    anyhow::ensure!(args.count > 0, "--count 0: must be at least 1");
    let mut norms = Norms::default();
    inputs.in_pool(|| {
        inputs.sweep(&[(&network, &[Cut::Embedding, Cut::Logits])], |seen| {
            norms.add(&seen.rows(0, Cut::Embedding)?, &seen.rows(0, Cut::Logits)?, seen.labels)
        })
    })?;
    let report = norms.report(inputs.classes());
    let noisy = inputs.data.labels() != inputs.data.given_labels();
    let noise = noisy.then(|| norms.noise(inputs.data.given_labels()));

    let mut rows = vec![];
    let mut shown = vec![];
    for wanted in &wanted {
        let ends = norms.extremes(args.count, |s: &Sample| wanted.is_none_or(|class| s.label == class));
        for (end, positions) in ["smallest", "largest"].into_iter().zip(ends) {
            for (column, &i) in positions.iter().enumerate() {
                let s = norms.samples()[i];
                let (label, predicted) = (inputs.class(s.label).to_string(), inputs.class(s.predicted).to_string());
                shown.push(Shown {
                    row: rows.len(),
                    column,
                    end,
                    sample: i,
                    record: inputs.data.record(i),
                    norm: s.norm,
                    label,
                    predicted,
                });
            }
            rows.push(positions);
        }
    }
    if let Some(path) = &args.sheet {
        let images = rows.iter().map(|row| row.iter().map(|&i| Ok(inputs.data.image(i)?)).collect()).collect::<Result<Vec<_>>>()?;
        write(path, &sheet::png(&images)?)?;
    }
    write_svg(args.output.svg.as_ref(), || figure(&network, &inputs, &norms, &report))?;

    if args.output.json {
        let classes: Vec<_> =
            report.classes.iter().enumerate().map(|(k, summary)| serde_json::json!({"class": inputs.class(k), "norm": summary})).collect();
        let (share, seed) = inputs.noise;
        return output::json(&serde_json::json!({
            "network": network.json(), "data": inputs.source, "split": inputs.split(), "samples": inputs.data.len(),
            "norm": report.all, "correct": report.correct, "wrong": report.wrong, "auc_wrong": report.auc_wrong, "classes": classes,
            "label_noise": noise.as_ref().map(|n| serde_json::json!({
                "share": share, "seed": seed, "noisy": n.noisy, "clean": n.clean, "auc_norm": n.auc_norm, "auc_loss": n.auc_loss,
            })),
            "extremes": shown,
        }));
    }
    output::line(&format!("network    {}", network.about()))?;
    output::line(&format!("data       {}", inputs.about()))?;
    output::line(&format!("embedding  {} wide", network.network.spec().embedding))?;
    output::line("")?;
    let mut groups = vec![("all", Some(report.all)), ("predicted right", report.correct), ("predicted wrong", report.wrong)];
    if let Some(noise) = &noise {
        groups.extend([("noisy label", noise.noisy), ("clean label", noise.clean)]);
    }
    let rows: Vec<Vec<String>> = groups.into_iter().filter_map(|(name, s)| Some(cells(name, &s?))).collect();
    output::table(&["|f|", "n", "mean", "sd", "min", "max"], &[false, true, true, true, true, true], &rows)?;
    output::line("")?;
    output::line(&format!("a wrong prediction has the smaller norm   AUC {}", number(report.auc_wrong, 4)))?;
    if let Some(noise) = &noise {
        output::line(&format!("a noisy label has the smaller norm        AUC {}", number(noise.auc_norm, 4)))?;
        output::line(&format!("a noisy label has the larger loss         AUC {}", number(noise.auc_loss, 4)))?;
    }
    let classes = report.classes.iter().enumerate().filter_map(|(k, s)| Some((s.as_ref()?.mean, cells(inputs.class(k), s.as_ref()?))));
    class_table(&["class", "n", "mean", "sd", "min", "max"], classes.collect(), args.all_classes)?;
    if args.sheet.is_some() {
        output::line("")?;
        let line = |s: &Shown| {
            let place = format!("{},{}", s.row + 1, s.column + 1);
            vec![place, s.end.to_string(), s.sample.to_string(), format!("{:.3}", s.norm), s.label.clone(), s.predicted.clone()]
        };
        let lines: Vec<_> = shown.iter().map(line).collect();
        output::table(&["row,column", "end", "sample", "|f|", "label", "predicted"], &[false, false, true, true, false, false], &lines)?;
    }
    Ok(())
}

/// The classes whose extremes are shown; `None` stands for all together.
fn wanted_classes(names: &[String], inputs: &Inputs) -> Result<Vec<Option<usize>>> {
    let all = &inputs.data.info().class_names;
    let find = |name: &String| match all.iter().position(|c| c == name) {
        Some(class) => Ok(Some(class)),
        None => {
            let hint = kd_train::config::did_you_mean(name, all.iter().map(String::as_str));
            anyhow::bail!("--classes: {} has no class `{name}`; {hint}", inputs.source)
        }
    };
    if names.is_empty() { Ok(vec![None]) } else { names.iter().map(find).collect() }
}

fn cells(name: &str, s: &Summary) -> Vec<String> {
    let mut cells = vec![name.to_string(), output::thousands(s.n as u64)];
    cells.extend([s.mean, s.sd, s.min, s.max].map(|v| format!("{v:.3}")));
    cells
}

fn figure(network: &Loaded, inputs: &Inputs, norms: &Norms, report: &NormReport) -> Result<String> {
    let series = |name: &str, colour, values: Vec<f64>| Series {
        name: format!("{name} (n = {}, mean {})", values.len(), number(Summary::of(values.iter().copied()).map(|s| s.mean), 2)),
        colour,
        values,
    };
    let axis = "norm of the embedding |f| (no unit)".to_string();
    let pick = |keep: &dyn Fn(usize, &Sample) -> bool| {
        norms.samples().iter().enumerate().filter(|(i, s)| keep(*i, s)).map(|(_, s)| s.norm).collect::<Vec<_>>()
    };
    let mut panels = vec![Panel {
        title: "right and wrong predictions".to_string(),
        axis: axis.clone(),
        series: vec![
            series("right", BLUE, pick(&|_, s| s.label == s.predicted)),
            series("wrong", ORANGE, pick(&|_, s| s.label != s.predicted)),
        ],
    }];
    let given = inputs.data.given_labels();
    if inputs.data.labels() != given {
        let noisy = |i: usize, s: &Sample| s.label != given[i] as usize;
        panels.push(Panel {
            title: "clean and noisy labels".to_string(),
            axis: axis.clone(),
            series: vec![series("clean", BLUE, pick(&|i, s| !noisy(i, s))), series("noisy", ORANGE, pick(&|i, s| noisy(i, s)))],
        });
    }
    let mut ranges: Vec<Range> =
        report.classes.iter().enumerate().filter_map(|(k, s)| Some(Range { name: inputs.class(k).to_string(), summary: (*s)? })).collect();
    ranges.sort_by(|a, b| a.summary.mean.total_cmp(&b.summary.mean));
    let title = format!("Norms of {} on {}", network.model, inputs.data.info().name);
    figure::histograms(&title, &panels, &ranges, "norm of the embedding |f|, mean and deviation by class (no unit)")
}
