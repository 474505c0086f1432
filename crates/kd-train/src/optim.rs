//! Optimisers over flat buffers: SGD, AdamW and [DOT](crate::dot), with everything resume needs in the open.
//!
//! `g` gradient (after clipping), `p` parameter; every parameter alike, batch norms and biases included.
//!
//! ```text
//! clip    n = l2 norm over everything trained;  g *= min(1, clip / (n + 1e-6))
//! sgd     g += wd p;  v = g in the first step, later v = momentum v + (1 - dampening) g
//!         p -= lr v;  nesterov: p -= lr (g + momentum v)
//! adamw   t = 1, 2, ...:  p *= 1 - lr wd;  m = b1 m + (1-b1) g;  q = b2 q + (1-b2) g^2
//!         p -= lr (m / (1-b1^t)) / (sqrt(q / (1-b2^t)) + eps)
//! ```
//! This is what PyTorch's `SGD`, `AdamW` and `clip_grad_norm_` compute. On the CPU one sweep in place moves a whole network; elsewhere
//! the same arithmetic is composed of candle operations.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Storage, Tensor, Var};
use kd_core::params::Element;
use kd_core::{Error, Flat, Model, Result, StateDict};
use serde::{Deserialize, Serialize};

use crate::dot::{Dot, Kind};

/// Which rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimKind {
    /// [`Sgd`].
    #[default]
    Sgd,
    /// [`AdamW`].
    Adamw,
    /// [`Dot`]: SGD with momenta of their own for the labels and for distillation.
    Dot,
}

/// The `[optim]` section. Values of the other kind are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Which rule.
    pub kind: OptimKind,
    /// The base learning rate.
    pub lr: f64,
    /// SGD and DOT: share of the buffer that stays.
    pub momentum: f64,
    /// DOT: by how much distillation's momentum is larger and the task's smaller.
    pub delta: f64,
    /// SGD: look ahead by one step of the buffer.
    pub nesterov: bool,
    /// On every parameter.
    pub weight_decay: f64,
    /// AdamW: decay of the mean.
    pub beta1: f64,
    /// AdamW: decay of the mean square.
    pub beta2: f64,
    /// AdamW: added to the root.
    pub eps: f64,
    /// Upper bound of the gradient's norm; 0: none.
    pub clip_grad_norm: f64,
}

impl Default for OptimConfig {
    /// SGD as in the CIFAR-100 tables.
    fn default() -> Self {
        Self {
            kind: OptimKind::Sgd,
            lr: 0.05,
            momentum: 0.9,
            delta: 0.075,
            nesterov: false,
            weight_decay: 5e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip_grad_norm: 0.0,
        }
    }
}

