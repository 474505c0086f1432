//! The adapter of the KD++ losses: brings the student's embedding to the teacher's width.
//!
//! `bn_dropout_linear`: batch norm over the student's width, dropout, linear layer to the teacher's width, applied for these losses
//! alone: the logits come from the embedding as it is. It is trained with the student and thrown away afterwards. Parameters as on
//! CIFAR-100: batch norm 1 and 0, linear weight by PyTorch's default, bias 0 (the ImageNet scripts draw both from N(0, 0.01)).

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, Mode, Model, ParityInputs, Result, Setup, StepView};
use kd_nn::{GraphBuilder, Init, Network, Op};
use serde::{Deserialize, Serialize};

use crate::inputs;

/// Which adapter stands behind the student's embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adapter {
    /// None when the widths agree, batch norm, dropout and a linear layer otherwise.
    #[default]
    Auto,
    /// None: the widths must agree.
    None,
    /// Batch norm, dropout, linear layer.
    BnDropoutLinear,
}

/// The adapter's parameters within a method's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) kind: Adapter,
    pub(crate) bn_eps: f64,
    pub(crate) dropout: f64,
}

impl Config {
    pub(crate) fn validate(&self) -> Result<()> {
        inputs::positive("bn_eps", self.bn_eps)?;
        if (0.0..1.0).contains(&self.dropout) { Ok(()) } else { Err(Error::param("dropout", self.dropout, "at least 0 and less than 1")) }
    }

    fn wanted(&self, student: usize, teacher: usize) -> bool {
        match self.kind {
            Adapter::Auto => student != teacher,
            Adapter::None => false,
            Adapter::BnDropoutLinear => true,
        }
    }

    /// The adapter as a network of its own, `None` where the embedding goes as it is.
    pub(crate) fn build(&self, setup: &Setup<'_>, teacher: usize, method: &str) -> Result<Option<Arc<Network>>> {
        let student = setup.models.student.spec().embedding;
        if !self.wanted(student, teacher) {
            if student != teacher {
                let allowed =
                    format!("\"auto\" or \"bn_dropout_linear\": the student's embedding is {student} wide, the teacher's {teacher}");
                return Err(Error::param(format!("{method}: adapter"), "\"none\"", allowed));
            }
            return Ok(None);
        }
        if setup.batch_size < 2 {
            return Err(one_sample());
        }
        let mut b = GraphBuilder::new(format!("{method}.adapter"), &[student]);
        b.batch_norm_with("norm", true, self.bn_eps);
        b.layer(Op::Dropout { p: self.dropout });
        b.linear_with("linear", teacher, Init::Default, Some(Init::Const(0.0)));
        b.cut(Cut::Embedding);
        let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
        network.init(setup.rng.named("adapter"))?;
        Ok(Some(Arc::new(network)))
    }

    /// The adapted embedding of a parity call, from `param.adapter.*`.
    pub(crate) fn parity(&self, inputs: &ParityInputs, teacher: usize) -> Result<Tensor> {
        let f = inputs.get("student.embedding")?;
        let (b, width) = inputs::embedding("student.embedding", f)?;
        if !self.wanted(width, teacher) {
            return Ok(f.clone());
        }
        if b < 2 {
            return Err(one_sample());
        }
        if self.dropout != 0.0 {
            return Err(Error::param("dropout", self.dropout, "0 here: a call on named tensors draws no random numbers"));
        }
        let get = |name: &str, shape: &[usize]| {
            let name = format!("param.adapter.{name}");
            let tensor = inputs.get(&name)?;
            if tensor.dims() == shape { Ok(tensor) } else { Err(Error::shape(name, format!("{shape:?}"), tensor.dims())) }
        };
        let centred = f.broadcast_sub(&f.mean_keepdim(0)?)?;
        let std = (centred.sqr()?.mean_keepdim(0)? + self.bn_eps)?.sqrt()?;
        let norm = centred.broadcast_div(&std)?.broadcast_mul(get("norm.weight", &[width])?)?.broadcast_add(get("norm.bias", &[width])?)?;
        let linear = norm.matmul(&get("linear.weight", &[teacher, width])?.t()?)?;
        Ok(linear.broadcast_add(get("linear.bias", &[teacher])?)?)
    }
}

/// The student's embedding of a step, behind the adapter if there is one.
pub(crate) fn apply(adapter: Option<&Arc<Network>>, step: &StepView<'_>) -> Result<Tensor> {
    let f = step.student()?.embedding()?;
    let Some(network) = adapter else { return Ok(f.clone()) };
    if f.dim(0)? < 2 {
        return Err(one_sample());
    }
    let out = network.run(f, Cut::Input, &[Cut::Embedding], Mode::Train(step.rng.named("adapter")))?;
    Ok(out.embedding()?.clone())
}

/// What [`kd_core::Method::networks`] returns.
pub(crate) fn networks(adapter: Option<&Arc<Network>>) -> Vec<Arc<dyn Model>> {
    adapter.map(|n| Arc::clone(n) as Arc<dyn Model>).into_iter().collect()
}

fn one_sample() -> Error {
    Error::refused("adapter: batch norm in training mode needs a batch of at least 2 samples, got 1")
}
