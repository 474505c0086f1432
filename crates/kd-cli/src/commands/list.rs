//! `kd-cli list`: the registries.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::commands::methods_page;
use crate::{assemble, output};

/// Lists what configs can name.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  kd-cli list methods\n  kd-cli list models --json")]
pub struct List {
    /// What to list; everything by default.
    #[arg(value_enum)]
    what: Option<Kind>,
    /// An array of objects with `name`, `about`, `needs`, `parameters`.
    #[arg(long)]
    json: bool,
    /// Methods alone, as the page `docs/methods.md`.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Models,
    Methods,
    Datasets,
}

/// Runs the command.
pub fn run(args: &List) -> Result<()> {
    if args.markdown {
        if args.what != Some(Kind::Methods) {
            bail!("--markdown: there is a page of methods alone; use `kd-cli list methods --markdown`");
        }
        return output::line(methods_page::page()?.trim_end());
    }
    let kinds = args.what.map_or_else(|| vec![Kind::Models, Kind::Methods, Kind::Datasets], |k| vec![k]);
    if args.json {
        let all = kinds.iter().map(|&k| objects(k)).collect::<Result<Vec<_>>>()?;
        return output::json(&all.into_iter().flatten().collect::<Vec<Value>>());
    }
    for (i, &kind) in kinds.iter().enumerate() {
        if i > 0 {
            output::line("")?;
        }
        table(kind)?;
    }
    Ok(())
}

fn objects(kind: Kind) -> Result<Vec<Value>> {
    match kind {
        Kind::Models => kd_models::registry()
            .iter()
            .map(|m| {
                let graph = kd_models::build(m.name, &m.config())?;
                let input = graph.spec().input;
                Ok(json!({
                    "kind": "model", "name": m.name, "about": m.about, "needs": {"input": input},
                    "parameters": {"classes": graph.spec().classes, "params": graph.param_count(), "macs": graph.macs(&input)?},
                }))
            })
            .collect(),
        Kind::Methods => {
            let notes = assemble::method_notes();
            assemble::methods()
                .iter()
                .map(|m| {
                    let needs = assemble::default_needs(m);
                    let notes = notes.get(m.name);
                    Ok(json!({
                        "kind": "method", "name": m.name, "about": m.about, "needs": needs, "parameters": m.parameters,
                        "source": m.source, "year": m.year, "cost": notes.map(|n| n.cost), "checks": notes.map(|n| n.checks),
                    }))
                })
                .collect()
        }
        Kind::Datasets => Ok(kd_data::SOURCES
            .iter()
            .map(|s| json!({"kind": "dataset", "name": s.name, "about": s.about, "needs": {"argument": s.argument}, "parameters": []}))
            .collect()),
    }
}

fn table(kind: Kind) -> Result<()> {
    match kind {
        Kind::Models => {
            let rows = kd_models::registry()
                .iter()
                .map(|m| {
                    let graph = kd_models::build(m.name, &m.config())?;
                    let macs = graph.macs(&graph.spec().input)? as f64 / 1e6;
                    Ok(vec![m.name.to_string(), output::thousands(graph.param_count() as u64), format!("{macs:.2}"), m.about.to_string()])
                })
                .collect::<Result<Vec<_>>>()?;
            output::table(&["model", "parameters", "MACs (M)", "about"], &[false, true, true, false], &rows)
        }
        Kind::Methods => {
            let rows: Vec<_> = assemble::methods()
                .iter()
                .map(|m| {
                    let params: Vec<String> = m.parameters.iter().map(|p| format!("{}={}", p.name, p.default)).collect();
                    vec![m.name.to_string(), m.about.to_string(), params.join(" "), format!("{} ({})", m.source, m.year)]
                })
                .collect();
            output::table(&["method", "about", "parameters", "source"], &[false; 4], &rows)
        }
        Kind::Datasets => {
            let rows: Vec<_> = kd_data::SOURCES
                .iter()
                .map(|s| {
                    let spec = if s.argument.is_empty() { s.name.to_string() } else { format!("{}:{}", s.name, s.argument) };
                    vec![spec, s.about.to_string()]
                })
                .collect();
            output::table(&["data set", "about"], &[false; 2], &rows)
        }
    }
}
