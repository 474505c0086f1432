//! `block_kd`: block-wise logit distillation. Features are compared as the logits that the rest of the teacher makes of them.
//!
//! Yu et al., "Decoupling Dark Knowledge via Block-wise Logit Distillation for Feature-level Alignment", IEEE Transactions on Artificial
//! Intelligence 2024, arXiv 2411.01547.
//!
//! ```text
//! student  S = S_c . S_n ... S_1        teacher  T = T_c . T_n ... T_1        n blocks, then pooling and classifier
//! stone    N_i = T_c . T_n ... T_{i+1} . C_i . S_i ... S_1,  i = 1..n         C_i: connector into the teacher's space
//!
//! L_task    = ce(S, y)   + sum_i w_i ce(N_i, y)
//! L_distill = d(S, T)    + sum_i w_i d(N_i, T)                                w_i = stone_decay^(i-n): .., 1/4, 1/2, 1
//! L_cross   = d(S, Yens) + sum_i c_i d(N_i, Yens)                             Yens = mean of the stones' logits
//! value     = alpha L_task + beta L_distill + gamma L_cross                   c_i = w_i with decay_cross, else 1
//! ```
//!
//! `N_n` is the teacher's classifier on the connected output of the student's last block. Stones exist in training alone; what is shipped is
//! the student. Gradients run through the teacher's blocks, which are frozen, into connectors and student.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S`, `T`, `N_i` | logits of student, teacher (detached), stone i | `[B,K]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! Terms: `student.task`, `student.distill`, `student.cross`, and `stone.<i>.task`, `stone.<i>.distill`, `stone.<i>.cross`; the cross terms
//! are absent when `gamma` is 0 or no stone is active. The method holds the cross-entropy of the student: it stands alone in an objective.
//!
//! # What is the paper's, what is ours
//!
//! No code was released, and of the paper only the abstract, its equations as others noted them, and a few facts were at hand: the stones,
//! the three sums, `Yens`, the halving coefficients; on CIFAR-100 240 epochs of SGD at batch 64, on ImageNet 100 epochs at batch 512, for
//! language 10 epochs at batch 32; a lightweight variant with less cost. **Everything else on this page is our choice**, not the paper's:
//!
//! | parameter | default | range | our reason |
//! |---|---|---|---|
//! | `alpha`, `beta`, `gamma` | 1, 1, 1 | >= 0 | neutral; 0.1, 0.9 weigh task and distillation as mdistiller's KD does |
//! | `temperature` | 4 | > 0 | as mdistiller on CIFAR-100; 1 on ImageNet |
//! | `distance` | `"kd"` | see below | |
//! | `stone_distance` | none | stone = distance | another one for single stones |
//! | `dkd_alpha`, `dkd_beta` | 1, 8 | >= 0 | weights of `dkd`, see [`kd_losses::dkd`](mod@kd_losses::dkd) |
//! | `blocks` | 0 | 0 .. blocks of either network | n; 0: as many as both have |
//! | `student_blocks`, `teacher_blocks` | `[]` | ascending numbers | where the n blocks end; `[]`: see below |
//! | `stones` | `"all"` | `"all"`, list of 1..n | the lightweight variant: the last one or two; weights and numbers stay, `Yens` over those present |
//! | `stone_decay` | 2 | >= 1 | 2 is the paper's; 1: all alike |
//! | `decay_cross` | false | | the coefficients are stated for the stones' own objectives, which come before the cross terms |
//! | `detach_ensemble` | true | | `Yens` as a fixed target; false lets stones move towards each other (`kd` and `dkd` only) |
//! | `normalise` | false | | divides the `w_i`, and the `c_i`, by their sum: at n = 3 the `w_i` add up to 1.75 beside the student's 1 |
//! | `stone_warmup` | 0 | epochs | all that stones bring (their terms, `student.cross`) grows linearly, epochs counted from 1 |
//! | `stone_schedule` | `[]` | `{ from, stones }`, .. | which stones are active from which epoch (0 the first) on; none before the first entry; `[]`: always all |
//! | `connector` | `"always"` | `"auto_identity"` | a learned connector even where shapes agree, or the identity there |
//! | `connector_relu` | `"auto"` | `"always"`, `"never"` | auto: where the teacher's block ends in a ReLU |
//! | `connector_bn` | `"default"` | `"teacher"` | initial scale and shift: 1 and 0, or deviation and mean of the teacher's map |
//! | `tail_bn` | `"eval"` | `"train"` | a frozen teacher stays the teacher; train: batch statistics, its running ones are never written |
//!
//! **Distance.** `d(z, v)` is any method of kd-losses that compares logits (and reads labels), by name or as a table with parameters of its
//! own: `distance = "nkd"`, `distance = { method = "kd", temperature = 2.0 }`, `stone_distance = { 1 = "dkd" }`. What a table leaves out comes
//! from `temperature`, `dkd_alpha`, `dkd_beta` here, then from the method's defaults. A stone's distance serves its distill and cross terms.
//!
//! **Block split.** Blocks are the networks' cuts `block.1 ..`: stages, the stem with the first, what stands before the pooling with the last.
//! Networks with different numbers of blocks are split into the smaller number: the last ends meet; going backwards, each block of the one
//! with fewer meets the latest of the other whose map is as much larger than the last one (else the one right before), and what lies between
//! is merged. Three stages 32, 16, 8 beside VGG's 32, 16, 8, 4, 4 meet at 16, 8 and the last 4. Blocks behind a given last one belong to the
//! classifier.
//!
//! **Connector.** Resize if the maps differ in size (adaptive average pooling where they shrink, nearest neighbour where they grow), 1x1
//! convolution without bias, batch norm, ReLU. It trains with the student and is thrown away. With `connector_bn = "teacher"` the batch norm
//! starts with the statistics of the teacher's map in front of its ReLU: the running ones of the batch norm that reads the map, or scale and
//! shift of those before it, through sums and ReLUs. Token maps are not supported yet.
//!
//! **Cost**, beside plain KD: per stone i the teacher's blocks i+1..n forward and backward to their input, about twice their forward pass; no
//! teacher weight gets a gradient. With `tail_bn = "eval"` stones that share a teacher block pass through it together, in one run.
//!
//! ```toml
//! [[loss]]
//! method = "block_kd"
//! stones = [2, 3]
//! stone_schedule = [{ from = 0, stones = [3] }, { from = 80, stones = [2, 3] }]
//! distance = { method = "nkd", temperature = 1.0 }
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;
use kd_core::registry::check_finite;
use kd_core::schedule::warmup_factor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView, Tag,
};
use kd_losses::ce;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::distance::Measure;
use crate::{Distance, SteppingStones};

