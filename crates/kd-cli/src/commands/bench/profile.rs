//! What `--profile` prints: time by pass, kernel and layer against the machine's limits.

use std::collections::BTreeMap;

use kd_nn::measure::Machine;
use kd_nn::profile::Entry;
use serde_json::{Value, json};

use crate::output;

/// A profile of some steps.
pub struct Report {
    machine: Machine,
    entries: Vec<Entry>,
    steps: f64,
}

/// Time, arithmetic and memory of one line.
#[derive(Clone, Copy, Default)]
struct Sum {
    seconds: f64,
    flops: f64,
    bytes: f64,
}

/// Layers that the table shows.
const LAYERS: usize = 25;

impl Report {
    /// Of `steps` steps.
    pub fn new(machine: Machine, entries: Vec<Entry>, steps: usize) -> Self {
        Self { machine, entries, steps: steps.max(1) as f64 }
    }

    /// Sums over the entries that have a name, by it, the longest first.
    fn by(&self, name: impl Fn(&Entry) -> Option<String>) -> Vec<(String, Sum)> {
        let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
        for entry in &self.entries {
            if let Some(name) = name(entry) {
                let sum = sums.entry(name).or_default();
                sum.seconds += entry.seconds / self.steps;
                sum.flops += entry.flops / self.steps;
                sum.bytes += entry.bytes / self.steps;
            }
        }
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        sums
    }

    fn kernels(&self) -> Vec<(String, Sum)> {
        let layers: f64 = self.entries.iter().filter(|e| e.kernel.is_none()).map(|e| e.seconds / self.steps).sum();
        let mut kernels = self.by(|e| e.kernel.map(ToString::to_string));
        let counted: f64 = kernels.iter().map(|k| k.1.seconds).sum();
        let rest = Sum { seconds: (layers - counted).max(0.0), ..Sum::default() };
        kernels.push(("between kernels: waiting, copies, sums of lanes".to_string(), rest));
        kernels
    }

    fn passes(&self) -> Vec<(String, Sum)> {
        self.by(|e| e.kernel.is_none().then(|| format!("{} {}", e.network, e.pass)))
    }

    /// As JSON, times in seconds a step.
    pub fn json(&self) -> Value {
        let list = |sums: Vec<(String, Sum)>| -> Vec<Value> {
            sums.into_iter().map(|(name, s)| json!({"name": name, "seconds": s.seconds, "flops": s.flops, "bytes": s.bytes})).collect()
        };
        let entry = |e: &Entry| {
            json!({
                "network": e.network, "layer": e.layer, "pass": e.pass, "kernel": e.kernel, "calls": e.calls as f64 / self.steps,
                "seconds": e.seconds / self.steps, "flops": e.flops / self.steps, "bytes": e.bytes / self.steps,
            })
        };
        json!({
            "fma_gflop_s": self.machine.flops / 1e9, "read_gb_s": self.machine.read / 1e9, "copy_gb_s": self.machine.copy / 1e9,
            "passes": list(self.passes()), "kernels": list(self.kernels()), "entries": self.entries.iter().map(entry).collect::<Vec<_>>(),
        })
    }

    /// As tables.
    pub fn text(&self) -> String {
        let m = &self.machine;
        let all: f64 = self.entries.iter().filter(|e| e.kernel.is_none()).map(|e| e.seconds / self.steps).sum();
        let layers = self.by(|e| e.kernel.is_none().then(|| format!("{} {} {}", e.network, e.pass, e.layer)));
        let (shown, rest) = layers.split_at(layers.len().min(LAYERS));
        let limits = format!(
            "limits of this machine, {} threads, {}: {:.0} GFLOP/s of multiply-adds, memory {:.1} GB/s read, {:.1} GB/s copied",
            m.threads,
            m.level.name(),
            m.flops / 1e9,
            m.read / 1e9,
            m.copy / 1e9
        );
        let mut lines = vec![limits];
        for (what, sums) in [
            ("pass (work as the layers define it)", &self.passes()[..]),
            ("kernel (work as it is done)", &self.kernels()),
            ("layer (work as it defines it)", shown),
        ] {
            lines.push(String::new());
            lines.extend(self.table(what, sums, all));
        }
        if !rest.is_empty() {
            let time: f64 = rest.iter().map(|l| l.1.seconds).sum();
            lines.push(format!("and {} more, {:.2} ms together", rest.len(), 1e3 * time));
        }
        lines.join("\n")
    }

    fn table(&self, what: &str, sums: &[(String, Sum)], all: f64) -> Vec<String> {
        let dash = || "-".to_string();
        let rate = |amount: f64, seconds: f64| if amount > 0.0 { format!("{:.1}", amount / seconds / 1e9) } else { dash() };
        let of_peak = |s: &Sum| if s.flops > 0.0 { format!("{:.0} %", 100.0 * s.flops / s.seconds / self.machine.flops) } else { dash() };
        let rows: Vec<Vec<String>> = sums
            .iter()
            .map(|(name, s)| {
                vec![
                    name.clone(),
                    format!("{:.2}", 1e3 * s.seconds),
                    format!("{:.1} %", 100.0 * s.seconds / all),
                    rate(s.flops, s.seconds),
                    of_peak(s),
                    rate(s.bytes, s.seconds),
                ]
            })
            .collect();
        output::render(&[what, "ms a step", "share", "GFLOP/s", "of the limit", "GB/s"], &[false, true, true, true, true, true], &rows)
    }
}
