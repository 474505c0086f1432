//! `simkd`: the student keeps the teacher's classifier; only its last map is distilled.
//!
//! Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.
//!
//! ```text
//! x       = relu(bn3(conv1x1)) . relu(bn2(conv3x3)) . relu(bn1(conv1x1))     C_s -> C_t/f -> C_t/f -> C_t, no biases
//! feature = mean over all elements of (x - T)^2
//! deployed prediction = W mean_hw(x) + b      with the teacher's classifier W, b
//! ```
//!
//! The student's map is pooled to the teacher's grid where it is larger (by height), else the teacher's to the student's.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | student | map of the last stage | `[B,C_s,H,W]` |
//! | `T` | the teacher's, detached | `[B,C_t,H',W']` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `factor` | 2 | divides `C_t` | f; 4 and 8 are the cheaper variants |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the projector's batch norms |
//!
//! Term: `feature`. State: the projector's running statistics. Use it alone, with weight 1: cross-entropy and kd have weight 0 in the
//! release, and the layers of the student behind its last stage (its own classifier among them) are left as they are.
//! What is evaluated and exported is [`Deployed`]: student, projector `simkd.projector.*`, classifier `simkd.classifier.*` and
//! `simkd.settings` (the teacher's grid, `bn_eps`); [`Deployed::restore`] reads it back, and `kd-cli eval` does.
//! Cost: `C_s m + 9 m^2 + m C_t` multiply-accumulates per cell, `m = C_t/f`, in training and deployed.
//!
//! The teacher's classifier must stand right behind the mean of its last stage (networks with layers in between are refused).
//!
//! Published, CIFAR-100 top-1: wrn40_2-wrn16_2 75.53, wrn40_2-wrn40_1 74.53, res56-res20 71.05, res110-res20 71.06, res110-res32 73.92,
//! res32x4-res8x4 78.08, vgg13-vgg8 74.89, vgg13-MobileNetV2 69.44.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use kd_core::{
    Classifier, Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, ModelSpec, Needs, Outputs, ParamDoc, ParamsBuilder, ParityInputs,
    ParityOutput, Result, Setup, StateDict, StepView, Trainable,
};
use kd_nn::{Conv, Graph, GraphBuilder, Network, Op, ops};
use serde::{Deserialize, Serialize};

use crate::registry::parse;
use crate::{inputs, named_graph, srrl};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The projector's narrow width is the teacher's channels divided by this.
    pub factor: usize,
    /// Epsilon of the projector's batch norms, above 0.
    pub bn_eps: f64,
    /// The batch's share of the projector's running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { factor: 2, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.factor == 0 {
            return Err(Error::param("factor", self.factor, "at least 1"));
        }
        inputs::positive("bn_eps", self.bn_eps)?;
        inputs::share("bn_momentum", self.bn_momentum)
    }

    /// The projector of maps `[channels, size]` for a teacher's `[width, grid]`.
    fn projector(&self, channels: usize, size: [usize; 2], width: usize, grid: [usize; 2]) -> Result<Graph> {
        if !width.is_multiple_of(self.factor) {
            return Err(Error::param("factor", self.factor, format!("a divisor of {width}, the channels of the teacher's last stage")));
        }
        let narrow = width / self.factor;
        let mut b = GraphBuilder::new("simkd.projector", &[channels, size[0], size[1]]);
        if size[0] > grid[0] {
            b.layer(Op::AdaptiveAvgPool { output: grid });
        }
        for (i, (out, kernel)) in [(narrow, 1), (narrow, 3), (width, 1)].into_iter().enumerate() {
            b.conv(&format!("conv{}", i + 1), Conv::new(out, kernel).pad(kernel / 2));
            b.batch_norm_as(&format!("bn{}", i + 1), true, self.bn_eps, self.bn_momentum);
            b.relu();
        }
        b.stage(0, "bn3", Some("bn3"));
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.finish()
    }
}