/// Which stones there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Stones {
    /// 1..n.
    All,
    /// Those, in any order.
    Some(Vec<usize>),
}

impl Stones {
    /// Their numbers in ascending order, of `blocks` blocks.
    pub(crate) fn numbers(&self, blocks: usize) -> Vec<usize> {
        match self {
            Self::All => (1..=blocks).collect(),
            Self::Some(list) => {
                let mut list = list.clone();
                list.sort_unstable();
                list
            }
        }
    }
}

impl TryFrom<Value> for Stones {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        let bad = |value| Error::param("stones", value, "\"all\" or a list of stone numbers, e.g. [2, 3]");
        match &value {
            Value::String(s) if s == "all" => Ok(Self::All),
            Value::Array(_) => serde_json::from_value(value.clone()).map(Self::Some).map_err(|_| bad(value)),
            _ => Err(bad(value)),
        }
    }
}

impl From<Stones> for Value {
    fn from(stones: Stones) -> Self {
        match stones {
            Stones::All => "all".into(),
            Stones::Some(list) => list.into(),
        }
    }
}

/// Stones that are active from an epoch on, until the next entry of the schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Active {
    /// The first epoch, from 0.
    pub from: usize,
    /// Their numbers.
    pub stones: Vec<usize>,
}

/// Where a connector stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Connector {
    /// In every stone.
    Always,
    /// Where channels or size differ.
    AutoIdentity,
}

/// Whether a connector ends in a ReLU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectorRelu {
    /// Where the teacher's block does.
    Auto,
    /// Yes.
    Always,
    /// No.
    Never,
}

