//! How other programs name the parameters of the same network.
//!
//! A *dialect* turns a key of the file into the network's key, or drops it. The one that leaves the fewest keys missing and unexpected is taken, the
//! keys as they are first of all, so that no rename touches a file that fits without.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use crate::WeightFile;

struct Dialect {
    name: &'static str,
    /// The network's key for a key of the file; `None` for one that is to be ignored.
    rename: fn(&str) -> Option<Cow<str>>,
}

static DIALECTS: &[Dialect] = &[
    Dialect { name: "as they are", rename: |key| Some(key.into()) },
    Dialect { name: "a distiller's student", rename: student },
    Dialect { name: "fc for linear", rename: |key| Some(swap(key, &[("fc.", "linear.")])) },
    Dialect { name: "linear for fc", rename: |key| Some(swap(key, &[("linear.", "fc.")])) },
    Dialect { name: "torchvision's", rename: |key| Some(swap(key, &[("fc.", "linear."), (".downsample.", ".shortcut.")])) },
    Dialect { name: "KD++'s WRN", rename: |key| Some(swap(key, &[("bn.", "bn1.")])) },
    Dialect { name: "MMClassification's", rename: |key| Some(swap(key, &[("backbone.", ""), ("head.fc.", "fc.")])) },
    Dialect {
        name: "MMClassification's for CIFAR",
        rename: |key| Some(swap(key, &[("backbone.", ""), ("head.fc.", "linear."), (".downsample.", ".shortcut.")])),
    },
    Dialect { name: "FNKD's MXNet", rename: fnkd },
];

/// A file's tensors under the network's keys.
pub(crate) struct Plan<'f> {
    pub(crate) mapping: &'static str,
    pub(crate) tensors: BTreeMap<String, &'f Tensor>,
    pub(crate) missing: Vec<String>,
    /// By the file's own names.
    pub(crate) unexpected: Vec<String>,
    pub(crate) ignored: Vec<String>,
}

/// Fits `file` to a network of these keys by the dialect that serves best; what would go to one of `unwanted` is ignored. Absent
/// `num_batches_tracked`, which older PyTorch did not write, are not missing.
pub(crate) fn plan<'f>(file: &'f WeightFile, keys: &[&str], unwanted: &[String]) -> Plan<'f> {
    let mut plans = DIALECTS.iter().map(|dialect| read_as(dialect, file, keys, unwanted));
    let first = plans.next().expect("invariant: there is a dialect");
    let faults = |plan: &Plan| plan.missing.len() + plan.unexpected.len();
    plans.fold(first, |best, plan| if faults(&plan) < faults(&best) { plan } else { best })
}

fn read_as<'f>(dialect: &Dialect, file: &'f WeightFile, keys: &[&str], unwanted: &[String]) -> Plan<'f> {
    let known: BTreeSet<&str> = keys.iter().copied().collect();
    let mut plan =
        Plan { mapping: dialect.name, tensors: BTreeMap::new(), missing: Vec::new(), unexpected: Vec::new(), ignored: Vec::new() };
    for (name, tensor) in &file.tensors {
        match (dialect.rename)(name) {
            None => plan.ignored.push(name.clone()),
            Some(key) if unwanted.iter().any(|u| *u == key) => plan.ignored.push(name.clone()),
            Some(key) if known.contains(&*key) && !plan.tensors.contains_key(&*key) => drop(plan.tensors.insert(key.into_owned(), tensor)),
            Some(_) => plan.unexpected.push(name.clone()),
        }
    }
    let absent = |key: &&&str| !plan.tensors.contains_key(**key) && !is_counter(key);
    plan.missing = keys.iter().filter(absent).map(|key| (*key).to_string()).collect();
    plan
}

/// Whether a key is a batch norm's counter of batches.
pub(crate) fn is_counter(key: &str) -> bool {
    key.ends_with("num_batches_tracked")
}

/// `key` with each prefix (`a.`) or inner part (`.a.`) replaced.
fn swap<'k>(key: &'k str, parts: &[(&str, &str)]) -> Cow<'k, str> {
    parts.iter().fold(Cow::Borrowed(key), |key, (from, to)| {
        let changed = match from.starts_with('.') {
            true => key.contains(from).then(|| key.replacen(from, to, 1)),
            false => key.strip_prefix(from).map(|rest| format!("{to}{rest}")),
        };
        changed.map_or(key, Cow::Owned)
    })
}

/// mdistiller saves a whole distiller: the student beside its teacher.
fn student(key: &str) -> Option<Cow<'_, str>> {
    if key.starts_with("teacher.") { None } else { Some(key.strip_prefix("student.").unwrap_or(key).into()) }
}

/// The pre-activation ResNet of FNKD: Gluon numbers the layers of a stage in the order of their making. In stages 2 and 3 convolution 2 is the
/// shortcut. The input's batch norm has a fixed scale of 1 and shift of 0, which our network leaves out.
fn fnkd(key: &str) -> Option<Cow<'_, str>> {
    let unknown = Some(Cow::Borrowed(key));
    let layers = key.strip_prefix("arg:").or_else(|| key.strip_prefix("aux:")).and_then(|k| k.strip_prefix("cifarresnetv"));
    let Some((_, layer)) = layers.and_then(|rest| rest.split_once('_')) else { return unknown };
    if matches!(layer, "batchnorm0_gamma" | "batchnorm0_beta") {
        return None;
    }
    let (stage, layer) = match layer.strip_prefix("stage").and_then(|rest| rest.split_once('_')) {
        Some((stage, layer)) => (stage, layer),
        None => ("", layer),
    };
    let Some((layer, field)) = layer.split_once('_') else { return unknown };
    let field = match field {
        "gamma" => "weight",
        "beta" => "bias",
        other => other,
    };
    let kind = layer.trim_end_matches(|c: char| c.is_ascii_digit());
    let Ok(number) = layer[kind.len()..].parse::<usize>() else { return unknown };
    let ours = match (stage, kind, number) {
        ("", "conv", 0) => "conv0".to_string(),
        ("", "batchnorm", 0 | 1) => format!("bn{number}"),
        ("", "dense", 0) => "fc".to_string(),
        ("", ..) => return unknown,
        (_, "batchnorm", n) => format!("stage{stage}.{}.bn{}", n / 2, n % 2 + 1),
        ("2" | "3", "conv", 2) => format!("stage{stage}.0.downsample"),
        ("2" | "3", "conv", n @ 3..) => format!("stage{stage}.{}.conv{}", (n - 1) / 2, (n - 1) % 2 + 1),
        (_, "conv", n) => format!("stage{stage}.{}.conv{}", n / 2, n % 2 + 1),
        _ => return unknown,
    };
    Some(format!("{ours}.{field}").into())
}
