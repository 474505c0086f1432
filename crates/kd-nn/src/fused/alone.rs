//! A convolution by itself, in each of its three directions, as the executor runs it.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device};
use kd_core::{Cut, Mode, Result, Rng};

use super::conv_grad::{ConvGrad, InputGrad};
use super::forward::{self, Batch, Inputs, Purpose, Tape};
use super::plan::{ConvStep, Kind, Plan, Source};
use super::value::Grad;
use crate::builder::{Conv, GraphBuilder};
use crate::kernels::Level;
use crate::kernels::buffer::Pool;
use crate::kernels::threads::{Lanes, cut, each};
use crate::network::{Network, Precision};

/// A convolution with its input, its weight and the gradient of its output.
pub struct Alone {
    tape: Tape,
    grad: Grad,
    dx: Vec<f32>,
    dw: Vec<f32>,
}

impl Alone {
    /// `conv` of `batch` images of shape `input`.
    pub fn new(input: [usize; 3], conv: Conv, batch: usize, precision: Precision) -> Result<Self> {
        let mut b = GraphBuilder::new("alone", &input);
        b.conv("conv", conv);
        b.stage(0, "conv", None);
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.linear("fc", 1);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish()?, DType::F32, &Device::Cpu)?;
        network.init(Rng::new(1))?;
        let (graph, params) = (network.graph(), network.shared_parameters());
        let (from, to) = (graph.cut(Cut::Input)?, graph.cut(Cut::Stage(0))?);
        let piece = graph.piece(from, &[to])?;
        let source = Source { level: Level::current(), graph, batch: true, fast: precision == Precision::Fast };
        let (plan, _) = source.chain(from, &input, &piece, &[to], false)?.remove(0);
        let (plan, pool) = (Arc::new(plan), Pool::default());
        let purpose = Purpose { mode: Mode::BatchStats, params: true, input: true };
        let packed = forward::pack(&plan, &params, &Mutex::default(), &pool, purpose)?;
        // Written by the threads that will use them: memory belongs to who touched it first.
        let random = |len: usize, seed: u64| {
            let mut x = pool.take(batch * len);
            let shares = Lanes::new(batch).shares();
            let parts = cut(&mut x, shares.iter().map(|s| s.images.len() * len));
            each(shares.into_iter().zip(parts).collect(), |(share, part)| {
                let first = (share.images.start * len) as u64;
                part.iter_mut().zip(first..).for_each(|(v, i)| *v = Rng::new(seed).uniform(i) as f32 - 0.5);
            });
            x
        };
        let x = random(plan.shapes[from].len(), 2);
        let grad = Grad::Stored(Arc::new(random(plan.shapes[to].len(), 3)));
        let (dx, dw) = (vec![0.0; batch * plan.shapes[from].len()], vec![0.0; params.entries()[0].range().len()]);
        let tape = Tape::run(&Batch { plan: &plan, params: &params, packed, purpose }, x, Lanes::new(batch), &pool)?;
        Ok(Self { tape, grad, dx, dw })
    }

    /// Additions and multiplications of one direction.
    pub fn flops(&self) -> f64 {
        let plan = self.tape.plan.clone();
        2.0 * (step(&plan).conv.macs() * self.tape.lanes.images) as f64
    }

    /// The output.
    pub fn forward(&mut self) {
        let plan = self.tape.plan.clone();
        drop(self.tape.conv(0, step(&plan)));
    }

    /// The input's gradient.
    pub fn input_grad(&mut self) {
        let plan = self.tape.plan.clone();
        let job = job(&self.tape, step(&plan), &self.grad);
        job.run(&self.tape, None, Some(InputGrad { dx: &mut self.dx, add: false, finish: None }));
    }

    /// The weight's gradient, added to what there was.
    pub fn weight_grad(&mut self) {
        let plan = self.tape.plan.clone();
        let step = step(&plan);
        let job = job(&self.tape, step, &self.grad);
        let mut sums = job.weight_sums(&self.tape, false);
        job.run(&self.tape, Some(&mut sums), None);
        sums.gather(&step.conv, &mut self.dw);
    }
}

fn step(plan: &Plan) -> &ConvStep {
    let Kind::Conv(step) = &plan.steps[0].kind else { unreachable!("invariant: the plan is one convolution") };
    step
}

fn job<'a>(tape: &'a Tape, step: &'a ConvStep, grad: &'a Grad) -> ConvGrad<'a> {
    let (x, lens) = tape.value(step.x).view();
    let inputs = Inputs { conv: &step.conv, x, lens };
    ConvGrad { level: tape.plan.level, inputs, panels: tape.packed(0).backward.as_deref(), grad }
}
