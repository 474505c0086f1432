//! Linear heads that bring both embeddings to one width, `f = W e + b`; the teacher's head is trained with the student, too.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, Mode, Model, ParityInputs, Result, Setup, StepView};
use kd_nn::{GraphBuilder, Network};

use crate::inputs;

/// Both heads as networks of their own, initialised as PyTorch's linear layers.
pub(crate) struct Heads([Arc<Network>; 2]);

impl Heads {
    pub(crate) fn new(setup: &Setup<'_>, dim: usize, method: &str) -> Result<Self> {
        let build = |name: &str, width: usize| -> Result<Arc<Network>> {
            let mut b = GraphBuilder::new(format!("{method}.{name}"), &[width]);
            b.linear(name, dim);
            b.cut(Cut::Embedding);
            let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
            network.init(setup.rng.named(name))?;
            Ok(Arc::new(network))
        };
        let teacher = setup.teacher(method)?.spec().embedding;
        Ok(Self([build("embed_s", setup.models.student.spec().embedding)?, build("embed_t", teacher)?]))
    }

    pub(crate) fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.0.iter().map(|n| Arc::clone(n) as Arc<dyn Model>).collect()
    }

    /// `f_s` and `f_t`, `[B,dim]`, of a step.
    pub(crate) fn apply(&self, step: &StepView<'_>) -> Result<[Tensor; 2]> {
        let run = |network: &Network, e: &Tensor| -> Result<Tensor> {
            Ok(network.run(e, Cut::Input, &[Cut::Embedding], Mode::Train(step.rng.named("heads")))?.embedding()?.clone())
        };
        let (student, teacher) = (step.student()?.embedding()?, step.teacher()?.embedding()?);
        Ok([run(&self.0[0], student)?, run(&self.0[1], &inputs::constant(teacher, student)?)?])
    }
}

/// `f_s` and `f_t` of a parity call.
pub(crate) fn parity(inputs: &ParityInputs) -> Result<[Tensor; 2]> {
    let (student, teacher) = (inputs.get("student.embedding")?, inputs.get("teacher.embedding")?);
    let (_, teacher) = inputs::one_batch(student, teacher)?;
    let dim = inputs.get("param.embed_s.weight")?.dims()[0];
    let linear = |name: &str, e: &Tensor| -> Result<Tensor> {
        let get = |part: &str, shape: &[usize]| {
            let name = format!("param.{name}.{part}");
            let tensor = inputs.get(&name)?;
            if tensor.dims() == shape { Ok(tensor) } else { Err(Error::shape(name, format!("{shape:?}"), tensor.dims())) }
        };
        Ok(e.matmul(&get("weight", &[dim, e.dim(1)?])?.t()?)?.broadcast_add(get("bias", &[dim])?)?)
    };
    Ok([linear("embed_s", student)?, linear("embed_t", &teacher)?])
}