/// How a connector's batch norm begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectorBn {
    /// Scale 1, shift 0.
    Default,
    /// With deviation and mean of the teacher's map.
    Teacher,
}

/// How the teacher's batch norms run inside stones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TailBn {
    /// With their running statistics.
    Eval,
    /// With those of the batch; the running ones are not written.
    Train,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of the labels, at least 0.
    pub alpha: f64,
    /// Weight of the distances to the teacher, at least 0.
    pub beta: f64,
    /// Weight of the distances to the stones' mean, at least 0.
    pub gamma: f64,
    /// T of the distances, above 0.
    pub temperature: f64,
    /// d.
    pub distance: Distance,
    /// d of single stones.
    pub stone_distance: BTreeMap<usize, Distance>,
    /// Weight of `dkd`'s target part, at least 0.
    pub dkd_alpha: f64,
    /// Weight of `dkd`'s other classes, at least 0.
    pub dkd_beta: f64,
    /// n; 0 for as many as both networks have.
    pub blocks: usize,
    /// The student's own blocks in which its blocks 1..n end; empty for the default split.
    pub student_blocks: Vec<usize>,
    /// The teacher's own blocks in which its blocks 1..n end; empty for the default split.
    pub teacher_blocks: Vec<usize>,
    /// Which stones there are.
    pub stones: Stones,
    /// What the coefficients fall by from stone to stone, backwards; at least 1.
    pub stone_decay: f64,
    /// Whether the cross terms have these coefficients too.
    pub decay_cross: bool,
    /// Whether the stones' mean is a constant.
    pub detach_ensemble: bool,
    /// Whether the stones' coefficients are divided by their sum.
    pub normalise: bool,
    /// Epochs over which all that stones bring grows to its weight; 0 for none.
    pub stone_warmup: usize,
    /// Which stones are active when; empty for all, always.
    pub stone_schedule: Vec<Active>,
    /// Where a connector stands.
    pub connector: Connector,
    /// Whether it ends in a ReLU.
    pub connector_relu: ConnectorRelu,
    /// How its batch norm begins.
    pub connector_bn: ConnectorBn,
    /// How the teacher's batch norms run inside stones.
    pub tail_bn: TailBn,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            alpha: 1.0,
            beta: 1.0,
            gamma: 1.0,
            temperature: 4.0,
            distance: Distance::new("kd"),
            stone_distance: BTreeMap::new(),
            dkd_alpha: 1.0,
            dkd_beta: 8.0,
            blocks: 0,
            student_blocks: vec![],
            teacher_blocks: vec![],
            stones: Stones::All,
            stone_decay: 2.0,
            decay_cross: false,
            detach_ensemble: true,
            normalise: false,
            stone_warmup: 0,
            stone_schedule: vec![],
            connector: Connector::Always,
            connector_relu: ConnectorRelu::Auto,
            connector_bn: ConnectorBn::Default,
            tail_bn: TailBn::Eval,
        }
    }
}

