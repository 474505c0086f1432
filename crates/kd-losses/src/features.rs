//! Stages of both networks: which are compared, their shapes, grids brought together, and the method of losses that need no more.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Cut, Error, FeatureSpec, LossTerms, Method, Mode, Model, ModelSpec, Needs, ParamDoc, ParityInputs, Phase, Result, Setup, StepView,
};
use kd_nn::{GraphBuilder, Network, ops};

use crate::layers::one_value;

/// The maps of both networks that a feature loss compares, `[B,C,H,W]` each; widths and grids may differ.
#[derive(Clone, Copy, Debug)]
pub struct StagePair<'a> {
    /// The student's stage, 0 being the stem: it names the term.
    pub index: usize,
    /// The student's map.
    pub student: &'a Tensor,
    /// The teacher's map; it is detached.
    pub teacher: &'a Tensor,
}

impl StagePair<'_> {
    /// What messages and terms call it.
    pub(crate) fn name(&self) -> String {
        format!("stage.{}", self.index)
    }

    /// Checks the ranks and the batch; the teacher's map outside any graph, in the student's type.
    pub(crate) fn teacher(&self) -> Result<Tensor> {
        let b = map(&format!("student.{}", self.name()), self.student)?[0];
        let rows = map(&format!("teacher.{}", self.name()), self.teacher)?[0];
        if b != rows {
            return Err(Error::shape(format!("teacher.{}", self.name()), format!("[{b},C,H,W], as the student's"), self.teacher.dims()));
        }
        crate::inputs::constant(self.teacher, self.student)
    }

    /// Both maps on the smaller grid: adaptive average pooling of the one with more rows. The teacher's is detached.
    pub(crate) fn matched(&self) -> Result<(Tensor, Tensor)> {
        let teacher = self.teacher()?;
        let (s, t) = matched(self.student, &teacher)?;
        Ok((s, t))
    }
}

/// Batch, channels, height and width of a map.
pub(crate) fn map(what: &str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [b, c, h, w] if b >= 1 && c >= 1 && h >= 1 && w >= 1 => Ok([b, c, h, w]),
        _ => Err(Error::shape(what, "[B,C,H,W] with none of them 0", x.dims())),
    }
}

/// Both maps on the grid of the one with fewer rows.
pub(crate) fn matched(s: &Tensor, t: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((_, _, hs, ws), (_, _, ht, wt)) = (s.dims4()?, t.dims4()?);
    let both = if hs > ht {
        (ops::adaptive_avg_pool2d(s, [ht, wt])?, t.clone())
    } else if hs < ht {
        (s.clone(), ops::adaptive_avg_pool2d(t, [hs, ws])?)
    } else if ws == wt {
        (s.clone(), t.clone())
    } else {
        return Err(Error::shape(
            "teacher's map",
            format!("[B,C,{hs},{ws}], as the student's: the heights agree, the widths do not"),
            t.dims(),
        ));
    };
    Ok(both)
}

/// Which stages a method compares when its configuration names none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stages {
    /// From stage 1 on, the same number on both sides; the side with fewer decides.
    Bodies,
    /// From the stem on, likewise.
    WithStem,
    /// Each side's last.
    Last,
    /// From stage 1 on, the last with the last.
    FromTheEnd,
}

/// One comparison: cuts, and shapes `[C,H,W]` at the networks' own input size.
#[derive(Clone, Debug)]
pub(crate) struct Match {
    /// The student's stage.
    pub(crate) index: usize,
    pub(crate) student: Cut,
    pub(crate) teacher: Cut,
    pub(crate) from: [usize; 3],
    pub(crate) to: [usize; 3],
    /// The teacher's batch norm before the stage's ReLU.
    pub(crate) teacher_norm: Option<String>,
}

/// What a method compares.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    /// Named in the configuration, ascending.
    pub(crate) stages: Option<Vec<usize>>,
    pub(crate) default: Stages,
    /// Pre-activations instead of outputs, student and teacher.
    pub(crate) preact: [bool; 2],
}