impl OptimConfig {
    /// Refuses values that train nothing.
    pub fn validate(&self) -> Result<()> {
        let check = |key: &str, value: f64, holds: bool, allowed: &str| {
            if holds && value.is_finite() { Ok(()) } else { Err(Error::param(format!("optim.{key}"), value, allowed)) }
        };
        check("lr", self.lr, self.lr > 0.0, "more than 0")?;
        check("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "0 or more")?;
        check("clip_grad_norm", self.clip_grad_norm, self.clip_grad_norm >= 0.0, "0 (none) or more")?;
        check("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "at least 0 and less than 1")?;
        check("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "at least 0 and less than 1")?;
        check("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "at least 0 and less than 1")?;
        check("eps", self.eps, self.eps >= 0.0, "0 or more")?;
        if self.kind == OptimKind::Sgd && self.nesterov && self.momentum == 0.0 {
            return Err(Error::param("optim.nesterov", true, "false without momentum"));
        }
        if self.kind == OptimKind::Dot {
            let allowed = format!("at least 0, at most the momentum and less than 1 - momentum = {}", 1.0 - self.momentum);
            check("delta", self.delta, self.delta >= 0.0 && self.delta <= self.momentum && self.delta < 1.0 - self.momentum, &allowed)?;
            if self.nesterov {
                return Err(Error::param("optim.nesterov", true, "false with kind = \"dot\""));
            }
        }
        Ok(())
    }

    fn rule(&self) -> Rule {
        match self.kind {
            OptimKind::Sgd => {
                Rule::Sgd(Sgd { momentum: self.momentum, dampening: 0.0, nesterov: self.nesterov, weight_decay: self.weight_decay })
            }
            OptimKind::Dot => {
                Rule::Dot(Dot { momentum: self.momentum, delta: self.delta, dampening: 0.0, weight_decay: self.weight_decay })
            }
            OptimKind::Adamw => Rule::AdamW(AdamW { beta1: self.beta1, beta2: self.beta2, eps: self.eps, weight_decay: self.weight_decay }),
        }
    }
}

/// A float with what an update computes.
pub trait Real: Element {
    /// Its square root.
    fn sqrt(self) -> Self;
}

impl Real for f32 {
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

/// What one step of a rule is told.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The learning rate.
    pub lr: f64,
    /// Factor of the gradient (clipping).
    pub scale: f64,
    /// The step's number, from 1.
    pub t: u64,
}

/// Stochastic gradient descent with momentum.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Share of the buffer that stays.
    pub momentum: f64,
    /// Share of the gradient that stays out of the buffer after the first step.
    pub dampening: f64,
    /// Look ahead by one step of the buffer.
    pub nesterov: bool,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
}

impl Sgd {
    fn fresh(&self, t: u64) -> f64 {
        if t == 1 { 1.0 } else { 1.0 - self.dampening }
    }

    /// One step in place. `v` is the buffer, zero before the first step.
    pub fn sweep<T: Real>(&self, p: &mut [T], g: &[T], v: &mut [T], step: Step) {
        let [lr, scale, decay, momentum, fresh] =
            [step.lr, step.scale, self.weight_decay, self.momentum, self.fresh(step.t)].map(T::from_f64);
        for ((p, &g), v) in p.iter_mut().zip(g).zip(v) {
            let g = scale * g + decay * *p;
            *v = momentum * *v + fresh * g;
            *p -= lr * if self.nesterov { g + momentum * *v } else { *v };
        }
    }

    /// The same on tensors: the new parameter and buffer.
    pub fn compose(&self, p: &Tensor, g: &Tensor, v: &Tensor, step: Step) -> Result<(Tensor, Tensor)> {
        let g = ((g * step.scale)? + (p * self.weight_decay)?)?;
        let v = ((v * self.momentum)? + (&g * self.fresh(step.t))?)?;
        let direction = if self.nesterov { (g + (&v * self.momentum)?)? } else { v.clone() };
        Ok(((p - (direction * step.lr)?)?, v))
    }
}

/// Adam with decoupled weight decay (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root.
    pub eps: f64,
    /// Share of the parameter that decays per unit of learning rate.
    pub weight_decay: f64,
}

impl AdamW {
    /// What the mean and the mean square are divided by.
    fn corrections(&self, t: u64) -> (f64, f64) {
        let power = |beta: f64| beta.powf(t as f64);
        (1.0 - power(self.beta1), 1.0 - power(self.beta2))
    }

    /// One step in place. `m` and `q` are the mean and the mean square, zero before the first step.
    pub fn sweep<T: Real>(&self, p: &mut [T], g: &[T], m: &mut [T], q: &mut [T], step: Step) {
        let (c1, c2) = self.corrections(step.t);
        let [scale, keep, b1, b2, eps] = [step.scale, 1.0 - step.lr * self.weight_decay, self.beta1, self.beta2, self.eps].map(T::from_f64);
        let [a1, a2, rate, root] = [1.0 - self.beta1, 1.0 - self.beta2, step.lr / c1, c2.sqrt()].map(T::from_f64);
        for (((p, &g), m), q) in p.iter_mut().zip(g).zip(m).zip(q) {
            let g = scale * g;
            *m = b1 * *m + a1 * g;
            *q = b2 * *q + a2 * g * g;
            *p = keep * *p - rate * *m / (q.sqrt() / root + eps);
        }
    }

    /// The same on tensors: the new parameter, mean and mean square.
    pub fn compose(&self, p: &Tensor, g: &Tensor, m: &Tensor, q: &Tensor, step: Step) -> Result<(Tensor, Tensor, Tensor)> {
        let (c1, c2) = self.corrections(step.t);
        let g = (g * step.scale)?;
        let m = ((m * self.beta1)? + (&g * (1.0 - self.beta1))?)?;
        let q = ((q * self.beta2)? + (g.sqr()? * (1.0 - self.beta2))?)?;
        let denominator = ((q.sqrt()? / c2.sqrt())? + self.eps)?;
        let p = ((p * (1.0 - step.lr * self.weight_decay))? - ((&m * (step.lr / c1))? / denominator)?)?;
        Ok((p, m, q))
    }
}

#[derive(Clone, Copy, Debug)]
enum Rule {
    Sgd(Sgd),
    AdamW(AdamW),
    Dot(Dot),
}

impl Rule {
    /// Names of the buffers beside each parameter.
    fn buffers(&self) -> &'static [&'static str] {
        match self {
            Self::Sgd(_) => &["momentum"],
            Self::AdamW(_) => &["exp_avg", "exp_avg_sq"],
            Self::Dot(_) => &["momentum_task", "momentum_kd"],
        }
    }
}

/// What an optimiser moves.
#[derive(Clone)]
pub enum Target {
    /// The flat values of a network.
    Network(Arc<dyn Model>),
    /// One variable.
    Var(Var),
}

/// Something to be trained, under the name that its state is kept by.
#[derive(Clone)]
pub struct Part {
    /// `student`, `nd.network.0`, `ctkd.var.temperature`, ...
    pub name: String,
    /// The parameters.
    pub target: Target,
    /// Name prefixes of a network's parameters that are left as they are.
    pub unused: Vec<String>,
}

impl Part {
    /// The network, where it is one.
    pub(crate) fn network(&self) -> Option<&dyn Model> {
        match &self.target {
            Target::Network(network) => Some(network.as_ref()),
            Target::Var(_) => None,
        }
    }
}

/// The gradient of a part by one kind of loss.
pub struct SplitGradient {
    /// Flat for a network.
    pub flat: Tensor,
    /// Which of the part's tensors it reaches.
    pub reached: Vec<bool>,
}

struct Trained {
    name: String,
    target: Target,
    /// What moves, within the flat values.
    ranges: Vec<Range<usize>>,
    /// The single tensors that move, with their numbers: for rules that tell them apart.
    tensors: Vec<(usize, Range<usize>)>,
    buffers: Vec<Flat>,
    steps: u64,
    /// DOT: gradients that each tensor's buffers have taken.
    taken: [Vec<i64>; 2],
}

/// The optimiser of a run: one rule over several parts.
pub struct Optimiser {
    rule: Rule,
    parts: Vec<Trained>,
}

impl Optimiser {
    /// With empty buffers for every part.
    ///
    /// # Errors
    /// A network without flat parameters.
    pub fn new(config: &OptimConfig, parts: Vec<Part>) -> Result<Self> {
        let rule = config.rule();
        let parts = parts
            .into_iter()
            .map(|part| {
                let (len, dtype, device, ranges, tensors) = match &part.target {
                    Target::Network(network) => {
                        let params = network.params().ok_or_else(|| Error::missing(&part.name, "flat parameters"))?;
                        let used = |name: &str| !part.unused.iter().any(|prefix| name.starts_with(prefix.as_str()));
                        let mut ranges: Vec<Range<usize>> = vec![];
                        for entry in params.entries().iter().filter(|e| used(&e.name)) {
                            match ranges.last_mut() {
                                Some(last) if last.end == entry.offset => last.end = entry.range().end,
                                _ => ranges.push(entry.range()),
                            }
                        }
                        let tensors = params.entries().iter().enumerate().filter(|(_, e)| used(&e.name));
                        let tensors = tensors.map(|(i, e)| (i, e.range())).collect();
                        (params.count(), params.dtype(), params.device().clone(), ranges, tensors)
                    }
                    Target::Var(var) => {
                        let all = 0..var.elem_count();
                        (var.elem_count(), var.dtype(), var.device().clone(), vec![all.clone()], vec![(0, all)])
                    }
                };
                let tensors: Vec<(usize, Range<usize>)> = tensors;
                let buffers = rule.buffers().iter().map(|_| Flat::zeros(len, dtype, &device)).collect::<Result<_>>()?;
                let taken = [(); 2].map(|()| vec![0; tensors.last().map_or(0, |(i, _)| i + 1)]);
                Ok(Trained { name: part.name, target: part.target, ranges, tensors, buffers, steps: 0, taken })
            })
            .collect::<Result<_>>()?;
        Ok(Self { rule, parts })
    }