/// SimKD of the projected map `x` against the teacher's last map, which is detached and pooled to the grid of `x` where it is larger.
///
/// # Errors
/// Maps that are not finite or whose batch or channels differ.
pub fn simkd(x: &Tensor, teacher: &Tensor) -> Result<LossTerms> {
    let (b, c, h, w) = map("the projected map", x)?;
    let (tb, tc, th, _) = map("teacher.stage.last", teacher)?;
    if (b, c) != (tb, tc) || th < h {
        return Err(Error::shape("teacher.stage.last", format!("[{b}, {c}, {h} or more, {w} or more]"), teacher.dims()));
    }
    let teacher = inputs::constant(teacher, x)?;
    let teacher = if th > h { ops::adaptive_avg_pool2d(&teacher, [h, w])? } else { teacher };
    Ok(LossTerms::one("feature", (x - teacher)?.sqr()?.mean_all()?))
}

fn map(what: &str, x: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *x.dims() {
        [b, c, h, w] if b * c * h * w > 0 => {
            inputs::finite(what, x)?;
            Ok((b, c, h, w))
        }
        _ => Err(Error::shape(what, "[B,C,H,W]", x.dims())),
    }
}

struct Prepared {
    projector: Arc<Network>,
    classifier: Classifier,
    stages: (usize, usize),
    grid: [usize; 2],
    unused: Vec<String>,
}

struct SimKd {
    params: Params,
    prepared: Option<Prepared>,
}

impl SimKd {
    fn prepared(&self) -> Result<&Prepared> {
        self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its projector (`prepare` builds it)"))
    }
}

impl Method for SimKd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The last stages are known once both networks are: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let cut = |stage: Option<usize>| stage.map(Cut::Stage).into_iter().collect();
        let stages = self.prepared.as_ref().map(|p| p.stages);
        let teacher: Vec<Cut> = stages.map_or_else(|| vec![Cut::Embedding], |s| vec![Cut::Stage(s.1)]);
        Needs { student: cut(stages.map(|s| s.0)), teacher, teacher_model: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let teacher = setup.teacher(ENTRY.name)?;
        let (s, t) = (setup.models.student.spec(), teacher.spec());
        let last = |spec: &ModelSpec| {
            spec.stages.len().checked_sub(1).ok_or_else(|| Error::refused(format!("simkd: {} has no stage (`stage.i`)", spec.name)))
        };
        let stages = (last(s)?, last(t)?);
        let (own, other) = (&s.stages[stages.0], &t.stages[stages.1]);
        if other.channels != t.embedding {
            return Err(Error::refused(format!(
                "simkd: the classifier of {} takes {} numbers, its last stage has {} channels: it must stand right behind the last stage",
                t.name, t.embedding, other.channels
            )));
        }
        let graph = self.params.projector(own.channels, own.size, other.channels, other.size)?;
        let projector = Network::new(graph, setup.dtype, setup.device)?;
        projector.init(setup.rng.named("projector"))?;
        self.prepared = Some(Prepared {
            projector: Arc::new(projector),
            classifier: srrl::classifier(teacher, setup)?,
            stages,
            grid: other.size,
            unused: behind(setup.models.student, Cut::Stage(stages.0))?,
        });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.iter().map(|p| Arc::clone(&p.projector) as Arc<dyn Model>).collect()
    }

    fn unused(&self) -> Vec<String> {
        self.prepared.as_ref().map_or_else(Vec::new, |p| p.unused.clone())
    }

    fn deploy(&self, student: Arc<dyn Model>) -> Result<Arc<dyn Model>> {
        let p = self.prepared()?;
        let settings = [p.grid[0] as f64, p.grid[1] as f64, self.params.bn_eps];
        Ok(Arc::new(Deployed::new(student, Arc::clone(&p.projector), p.classifier.clone(), Cut::Stage(p.stages.0), settings)?))
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let p = self.prepared()?;
        let map = step.student()?.stage(p.stages.0)?;
        let x = p.projector.run(map, Cut::Input, &[Cut::Stage(0)], Mode::Train(step.rng.named("projector")))?;
        simkd(x.stage(0)?, step.teacher()?.stage(p.stages.1)?)
    }
}

