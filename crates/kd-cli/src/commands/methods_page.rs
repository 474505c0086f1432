//! `docs/methods.md`: every method, from the registries.
//!
//! `kd-cli list methods --markdown > docs/methods.md` writes it; a test fails when the file is not what this prints.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use kd_core::{Check, Cost, Cut, MethodEntry, MethodNotes, Model, Models, Needs, Rng, Setup};

use crate::assemble;

/// Networks that the needs are stated for: a method may ask for cuts that follow from the shapes of both sides.
const PAIR: [&str; 2] = ["resnet20", "resnet56"];
const CLASSES: usize = 100;
/// Enough for every memory bank to be built, and few enough to build it at once.
const SAMPLES: usize = 512;

/// The whole page.
pub fn page() -> Result<String> {
    let notes = assemble::method_notes();
    let pair = Pair::new()?;
    let mut out = String::new();
    out += "# Methods\n\n";
    out += "Every method that a config can name, from the registries. Generated: `kd-cli list methods --markdown > docs/methods.md`;\n";
    out += "a test fails when this file is not what the command prints. Formulas, shapes, quirks and the settings of the published pairs are in\n";
    out += "each method's module documentation (`cargo doc --open -p kd-losses`).\n\n";
    out += &format!(
        "Needs are those for the student {} and the teacher {}; a method computes what it needs and no more. Costs come on top of the\n\
         networks' own passes.\n\n",
        PAIR[0], PAIR[1]
    );
    out += "How each was checked:\n\n";
    for (check, meaning) in [
        (Check::Fixtures, "value, terms, gradients and state agree with PyTorch in double precision, in f64 and f32"),
        (Check::Released, "the PyTorch implementation behind those fixtures agrees with released code, run on the same inputs"),
        (
            Check::Independent,
            "value, gradients and state agree with an independent double-precision implementation in this repository's tests",
        ),
        (Check::Read, "formula and values were read in released code, which was not run; the module says in whose"),
    ] {
        out += &format!("- {}: {meaning}.\n", check.about());
    }
    out += "\n| method | year | needs | cost | checked |\n|---|---|---|---|---|\n";
    for entry in assemble::methods() {
        let (cost, checks) = facts(&notes, entry)?;
        let needs = pair.needs(entry).map_or_else(|| "depends on its parameters".to_string(), |n| words(&n));
        out += &format!("| [`{0}`](#{0}) | {1} | {needs} | {2} | {checks} |\n", entry.name, entry.year, cost.about());
    }
    for entry in assemble::methods() {
        out += &format!("\n## {}\n\n{}.\n\nSource: {}.\n", entry.name, sentence(entry.about), entry.source);
        if entry.parameters.is_empty() {
            continue;
        }
        out += "\n| parameter | default | range | |\n|---|---|---|---|\n";
        for p in entry.parameters {
            let default = if p.default.is_empty() { "(must be given)".to_string() } else { format!("`{}`", p.default) };
            out += &format!("| `{}` | {} | {} | {} |\n", p.name, cell(&default), cell(p.range), cell(p.about));
        }
    }
    Ok(out)
}

fn facts(notes: &BTreeMap<&'static str, MethodNotes>, entry: &MethodEntry) -> Result<(Cost, String)> {
    let note = notes.get(entry.name).with_context(|| format!("`{}` has no line in its crate's NOTES", entry.name))?;
    Ok((note.cost, note.checks.iter().map(|c| c.about()).collect::<Vec<_>>().join(", ")))
}

/// Its first letter large.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Text that a table's cell can hold.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// The two networks, without weights.
struct Pair {
    student: Arc<dyn Model>,
    teachers: Vec<Arc<dyn Model>>,
    means: Tensor,
}

impl Pair {
    fn new() -> Result<Self> {
        let network = |name: &str| assemble::network(name, Some(CLASSES), [3, 32, 32], DType::F32, &Device::Cpu);
        let teacher = network(PAIR[1])?.frozen();
        let width = teacher.spec().embedding;
        let means = Tensor::ones((CLASSES, width), DType::F32, &Device::Cpu)?;
        Ok(Self { student: Arc::new(network(PAIR[0])?), teachers: vec![Arc::new(teacher)], means })
    }

    /// With default parameters: after it was prepared for the pair, else before; nothing where it cannot be built without being given some.
    fn needs(&self, entry: &MethodEntry) -> Option<Needs> {
        let mut method = (entry.build)(&serde_json::json!({})).ok()?;
        let before = method.needs();
        let groups = vec![0; CLASSES];
        let labels: Vec<u32> = (0..SAMPLES).map(|i| (i % CLASSES) as u32).collect();
        let prepared = method.prepare(&Setup {
            models: Models { student: self.student.as_ref(), teachers: &self.teachers },
            classes: CLASSES,
            train_samples: SAMPLES,
            train_labels: Some(&labels),
            batch_size: 64,
            class_means: before.class_means.then_some(&self.means),
            class_groups: before.class_groups.then_some(&groups),
            dtype: DType::F32,
            device: &Device::Cpu,
            rng: Rng::new(0),
        });
        Some(if prepared.is_ok() { method.needs() } else { before })
    }
}

fn words(needs: &Needs) -> String {
    let mut parts = vec![];
    if !needs.student.is_empty() && needs.student == needs.teacher {
        parts.push(format!("both: {}", cuts(&needs.student)));
    } else {
        for (who, list) in [("student", &needs.student), ("teacher", &needs.teacher)] {
            if !list.is_empty() {
                parts.push(format!("{who}: {}", cuts(list)));
            }
        }
    }
    if needs.views > 1 {
        parts.push(format!("{} views", needs.views));
    }
    for (wanted, what) in [
        (needs.labels, "labels"),
        (needs.indices, "sample indices"),
        (needs.teacher_model, "the teacher's layers"),
        (needs.student_model, "the student's layers"),
        (needs.class_means, "class means"),
        (needs.class_groups, "class groups"),
    ] {
        if wanted {
            parts.push(what.to_string());
        }
    }
    parts.join("; ")
}

/// `stages 1 2 3, logits`.
fn cuts(list: &[Cut]) -> String {
    let numbers = |which: fn(&Cut) -> Option<usize>, name: &str| {
        let found: Vec<String> = list.iter().filter_map(which).map(|i| i.to_string()).collect();
        let plural = if found.len() > 1 { "s" } else { "" };
        (!found.is_empty()).then(|| format!("{name}{plural} {}", found.join(" ")))
    };
    let stage = |c: &Cut| if let Cut::Stage(i) = c { Some(*i) } else { None };
    let preact = |c: &Cut| if let Cut::Preact(i) = c { Some(*i) } else { None };
    let block = |c: &Cut| if let Cut::Block(i) = c { Some(*i) } else { None };
    let groups = [numbers(block, "block"), numbers(stage, "stage"), numbers(preact, "pre-activation")];
    let single = list.iter().filter(|c| !matches!(c, Cut::Stage(_) | Cut::Preact(_) | Cut::Block(_))).map(ToString::to_string);
    groups.into_iter().flatten().chain(single).collect::<Vec<_>>().join(", ")
}