fn cut(preact: bool, i: usize) -> Cut {
    if preact { Cut::Preact(i) } else { Cut::Stage(i) }
}

fn spec_of(spec: &ModelSpec, i: usize) -> Result<&FeatureSpec> {
    spec.stages.get(i).ok_or_else(|| {
        Error::refused(format!("`{}` has no stage {i}: its stages are 0 to {}", spec.name, spec.stages.len().saturating_sub(1)))
    })
}

impl Choice {
    /// Outputs of the stages.
    pub(crate) fn outputs(stages: &Option<Vec<usize>>, default: Stages) -> Self {
        Self { stages: stages.clone(), default, preact: [false; 2] }
    }

    /// Pre-activations of the stages.
    pub(crate) fn preacts(stages: &Option<Vec<usize>>, default: Stages) -> Self {
        Self { stages: stages.clone(), default, preact: [true; 2] }
    }

    /// Refuses a list that is empty or does not ascend.
    pub(crate) fn validate(&self) -> Result<()> {
        match &self.stages {
            Some(list) if list.is_empty() || list.windows(2).any(|w| w[0] >= w[1]) => {
                Err(Error::param("stages", format!("{list:?}"), "ascending stage numbers, at least one"))
            }
            _ => Ok(()),
        }
    }

    /// What is certain before the networks are known.
    pub(crate) fn before(&self) -> Needs {
        let stages = self.stages.clone().unwrap_or_else(|| vec![1]);
        let cuts = |side: usize| stages.iter().map(|&i| cut(self.preact[side], i)).collect();
        Needs { student: cuts(0), teacher: cuts(1), ..Needs::default() }
    }

    /// The comparisons of these networks.
    ///
    /// # Errors
    /// A stage or pre-activation that a network has not; nothing to compare.
    pub(crate) fn matches(&self, setup: &Setup<'_>, method: &str) -> Result<Vec<Match>> {
        let (student, teacher) = (setup.models.student.spec(), setup.teacher(method)?.spec());
        let (ns, nt) = (student.stages.len(), teacher.stages.len());
        let zipped = |first: usize| (first..ns.min(nt)).map(|i| (i, i)).collect();
        // Stage ns - k of the student with stage nt - k of the teacher.
        let ends = |stages: &[usize]| stages.iter().filter(|&&i| i + nt > ns).map(|&i| (i, i + nt - ns)).collect();
        let pairs: Vec<(usize, usize)> = match (&self.stages, self.default) {
            (Some(list), Stages::FromTheEnd) => {
                list.iter().try_for_each(|&i| spec_of(student, i).map(drop)).map_err(|e| named(method, e))?;
                ends(list)
            }
            (Some(list), _) => list.iter().map(|&i| (i, i)).collect(),
            (None, Stages::Bodies) => zipped(1),
            (None, Stages::WithStem) => zipped(0),
            (None, Stages::Last) => ns.checked_sub(1).zip(nt.checked_sub(1)).into_iter().collect(),
            (None, Stages::FromTheEnd) => {
                let own: Vec<usize> = (1..ns).collect();
                ends(&own).into_iter().filter(|&(_, j): &(usize, usize)| j >= 1).collect()
            }
        };
        if pairs.is_empty() {
            let why =
                format!("{method}: no stages to compare: `{}` has {ns} with the stem, the teacher `{}` {nt}", student.name, teacher.name);
            return Err(Error::refused(why));
        }
        pairs.into_iter().map(|(i, j)| self.one([student, teacher], [i, j])).collect::<Result<_>>().map_err(|e| named(method, e))
    }