/// The parameters of a network made of a graph that nothing up to `cut` uses; none of another model's.
fn behind(model: &dyn Model, cut: Cut) -> Result<Vec<String>> {
    let Some(network) = model.as_any().downcast_ref::<Network>() else { return Ok(vec![]) };
    let graph = network.graph();
    let mut used = vec![false; graph.params().entries().len()];
    for id in graph.piece(0, &[graph.cut(cut)?])? {
        match &graph.nodes()[id].op {
            Op::Conv2d(c) => std::iter::once(c.weight).chain(c.bias).for_each(|i| used[i] = true),
            Op::BatchNorm(bn) => bn.affine.iter().for_each(|&(w, b)| (used[w], used[b]) = (true, true)),
            Op::Linear { weight, bias, .. } => std::iter::once(*weight).chain(*bias).for_each(|i| used[i] = true),
            _ => {}
        }
    }
    Ok(graph.params().entries().iter().zip(used).filter(|(_, used)| !used).map(|(e, _)| e.name.clone()).collect())
}

/// What SimKD ships: the student up to its last stage, the projector and the teacher's classifier as one network.
///
/// Its tensors are copies, those of the student under their own names; it is run from the images or from the embedding and is not trained.
pub struct Deployed {
    student: Arc<dyn Model>,
    projector: Arc<Network>,
    classifier: Classifier,
    from: Cut,
    spec: ModelSpec,
    params: Option<kd_core::Params>,
}

impl Deployed {
    /// What the names of an export's tensors begin with that are not the student's own.
    pub const PREFIX: &'static str = "simkd.";

    /// The composition; `from` is the student's cut that the projector takes, `settings` the teacher's grid and the epsilon.
    fn new(student: Arc<dyn Model>, projector: Arc<Network>, classifier: Classifier, from: Cut, settings: [f64; 3]) -> Result<Self> {
        let (classes, embedding) = classifier.weight.dims2()?;
        let spec = ModelSpec { name: format!("{} with simkd", student.spec().name), classes, embedding, ..student.spec().clone() };
        let params = student.params().map(|own| combined(own, projector.parameters(), &classifier, settings)).transpose()?;
        Ok(Self { student, projector, classifier, from, spec, params })
    }

    /// From the tensors of an export whose names begin with [`Deployed::PREFIX`], around `student`, which holds its own.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    pub fn restore(student: Arc<dyn Model>, extra: &StateDict) -> Result<Self> {
        let get = |name: &str| {
            let name = format!("{}{name}", Self::PREFIX);
            extra.get(&name).ok_or_else(|| Error::missing("a student of simkd", name))
        };
        let [weights, last] = [get("projector.conv1.weight")?, get("projector.conv3.weight")?];
        let (&[narrow, channels, ..], &[width, ..]) = (weights.dims(), last.dims()) else {
            return Err(Error::shape("simkd.projector.conv1.weight", "[out, in, 1, 1]", weights.dims()));
        };
        let settings = get("settings")?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let &[h, w, bn_eps] = settings.as_slice() else {
            return Err(Error::shape("simkd.settings", "[3]", get("settings")?.dims()));
        };
        let spec = student.spec();
        let from = spec.stages.len().checked_sub(1).ok_or_else(|| Error::refused(format!("simkd: {} has no stage", spec.name)))?;
        let stage = &spec.stages[from];
        if narrow == 0 || !width.is_multiple_of(narrow) || stage.channels != channels || h < 1.0 || w < 1.0 {
            let expected = format!("[a divisor of {width}, {}, 1, 1], for {}", stage.channels, spec.name);
            return Err(Error::shape("simkd.projector.conv1.weight", expected, weights.dims()));
        }
        let params = Params { factor: width / narrow, bn_eps, ..Params::default() };
        params.validate()?;
        let (dtype, device) = match student.params() {
            Some(p) => (p.dtype(), p.device().clone()),
            None => (weights.dtype(), weights.device().clone()),
        };
        let projector = Network::new(params.projector(channels, stage.size, width, [h as usize, w as usize])?, dtype, &device)?.frozen();
        let named = |name: &str| extra.get(&format!("{}projector.{name}", Self::PREFIX)).cloned();
        for (name, _) in projector.parameters().keys() {
            if named(&name).is_none() && !name.ends_with("num_batches_tracked") {
                return Err(Error::missing("a student of simkd", format!("{}projector.{name}", Self::PREFIX)));
            }
        }
        projector.parameters().assign(named)?;
        let here = |t: &Tensor| -> Result<Tensor> { Ok(t.to_device(&device)?.to_dtype(dtype)?) };
        let weight = here(get("classifier.weight")?)?;
        if weight.rank() != 2 || weight.dim(1)? != width {
            return Err(Error::shape("simkd.classifier.weight", format!("[K, {width}]"), weight.dims()));
        }
        let bias = get("classifier.bias").ok().map(here).transpose()?;
        Self::new(student, Arc::new(projector), Classifier { weight, bias }, Cut::Stage(from), [h, w, bn_eps])
    }

    fn logits(&self, embedding: &Tensor) -> Result<Tensor> {
        Ok(ops::linear(embedding, &self.classifier.weight, self.classifier.bias.as_ref())?)
    }
}

