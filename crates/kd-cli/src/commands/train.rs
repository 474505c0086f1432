//! `kd-cli train`: one network on labels.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use kd_train::config::DataConfig;
use kd_train::{Config, LossConfig};

use super::distill::{RunArgs, Session};
use crate::{assemble, output};

/// Trains the `[student]` of a config on labels, without a teacher: a teacher to be, or a baseline.
///
/// A `[teacher]` and the losses that need one are left out; `ce` remains when nothing else does.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli train --model resnet20 --data digits --set schedule.epochs=20\n  kd-cli train --config my-run.toml --set seed=2\n  kd-cli train --resume runs/resnet20-ce"
)]
pub struct Train {
    /// The network to train; overrides `student.model`.
    #[arg(long, conflicts_with = "resume")]
    model: Option<String>,
    /// The data set to train on; overrides `data.source`.
    #[arg(long, conflicts_with = "resume")]
    data: Option<String>,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
pub fn run(args: &Train) -> Result<()> {
    let (config, dir) = args.run.open_for(args.model.as_deref(), args.data.as_deref())?;
    let stop = stop_flag()?;
    let done = assemble::in_pool(config.threads, || {
        assemble::pipeline(&config.data)?;
        let session = Session {
            config: &config,
            args: &args.run,
            stop: &stop,
            device: assemble::device(&config.device)?,
            precision: assemble::precision(&config)?,
        };
        let splits = assemble::splits(&config.data, config.data.train_limit, config.seed)?;
        let (_, result) = session.student("train", &config, &splits, &[], &dir)?;
        if args.run.json {
            return output::json(&serde_json::json!({"run": dir.display().to_string(), "result": result}));
        }
        let last = result.test.or(result.history.last().map(|h| h.evaluation));
        if let Some(e) = last {
            output::line(&format!("top-1 {:.2} %, top-5 {:.2} % ({} of {})", e.top1, e.top5, e.correct, e.total))?;
        }
        output::line(&format!("run directory: {}", dir.display()))
    })?;
    done.map_err(|e| args.run.located(e, args.model.as_deref(), args.data.is_none(), &config.data))
}

/// The config without its teachers and the losses that need one.
pub(crate) fn on_labels(config: &Config) -> Config {
    let alone = |l: &&LossConfig| {
        let built = assemble::method(&l.method).ok().and_then(|m| (m.build)(&serde_json::Value::Object(l.params.clone())).ok());
        built.map(|m| m.needs()).is_some_and(|n| n.teacher.is_empty() && !n.teacher_model && !n.class_means)
    };
    let mut loss: Vec<LossConfig> = config.loss.iter().filter(alone).cloned().collect();
    if loss.is_empty() || (loss.len() == 1 && loss[0].method == "ce") {
        // The weight of `ce` beside a teacher's loss means nothing alone.
        loss = vec![LossConfig::resolved("ce", assemble::methods())];
    }
    // A loss without a teacher learns from labels.
    let data = DataConfig { unlabelled: None, ..config.data.clone() };
    Config { teacher: vec![], loss, baseline: false, data, ..config.clone() }
}

/// A flag that Ctrl-C and SIGTERM set; a second one ends the program at once.
pub(crate) fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
