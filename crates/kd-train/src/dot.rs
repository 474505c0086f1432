//! DOT: learning the labels and learning from the teacher keep momenta of their own.
//!
//! Zhao et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023, arXiv 2307.08436.
//!
//! ```text
//! v_task = (momentum - delta) v_task + (1 - dampening) (g_task + wd p)
//! v_kd   = (momentum + delta) v_kd   + (1 - dampening) g_kd                 in its first step a buffer takes the gradient whole
//! p     -= lr (v_task + v_kd)
//! ```
//!
//! `g_task` is the gradient of the terms tagged [`Tag::Task`](kd_core::Tag::Task) (cross-entropy with the labels), `g_kd` that of all others, both with their
//! weights. A parameter that only one of them reaches (an adapter, a classifier that no distillation loss sees) has one buffer with the
//! plain `momentum`, decayed too; one that only `g_kd` reaches is not decayed in its first step, as released. With `delta` 0 and both
//! gradients it is plain SGD on the sum.
//!
//! The authors' `delta`: 0.075 on CIFAR-100 and Tiny ImageNet, 0.09 on ImageNet, with momentum 0.9. Two backward passes over one graph:
//! about half a step's time more, and one buffer more for each parameter.

use candle_core::Tensor;
use kd_core::Result;

use crate::optim::{Real, Step};

/// The rule.
#[derive(Clone, Copy, Debug)]
pub struct Dot {
    /// Share of a buffer that stays, before `delta`.
    pub momentum: f64,
    /// What the task's buffer keeps less and distillation's more.
    pub delta: f64,
    /// Share of the gradient that stays out of a buffer after its first step.
    pub dampening: f64,
    /// Added to the task's gradient, times the parameter.
    pub weight_decay: f64,
}

/// Which gradients some parameters have, and whether their buffers are new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Whether there is a task gradient.
    pub task: bool,
    /// Whether there is a distillation gradient.
    pub distill: bool,
    /// Whether the task's buffer takes its first gradient.
    pub first_task: bool,
    /// Whether distillation's buffer takes its first gradient.
    pub first_distill: bool,
}

/// Factors of one step: of the old buffers, the new gradients, and of the parameter within each gradient.
struct Factors {
    keep: [f64; 2],
    take: [f64; 2],
    decay: [f64; 2],
}

impl Dot {
    fn factors(&self, kind: Kind) -> Factors {
        let both = kind.task && kind.distill;
        let fresh = |first: bool| if first { 1.0 } else { 1.0 - self.dampening };
        let decay_distill = if both || kind.first_distill { 0.0 } else { self.weight_decay };
        Factors {
            keep: if both { [self.momentum - self.delta, self.momentum + self.delta] } else { [self.momentum; 2] },
            take: [fresh(kind.first_task), fresh(kind.first_distill)],
            decay: [self.weight_decay, decay_distill],
        }
    }

    /// One step in place of parameters of one kind. `g` and `v` are the gradients and buffers of task and distillation; of a gradient that
    /// the kind lacks nothing is read, and its buffer stays. `step.t` plays no part.
    pub fn sweep<T: Real>(&self, p: &mut [T], g: [&[T]; 2], v: [&mut [T]; 2], kind: Kind, step: Step) {
        let f = self.factors(kind);
        let [lr, scale] = [step.lr, step.scale].map(T::from_f64);
        let (keep, take, decay) = (f.keep.map(T::from_f64), f.take.map(T::from_f64), f.decay.map(T::from_f64));
        let [v_task, v_kd] = v;
        for (i, p) in p.iter_mut().enumerate() {
            let old = *p;
            if kind.task {
                v_task[i] = keep[0] * v_task[i] + take[0] * (scale * g[0][i] + decay[0] * old);
                *p -= lr * v_task[i];
            }
            if kind.distill {
                v_kd[i] = keep[1] * v_kd[i] + take[1] * (scale * g[1][i] + decay[1] * old);
                *p -= lr * v_kd[i];
            }
        }
    }

    /// The same on tensors: the new parameters and buffers.
    pub fn compose(&self, p: &Tensor, g: [&Tensor; 2], v: [&Tensor; 2], kind: Kind, step: Step) -> Result<(Tensor, [Tensor; 2])> {
        let f = self.factors(kind);
        let mut moved = p.clone();
        let mut buffers = v.map(Clone::clone);
        for (i, present) in [kind.task, kind.distill].into_iter().enumerate() {
            if present {
                let g = ((g[i] * step.scale)? + (p * f.decay[i])?)?;
                buffers[i] = ((v[i] * f.keep[i])? + (g * f.take[i])?)?;
                moved = (moved - (&buffers[i] * step.lr)?)?;
            }
        }
        Ok((moved, buffers))
    }
}
