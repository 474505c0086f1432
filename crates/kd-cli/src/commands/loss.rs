//! `kd-cli loss`: one loss on named tensors, for comparing with other frameworks.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::Value;

use crate::{assemble, output};

/// Evaluates a method on the tensors of a file: value, terms, gradients, state.
///
/// Tensors have the names of the loss fixtures (`student.logits`, `teacher.logits`, `labels`, ...). The output holds `value`, `term.<name>`,
/// `grad.<input>` for every float input except `teacher.*`, `targets`, `class_means`, `state_in.*` and `mask`, and `state.<name>`.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  kd-cli loss kd --inputs in.safetensors --params '{\"temperature\": 4}' --output out.safetensors")]
pub struct Loss {
    /// The method (`kd-cli list methods`).
    method: String,
    /// A safetensors file with the inputs.
    #[arg(long)]
    inputs: PathBuf,
    /// The method's parameters as a JSON object; default: the file's metadata `params`, else the method's own defaults.
    #[arg(long)]
    params: Option<String>,
    /// The type to compute in.
    #[arg(long, value_enum, default_value = "f64")]
    dtype: assemble::Float,
    /// The safetensors file to write.
    #[arg(long)]
    output: PathBuf,
}

/// Runs the command.
pub fn run(args: &Loss) -> Result<()> {
    let entry = assemble::method(&args.method)?;
    let (tensors, metadata) = output::read_tensors(&args.inputs)?;
    let params: Value = match args.params.as_ref().or(metadata.get("params")) {
        Some(text) => serde_json::from_str(text).with_context(|| format!("the parameters are no JSON: {text}"))?,
        None => Value::Object(serde_json::Map::new()),
    };
    anyhow::ensure!(params.is_object(), "the parameters must be a JSON object, {{\"temperature\": 4}} say; got {params}");
    // A fixture carries the answers beside the questions.
    let inputs = tensors
        .into_iter()
        .filter(|(name, _)| name != "value" && !["term.", "grad.", "state."].iter().any(|p| name.starts_with(p)))
        .collect();
    let found = kd_core::registry::evaluate(entry, &inputs, &params, DType::from(args.dtype))
        .with_context(|| format!("{} on {}", entry.name, args.inputs.display()))?;
    output::write_tensors(&args.output, &found)
}
