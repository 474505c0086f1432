//! `anisotropic_label_smoothing`: label smoothing that favours the label's own group of classes.
//!
//! Xu et al., "Feature Normalized Knowledge Distillation for Image Classification" (FNKD), ECCV 2020, equation 3.
//!
//! ```text
//! q = (1 - epsilon1 - epsilon2) onehot(y) + epsilon1 / K + epsilon2 rho
//! rho_k = 1 / |A(y)| for k in A(y), else 0;   A(y): the classes of y's group
//! value = mean_b H(q, softmax(z))
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `y` | labels | `[B]` integers |
//! | | a group number for each class | `K` integers |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `epsilon1` | 0.2 | 0..=1 | share of the uniform distribution |
//! | `epsilon2` | 0.02 | 0..=1, `epsilon1 + epsilon2 <= 1` | share of the group |
//! | `include_target` | true | | whether A(y) contains y |
//!
//! Terms: `target`, `uniform`, `group`, weighted by `1 - epsilon1 - epsilon2`, `epsilon1`, `epsilon2`.
//!
//! The paper takes the groups from class names (the five woodpeckers of CUB-200 give each of them 1/5, so that A(y) contains y); the
//! defaults are its values. CIFAR-100's groups are its 20 superclasses. Without the target, a class alone in its group has no rho and is
//! refused. Defined for hard labels: mixtures are refused.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use kd_core::{Error, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of the uniform distribution, in 0..=1.
    pub epsilon1: f64,
    /// Share of the group, in 0..=1.
    pub epsilon2: f64,
    /// Whether the label belongs to its own group.
    pub include_target: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { epsilon1: 0.2, epsilon2: 0.02, include_target: true }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::share("epsilon1", self.epsilon1)?;
        inputs::share("epsilon2", self.epsilon2)?;
        let sum = self.epsilon1 + self.epsilon2;
        if sum <= 1.0 { Ok(()) } else { Err(Error::param("epsilon1 + epsilon2", sum, "at most 1")) }
    }

    /// Members of every group; refuses groups that leave a class without a neighbour where one is needed.
    fn group_sizes(&self, groups: &[i64], classes: usize) -> Result<BTreeMap<i64, usize>> {
        if groups.len() != classes {
            return Err(Error::shape("class_groups", format!("[{classes}], a group for each class"), &[groups.len()]));
        }
        let mut sizes = BTreeMap::new();
        groups.iter().for_each(|&g| *sizes.entry(g).or_insert(0) += 1);
        let lonely = groups.iter().position(|g| sizes[g] == 1).filter(|_| !self.include_target);
        match lonely {
            None => Ok(sizes),
            Some(class) => {
                let why = format!("false: class {class} is alone in group {}, nothing is left of it without the target", groups[class]);
                Err(Error::param("include_target", why, "true, or every group must have at least two classes"))
            }
        }
    }
}

/// Anisotropic label smoothing on `student` `[B,K]` with class indices `labels` `[B]` and a group number for each of the `K` classes.
///
/// # Errors
/// Logits that are not finite or have no row, fewer than two classes, labels outside them or soft, groups for another number of classes,
/// parameters out of range, a class alone in its group without the target.
pub fn anisotropic_label_smoothing(student: &Tensor, labels: &Tensor, class_groups: &[i64], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k) = inputs::logits("student.logits", student)?;
    let sizes = params.group_sizes(class_groups, k)?;
    let labels = Labels::new(labels, k, student)?;
    if labels.is_soft() {
        return Err(Error::refused("anisotropic_label_smoothing is defined for class indices, not for mixed labels (mixup, cutmix)"));
    }
    let log_p = softmax::log_softmax(student)?;
    let target = softmax::cross_entropy(&labels.q, &log_p)?.mean_all()?;
    let uniform = log_p.mean_all()?.neg()?;

    let own: Vec<i64> = labels.ids.iter().map(|&y| class_groups[y as usize]).collect();
    let without = usize::from(!params.include_target);
    let shares: Vec<f64> = own.iter().map(|g| 1.0 / (sizes[g] - without) as f64).collect();
    let device = student.device();
    let own = Tensor::new(own, device)?.unsqueeze(1)?;
    let mut members = own.broadcast_eq(&Tensor::new(class_groups, device)?.unsqueeze(0)?)?.to_dtype(student.dtype())?;
    if !params.include_target {
        members = (members - &labels.q)?;
    }
    let rho = members.broadcast_mul(&Tensor::new(shares, device)?.to_dtype(student.dtype())?.unsqueeze(1)?)?;
    let group = softmax::cross_entropy(&rho, &log_p)?.mean_all()?;

    let Params { epsilon1, epsilon2, .. } = *params;
    Ok(LossTerms::one("target", target).scaled(1.0 - epsilon1 - epsilon2).with("uniform", uniform, epsilon1).with("group", group, epsilon2))
}

struct AnisotropicLabelSmoothing {
    params: Params,
    groups: Vec<i64>,
}

impl Method for AnisotropicLabelSmoothing {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { class_groups: true, ..Needs::supervised() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let groups = setup.class_groups.ok_or_else(|| Error::missing(ENTRY.name, "class groups"))?;
        self.params.group_sizes(groups, setup.classes)?;
        self.groups = groups.to_vec();
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        anisotropic_label_smoothing(step.student()?.logits()?, labels::of(step.batch), &self.groups, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let groups = inputs.get("class_groups")?.to_dtype(DType::I64)?.to_vec1()?;
    Ok(anisotropic_label_smoothing(inputs.get("student.logits")?, parity_labels(inputs)?, &groups, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "anisotropic_label_smoothing",
    about: "label smoothing that favours the label's own group of classes",
    source: "Xu et al. (FNKD), ECCV 2020, eq. 3",
    year: 2020,
    parameters: &[
        ParamDoc { name: "epsilon1", default: "0.2", range: "0..=1", about: "share of the uniform distribution" },
        ParamDoc { name: "epsilon2", default: "0.02", range: "0..=1, epsilon1 + epsilon2 <= 1", about: "share of the label's group" },
        ParamDoc { name: "include_target", default: "true", range: "true | false", about: "whether the group contains the label" },
    ],
    build: |params| Ok(Box::new(AnisotropicLabelSmoothing { params: parse(params, Params::validate)?, groups: vec![] })),
    parity,
    raw_terms: false,
};
