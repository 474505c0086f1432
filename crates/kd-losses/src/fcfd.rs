//! `fcfd`: function-consistent feature distillation: a feature is good if the later layers of either network make of it what they should.
//!
//! Liu et al., "Function-Consistent Feature Distillation", ICLR 2023, openreview pgHNOcxEdRI.
//!
//! ```text
//! b_s        = bridge_s(S_s)                             student's stage s in the teacher's channels and grid, s = 1..L
//! d(x, s)    = mean (x - T_s)^2;  for s = L plus mean (gap(relu(x)) - gap(relu(T_L)))^2
//! appearance = sum_s d(b_s, s)
//! function   = sum over mixed paths "student up to k, then teacher" of sum_{s > k} d(teacher_s(b_k), s)
//! mixture    = sum over mixed paths, in both directions, of T^2 mean_b KL(softmax(z_t/T) || softmax(z_path/T))
//! value      = w feature_weight (appearance + function) + mixture_weight mixture,   w = min(1, (epoch + 1) / warmup_epochs)
//! ```
//!
//! A mixed path runs through one network up to stage k, over a bridge, and through the other one's later layers and classifier:
//! "student, then teacher" uses the teacher as a lens on the student's feature, "teacher, then student" trains the student's later layers on
//! the teacher's. Each step draws `extra_paths` of the `2 (L - 1)` paths.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_s`, `T_s` | stages of student and teacher, the stem not counted; the teacher's detached | `[B,C,H,W]` |
//! | `z_t`, `z_path` | logits of the teacher (detached) and of a mixed path | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 4 | > 0 | T |
//! | `feature_weight` | 5 | >= 0 | |
//! | `mixture_weight` | 1 | >= 0 | |
//! | `extra_paths` | 2 | 0..=paths | paths drawn in a step |
//! | `paths` | `"both"` | `"both"`, `"student_teacher"`, `"teacher_student"` | which there are |
//! | `warmup_epochs` | 20 | >= 0 | of the features' weight; 0: none |
//! | `teacher_statistics` | `"batch"` | `"batch"`, `"running"` | what the teacher's batch norms use, in its own pass and in mixed paths |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the bridges' batch norms |
//!
//! Terms: `appearance`, `function`, `mixture`. State: the bridges' running statistics; the paths of a step follow from its number. Use with
//! `ce` of weight 1 and `kd` of weight 1 at the same temperature. Cost: a bridge for each stage and direction (3x3 convolution), and for
//! each path the layers behind its bridge once more, forward and backward.
//!
//! Bridges: 3x3 convolution (no bias; stride 2 or a transposed 4x4 with bias where the grid halves or doubles), batch norm, and leaky ReLU
//! 0.1 where the receiving stage is the output of a ReLU. Convolutions are drawn He-normal over outputs. Networks need the same number of
//! stages, each grid equal, half or double, and stages that can be fed in.
//!
//! | pair | T | feature_weight | mixture_weight |
//! |---|---|---|---|
//! | CIFAR-100 res56-res20 | 4 | 0.02 | 1 |
//! | wrn40_2-wrn16_2 | 4 | 5 | 0.2 |
//! | vgg13-vgg8 | 4 | 5 | 1 |
//! | res32x4-shuffleV2 | 8 | 5 | 1 |
//! | ImageNet R34-R18 | 1 | 0.02 | 1 |
//!
//! As released, the teacher runs with the statistics of the batch (the code freezes its parameters but leaves it in training mode); unlike
//! the release its running statistics are never written, and a student in a mixed path uses the batch's without remembering them (the
//! release keeps them per path, which changes no output). Stages are kd's: of wide resnets the sums before the next batch norm.
//! Checked: read in the authors' code (LiuDongyang6/FCFD); the loss and, through networks, its gradient against an independent f64
//! implementation; the paper's text was not compared.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use kd_core::schedule::warmup_factor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, Outputs, ParamDoc, ParityInputs, ParityOutput, Result, Rng, Setup,
    StepView,
};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Network, Op, ops};
use serde::{Deserialize, Serialize};

