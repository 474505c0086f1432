//! Weights into a network: all of them, or none and the reasons.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Model};
use kd_nn::{Graph, Network, Op};

use crate::{Error, Mismatch, Result, WeightFile, mapping};

/// How [`load_into`] treats what does not fit; by default everything must.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Takes NaN and infinity.
    pub allow_non_finite: bool,
    /// Loads what fits by name and leaves the rest of the network as it is. Another shape remains an error, and so does a file of which nothing
    /// fits.
    pub partial: bool,
    /// Leaves the classifier as it is, whatever the file holds for it: a pretrained network for other classes.
    pub new_head: bool,
}

/// What [`load_into`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// How the file's keys were understood.
    pub mapping: &'static str,
    /// Tensors of the network that were loaded.
    pub loaded: usize,
    /// Parameters and statistics that the file does not have (a partial load).
    pub missing: Vec<String>,
    /// The file's own names of tensors that the network does not have (a partial load).
    pub unexpected: Vec<String>,
    /// Tensors of the file that were not wanted: a teacher beside its student, a fixed scale.
    pub ignored: Vec<String>,
}

/// Fills `network` with the weights of `file`, converted to its type. Counters of batches that the file does not have become 0.
///
/// # Errors
/// Keys that are missing, unexpected or of another shape, all in one [`Mismatch`]; NaN or infinity. Then the network is as it was.
pub fn load_into(network: &Network, file: &WeightFile, options: &LoadOptions) -> Result<Report> {
    let params = network.parameters();
    let head = if options.new_head { head(network.graph()) } else { Vec::new() };
    let keys: Vec<_> = params.keys().into_iter().filter(|(name, _)| !head.contains(name)).collect();
    let names: Vec<&str> = keys.iter().map(|(name, _)| name.as_str()).collect();
    let mapping::Plan { mapping, tensors, missing, unexpected, ignored } = mapping::plan(file, &names, &head);
    // A counter is a scalar or, from other programs, a list of one.
    let fits = |name: &str, t: &Tensor, shape: &[usize]| t.dims() == shape || (mapping::is_counter(name) && t.elem_count() == 1);
    let misshaped: Vec<_> = keys
        .iter()
        .filter_map(|(name, shape)| {
            let tensor = tensors.get(name).filter(|t| !fits(name, t, shape))?;
            Some((name.clone(), tensor.dims().to_vec(), shape.clone()))
        })
        .collect();
    let wrong = if options.partial { tensors.is_empty() } else { !missing.is_empty() || !unexpected.is_empty() };
    if wrong || !misshaped.is_empty() {
        let (path, network) = (file.path.clone(), network.spec().name.clone());
        return Err(Error::Mismatch(Box::new(Mismatch { path, network, mapping, missing, unexpected, misshaped })));
    }
    let failed = |source: kd_core::Error| Error::Load { path: file.path.clone(), source };
    let mut ready: BTreeMap<&str, Tensor> = BTreeMap::new();
    for (name, tensor) in &tensors {
        let dtype = if mapping::is_counter(name) { DType::I64 } else { params.dtype() };
        // In the network's type, as a large f64 is no f32.
        let converted = tensor.to_dtype(dtype).map_err(|e| failed(e.into()))?;
        if !options.allow_non_finite {
            check_finite(file, name, &converted)?;
        }
        ready.insert(name, converted);
    }
    let zero = Tensor::new(0i64, &Device::Cpu).map_err(|e| failed(e.into()))?;
    let absent = |name: &str| (mapping::is_counter(name) && !options.partial).then(|| zero.clone());
    params.assign(|name| ready.get(name).cloned().or_else(|| absent(name))).map_err(failed)?;
    Ok(Report { mapping, loaded: tensors.len(), missing, unexpected, ignored })
}

fn check_finite(file: &WeightFile, name: &str, tensor: &Tensor) -> Result<()> {
    let values = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)?.to_vec1::<f64>());
    let values = values.map_err(|e| Error::Load { path: file.path.clone(), source: e.into() })?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite { path: file.path.clone(), tensor: name.to_string(), value: values[index], index }),
    }
}

/// How many outputs the classifier in `file` has: the rows of the weight that the linear layer of `graph`'s logits would take, whatever its
/// own number of classes. `None` where there is no such layer or no such tensor.
pub fn classes(file: &WeightFile, graph: &Graph) -> Option<usize> {
    let keys: Vec<&str> = graph.params().entries().iter().chain(graph.params().stats()).map(|e| e.name.as_str()).collect();
    let plan = mapping::plan(file, &keys, &[]);
    match plan.tensors.get(head(graph).first()?)?.dims() {
        &[classes, _] => Some(classes),
        _ => None,
    }
}

/// Names of the classifier's weight and bias.
fn head(graph: &Graph) -> Vec<String> {
    let Ok(logits) = graph.cut(Cut::Logits) else { return Vec::new() };
    let Op::Linear { weight, bias, .. } = graph.nodes()[logits].op else { return Vec::new() };
    [Some(weight), bias].into_iter().flatten().map(|i| graph.params().entries()[i].name.clone()).collect()
}