    /// Moves every part by one step. `grads` holds one gradient per part, flat for a network. A part without one stays as it is; one with
    /// a gradient of zero still decays and keeps its momentum.
    pub fn step(&mut self, grads: &[Option<Tensor>], lr: f64, scale: f64) -> Result<()> {
        for (part, grad) in self.parts.iter_mut().zip(grads) {
            if let Some(grad) = grad {
                part.steps += 1;
                part.step(&self.rule, grad, Step { lr, scale, t: part.steps })?;
            }
        }
        Ok(())
    }

    /// As [`Optimiser::step`] with the gradients of task and distillation apart: DOT's step.
    ///
    /// # Errors
    /// Another rule.
    pub fn step_split(&mut self, grads: &[[Option<SplitGradient>; 2]], lr: f64, scale: f64) -> Result<()> {
        let Rule::Dot(dot) = self.rule else {
            return Err(Error::refused("gradients of task and distillation apart are for optim.kind = \"dot\""));
        };
        for (part, grads) in self.parts.iter_mut().zip(grads) {
            if grads.iter().any(Option::is_some) {
                part.steps += 1;
                part.step_split(&dot, grads, Step { lr, scale, t: part.steps })?;
            }
        }
        Ok(())
    }

    /// Whether it wants the gradients of task and distillation apart.
    pub fn splits(&self) -> bool {
        matches!(self.rule, Rule::Dot(_))
    }