use crate::plus_plus::parity_epoch;
use crate::registry::parse;
use crate::softmax::Softmax;
use crate::{features, inputs};

/// Which mixed paths there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paths {
    /// Both directions.
    Both,
    /// The student's stages first.
    StudentTeacher,
    /// The teacher's stages first.
    TeacherStudent,
}

/// What the teacher's batch norms use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistics {
    /// The batch's, as released.
    Batch,
    /// The running ones, as everywhere else.
    Running,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T, above 0.
    pub temperature: f64,
    /// Weight of `appearance` and `function`, at least 0.
    pub feature_weight: f64,
    /// Weight of `mixture`, at least 0.
    pub mixture_weight: f64,
    /// Paths drawn in a step.
    pub extra_paths: usize,
    /// Which paths there are.
    pub paths: Paths,
    /// Epochs over which the features' weight rises; 0 for none.
    pub warmup_epochs: usize,
    /// What the teacher's batch norms use.
    pub teacher_statistics: Statistics,
    /// Epsilon of the bridges' batch norms, above 0.
    pub bn_eps: f64,
    /// The batch's share of the bridges' running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            temperature: 4.0,
            feature_weight: 5.0,
            mixture_weight: 1.0,
            extra_paths: 2,
            paths: Paths::Both,
            warmup_epochs: 20,
            teacher_statistics: Statistics::Batch,
            bn_eps: 1e-5,
            bn_momentum: 0.1,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("feature_weight", self.feature_weight)?;
        inputs::not_negative("mixture_weight", self.mixture_weight)?;
        inputs::positive("bn_eps", self.bn_eps)?;
        inputs::share("bn_momentum", self.bn_momentum)
    }

    /// The bridge from maps `[C,H,W]` of one network to those of the other.
    fn bridge(&self, name: &str, from: [usize; 3], to: [usize; 3], relu: bool) -> Result<Graph> {
        let mut b = GraphBuilder::new(name, &from);
        let conv = || Conv::new(to[0], 3).pad(1).init(Init::HeFanOut);
        let times = |a: [usize; 3], b: [usize; 3]| a[1] == 2 * b[1] && a[2] == 2 * b[2];
        if from[1..] == to[1..] {
            b.conv("conv", conv());
        } else if times(from, to) {
            b.conv("conv", conv().stride(2).bias());
        } else if times(to, from) {
            b.conv_transpose("conv", to[0], 4, 2, 1);
        } else {
            let grids = format!("{}x{} and {}x{}", from[1], from[2], to[1], to[2]);
            return Err(Error::refused(format!("{name}: the stages' grids are {grids}; they must be equal, or one twice the other")));
        }
        b.batch_norm_as("bn", true, self.bn_eps, self.bn_momentum);
        if relu {
            b.layer(Op::LeakyRelu { slope: 0.1 });
        }
        b.stage(0, "bn", Some("bn"));
        b.finish()
    }
}

/// What a mixed path gave.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// For "student, then teacher": the teacher's stages behind the bridge, by number from 1.
    pub features: Vec<(usize, Tensor)>,
    /// Its logits `[B,K]`.
    pub logits: Tensor,
}

