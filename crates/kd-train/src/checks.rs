//! What is checked before hours are spent.

use candle_core::Tensor;
use kd_core::{Cut, ModelSpec, Needs};
use kd_nn::Gradients;

use crate::job::{Shared, Student, Teacher, mean_will_do};
use crate::optim::{Part, Target};
use crate::{Error, Evaluation, Result, Split};

/// Names listed in a message before it says how many more there are.
const LISTED: usize = 3;

/// Ranges, classes, cuts and inputs.
pub(crate) fn student(shared: &Shared, own: &Student) -> Result<()> {
    own.optim.validate().and_then(|()| own.schedule.validate()).map_err(Error::Setup)?;
    let refuse = |message: String| Err(Error::Refused(message));
    if own.objectives.is_empty() {
        return refuse("a run without a loss".to_string());
    }
    if shared.data.train.batches() == 0 {
        return refuse("the training set is empty".to_string());
    }
    let classes = shared.data.classes;
    let student = own.model.spec();
    if student.classes != classes {
        return refuse(format!("student {} has {} outputs, the data {classes} classes", student.name, student.classes));
    }
    for teacher in &shared.teachers {
        let outputs = teacher.model.spec().classes;
        if outputs != classes {
            return refuse(format!("teacher {} has {outputs} outputs, the data {classes} classes", teacher.name));
        }
    }
    let shares = || shared.teachers.iter().map(|t| t.weight);
    let usable = shares().all(|w| w.is_finite() && w >= 0.0) && (shares().count() == 0 || shares().any(|w| w > 0.0));
    if !usable {
        let shares: Vec<String> = shares().map(|w| w.to_string()).collect();
        return refuse(format!("weights of the teachers: {}; must be 0 or more, and one of them more than 0", shares.join(", ")));
    }
    needs(shared, own)
}

/// Is there a loss, of some student, for images that have no labels?
pub(crate) fn unlabelled<'a>(shared: &Shared, students: impl Iterator<Item = &'a Student>) -> Result<()> {
    let mut objectives = students.flat_map(|s| &s.objectives);
    if shared.data.train.unlabelled() == 0 || objectives.any(|o| !o.method.needs().labels) {
        return Ok(());
    }
    let what = "unlabelled images are among the training images, but all losses need labels";
    Err(Error::Refused(format!("{what}\nhint: add one that learns from the teacher alone (kd, say), or leave the images out")))
}

/// Does every method get what it asks for?
pub(crate) fn needs(shared: &Shared, own: &Student) -> Result<()> {
    let refuse = |message: String| Err(Error::Refused(message));
    let student = own.model.spec();
    for objective in &own.objectives {
        let name = objective.method.name();
        let seen = objective.sees(&shared.teachers)?.map(|t| &shared.teachers[t]);
        for needs in objective.all_needs() {
            check_cuts(name, "student", student, &needs.student)?;
            if shared.teachers.is_empty() && (!needs.teacher.is_empty() || needs.teacher_model || needs.class_means) {
                return refuse(format!("method {name} needs a teacher, and there is none"));
            }
            match seen {
                Some(teacher) => check_cuts(name, &format!("teacher {}", teacher.name), teacher.model.spec(), &needs.teacher)?,
                None if shared.teachers.is_empty() || mean_will_do(&needs) => {}
                None => {
                    let names: Vec<&str> = shared.teachers.iter().map(|t| t.name.as_str()).collect();
                    return refuse(format!(
                        "method {name} needs more than logits, so one teacher: set `teacher` to one of {}",
                        names.join(", ")
                    ));
                }
            }
            check_inputs(name, &needs, shared)?;
        }
        if !objective.weight.is_finite() {
            return refuse(format!("method {name}: weight {}, must be finite", objective.weight));
        }
    }
    Ok(())
}

fn check_inputs(name: &str, needs: &Needs, shared: &Shared) -> Result<()> {
    if needs.class_groups && shared.data.class_groups.is_none() {
        return Err(Error::Refused(format!("method {name} needs a group for each class, which this data set has not")));
    }
    if needs.class_means && shared.data.class_means.is_none() && shared.data.plain.is_none() {
        return Err(Error::Refused(format!(
            "method {name} needs class means, or an unaugmented pass over the training set to compute them"
        )));
    }
    Ok(())
}