    fn one(&self, specs: [&ModelSpec; 2], at: [usize; 2]) -> Result<Match> {
        let features = [spec_of(specs[0], at[0])?, spec_of(specs[1], at[1])?];
        for side in 0..2 {
            if self.preact[side] && !features[side].has_preact {
                return Err(Error::refused(format!("stage {} of `{}` has no pre-activation", at[side], specs[side].name)));
            }
        }
        let shape = |f: &FeatureSpec| [f.channels, f.size[0], f.size[1]];
        Ok(Match {
            index: at[0],
            student: cut(self.preact[0], at[0]),
            teacher: cut(self.preact[1], at[1]),
            from: shape(features[0]),
            to: shape(features[1]),
            teacher_norm: features[1].norm_before_relu.clone(),
        })
    }

    /// The pairs of a parity call, `student.stage.<i>` and `teacher.stage.<i>` (or `preact`): those named, or all there are.
    pub(crate) fn parity<'a>(&self, inputs: &'a ParityInputs) -> Result<Vec<StagePair<'a>>> {
        let kind = |side: usize| if self.preact[side] { "preact" } else { "stage" };
        let stages = self.stages.clone().unwrap_or_else(|| {
            let prefix = format!("student.{}.", kind(0));
            let mut found: Vec<usize> = inputs.tensors.keys().filter_map(|n| n.strip_prefix(&prefix)?.parse().ok()).collect();
            found.retain(|&i| i > 0 || self.default == Stages::WithStem);
            found.sort_unstable();
            if self.default == Stages::Last { found.split_off(found.len().saturating_sub(1)) } else { found }
        });
        if stages.is_empty() {
            return Err(Error::missing("this method", format!("student.{}.1", kind(0))));
        }
        let pair = |index| {
            let student = inputs.get(&format!("student.{}.{index}", kind(0)))?;
            Ok(StagePair { index, student, teacher: inputs.get(&format!("teacher.{}.{index}", kind(1)))? })
        };
        stages.into_iter().map(pair).collect()
    }
}

fn named(method: &str, e: Error) -> Error {
    Error::refused(format!("{method}: {e}"))
}

/// The cuts that comparisons need.
pub(crate) fn needs<'a>(matches: impl IntoIterator<Item = &'a Match>) -> Needs {
    let (student, teacher) = matches.into_iter().map(|m| (m.student, m.teacher)).unzip();
    Needs { student, teacher, ..Needs::default() }
}

/// The maps of a step.
pub(crate) fn pairs<'a>(matches: &[Match], step: &StepView<'a>) -> Result<Vec<StagePair<'a>>> {
    let (student, teacher) = (step.student()?, step.teacher()?);
    let pair = |m: &Match| Ok(StagePair { index: m.index, student: student.get(m.student)?, teacher: teacher.get(m.teacher)? });
    matches.iter().map(pair).collect()
}

/// A method without adapters and state: a function of the maps.
pub(crate) struct Plain<F> {
    name: &'static str,
    choice: Choice,
    matches: Vec<Match>,
    check: fn(&[Match]) -> Result<()>,
    loss: F,
}

impl<F: Fn(&[StagePair<'_>]) -> Result<LossTerms> + Send> Plain<F> {
    pub(crate) fn new(name: &'static str, choice: Choice, loss: F) -> Self {
        Self { name, choice, matches: vec![], check: |_| Ok(()), loss }
    }

    /// With a condition on the networks.
    pub(crate) fn checked(mut self, check: fn(&[Match]) -> Result<()>) -> Self {
        self.check = check;
        self
    }
}

impl<F: Fn(&[StagePair<'_>]) -> Result<LossTerms> + Send> Method for Plain<F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> Needs {
        if self.matches.is_empty() { self.choice.before() } else { needs(&self.matches) }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let matches = self.choice.matches(setup, self.name)?;
        (self.check)(&matches)?;
        self.matches = matches;
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        prepared(&self.matches, self.name)?;
        (self.loss)(&pairs(&self.matches, step)?)
    }
}

/// Refuses a loss before [`Method::prepare`].
pub(crate) fn prepared<T>(what: &[T], method: &str) -> Result<()> {
    if what.is_empty() { Err(Error::missing(method, "to be prepared for its networks (`prepare`)")) } else { Ok(()) }
}

/// An adapter's network, its parameters drawn by name from the stream of its own name.
///
/// By convention the graph is called `<method>`, or `<method>.<prefix>` where the parameters of a parity call are `param.<prefix>.<name>`.
pub(crate) fn network(setup: &Setup<'_>, b: GraphBuilder) -> Result<Arc<Network>> {
    let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
    network.init(setup.rng.named(&network.spec().name))?;
    Ok(Arc::new(network))
}

/// As [`Method::networks`] returns them.
pub(crate) fn models<'a>(networks: impl IntoIterator<Item = &'a Arc<Network>>) -> Vec<Arc<dyn Model>> {
    networks.into_iter().map(|n| Arc::clone(n) as Arc<dyn Model>).collect()
}