/// FCFD in epoch `epoch`, counted from 0: the student's stages behind their bridges and the teacher's, from stage 1 on, the mixed paths, and
/// the teacher's logits. The teacher's tensors are detached.
///
/// # Errors
/// Maps or logits that are not finite or differ in shape; parameters out of range.
pub fn fcfd(bridged: &[Tensor], stages: &[Tensor], mixed: &[Mixed], logits: &Tensor, epoch: usize, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    if bridged.is_empty() || bridged.len() != stages.len() {
        return Err(Error::refused(format!("fcfd: {} bridged stages for {} of the teacher", bridged.len(), stages.len())));
    }
    let distance = |x: &Tensor, s: usize| -> Result<Tensor> {
        let t = stages.get(s - 1).ok_or_else(|| Error::missing("fcfd", format!("teacher.stage.{s}")))?;
        features::map(&format!("stage {s} of a path"), x)?;
        inputs::finite(&format!("stage {s} of a path"), x)?;
        if x.dims() != t.dims() {
            return Err(Error::shape(format!("stage {s} of a path"), format!("{:?}, as the teacher's", t.dims()), x.dims()));
        }
        let t = inputs::constant(t, x)?;
        let own = (x - &t)?.sqr()?.mean_all()?;
        if s < stages.len() {
            return Ok(own);
        }
        let gap = |x: &Tensor| -> Result<Tensor> { Ok(ops::relu(x)?.mean((2, 3))?) };
        Ok((own + (gap(x)? - gap(&t)?)?.sqr()?.mean_all()?)?)
    };
    let sum = |parts: Vec<Tensor>| -> Result<Tensor> {
        let none = || Tensor::zeros((), bridged[0].dtype(), bridged[0].device());
        Ok(parts.into_iter().map(Ok).reduce(|a, b| a? + b?).unwrap_or_else(none)?)
    };
    let warm = params.feature_weight * warmup_factor(epoch, params.warmup_epochs, 1);
    let appearance = bridged.iter().enumerate().map(|(i, x)| distance(x, i + 1)).collect::<Result<_>>()?;
    let mut terms = LossTerms::new().with("appearance", sum(appearance)?, warm);
    if !mixed.is_empty() {
        let function = mixed.iter().flat_map(|m| &m.features).map(|(s, x)| distance(x, *s)).collect::<Result<_>>()?;
        terms = terms.with("function", sum(function)?, warm);
        let t = params.temperature;
        let kl = |m: &Mixed| -> Result<Tensor> {
            let (.., teacher) = inputs::both_logits(&m.logits, logits)?;
            Ok((Softmax::new(&(&m.logits / t)?)?.kl(&Softmax::new(&(teacher / t)?)?)?.mean_all()? * (t * t))?)
        };
        terms = terms.with("mixture", sum(mixed.iter().map(kl).collect::<Result<_>>()?)?, params.mixture_weight);
    }
    Ok(terms)
}

/// One mixed path: where it changes sides, and from which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Path {
    stage: usize,
    student_first: bool,
}

struct Prepared {
    /// Stages behind the stem.
    stages: usize,
    /// The student's stage s into the teacher, at `s - 1`.
    into_teacher: Vec<Arc<Network>>,
    /// The teacher's stage s into the student, at `s - 1`; the last stage needs none.
    into_student: Vec<Arc<Network>>,
    paths: Vec<Path>,
    /// Bridges into the student that the last step did not cross.
    idle: Vec<usize>,
}

struct Fcfd {
    params: Params,
    prepared: Option<Prepared>,
}

