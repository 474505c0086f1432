//! `kd-cli analyse cka`.

use anyhow::{Result, bail};
use candle_core::Tensor;
use kd_core::{Cut, Model};
use kd_train::analysis::{Cka as Similarity, Estimator};

use super::inputs::{DataArgs, Loaded, NetworkArgs, Noise, TeacherArgs};
use super::{OutputArgs, number, write_svg};
use crate::figure::{self, Heat};
use crate::output;

/// Features of one batch that the plain estimator may hold.
const PLAIN_BYTES: usize = 4 << 30;

/// Measures how similar the stages of a student are to its teacher's (linear CKA); without a teacher, to each other.
///
/// The unbiased estimator averages over batches (--batch-size, at least 4; larger ones are less noisy). The plain one takes all samples as one batch, which
/// memory limits, and overrates places that have more numbers than there are samples; --pool averages each channel over its positions first.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse cka --run runs/quickstart --svg cka.svg
  kd-cli analyse cka --model resnet20 --weights r20.pth --data cifar100:DIR --limit 2000           one network's own stages
  kd-cli analyse cka --model resnet20 --weights r20.pth --teacher-model resnet56 --teacher-weights r56.pth --data cifar100:DIR --estimator plain --pool --limit 5000")]
pub(super) struct Cka {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    teacher: TeacherArgs,
    /// How similarity is estimated.
    #[arg(long, value_enum, default_value = "unbiased")]
    estimator: Kind,
    /// Averages each channel over its positions first.
    #[arg(long)]
    pool: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Over batches, without bias.
    Unbiased,
    /// Over all samples at once.
    Plain,
}

/// Runs the command.
pub(super) fn run(args: &Cka) -> Result<()> {
    let mut inputs = args.data.open(Noise::default())?;
    let student = inputs.network(&args.network, "student")?;
    let teacher = inputs.teacher(&args.teacher)?;
    let mut networks = vec![&student];
    networks.extend(teacher.as_ref());
    let cuts: Vec<Vec<Cut>> = networks.iter().map(|n| places(n)).collect();
    let estimator = match args.estimator {
        Kind::Unbiased => Estimator::Unbiased,
        Kind::Plain => {
            let samples = inputs.data.len();
            let bytes: usize = networks.iter().map(|n| samples * floats(n) * 4).sum();
            if bytes > PLAIN_BYTES {
                bail!(
                    "--estimator plain on {samples} samples holds {} of features at once; take fewer (--limit {}) or --estimator unbiased",
                    gib(bytes),
                    (samples as f64 * PLAIN_BYTES as f64 / bytes as f64) as usize / 100 * 100
                );
            }
            inputs.one_batch();
            Estimator::Plain
        }
    };
    let mut cka = Similarity::new(estimator, args.pool);
    inputs.in_pool(|| {
        let sides: Vec<(&Loaded, &[Cut])> = networks.iter().zip(&cuts).map(|(n, c)| (*n, c.as_slice())).collect();
        inputs.sweep(&sides, |seen| {
            let features = |side: usize| cuts[side].iter().map(|cut| seen.tensor(side, *cut)).collect::<kd_train::Result<Vec<&Tensor>>>();
            // Features are not looked at one by one; the logits tell whether the network works.
            for side in 0..cuts.len() {
                seen.rows(side, Cut::Logits)?;
            }
            cka.add(&features(0)?, &features(cuts.len() - 1)?)
        })
    })?;
    let matrix = cka.matrix()?;
    let names = |side: usize| cuts[side].iter().map(ToString::to_string).collect::<Vec<_>>();
    let (rows, columns) = (names(0), names(cuts.len() - 1));
    let other = teacher.as_ref().unwrap_or(&student);

    write_svg(args.output.svg.as_ref(), || {
        let (y, x) = match &teacher {
            Some(teacher) => (format!("student {}", student.model), format!("teacher {}", teacher.model)),
            None => (student.model.clone(), student.model.clone()),
        };
        let heat = Heat {
            y: &y,
            x: &x,
            rows: &rows,
            columns: &columns,
            values: &matrix.concat(),
            range: [0.0, 1.0],
            diverging: false,
            scale: "linear CKA",
        };
        figure::heat_map(&format!("Similarity of stages on {}", inputs.data.info().name), &heat)
    })?;
    let method = match args.estimator {
        Kind::Unbiased => format!("unbiased (HSIC_1 averaged over batches of {})", args.data.batch_size),
        Kind::Plain => "plain (HSIC_0 over all samples)".to_string(),
    };
    let kind = if args.pool { "averaged over positions" } else { "all positions" };
    if args.output.json {
        return output::json(&serde_json::json!({
            "student": student.json(), "teacher": teacher.as_ref().map(Loaded::json), "data": inputs.source, "split": inputs.split(),
            "samples": cka.samples(), "estimator": if args.estimator == Kind::Plain { "plain" } else { "unbiased" },
            "batch_size": if args.estimator == Kind::Plain { cka.samples() } else { args.data.batch_size }, "pool": args.pool,
            "rows": rows, "columns": columns, "cka": matrix,
        }));
    }
    output::line(&format!("rows       {} {}", if teacher.is_some() { "student" } else { "network" }, student.about()))?;
    output::line(&format!("columns    {} {}", if teacher.is_some() { "teacher" } else { "network" }, other.about()))?;
    output::line(&format!("data       {}; {} entered", inputs.about(), output::thousands(cka.samples() as u64)))?;
    output::line(&format!("estimator  {method}; features: {kind}"))?;
    output::line("")?;
    let mut header = vec!["linear CKA"];
    header.extend(columns.iter().map(String::as_str));
    let right: Vec<bool> = (0..header.len()).map(|c| c > 0).collect();
    let lines: Vec<Vec<String>> = rows
        .iter()
        .zip(&matrix)
        .map(|(name, values)| std::iter::once(name.clone()).chain(values.iter().map(|v| number((!v.is_nan()).then_some(*v), 3))).collect())
        .collect();
    output::table(&header, &right, &lines)
}

/// The stages, the embedding, the logits.
fn places(network: &Loaded) -> Vec<Cut> {
    let stages = (0..network.network.spec().stages.len()).map(Cut::Stage);
    stages.chain([Cut::Embedding, Cut::Logits]).collect()
}

/// Numbers of one sample at all places.
fn floats(network: &Loaded) -> usize {
    let spec = network.network.spec();
    spec.stages.iter().map(|s| s.channels * s.size[0] * s.size[1]).sum::<usize>() + spec.embedding + spec.classes
}

fn gib(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