fn check_cuts(method: &str, who: &str, spec: &ModelSpec, cuts: &[Cut]) -> Result<()> {
    match cuts.iter().find(|&&cut| !has(spec, cut)) {
        None => Ok(()),
        Some(cut) => Err(Error::Refused(format!(
            "method {method} needs {cut} of the {who}; {} has {} blocks, stages 0 to {}, {} of them with a pre-activation",
            spec.name,
            spec.blocks.len(),
            spec.stages.len().saturating_sub(1),
            spec.stages.iter().filter(|s| s.has_preact).count(),
        ))),
    }
}

fn has(spec: &ModelSpec, cut: Cut) -> bool {
    match cut {
        Cut::Input | Cut::Embedding | Cut::Logits => true,
        Cut::LogitsDist => spec.logits_dist,
        Cut::Block(i) => (1..=spec.blocks.len()).contains(&i),
        Cut::Stage(i) => i < spec.stages.len(),
        Cut::Preact(i) => spec.stages.get(i).is_some_and(|s| s.has_preact),
    }
}

/// Refuses a teacher whose accuracy is hardly more than chance: twice chance, or with few classes a tenth of the way to perfect.
pub(crate) fn teacher(teacher: &Teacher, evaluation: &Evaluation, split: Split, classes: usize) -> Result<()> {
    let chance = 100.0 / classes as f64;
    if evaluation.top1 <= (2.0 * chance).min(chance + (100.0 - chance) / 10.0) {
        let name = teacher.name.clone();
        return Err(Error::BadTeacher { name, top1: evaluation.top1, split: split.to_string(), classes });
    }
    Ok(())
}

/// After a step in which every loss took part: was every parameter that is to be trained reached?
///
/// `passes` are the backward passes of the step; one of them is enough. Reached, not non-zero: a parameter behind a dead ReLU is fine, one that no loss depends on is a mistake in the configuration.
pub(crate) fn reached(parts: &[Part], passes: &[&Gradients], exempt: impl Fn(&Part) -> bool) -> Result<()> {
    let mut networks = 0;
    for part in parts {
        let number = networks;
        networks += usize::from(part.network().is_some());
        if exempt(part) {
            continue;
        }
        let missed: Vec<&str> = match &part.target {
            Target::Var(var) => {
                let found = passes.iter().any(|pass| pass.store.get(var).is_some());
                (!found).then_some(part.name.as_str()).into_iter().collect()
            }
            Target::Network(network) => {
                let found = |tensor: usize| {
                    let of =
                        |pass: &&Gradients| pass.networks.get(number).and_then(Option::as_ref).and_then(|n| n.reached.get(tensor).copied());
                    passes.iter().any(|pass| of(pass).unwrap_or(false))
                };
                let entries = network.params().map(|p| p.entries()).unwrap_or_default();
                let unused = |name: &str| part.unused.iter().any(|prefix| name.starts_with(prefix.as_str()));
                let missed = entries.iter().enumerate().filter(|&(i, e)| !found(i) && !unused(&e.name));
                missed.map(|(_, e)| e.name.as_str()).collect()
            }
        };
        if !missed.is_empty() {
            let more = missed.len().saturating_sub(LISTED);
            let first = missed[..missed.len() - more].join(", ");
            return Err(Error::Unreached {
                network: part.name.clone(),
                unreached: missed.len(),
                total: match &part.target {
                    Target::Network(network) => network.params().map_or(0, |p| p.entries().len()),
                    Target::Var(_) => 1,
                },
                first: if more > 0 { format!("{first} and {more} more") } else { first },
            });
        }
    }
    Ok(())
}

/// An upper estimate of what a run leaves on the disk at any time: three checkpoints (two kept, one being written), three students
/// (best, its successor, the exported one) and the lines of `metrics.jsonl`.
pub(crate) fn bytes_needed<'a>(
    checkpoint: impl Iterator<Item = &'a Tensor>,
    student: impl Iterator<Item = &'a Tensor>,
    steps: usize,
) -> u64 {
    const LINE: usize = 400;
    let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    (3 * checkpoint.map(size).sum::<usize>() + 3 * student.map(size).sum::<usize>() + LINE * steps) as u64
}