impl Method for Fcfd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The number of stages is known once both networks are: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let stages = self.prepared.as_ref().map_or(1, |p| p.stages);
        let cuts: Vec<Cut> = (1..=stages).map(Cut::Stage).collect();
        let teacher = match self.params.teacher_statistics {
            Statistics::Running => cuts.iter().copied().chain([Cut::Logits]).collect(),
            Statistics::Batch => vec![],
        };
        Needs { student: cuts, teacher, teacher_model: true, student_model: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let (s, t) = (setup.models.student.spec(), setup.teacher(ENTRY.name)?.spec());
        let stages = s.stages.len().saturating_sub(1);
        if s.stages.len() != t.stages.len() || stages == 0 {
            return Err(Error::refused(format!(
                "fcfd: {} has {} stages with the stem, {} has {}: the same number is needed, at least 2",
                s.name,
                s.stages.len(),
                t.name,
                t.stages.len()
            )));
        }
        let direction = |student_first: bool| (1..stages).map(move |stage| Path { stage, student_first });
        let paths: Vec<Path> = match self.params.paths {
            Paths::Both => direction(true).chain(direction(false)).collect(),
            Paths::StudentTeacher => direction(true).collect(),
            Paths::TeacherStudent => direction(false).collect(),
        };
        if self.params.extra_paths > paths.len() {
            let allowed = format!("at most {}, the paths between {} and {}", paths.len(), s.name, t.name);
            return Err(Error::param("fcfd: extra_paths", self.params.extra_paths, allowed));
        }
        let build = |into: &str, from: &kd_core::FeatureSpec, to: &kd_core::FeatureSpec, stage: usize| {
            features::batch_statistics(setup, ENTRY.name, to.size[0] * to.size[1])?;
            let name = format!("fcfd.into_{into}.{stage}");
            let shape = |f: &kd_core::FeatureSpec| [f.channels, f.size[0], f.size[1]];
            let network = Network::new(self.params.bridge(&name, shape(from), shape(to), to.post_relu)?, setup.dtype, setup.device)?;
            network.init(setup.rng.named(&name))?;
            Ok::<_, Error>(Arc::new(network))
        };
        let into_teacher = (1..=stages).map(|i| build("teacher", &s.stages[i], &t.stages[i], i)).collect::<Result<_>>()?;
        let back = paths.iter().filter(|p| !p.student_first && self.params.extra_paths > 0);
        let into_student = back.map(|p| build("student", &t.stages[p.stage], &s.stages[p.stage], p.stage)).collect::<Result<_>>()?;
        self.prepared = Some(Prepared { stages, into_teacher, into_student, paths, idle: vec![] });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        let all = self.prepared.iter().flat_map(|p| p.into_teacher.iter().chain(&p.into_student));
        all.map(|n| Arc::clone(n) as Arc<dyn Model>).collect()
    }

    /// The bridges that the last step did not cross: as in the release they stay as they are in it.
    fn idle(&self, _epoch: usize) -> Vec<usize> {
        self.prepared.as_ref().map_or_else(Vec::new, |p| p.idle.clone())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let params = self.params.clone();
        let p = self.prepared.as_mut().ok_or_else(|| Error::missing(ENTRY.name, "its bridges (`prepare` builds them)"))?;
        let student = step.student()?;
        let teacher = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?.as_ref();
        let like = student.stage(1)?;
        let mode = if params.teacher_statistics == Statistics::Batch { Mode::BatchStats } else { Mode::Eval };
        let own = match params.teacher_statistics {
            Statistics::Batch => {
                let images = step.batch.images.first().ok_or_else(|| Error::missing(ENTRY.name, "images"))?;
                let cuts: Vec<Cut> = (1..=p.stages).map(Cut::Stage).chain([Cut::Logits]).collect();
                teacher.run(&on(images, dtype_of(teacher, images))?, Cut::Input, &cuts, mode)?.detach()
            }
            Statistics::Running => step.teacher()?.detach(),
        };
        let stages = (1..=p.stages).map(|s| on(own.stage(s)?, like.dtype())).collect::<Result<Vec<_>>>()?;
        let logits = on(own.logits()?, like.dtype())?;
        let cross = |bridge: &Network, x: &Tensor| -> Result<Tensor> {
            let rng = step.rng.named(&bridge.spec().name);
            Ok(bridge.run(x, Cut::Input, &[Cut::Stage(0)], Mode::Train(rng))?.stage(0)?.clone())
        };
        let bridged = p.into_teacher.iter().enumerate().map(|(i, b)| cross(b, student.stage(i + 1)?)).collect::<Result<Vec<_>>>()?;
        let mut mixed = vec![];
        let backward: Vec<Path> = p.paths.iter().copied().filter(|path| !path.student_first).collect();
        let mut crossed = vec![];
        for path in drawn(&p.paths, params.extra_paths, step.rng) {
            let k = path.stage;
            if path.student_first {
                let cuts: Vec<Cut> = (k + 1..=p.stages).map(Cut::Stage).chain([Cut::Logits]).collect();
                let from = on(&bridged[k - 1], dtype_of(teacher, &bridged[k - 1]))?;
                let out = teacher.run(&from, Cut::Stage(k), &cuts, mode)?;
                let features = (k + 1..=p.stages).map(|s| Ok((s, on(out.stage(s)?, like.dtype())?))).collect::<Result<_>>()?;
                mixed.push(Mixed { features, logits: on(out.logits()?, like.dtype())? });
            } else {
                let bridge = backward.iter().position(|b| b.stage == k).unwrap_or_default();
                crossed.push(bridge);
                let x = cross(&p.into_student[bridge], &stages[k - 1])?;
                let out: Outputs = step.models.student.run(&x, Cut::Stage(k), &[Cut::Logits], Mode::BatchStats)?;
                mixed.push(Mixed { features: vec![], logits: out.logits()?.clone() });
            }
        }
        let first = p.into_teacher.len();
        p.idle = (0..p.into_student.len()).filter(|b| !crossed.contains(b)).map(|b| first + b).collect();
        fcfd(&bridged, &stages, &mixed, &logits, step.progress.epoch, &params)
    }
}