/// Runs an adapter in training mode from one cut to another.
pub(crate) fn run(network: &Network, x: &Tensor, from: Cut, to: Cut, step: &StepView<'_>) -> Result<Tensor> {
    Ok(network.run(x, from, &[to], Mode::Train(step.rng.named(&network.spec().name)))?.get(to)?.clone())
}

/// Refuses batches of one where batch norm sees a single position.
pub(crate) fn batch_statistics(setup: &Setup<'_>, method: &str, positions: usize) -> Result<()> {
    if positions > 1 {
        return Ok(());
    }
    let b = setup.batch_size;
    if b == 1 {
        return Err(one_value(method));
    }
    if setup.train_samples % b == 1 {
        return Err(Error::refused(format!(
            "{method}: batch norm in training mode needs at least 2 samples, and the last of {} samples in batches of {b} stands alone",
            setup.train_samples
        )));
    }
    Ok(())
}

/// The documentation of a list of stages.
pub(crate) const fn stages_doc(about: &'static str) -> ParamDoc {
    ParamDoc { name: "stages", default: "null", range: "ascending stage numbers, or null", about }
}
pub(crate) const BN_EPS: ParamDoc = ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "of the adapters' batch norms" };
pub(crate) const BN_MOMENTUM: ParamDoc =
    ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "share of a batch in their running statistics" };
pub(crate) const INIT_EPOCHS: ParamDoc =
    ParamDoc { name: "init_epochs", default: "30", range: ">= 0", about: "epochs of an initial phase with this loss alone; 0: none" };

/// What a loss of an initial phase needs in the main training: nothing, once the networks are known (before that, what the phase needs,
/// so that networks without it are refused).
pub(crate) fn main_needs(wanted: Needs, init_epochs: usize, unprepared: bool) -> Needs {
    if init_epochs == 0 || unprepared { wanted } else { Needs { student: vec![], ..Needs::default() } }
}

/// The one initial phase of a method, if it has epochs.
pub(crate) fn initial(name: &str, epochs: usize, needs: Needs, unused: &[String]) -> Vec<Phase> {
    let phase = Phase { name: name.to_string(), epochs, needs, unused: unused.to_vec(), ..Phase::default() };
    if epochs > 0 { vec![phase] } else { vec![] }
}

/// Name prefixes of the parameters that a run from the images to `cuts` does not meet; none are known of a network without a graph.
pub(crate) fn unreached(model: &dyn Model, cuts: impl Iterator<Item = Cut>) -> Result<Vec<String>> {
    let Some(network) = model.as_any().downcast_ref::<Network>() else { return Ok(vec![]) };
    let graph = network.graph();
    let wanted = cuts.map(|cut| graph.cut(cut)).collect::<Result<Vec<_>>>()?;
    let met = graph.piece(0, &wanted)?;
    let name = |id: usize| graph.nodes()[id].name.as_str();
    let missed = (0..graph.nodes().len()).filter(|id| !met.contains(id) && !met.iter().any(|&m| name(m) == name(*id)));
    Ok(missed.map(name).filter(|name| !name.is_empty()).map(|name| format!("{name}.")).collect())
}