    /// Buffers and step counts by part name, copies.
    pub fn state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        for part in &self.parts {
            state.insert(format!("{}.steps", part.name), Tensor::new(part.steps as i64, &Device::Cpu)?);
            for (buffer, name) in part.buffers.iter().zip(self.rule.buffers()) {
                state.insert(format!("{}.{name}", part.name), buffer.snapshot()?);
                if let Rule::Dot(_) = self.rule {
                    let taken = &part.taken[usize::from(*name == "momentum_kd")];
                    state.insert(format!("{}.{name}.taken", part.name), Tensor::from_slice(taken, taken.len(), &Device::Cpu)?);
                }
            }
        }
        Ok(state)
    }

    /// Takes back what [`Optimiser::state`] gave.
    ///
    /// # Errors
    /// State of another rule or other parts.
    pub fn load_state(&mut self, state: &StateDict) -> Result<()> {
        let get = |name: &str| state.get(name).ok_or_else(|| Error::missing("the optimiser's state", name));
        for part in &mut self.parts {
            for (buffer, name) in part.buffers.iter().zip(self.rule.buffers()) {
                buffer.set(get(&format!("{}.{name}", part.name))?)?;
                if let Rule::Dot(_) = self.rule {
                    let taken = &mut part.taken[usize::from(*name == "momentum_kd")];
                    let found = get(&format!("{}.{name}.taken", part.name))?;
                    if found.dims() != [taken.len()] {
                        return Err(Error::shape(format!("{}.{name}.taken", part.name), format!("[{}]", taken.len()), found.dims()));
                    }
                    *taken = found.to_vec1::<i64>()?;
                }
            }
            part.steps = get(&format!("{}.steps", part.name))?.to_scalar::<i64>()? as u64;
        }
        Ok(())
    }
}

