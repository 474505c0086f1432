//! `sdd`: scale decoupled distillation, a logit loss for every region of the last map.
//!
//! Wei et al., "Scale Decoupled Distillation", CVPR 2024, arXiv 2403.13512.
//!
//! ```text
//! cells    = X pooled to 1x1, 2x2, 4x4 (the scales), N in all, row by row; cell 0 is the global one
//! z_n, v_n = classifier(cell n) of student and teacher
//! l_bn     = the base's loss of one row: kd: T^2 KL;  dkd: alpha tckd + beta nckd;  nkd: target + gamma non_target
//! a cell is consistent where the teacher is right (or wrong) about it as it is globally, complementary elsewhere
//! consistent = sum of l over consistent cells / (B N),  complementary = likewise over the others
//! value = consistent_weight consistent + complementary_weight complementary
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `X` | the map before the global pooling: the last block's output, of both sides (the teacher's detached) | `[B,D,H,W]` |
//! | | the classifiers of both networks, applied to the cells | `[K,D]` |
//! | `y` | labels; of soft targets the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `base` | `"kd"` | `"kd"`, `"dkd"`, `"nkd"` | |
//! | `scales` | [1, 2, 4] | ascending from 1 | |
//! | `nested_pool` | true | | pool to 4x4 first and the coarser scales from it, as released (scales up to 4); the same where 4 divides the map |
//! | `temperature` | 4 | > 0 | T of the base |
//! | `alpha`, `beta` | 1, 8 | >= 0 | weights of dkd's terms |
//! | `gamma` | 1.5 | >= 0 | weight of nkd's non-target part |
//! | `nkd_keep_target` | false | | the released nkd base: its mask leaves the label among the non-targets, 9 % of the value |
//! | `consistent_weight`, `complementary_weight` | 1, 2 | >= 0 | |
//!
//! Terms: `consistent`, `complementary`. The authors' recipe: kd: T 4, weight 0.9 beside `ce` of weight 0.1; dkd and nkd: weight 1 beside `ce` of
//! weight 1, warm-up 20 epochs counted from 1.
//!
//! | pair | scales | dkd's beta |
//! |---|---|---|
//! | res32x4-res8x4 | [1, 2] | 8 |
//! | vgg13-vgg8 | [1, 2] | 6 |
//! | res50-vgg8, wrn40_2-vgg8 (nkd) | [1, 2] | |
//! | pairs with MobileNetV2, ShuffleNets | [1, 2, 4] | 8; wrn40_2-mobileV2 6 |
//! | res56-res20, res110-res32 | | 2 |
//!
//! The release replaces a loss that is NaN or infinite by 0; here it is refused. A 2x2 map is stretched to 4x4 by repetition. Needs networks whose
//! embedding is the mean of the last block's map; others are refused at the start. Gradients reach the student's map and its classifier. Cost:
//! N classifiers and N times the base, N = 21 at scales 1, 2, 4; memory 2 B N K.

use candle_core::{DType, Tensor};
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Rng, Setup, StepView,
};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::rows::{self, Base};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The loss of each cell.
    pub base: Base,
    /// Cells a side, ascending from 1.
    pub scales: Vec<usize>,
    /// Whether coarser scales are pooled from 4x4 cells.
    pub nested_pool: bool,
    /// T of the base, above 0.
    pub temperature: f64,
    /// Weight of dkd's target part, at least 0.
    pub alpha: f64,
    /// Weight of dkd's other classes, at least 0.
    pub beta: f64,
    /// Weight of nkd's non-target part, at least 0.
    pub gamma: f64,
    /// Whether nkd's label stays among the non-targets.
    pub nkd_keep_target: bool,
    /// Weight of `consistent`, at least 0.
    pub consistent_weight: f64,
    /// Weight of `complementary`, at least 0.
    pub complementary_weight: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            base: Base::Kd,
            scales: vec![1, 2, 4],
            nested_pool: true,
            temperature: 4.0,
            alpha: 1.0,
            beta: 8.0,
            gamma: 1.5,
            nkd_keep_target: false,
            consistent_weight: 1.0,
            complementary_weight: 2.0,
        }
    }
}

