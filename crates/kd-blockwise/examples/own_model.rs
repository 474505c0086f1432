//! Block-KD on a user's own candle networks: nothing here is a kd-nn graph but the connectors.
//!
//! `cargo run -p kd-blockwise --example own_model`
#![allow(clippy::print_stdout, reason = "an example")]

use std::any::Any;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, Optimizer, SGD, VarBuilder, VarMap, conv2d, linear};
use kd_blockwise::{BlockKd, Params};
use kd_core::{
    Batch, Classifier, Cut, Error, FeatureSpec, Method, Mode, Model, ModelSpec, Models, Outputs, Progress, Result, Rng, Setup, StepView,
    Trainable,
};

const CLASSES: usize = 4;
const SIZE: usize = 8;

/// Blocks of convolution and ReLU, each but the first behind a 2x2 pooling; mean over the map; a linear layer.
struct Cnn {
    spec: ModelSpec,
    blocks: Vec<Conv2d>,
    head: Linear,
    vars: VarMap,
    frozen: bool,
}

impl Cnn {
    fn new(name: &str, widths: &[usize], seed: u64) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let padded = Conv2dConfig { padding: 1, ..Default::default() };
        let mut channels = 3;
        let (mut blocks, mut features) = (vec![], vec![]);
        for (i, &width) in widths.iter().enumerate() {
            blocks.push(conv2d(channels, width, 3, padded, vb.pp(format!("block{i}")))?);
            features.push(FeatureSpec {
                name: format!("block{i}"),
                channels: width,
                size: [SIZE >> i; 2],
                post_relu: true,
                has_preact: false,
                norm_before_relu: None,
            });
            channels = width;
        }
        let head = linear(channels, CLASSES, vb.pp("head"))?;
        let spec = ModelSpec {
            name: name.to_string(),
            classes: CLASSES,
            embedding: channels,
            input: [3, SIZE, SIZE],
            blocks: features,
            stages: vec![],
            logits_dist: false,
        };
        let own = Self { spec, blocks, head, vars, frozen: false };
        // candle's generator cannot be seeded on the CPU; ours is a function of the seed.
        let mut named: Vec<(String, Var)> = own.vars.data().lock().unwrap_or_else(|e| e.into_inner()).clone().into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, var) in named {
            let rng = Rng::new(seed).named(&name);
            let fan_in = var.dims()[1..].iter().product::<usize>() as f64;
            let scale = if var.rank() == 1 { 0.0 } else { (2.0 / fan_in).sqrt() };
            let values: Vec<f32> = (0..var.elem_count() as u64).map(|i| (rng.normal(i) * scale) as f32).collect();
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
        }
        Ok(own)
    }

    /// A teacher: the same network, whose variables no gradient is asked for.
    fn frozen(self) -> Self {
        Self { frozen: true, ..self }
    }
}

impl Model for Cnn {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn run(&self, x: &Tensor, from: Cut, wanted: &[Cut], _mode: Mode) -> Result<Outputs> {
        // The steps in order, each with the cut behind it; running starts behind `from`.
        let n = self.blocks.len();
        let mut order: Vec<Cut> = vec![Cut::Input];
        order.extend((1..=n).map(Cut::Block));
        order.extend([Cut::Embedding, Cut::Logits]);
        let at =
            |cut: Cut| order.iter().position(|&c| c == cut).ok_or_else(|| Error::refused(format!("{} has no cut `{cut}`", self.spec.name)));
        let last = wanted.iter().map(|&c| at(c)).try_fold(0, |m, i| i.map(|i| m.max(i)))?;
        let (mut x, mut outputs) = (x.clone(), Outputs::default());
        for &cut in &order[at(from)? + 1..=last] {
            x = match cut {
                Cut::Block(b) => {
                    let input = if b > 1 { x.max_pool2d(2)? } else { x };
                    self.blocks[b - 1].forward(&input)?.relu()?
                }
                Cut::Embedding => x.mean((2, 3))?,
                _ => self.head.forward(&x)?,
            };
            if wanted.contains(&cut) {
                outputs.insert(cut, x.clone());
            }
        }
        Ok(outputs)
    }