fn combined(
    student: &kd_core::Params,
    projector: &kd_core::Params,
    classifier: &Classifier,
    settings: [f64; 3],
) -> Result<kd_core::Params> {
    let mut all = student.state_dict()?;
    all.extend(projector.state_dict()?.into_iter().map(|(name, t)| (format!("simkd.projector.{name}"), t)));
    all.push(("simkd.classifier.weight".to_string(), classifier.weight.clone()));
    all.extend(classifier.bias.iter().map(|b| ("simkd.classifier.bias".to_string(), b.clone())));
    all.push(("simkd.settings".to_string(), Tensor::new(&settings, student.device())?));
    let mut builder = ParamsBuilder::default();
    for (name, tensor) in &all {
        if tensor.dtype() == DType::I64 {
            builder.counter(name);
        } else {
            builder.param(name, tensor.dims());
        }
    }
    let params = builder.build(student.dtype(), student.device())?;
    let all: StateDict = all.into_iter().collect();
    params.assign(|name| all.get(name).cloned())?;
    Ok(params)
}

impl Model for Deployed {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn run(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode) -> Result<Outputs> {
        let own = |cut: &Cut| matches!(cut, Cut::Embedding | Cut::Logits);
        let mut found = match from {
            Cut::Embedding => Outputs::new([(Cut::Embedding, x.clone())]),
            Cut::Input => {
                let mut cuts: Vec<Cut> = wanted.iter().copied().filter(|c| !own(c)).collect();
                if wanted.iter().any(own) {
                    cuts.push(self.from);
                }
                let mut found = self.student.run(x, Cut::Input, &cuts, mode)?;
                if wanted.iter().any(own) {
                    let projected = self.projector.run(found.get(self.from)?, Cut::Input, &[Cut::Embedding], mode)?;
                    found.insert(Cut::Embedding, projected.embedding()?.clone());
                }
                found
            }
            _ => return Err(Error::refused(format!("{}: runs from the images or the embedding, not from `{from}`", self.spec.name))),
        };
        if wanted.contains(&Cut::Logits) {
            let logits = self.logits(found.embedding()?)?;
            found.insert(Cut::Logits, logits);
        }
        wanted.iter().map(|&cut| Ok((cut, found.get(cut)?.clone()))).collect::<Result<Vec<_>>>().map(Outputs::new)
    }

    fn params(&self) -> Option<&kd_core::Params> {
        self.params.as_ref()
    }

    fn trainable(&self) -> Trainable {
        Trainable::Frozen
    }

    fn classifier(&self) -> Result<Classifier> {
        Ok(self.classifier.clone())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let (student, teacher) = (inputs.get("student.stage.last")?, inputs.get("teacher.stage.last")?);
    let (_, c, h, w) = map("student.stage.last", student)?;
    let (_, tc, th, tw) = map("teacher.stage.last", teacher)?;
    let mut state = StateDict::new();
    let graph = params.projector(c, [h, w], tc, [th, tw])?;
    let x = named_graph::run(&graph, "projector", inputs, student, Cut::Stage(0), &mut state)?;
    Ok(ParityOutput { terms: simkd(&x, teacher)?, state })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "simkd",
    about: "the student's last map, projected, matches the teacher's; the deployed student keeps projector and teacher's classifier",
    source: "Chen et al., CVPR 2022, arXiv 2203.14001",
    year: 2022,
    parameters: &[
        ParamDoc { name: "factor", default: "2", range: "divides the teacher's channels", about: "how much narrower the projector is" },
        ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "epsilon of the projector's batch norms" },
        ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "the batch's share of their running statistics" },
    ],
    build: |params| Ok(Box::new(SimKd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
