//! From a file into a network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use candle_core::{Device, Tensor};
use kd_core::registry::check_finite;
use kd_core::{Cut, Model};
use kd_nn::{Graph, Network, Op};

use crate::keys::{Dialect, dialects};
use crate::{Error, Result, WeightFile};

/// What may differ between a file and a network.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Load what fits and leave the rest of the network as it is.
    pub partial: bool,
    /// Leave the classifier as it is, whatever the file holds for it: a pretrained network for other classes.
    pub new_head: bool,
    /// Only the file's tensors whose names begin so, without it (`student.`).
    pub prefix: Option<String>,
}

/// How a file fitted a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The network.
    pub model: String,
    /// In which of [`dialects`] the names were read.
    pub dialect: &'static str,
    /// Tensors that were loaded.
    pub loaded: usize,
    /// Names of the network that the file lacks. An absent `num_batches_tracked` counts as 0 and is not listed.
    pub missing: Vec<String>,
    /// Names of the file that the network lacks.
    pub unexpected: Vec<String>,
    /// Tensors of another shape.
    pub misshaped: Vec<Misshaped>,
    /// Tensors of the classifier that were left as they are.
    pub kept: Vec<String>,
}

/// A tensor of another shape than the network's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshaped {
    /// Its name in the network.
    pub name: String,
    /// The network's shape.
    pub expected: Vec<usize>,
    /// The file's shape.
    pub found: Vec<usize>,
}

impl Report {
    /// Whether every tensor found its place.
    pub fn is_exact(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshaped.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_exact() {
            return write!(f, "{}: {} tensors loaded ({} names)", self.model, self.loaded, self.dialect);
        }
        write!(f, "{}: the weights do not fit ({} tensors do, read by {} names)", self.model, self.loaded, self.dialect)?;
        let shapes = self.misshaped.iter().map(|m| format!("{} {:?} instead of {:?}", m.name, m.found, m.expected)).collect();
        for (what, names) in [("of another shape", &shapes), ("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "; {} {what}: {}", names.len(), names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// Puts the tensors of `file` into `network`.
///
/// # Errors
/// Tensors that are missing, left over or of another shape (all of them in one [`Error::Mismatch`], unless the options allow them); a value that
/// is not finite. The network is then as it was.
pub fn load_into(network: &Network, file: &WeightFile, options: &LoadOptions) -> Result<Report> {
    let params = network.parameters();
    let keys = params.keys();
    let found = Named::new(file, options.prefix.as_deref(), keys.iter().map(|(name, _)| name.as_str()))?;
    let head = if options.new_head { head(network.graph()) } else { vec![] };
    let mut report =
        Report { model: network.spec().name.clone(), dialect: found.dialect, unexpected: found.unexpected, ..Report::default() };
    let mut ready: BTreeMap<&str, Tensor> = BTreeMap::new();
    for (name, shape) in &keys {
        match found.tensors.get(name.as_str()) {
            _ if head.contains(name) => report.kept.push(name.clone()),
            Some(tensor) if tensor.dims() == shape.as_slice() => {
                // Checked as the network will hold it: a large f64 is no f32. Counters stay integers.
                let tensor = if tensor.dtype().is_float() { tensor.to_dtype(params.dtype())? } else { (*tensor).clone() };
                check_finite(&format!("`{name}` of the weights"), &tensor)?;
                ready.insert(name, tensor);
            }
            Some(tensor) => {
                report.misshaped.push(Misshaped { name: name.clone(), expected: shape.clone(), found: tensor.dims().to_vec() });
            }
            None if name.ends_with("num_batches_tracked") => {
                ready.insert(name, Tensor::new(0i64, &Device::Cpu)?);
            }
            None => report.missing.push(name.clone()),
        }
    }
    report.loaded = ready.keys().filter(|name| found.tensors.contains_key(**name)).count();
    if report.loaded == 0 || !options.partial && !report.is_exact() {
        return Err(Error::Mismatch(Box::new(report)));
    }
    params.assign(|name| ready.get(name).cloned())?;
    Ok(report)
}

/// The number of classes that `file` was trained for, when it holds the classifier of `graph` (built for any number).
pub fn classes(file: &WeightFile, graph: &Graph) -> Option<usize> {
    let (params, head) = (graph.params(), head(graph));
    let names = params.entries().iter().chain(params.stats()).map(|e| e.name.as_str());
    let found = Named::new(file, None, names).ok()?;
    found.tensors.get(head.first()?.as_str())?.dims().first().copied()
}

/// Names of the classifier's weight and bias.
fn head(graph: &Graph) -> Vec<String> {
    let node = graph.cut(Cut::Logits).ok().map(|id| &graph.nodes()[id].op);
    let Some(Op::Linear { weight, bias, .. }) = node else { return vec![] };
    [Some(*weight), *bias].into_iter().flatten().map(|i| graph.params().entries()[i].name.clone()).collect()
}

/// A file's tensors under the network's names.
struct Named<'a> {
    dialect: &'static str,
    tensors: BTreeMap<String, &'a Tensor>,
    unexpected: Vec<String>,
}

impl<'a> Named<'a> {
    fn new<'n>(file: &'a WeightFile, prefix: Option<&str>, names: impl Iterator<Item = &'n str>) -> Result<Self> {
        let names: Vec<&str> = names.collect();
        let mut own: Vec<(&str, &Tensor)> = file.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        // What wrappers put in front of every name.
        for wrapper in ["module.", "_orig_mod.", "module."] {
            if own.iter().all(|(name, _)| name.starts_with(wrapper)) {
                own.iter_mut().for_each(|(name, _)| *name = &name[wrapper.len()..]);
            }
        }
        if let Some(prefix) = prefix {
            let first = own.first().map_or(String::new(), |(name, _)| (*name).to_string());
            own = own.into_iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t))).collect();
            if own.is_empty() {
                return Err(Error::Prefix { prefix: prefix.to_string(), first });
            }
        }
        let mut best = Self::read(&dialects()[0], &own, &names);
        for dialect in &dialects()[1..] {
            let other = Self::read(dialect, &own, &names);
            if other.tensors.len() > best.tensors.len() {
                best = other;
            }
        }
        Ok(best)
    }

    fn read(dialect: &Dialect, own: &[(&str, &'a Tensor)], names: &[&str]) -> Self {
        let targets: BTreeMap<String, &str> = names.iter().filter_map(|name| Some(((dialect.form)(name)?, *name))).collect();
        let (mut tensors, mut unexpected, mut taken) = (BTreeMap::new(), vec![], BTreeSet::new());
        for (name, tensor) in own {
            let Some(form) = (dialect.form)(name) else { continue };
            match targets.get(&form) {
                Some(target) if taken.insert(*target) => {
                    tensors.insert((*target).to_string(), *tensor);
                }
                _ => unexpected.push((*name).to_string()),
            }
        }
        Self { dialect: dialect.name, tensors, unexpected }
    }
}