impl Trained {
    fn step(&self, rule: &Rule, grad: &Tensor, step: Step) -> Result<()> {
        match &self.target {
            Target::Network(network) => {
                let params = network.params().ok_or_else(|| Error::missing(&self.name, "flat parameters"))?;
                match (params.device().is_cpu(), params.dtype()) {
                    (true, DType::F32) => self.sweep::<f32>(params.values(), rule, grad, step),
                    (true, DType::F64) => self.sweep::<f64>(params.values(), rule, grad, step),
                    _ => params.values().set(&self.compose(params.values().snapshot()?, rule, grad, step)?),
                }
            }
            Target::Var(var) => {
                let moved = self.compose(var.as_detached_tensor().flatten_all()?, rule, &grad.flatten_all()?, step)?;
                Ok(var.set(&moved.reshape(var.shape())?)?)
            }
        }
    }

    /// DOT's step: neighbouring tensors of one kind move in one sweep.
    fn step_split(&mut self, dot: &Dot, grads: &[Option<SplitGradient>; 2], step: Step) -> Result<()> {
        let has = |which: usize, tensor: usize| grads[which].as_ref().is_some_and(|g| g.reached.get(tensor).copied().unwrap_or(false));
        let mut runs: Vec<(Kind, Range<usize>)> = vec![];
        for (i, range) in &self.tensors {
            let (task, distill) = (has(0, *i), has(1, *i));
            let kind = Kind { task, distill, first_task: self.taken[0][*i] == 0, first_distill: self.taken[1][*i] == 0 };
            self.taken[0][*i] += i64::from(task);
            self.taken[1][*i] += i64::from(distill);
            match runs.last_mut() {
                Some((last, run)) if *last == kind && run.end == range.start => run.end = range.end,
                _ => runs.push((kind, range.clone())),
            }
        }
        let silent = grads.iter().flatten().next().map(|g| g.flat.zeros_like()).transpose()?;
        let Some(silent) = silent else { return Ok(()) };
        let flat = |which: usize| grads[which].as_ref().map_or(&silent, |g| &g.flat).flatten_all();
        let flats = [flat(0)?, flat(1)?];
        match &self.target {
            Target::Network(network) => {
                let params = network.params().ok_or_else(|| Error::missing(&self.name, "flat parameters"))?;
                match (params.device().is_cpu(), params.dtype()) {
                    (true, DType::F32) => self.sweep_split::<f32>(params.values(), dot, &flats, &runs, step),
                    (true, DType::F64) => self.sweep_split::<f64>(params.values(), dot, &flats, &runs, step),
                    _ => params.values().set(&self.compose_split(params.values().snapshot()?, dot, &flats, &runs, step)?),
                }
            }
            Target::Var(var) => {
                let moved = self.compose_split(var.as_detached_tensor().flatten_all()?, dot, &flats, &runs, step)?;
                Ok(var.set(&moved.reshape(var.shape())?)?)
            }
        }
    }

    fn sweep_split<T: Real>(&self, values: &Flat, dot: &Dot, g: &[Tensor; 2], runs: &[(Kind, Range<usize>)], step: Step) -> Result<()> {
        with_slice::<T, _>(&g[0], |task| {
            with_slice::<T, _>(&g[1], |kd| {
                values.write::<T, _>(|p| {
                    self.buffers[0].write::<T, _>(|v| {
                        self.buffers[1].write::<T, _>(|w| {
                            for (kind, r) in runs.iter().cloned() {
                                let (g, v) = ([&task[r.clone()], &kd[r.clone()]], [&mut v[r.clone()], &mut w[r.clone()]]);
                                dot.sweep(&mut p[r], g, v, kind, step);
                            }
                        })
                    })
                })
            })
        })?????;
        Ok(())
    }

    /// The new values; the buffers move too.
    fn compose_split(&self, mut values: Tensor, dot: &Dot, g: &[Tensor; 2], runs: &[(Kind, Range<usize>)], step: Step) -> Result<Tensor> {
        let mut buffers = [self.buffers[0].snapshot()?, self.buffers[1].snapshot()?];
        for (kind, range) in runs {
            let part = |t: &Tensor| t.narrow(0, range.start, range.len());
            let (gs, vs) = ([part(&g[0])?, part(&g[1])?], [part(&buffers[0])?, part(&buffers[1])?]);
            let (moved, [v, w]) = dot.compose(&part(&values)?, [&gs[0], &gs[1]], [&vs[0], &vs[1]], *kind, step)?;
            values = values.slice_scatter0(&moved, range.start)?;
            buffers = [buffers[0].slice_scatter0(&v, range.start)?, buffers[1].slice_scatter0(&w, range.start)?];
        }
        self.buffers.iter().zip(&buffers).try_for_each(|(flat, new)| flat.set(new))?;
        Ok(values)
    }