impl Params {
    /// Refuses values out of range and combinations that contradict each other, naming key, value and what would be right.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [("alpha", self.alpha), ("beta", self.beta), ("gamma", self.gamma)] {
            at_least(key, value, 0.0)?;
        }
        for (key, value, least) in
            [("dkd_alpha", self.dkd_alpha, 0.0), ("dkd_beta", self.dkd_beta, 0.0), ("stone_decay", self.stone_decay, 1.0)]
        {
            at_least(key, value, least)?;
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::param("temperature", self.temperature, "a finite number above 0"));
        }
        self.validate_split()?;
        self.validate_stones()?;
        for measure in self.measures()? {
            if !self.detach_ensemble && !measure.differentiates_both() {
                let allowed = "true with this distance: `kd` and `dkd` alone have a gradient towards the stones' mean";
                return Err(Error::param("detach_ensemble", false, allowed));
            }
        }
        Ok(())
    }

    fn validate_split(&self) -> Result<()> {
        for (key, list) in [("student_blocks", &self.student_blocks), ("teacher_blocks", &self.teacher_blocks)] {
            if list.first() == Some(&0) || list.windows(2).any(|w| w[0] >= w[1]) {
                return Err(Error::param(key, format!("{list:?}"), "block numbers from 1 on, ascending"));
            }
            let other = if self.blocks > 0 { self.blocks } else { self.student_blocks.len() };
            if !list.is_empty() && other > 0 && list.len() != other {
                let allowed = format!("{other} of them, as many as `blocks` or the other network's list says");
                return Err(Error::param(key, format!("{list:?}"), allowed));
            }
        }
        Ok(())
    }

    fn validate_stones(&self) -> Result<()> {
        let listed = match &self.stones {
            Stones::All => None,
            Stones::Some(list) => {
                let sorted = self.stones.numbers(0);
                let beyond = self.blocks > 0 && sorted.last() > Some(&self.blocks);
                if beyond || sorted.first() == Some(&0) || sorted.windows(2).any(|w| w[0] == w[1]) {
                    let last = if self.blocks > 0 { self.blocks.to_string() } else { "n".to_string() };
                    return Err(Error::param("stones", format!("{list:?}"), format!("different numbers within 1..={last}")));
                }
                if list.is_empty() && self.gamma > 0.0 {
                    return Err(Error::param("gamma", self.gamma, "0 where there are no stones, whose mean the cross terms are about"));
                }
                Some(sorted)
            }
        };
        let known = |number: &usize| *number > 0 && listed.as_ref().is_none_or(|l| l.contains(number));
        if let Some(number) = self.stone_distance.keys().find(|n| !known(n)) {
            return Err(Error::param("stone_distance", number, "for stones that there are (`stones`)"));
        }
        let schedule = &self.stone_schedule;
        if schedule.windows(2).any(|w| w[0].from >= w[1].from) || !schedule.iter().flat_map(|a| &a.stones).all(known) {
            let allowed = "ascending in `from`, of stones that there are (`stones`)";
            return Err(Error::param("stone_schedule", serde_json::to_string(schedule)?, allowed));
        }
        Ok(())
    }

    /// The student's distance, then those of single stones.
    fn measures(&self) -> Result<Vec<Measure>> {
        std::iter::once(&self.distance).chain(self.stone_distance.values()).map(|d| Measure::new(d, self)).collect()
    }

    /// The stones among `there` that are active in `epoch`.
    fn active(&self, there: impl Iterator<Item = usize>, epoch: usize) -> Vec<usize> {
        let now = self.stone_schedule.iter().rfind(|a| a.from <= epoch);
        there.filter(|number| self.stone_schedule.is_empty() || now.is_some_and(|a| a.stones.contains(number))).collect()
    }
}

fn at_least(key: &str, value: f64, least: f64) -> Result<()> {
    if value >= least && value.is_finite() { Ok(()) } else { Err(Error::param(key, value, format!("a finite number of at least {least}"))) }
}