/// The finest cells that nested pooling starts from, as released.
const NEST: usize = 4;

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        let scales = &self.scales;
        if scales.first() != Some(&1) || scales.windows(2).any(|w| w[0] >= w[1]) {
            return Err(Error::param("scales", format!("{scales:?}"), "ascending from 1"));
        }
        if self.nested_pool && scales.iter().any(|&s| s > NEST) {
            return Err(Error::param("scales", format!("{scales:?}"), "at most 4 with nested_pool"));
        }
        inputs::positive("temperature", self.temperature)?;
        self.config().validate()?;
        inputs::not_negative("consistent_weight", self.consistent_weight)?;
        inputs::not_negative("complementary_weight", self.complementary_weight)
    }

    fn config(&self) -> rows::Config {
        rows::Config { base: self.base, alpha: self.alpha, beta: self.beta, gamma: self.gamma, keep_target: self.nkd_keep_target }
    }

    /// N.
    fn cells(&self) -> usize {
        self.scales.iter().map(|s| s * s).sum()
    }
}

/// The cells of a map `[B,C,H,W]` as rows `[B N,C]`, those of a sample side by side.
pub fn cells(map: &Tensor, params: &Params) -> Result<Tensor> {
    let (b, c, _, _) = map.dims4()?;
    let fine = if params.nested_pool { kd_nn::ops::adaptive_avg_pool2d(map, [NEST, NEST])? } else { map.clone() };
    let pooled = params.scales.iter().map(|&s| Ok(kd_nn::ops::adaptive_avg_pool2d(&fine, [s, s])?.flatten_from(2)?));
    let all = Tensor::cat(&pooled.collect::<Result<Vec<_>>>()?, 2)?;
    Ok(all.transpose(1, 2)?.contiguous()?.reshape((b * params.cells(), c))?)
}

/// SDD on the logits of `n` cells a sample, `[B N,K]`, those of a sample side by side and the global one first; the teacher's are detached.
/// `labels` are class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have fewer than two classes or no multiple of `n` rows; labels outside the classes; parameters
/// out of range.
pub fn sdd(student: &Tensor, teacher: &Tensor, n: usize, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (all, k, teacher) = inputs::both_logits(student, teacher)?;
    if n == 0 || all % n != 0 {
        return Err(Error::shape("regional logits", format!("a multiple of {n} rows"), student.dims()));
    }
    let b = all / n;
    let ids = Labels::new(labels, k, &student.narrow(0, 0, b)?)?.ids;
    let repeated: Vec<i64> = ids.iter().flat_map(|&y| std::iter::repeat_n(y, n)).collect();
    let labels = Labels::new(&Tensor::new(repeated.as_slice(), student.device())?, k, student)?;

    let t = params.temperature;
    let terms = params.config().rows([student, &teacher], [&(student / t)?, &(&teacher / t)?], Some(&labels))?;
    let mut rows = Tensor::zeros(all, student.dtype(), student.device())?;
    for term in terms {
        rows = (rows + (term.rows * (term.weight * if term.softened { t * t } else { 1.0 }))?)?;
    }

    let best = teacher.argmax(1)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let right: Vec<bool> = best.iter().zip(&repeated).map(|(found, y)| found == y).collect();
    let complementary: Vec<f64> = (0..all).map(|i| f64::from(u8::from(right[i] != right[i - i % n]))).collect();
    let mask = Tensor::new(complementary, student.device())?.to_dtype(student.dtype())?;
    let share = |mask: &Tensor| -> Result<Tensor> { Ok(((&rows * mask)?.sum_all()? / all as f64)?) };
    Ok(LossTerms::new().with("consistent", share(&(1.0 - &mask)?)?, params.consistent_weight).with(
        "complementary",
        share(&mask)?,
        params.complementary_weight,
    ))
}

struct Sdd {
    params: Params,
    /// The cuts before the global pooling of student and teacher.
    maps: Option<[Cut; 2]>,
}

/// The cut before the global pooling, if the embedding is the mean of what stands there.
fn last_map(model: &dyn Model, side: &str, setup: &Setup<'_>) -> Result<Cut> {
    let spec = model.spec();
    let refused = |why: String| Error::refused(format!("sdd: the {side} `{}` {why}", spec.name));
    if spec.blocks.is_empty() {
        return Err(refused("has no block".to_string()));
    }
    let (cut, [c, h, w]) = (Cut::Block(spec.blocks.len()), spec.input);
    let noise: Vec<f64> = (0..2 * c * h * w).map(|i| Rng::new(0).named("sdd").normal(i as u64)).collect();
    let images = Tensor::from_vec(noise, (2, c, h, w), &candle_core::Device::Cpu)?.to_dtype(setup.dtype)?.to_device(setup.device)?;
    let images = match model.params() {
        Some(params) => images.to_dtype(params.dtype())?.to_device(params.device())?,
        None => images,
    };
    let out = model.run(&images, Cut::Input, &[cut, Cut::Embedding], Mode::Eval)?.detach();
    let (map, embedding) = (out.get(cut)?, out.embedding()?);
    if map.rank() != 4 {
        return Err(refused(format!("ends in {:?}, not in a map that is pooled", map.dims())));
    }
    let mean = map.flatten_from(2)?.mean(2)?;
    if mean.dims() == embedding.dims() {
        let scalar = |t: Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.to_scalar()?) };
        let off = scalar((&mean - embedding)?.abs()?.max_all()?)?;
        if off <= 1e-3 * scalar(embedding.abs()?.max_all()?)? {
            return Ok(cut);
        }
    }
    Err(refused(format!("has an embedding that is not the mean of its last map ({cut}): its classifier cannot be applied to regions")))
}