    fn sweep<T: Real>(&self, values: &Flat, rule: &Rule, grad: &Tensor, step: Step) -> Result<()> {
        with_slice::<T, _>(grad, |g| {
            values.write::<T, _>(|p| match rule {
                Rule::Sgd(sgd) => self.buffers[0].write::<T, _>(|v| {
                    self.ranges.iter().cloned().for_each(|r| sgd.sweep(&mut p[r.clone()], &g[r.clone()], &mut v[r], step));
                }),
                Rule::AdamW(adam) => self.buffers[0].write::<T, _>(|m| {
                    self.buffers[1].write::<T, _>(|q| {
                        for r in self.ranges.iter().cloned() {
                            adam.sweep(&mut p[r.clone()], &g[r.clone()], &mut m[r.clone()], &mut q[r], step);
                        }
                    })
                })?,
                Rule::Dot(_) => Err(undivided()),
            })
        })??
    }

    /// The new values; the buffers move too.
    fn compose(&self, mut values: Tensor, rule: &Rule, grad: &Tensor, step: Step) -> Result<Tensor> {
        let mut buffers = self.buffers.iter().map(Flat::snapshot).collect::<Result<Vec<_>>>()?;
        for range in &self.ranges {
            let part = |t: &Tensor| t.narrow(0, range.start, range.len());
            let moved = match rule {
                Rule::Sgd(sgd) => {
                    let (p, v) = sgd.compose(&part(&values)?, &part(grad)?, &part(&buffers[0])?, step)?;
                    vec![p, v]
                }
                Rule::AdamW(adam) => {
                    let (p, m, q) = adam.compose(&part(&values)?, &part(grad)?, &part(&buffers[0])?, &part(&buffers[1])?, step)?;
                    vec![p, m, q]
                }
                Rule::Dot(_) => return Err(undivided()),
            };
            for (old, new) in std::iter::once(&mut values).chain(&mut buffers).zip(&moved) {
                *old = old.slice_scatter0(new, range.start)?;
            }
        }
        self.buffers.iter().zip(&buffers).try_for_each(|(flat, new)| flat.set(new))?;
        Ok(values)
    }
}

/// DOT cannot tell the two kinds of loss apart in their sum.
fn undivided() -> Error {
    Error::refused("optim.kind = \"dot\" needs the gradients of task and distillation apart")
}

/// The l2 norm over all gradients, summed in f64 in a fixed order on the CPU.
pub fn grad_norm(grads: &[Option<Tensor>]) -> Result<f64> {
    let mut sum = 0.0;
    for grad in grads.iter().flatten() {
        sum += match (grad.device().is_cpu(), grad.dtype()) {
            (true, DType::F32) => with_slice::<f32, _>(grad, |g| square_sum(g, f64::from))?,
            (true, DType::F64) => with_slice::<f64, _>(grad, |g| square_sum(g, |v| v))?,
            _ => f64::from(grad.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?),
        };
    }
    Ok(sum.sqrt())
}

/// Factor of the gradient that keeps its norm within `clip` (0: no bound).
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Eight sums side by side: a single one waits for itself.
fn square_sum<T: Copy>(values: &[T], widen: impl Fn(T) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|&v| widen(v) * widen(v)).sum();
    for chunk in chunks {
        for (sum, &v) in sums.iter_mut().zip(chunk) {
            *sum += widen(v) * widen(v);
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// The elements of a CPU tensor without a copy (when it is contiguous).
fn with_slice<T: Element, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => {
            let start = layout.start_offset();
            Ok(f(&cpu.as_slice::<T>()?[start..start + tensor.elem_count()]))
        }
        _ => Err(Error::refused("a gradient on another device cannot be read in place")),
    }
}