    fn params(&self) -> Option<&kd_core::Params> {
        None
    }

    fn trainable(&self) -> Trainable {
        if self.frozen { Trainable::Frozen } else { Trainable::Vars(self.vars.all_vars()) }
    }

    fn classifier(&self) -> Result<Classifier> {
        Ok(Classifier { weight: self.head.weight().detach(), bias: self.head.bias().map(Tensor::detach) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn main() -> Result<()> {
    let student = Cnn::new("student", &[4, 8], 1)?;
    // Three blocks against two: the split merges the teacher's first two. Its weights would come from a file.
    let teachers: Vec<Arc<dyn Model>> = vec![Arc::new(Cnn::new("teacher", &[8, 16, 16], 2)?.frozen())];
    let models = Models { student: &student, teachers: &teachers };

    let b = 16;
    let values: Vec<f32> = (0..(b * 3 * SIZE * SIZE) as u64).map(|i| Rng::new(3).normal(i) as f32).collect();
    let images = Tensor::from_vec(values, (b, 3, SIZE, SIZE), &Device::Cpu)?;
    let batch = Batch {
        labels: teachers[0].run(&images, Cut::Input, &[Cut::Logits], Mode::Eval)?.logits()?.argmax(1)?.to_dtype(DType::I64)?,
        images: vec![images],
        targets: None,
        indices: Tensor::arange(0u32, b as u32, &Device::Cpu)?,
    };

    let mut method = BlockKd::new(Params { temperature: 2.0, ..Params::default() })?;
    method.prepare(&Setup {
        models,
        classes: CLASSES,
        train_samples: b,
        train_labels: None,
        batch_size: b,
        class_means: None,
        class_groups: None,
        dtype: DType::F32,
        device: &Device::Cpu,
        rng: Rng::new(4),
    })?;
    for (stone, leaves, enters) in method.stones().iter().flat_map(|s| s.cuts()) {
        println!("stone {stone}: the student up to {leaves}, the teacher from {enters} on");
    }

    let lr = 0.05;
    let needs = method.needs(); // after `prepare`: the blocks are known
    let mut sgd = SGD::new(student.vars.all_vars(), lr)?;
    let connectors = method.networks();
    let networks: Vec<&dyn Model> = connectors.iter().map(|c| c.as_ref()).collect();
    let mut first = None;
    for step in 0..40 {
        let rng = Rng::new(5).fork(step as u64);
        let outputs = [student.run(&batch.images[0], Cut::Input, &needs.student, Mode::Train(rng))?];
        let teacher = [vec![teachers[0].run(&batch.images[0], Cut::Input, &needs.teacher, Mode::Eval)?.detach()]];
        let progress = Progress { epoch: step, epochs: 40, step, steps_per_epoch: 1 };
        let terms = method.loss(&StepView { student: &outputs, teachers: &teacher, models, batch: &batch, progress, rng })?;

        let gradients = kd_nn::backward(&terms.total()?, &networks)?;
        sgd.step(&gradients.store)?;
        for (connector, gradient) in networks.iter().zip(&gradients.networks) {
            if let (Some(params), Some(gradient)) = (connector.params(), gradient) {
                params.values().set(&(params.values().tensor() - (&gradient.flat * lr)?)?)?;
            }
        }

        let loss = terms.total()?.to_scalar::<f32>()?;
        if step % 10 == 0 || step == 39 {
            let task = |name: &str| terms.terms.iter().find(|t| t.name == name).map_or(Ok(f32::NAN), |t| t.raw.to_scalar::<f32>());
            println!(
                "step {step:2}: loss {loss:.3}, cross-entropy of the student {:.3}, of the last stone {:.3}",
                task("student.task")?,
                task("stone.2.task")?
            );
        }
        let first = *first.get_or_insert(loss);
        assert!(step < 39 || loss < 0.8 * first, "the loss did not fall: {first} to {loss}");
    }
    Ok(())
}