/// The paths of a step, in the order of the list.
fn drawn(paths: &[Path], count: usize, rng: Rng) -> Vec<Path> {
    let mut chosen: Vec<usize> = rng.named("paths").permutation(paths.len()).into_iter().take(count).map(|i| i as usize).collect();
    chosen.sort_unstable();
    chosen.into_iter().map(|i| paths[i]).collect()
}

fn dtype_of(model: &dyn Model, otherwise: &Tensor) -> DType {
    model.params().map_or(otherwise.dtype(), kd_core::Params::dtype)
}

fn on(x: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(x.to_dtype(dtype)?)
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let (epoch, inputs) = parity_epoch(inputs)?;
    let params: Params = inputs.params()?;
    let counted = |prefix: &str, suffix: &str| -> Vec<Tensor> {
        (1..).map_while(|i| inputs.find(&format!("{prefix}{i}{suffix}")).cloned()).collect()
    };
    let (bridged, stages) = (counted("student.bridged.", ""), counted("teacher.stage.", ""));
    let path = |(i, logits): (usize, Tensor)| {
        let name = |s: usize| format!("student.mixed.{}.stage.{s}", i + 1);
        let features = (1..=stages.len()).filter_map(|s| Some((s, inputs.find(&name(s))?.clone()))).collect();
        Mixed { features, logits }
    };
    let mixed: Vec<Mixed> = counted("student.mixed.", ".logits").into_iter().enumerate().map(path).collect();
    Ok(fcfd(&bridged, &stages, &mixed, inputs.get("teacher.logits")?, epoch, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "fcfd",
    about: "the student's features, bridged, pass through the teacher's later layers and the teacher's through the student's, and must serve as well",
    source: "Liu et al., ICLR 2023, openreview pgHNOcxEdRI",
    year: 2023,
    parameters: &[
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T of the mixed paths' predictions" },
        ParamDoc { name: "feature_weight", default: "5.0", range: ">= 0", about: "weight of the features' distances" },
        ParamDoc { name: "mixture_weight", default: "1.0", range: ">= 0", about: "weight of the mixed paths' predictions" },
        ParamDoc { name: "extra_paths", default: "2", range: "0..=paths", about: "mixed paths drawn in a step" },
        ParamDoc {
            name: "paths",
            default: "\"both\"",
            range: "\"both\" | \"student_teacher\" | \"teacher_student\"",
            about: "which mixed paths there are",
        },
        ParamDoc { name: "warmup_epochs", default: "20", range: ">= 0", about: "epochs over which feature_weight rises" },
        ParamDoc {
            name: "teacher_statistics",
            default: "\"batch\"",
            range: "\"batch\" | \"running\"",
            about: "what the teacher's batch norms use",
        },
        ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "epsilon of the bridges' batch norms" },
        ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "the batch's share of their running statistics" },
    ],
    build: |params| Ok(Box::new(Fcfd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