/// The loss of `student` `[B,K]` and of `stones`, logits `[B,K]` by number, of networks with `blocks` blocks. `teacher` `[B,K]` is detached,
/// `labels` are class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite or differ in shape, labels outside them, stones beyond `blocks`, parameters out of range.
pub fn block_kd(
    student: &Tensor,
    teacher: &Tensor,
    labels: &Tensor,
    stones: &BTreeMap<usize, Tensor>,
    blocks: usize,
    params: &Params,
) -> Result<LossTerms> {
    params.validate()?;
    for (number, z) in stones {
        if !(1..=blocks).contains(number) {
            return Err(Error::param("stones", number, format!("within 1..={blocks}")));
        }
        let name = format!("stone.{number}.logits");
        if z.dims() != student.dims() {
            return Err(Error::shape(name, format!("{:?}, as the student's", student.dims()), z.dims()));
        }
        check_finite(&name, z)?;
    }
    let ensemble = if params.gamma > 0.0 { mean(stones, params.detach_ensemble)? } else { None };
    let share = |raw: f64, all: f64| if params.normalise { raw / all } else { raw };
    let own = |number: usize| params.stone_decay.powi(number as i32 - blocks as i32);
    let cross = |number: usize| if params.decay_cross { own(number) } else { 1.0 };
    let (all_own, all_cross) = (stones.keys().map(|&i| own(i)).sum(), stones.keys().map(|&i| cross(i)).sum());

    let mut terms = LossTerms::new();
    let mut network = |who: &str, z: &Tensor, distance: &Distance, own: f64, cross: f64| -> Result<()> {
        let measure = Measure::new(distance, params)?;
        let task = ce(z, labels)?.total()?;
        let mut own_terms = LossTerms::new().with_tag("task", task, params.alpha * own, Tag::Task).with(
            "distill",
            measure.between(z, teacher, labels)?,
            params.beta * own,
        );
        if let Some(ensemble) = &ensemble {
            let distance =
                if params.detach_ensemble { measure.between(z, ensemble, labels)? } else { measure.both_ways(z, ensemble, labels)? };
            own_terms = own_terms.with("cross", distance, params.gamma * cross);
        }
        terms.extend(own_terms.prefixed(who));
        Ok(())
    };
    network("student", student, &params.distance, 1.0, 1.0)?;
    for (&number, z) in stones {
        let distance = params.stone_distance.get(&number).unwrap_or(&params.distance);
        network(&format!("stone.{number}"), z, distance, share(own(number), all_own), share(cross(number), all_cross))?;
    }
    Ok(terms)
}

/// The stones' mean logits; `None` without stones.
fn mean(stones: &BTreeMap<usize, Tensor>, detach: bool) -> Result<Option<Tensor>> {
    let mut all = stones.values();
    let Some(first) = all.next() else { return Ok(None) };
    let sum = all.try_fold(first.clone(), |sum, z| sum + z)?;
    let mean = (sum / stones.len() as f64)?;
    Ok(Some(if detach { mean.detach() } else { mean }))
}

/// The method: stones, their connectors, the loss of a step.
pub struct BlockKd {
    params: Params,
    stones: Option<SteppingStones>,
}

impl BlockKd {
    /// The method with its parameters, to be prepared.
    ///
    /// # Errors
    /// Parameters out of range, distances that are none.
    pub fn new(params: Params) -> Result<Self> {
        params.validate()?;
        params.measures()?.iter().try_for_each(Measure::check)?;
        Ok(Self { params, stones: None })
    }

    /// The stones, once prepared.
    pub fn stones(&self) -> Option<&SteppingStones> {
        self.stones.as_ref()
    }
}