impl Method for Sdd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The last maps are known once the networks are: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let side = |i: usize| self.maps.map_or(vec![Cut::Logits], |maps| vec![maps[i]]);
        Needs { student: side(0), teacher: side(1), labels: true, student_model: true, teacher_model: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let teacher = setup.teacher(ENTRY.name)?;
        self.maps = Some([last_map(setup.models.student, "student", setup)?, last_map(teacher, "teacher", setup)?]);
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let [ours, theirs] = self.maps.ok_or_else(|| Error::missing(ENTRY.name, "the networks' last maps (`prepare` finds them)"))?;
        let teacher = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?;
        let (x, t) = (step.student()?.get(ours)?, step.teacher()?.get(theirs)?);
        let classify = |model: &dyn Model, map: &Tensor, mode| -> Result<Tensor> {
            Ok(model.run(&cells(map, &self.params)?, Cut::Embedding, &[Cut::Logits], mode)?.logits()?.clone())
        };
        let student = classify(step.models.student, x, Mode::Train(step.rng.named("classifier")))?;
        let t = match teacher.params() {
            Some(params) => t.to_device(params.device())?.to_dtype(params.dtype())?,
            None => t.clone(),
        };
        let teacher = classify(teacher.as_ref(), &t, Mode::Eval)?.to_device(student.device())?;
        sdd(&student, &teacher, self.params.cells(), labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = parse(&inputs.params, Params::validate)?;
    let side = |side: &str| -> Result<(Tensor, usize)> {
        let name = format!("{side}.regions");
        if let Some(regions) = inputs.find(&name) {
            let &[b, k, n] = regions.dims() else { return Err(Error::shape(name, "[B,K,N]", regions.dims())) };
            return Ok((regions.transpose(1, 2)?.contiguous()?.reshape((b * n, k))?, n));
        }
        let name = format!("{side}.stage.last");
        let map = inputs.get(&name)?;
        if map.rank() != 4 {
            return Err(Error::shape(name, "[B,C,H,W]", map.dims()));
        }
        let weight = inputs.get(&format!("{side}.fc.weight"))?;
        let logits = cells(map, &params)?.matmul(&weight.t()?)?.broadcast_add(inputs.get(&format!("{side}.fc.bias"))?)?;
        Ok((logits, params.cells()))
    };
    let ((student, n), (teacher, _)) = (side("student")?, side("teacher")?);
    Ok(sdd(&student, &teacher, n, parity_labels(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "sdd",
    about: "wrapper: scale decoupled distillation, a logit loss for every region of the last map",
    source: "Wei et al., CVPR 2024, arXiv 2403.13512",
    year: 2024,
    parameters: &[
        ParamDoc { name: "base", default: "\"kd\"", range: "\"kd\" | \"dkd\" | \"nkd\"", about: "the loss of each region" },
        ParamDoc { name: "scales", default: "[1, 2, 4]", range: "ascending from 1", about: "regions a side" },
        ParamDoc { name: "nested_pool", default: "true", range: "true | false", about: "pool coarser scales from 4x4 regions" },
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T of the base" },
        ParamDoc { name: "alpha", default: "1.0", range: ">= 0", about: "weight of dkd's target class" },
        ParamDoc { name: "beta", default: "8.0", range: ">= 0", about: "weight of dkd's other classes" },
        ParamDoc { name: "gamma", default: "1.5", range: ">= 0", about: "weight of nkd's non-target part" },
        ParamDoc { name: "nkd_keep_target", default: "false", range: "true | false", about: "the released nkd base" },
        ParamDoc { name: "consistent_weight", default: "1.0", range: ">= 0", about: "weight of regions like the whole" },
        ParamDoc { name: "complementary_weight", default: "2.0", range: ">= 0", about: "weight of the others" },
    ],
    build: |params| Ok(Box::new(Sdd { params: parse(params, Params::validate)?, maps: None })),
    parity,
    raw_terms: true,
};