impl Method for BlockKd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The student's cuts are known once the method is prepared.
    fn needs(&self) -> Needs {
        let cuts = self.stones.iter().flat_map(SteppingStones::cuts).map(|(_, student, _)| student);
        Needs { student: cuts.chain([Cut::Logits]).collect(), labels: true, teacher_model: true, ..Needs::logits() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let (student, teacher) = (setup.models.student.spec(), setup.teacher(ENTRY.name)?);
        let stones = SteppingStones::new(student, teacher, &self.params, setup.dtype, setup.device, setup.rng)?;
        // What names a stone beyond the last is known to be wrong only now.
        let there: Vec<usize> = stones.cuts().map(|(number, ..)| number).collect();
        let scheduled = self.params.stone_schedule.iter().flat_map(|a| &a.stones);
        if let Some(number) = scheduled.chain(self.params.stone_distance.keys()).find(|n| !there.contains(n)) {
            return Err(Error::param("stone_schedule or stone_distance", number, format!("one of the stones {there:?}")));
        }
        self.stones = Some(stones);
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.stones.iter().flat_map(SteppingStones::connectors).map(|(_, c)| Arc::clone(c) as Arc<dyn Model>).collect()
    }

    fn idle(&self, epoch: usize) -> Vec<usize> {
        let Some(stones) = &self.stones else { return vec![] };
        let active = self.params.active(stones.cuts().map(|(number, ..)| number), epoch);
        stones.connectors().enumerate().filter(|(_, (number, _))| !active.contains(number)).map(|(i, _)| i).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let stones = self.stones.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its connectors (it was not prepared)"))?;
        let teacher = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?;
        let epoch = step.progress.epoch;
        let active = self.params.active(stones.cuts().map(|(number, ..)| number), epoch);
        let student = step.student()?;
        let logits = stones.run(student, teacher.as_ref(), &active, Mode::Train(step.rng.named("connector")))?;
        let labels = step.batch.targets.as_ref().unwrap_or(&step.batch.labels);
        let mut terms = block_kd(student.logits()?, step.teacher()?.logits()?, labels, &logits, stones.blocks(), &self.params)?;
        let warm = warmup_factor(epoch, self.params.stone_warmup, 1);
        for term in terms.terms.iter_mut().filter(|t| !["student.task", "student.distill"].contains(&t.name.as_str())) {
            term.weight *= warm;
        }
        Ok(terms)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    if params.blocks == 0 {
        return Err(Error::param("blocks", 0, "n, at least 1, on named tensors"));
    }
    let numbers = params.stones.numbers(params.blocks).into_iter();
    let stones = numbers.map(|i| Ok((i, inputs.get(&format!("stone.{i}.logits"))?.clone()))).collect::<Result<_>>()?;
    let labels = inputs.find("targets").map_or_else(|| inputs.get("labels"), Ok)?;
    Ok(block_kd(inputs.get("student.logits")?, inputs.get("teacher.logits")?, labels, &stones, params.blocks, &params)?.into())
}

const fn doc(name: &'static str, default: &'static str, range: &'static str, about: &'static str) -> ParamDoc {
    ParamDoc { name, default, range, about }
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "block_kd",
    about: "Block-KD: features compared as logits, through stones of the student's first and the teacher's last blocks",
    source: "Yu et al., IEEE TAI 2024, arXiv 2411.01547; what it leaves open is documented as ours",
    year: 2024,
    parameters: &[
        doc("alpha", "1.0", ">= 0", "weight of the labels"),
        doc("beta", "1.0", ">= 0", "weight of the distances to the teacher"),
        doc("gamma", "1.0", ">= 0", "weight of the distances to the stones' mean"),
        doc("temperature", "4.0", "> 0", "T of the distances"),
        doc("distance", "\"kd\"", "a logit method, by name or as a table", "between two networks' logits"),
        doc("stone_distance", "{}", "stone = distance", "another one for single stones"),
        doc("dkd_alpha", "1.0", ">= 0", "weight of dkd's target class"),
        doc("dkd_beta", "8.0", ">= 0", "weight of dkd's other classes"),
        doc("blocks", "0", ">= 0", "n; 0: as many as both networks have"),
        doc("student_blocks", "[]", "ascending block numbers", "where the student's n blocks end; []: by equal reduction from the end"),
        doc("teacher_blocks", "[]", "ascending block numbers", "where the teacher's n blocks end; []: by equal reduction from the end"),
        doc("stones", "\"all\"", "\"all\" | list of 1..n", "which stones there are"),
        doc("stone_decay", "2.0", ">= 1", "stone i weighs stone_decay^(i-n)"),
        doc("decay_cross", "false", "true | false", "the cross terms weigh so too"),
        doc("detach_ensemble", "true", "true | false", "the stones' mean is a constant"),
        doc("normalise", "false", "true | false", "divide the stones' coefficients by their sum"),
        doc("stone_warmup", "0", ">= 0", "epochs over which all that stones bring grows, counted from 1"),
        doc("stone_schedule", "[]", "list of { from, stones }", "which stones are active from which epoch on; []: all"),
        doc("connector", "\"always\"", "\"always\" | \"auto_identity\"", "a learned connector, or the identity where shapes agree"),
        doc("connector_relu", "\"auto\"", "\"auto\" | \"always\" | \"never\"", "auto: where the teacher's block ends in a ReLU"),
        doc("connector_bn", "\"default\"", "\"default\" | \"teacher\"", "initial scale and shift, or those of the teacher's map"),
        doc("tail_bn", "\"eval\"", "\"eval\" | \"train\"", "running or batch statistics in the teacher's blocks; never written"),
    ],
    build: |params| Ok(Box::new(BlockKd::new(serde_json::from_value(params.clone())?)?)),
    parity,
    raw_terms: false,
};
