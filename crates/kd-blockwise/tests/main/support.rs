//! Networks, batches and steps for the tests.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_blockwise::BlockKd;
use kd_core::{Batch, Cut, LossTerms, Method, Mode, Model, Models, Outputs, Params, Progress, Result, Rng, Setup, StepView};
use kd_nn::{Conv, GraphBuilder, Network};
use serde_json::Value;

pub(crate) const B: usize = 4;
pub(crate) const K: usize = 5;

pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn scalar(t: &Tensor) -> f64 {
    values(t)[0]
}

/// The largest difference between two tensors of one shape.
pub(crate) fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).fold(0.0, |m, (x, y)| f64::max(m, (x - y).abs()))
}

pub(crate) fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let n = shape.iter().product::<usize>() as u64;
    let values: Vec<f64> = (0..n).map(|i| Rng::new(seed).normal(i)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Draws parameters, and running statistics that are not those of a fresh network.
pub(crate) fn fill(params: &Params, seed: u64) {
    let rng = Rng::new(seed).named("statistics");
    let shapes: Vec<_> = params.keys();
    params
        .assign(|name| {
            let shape = shapes.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice())?;
            let draw = |f: &dyn Fn(f64) -> f64| {
                let n = shape.iter().product::<usize>() as u64;
                let values: Vec<f64> = (0..n).map(|i| f(rng.named(name).normal(i))).collect();
                Some(Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
            };
            match name.rsplit('.').next() {
                Some("running_mean") => draw(&|z| 0.2 * z),
                Some("running_var") => draw(&|z| 0.5 + z * z),
                Some("weight") if shape.len() == 1 => draw(&|z| 1.0 + 0.2 * z),
                Some("bias") => draw(&|z| 0.2 * z),
                _ => None,
            }
        })
        .unwrap();
}

/// Blocks of convolution, batch norm and ReLU with these channels, the first at full size, each other one at half its predecessor's.
pub(crate) fn small(name: &str, channels: &[usize], dtype: DType, seed: u64) -> Network {
    let mut b = GraphBuilder::new(name, &[2, 8, 8]);
    for (i, &c) in (1..).zip(channels) {
        b.conv(&format!("block{i}.conv"), Conv::new(c, 3).pad(1).stride(if i == 1 { 1 } else { 2 }));
        b.batch_norm(&format!("block{i}.bn"));
        b.relu();
        b.block(i, &format!("block{i}"));
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", K);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish().unwrap(), dtype, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    fill(network.parameters(), seed);
    network
}

/// A network of the zoo for images of `size` pixels.
pub(crate) fn zoo(name: &str, size: usize, dtype: DType, seed: u64) -> Network {
    let network = kd_models::network(name, &kd_models::Config::new(K, [2, size, size]), dtype, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    fill(network.parameters(), seed);
    network
}

/// A student, its frozen teacher and one batch.
pub(crate) struct Bench {
    pub(crate) student: Network,
    pub(crate) teachers: Vec<Arc<dyn Model>>,
    pub(crate) batch: Batch,
    pub(crate) dtype: DType,
}

impl Bench {
    pub(crate) fn new(student: Network, teacher: Network) -> Self {
        let [c, h, w] = student.spec().input;
        let dtype = student.parameters().dtype();
        let batch = Batch {
            images: vec![normal(3, &[B, c, h, w], dtype)],
            labels: Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap(),
            targets: None,
            indices: Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu).unwrap(),
        };
        Self { student, teachers: vec![Arc::new(teacher.frozen())], batch, dtype }
    }

    /// Three blocks each, the teacher's wider.
    pub(crate) fn small(dtype: DType) -> Self {
        Self::new(small("student", &[3, 4, 6], dtype, 1), small("teacher", &[4, 6, 8], dtype, 2))
    }

    /// ResNet-8 and ResNet-20 on 8x8 images.
    pub(crate) fn resnets(dtype: DType) -> Self {
        Self::new(zoo("resnet8", 8, dtype, 1), zoo("resnet20", 8, dtype, 2))
    }

    pub(crate) fn teacher(&self) -> &Network {
        self.teachers[0].as_any().downcast_ref().unwrap()
    }

    pub(crate) fn models(&self) -> Models<'_> {
        Models { student: &self.student, teachers: &self.teachers }
    }

    pub(crate) fn setup(&self, seed: u64) -> Setup<'_> {
        Setup {
            models: self.models(),
            classes: K,
            train_samples: 100,
            train_labels: None,
            batch_size: B,
            class_means: None,
            class_groups: None,
            dtype: self.dtype,
            device: &Device::Cpu,
            rng: Rng::new(seed),
        }
    }

    pub(crate) fn prepare(&self, params: Value) -> Result<BlockKd> {
        let mut method = BlockKd::new(serde_json::from_value(params)?)?;
        method.prepare(&self.setup(9))?;
        Ok(method)
    }

    pub(crate) fn prepared(&self, params: Value) -> BlockKd {
        let what = params.to_string();
        self.prepare(params).unwrap_or_else(|e| panic!("{what}: {e}"))
    }

    /// What a loop runs for a method.
    pub(crate) fn outputs(&self, method: &dyn Method, mode: Mode) -> (Vec<Outputs>, Vec<Vec<Outputs>>) {
        let (needs, images) = (method.needs(), &self.batch.images[0]);
        let student = self.student.run(images, Cut::Input, &needs.student, mode).unwrap();
        let teacher = |t: &Arc<dyn Model>| {
            let images = images.to_dtype(t.params().unwrap().dtype()).unwrap();
            vec![t.run(&images, Cut::Input, &needs.teacher, Mode::Eval).unwrap().detach()]
        };
        (vec![student], self.teachers.iter().map(teacher).collect())
    }

    pub(crate) fn loss_at(&self, method: &mut dyn Method, epoch: usize, step: usize) -> LossTerms {
        let rng = Rng::new(5).fork(step as u64);
        let (student, teachers) = self.outputs(method, Mode::Train(rng));
        let progress = Progress { epoch, epochs: 40, step, steps_per_epoch: 10 };
        let view = StepView { student: &student, teachers: &teachers, models: self.models(), batch: &self.batch, progress, rng };
        method.loss(&view).unwrap()
    }

    pub(crate) fn loss(&self, method: &mut dyn Method) -> LossTerms {
        self.loss_at(method, 0, 0)
    }

    /// One step of gradient descent on the student and on what the method trains; the loss before it.
    pub(crate) fn step(&self, method: &mut dyn Method, step: usize) -> f64 {
        let loss = self.loss_at(method, 0, step).total().unwrap();
        let networks = method.networks();
        let mut models: Vec<&dyn Model> = vec![&self.student];
        models.extend(networks.iter().map(|n| n.as_ref()));
        let gradients = kd_nn::backward(&loss, &models).unwrap();
        for (model, gradient) in models.iter().zip(gradients.networks) {
            let values = model.params().unwrap().values();
            values.set(&(values.tensor() - (gradient.unwrap().flat * 0.1).unwrap()).unwrap()).unwrap();
        }
        scalar(&loss)
    }
}

/// The bits of the values and running statistics of a network.
pub(crate) fn bits(params: &Params) -> Vec<u64> {
    let (values_, stats) = (params.values().tensor(), params.stats().tensor());
    values(&values_).into_iter().chain(values(&stats)).map(f64::to_bits).collect()
}

/// The names of the parameters that a backward pass reaches, one list per model.
pub(crate) fn reached(loss: &Tensor, models: &[&dyn Model]) -> Vec<Vec<String>> {
    let gradients = kd_nn::backward(loss, models).unwrap();
    let names = |(model, g): (&&dyn Model, &Option<kd_nn::NetworkGradients>)| {
        let entries = model.params().unwrap().entries().iter();
        entries.zip(&g.as_ref().unwrap().reached).filter(|(_, r)| **r).map(|(e, _)| e.name.clone()).collect()
    };
    models.iter().zip(&gradients.networks).map(names).collect()
}

/// The names of the parameters with a gradient that is not zero, one list per model. Stones that pass through the teacher together are one
/// graph, in which zeros reach farther.
pub(crate) fn moved(loss: &Tensor, models: &[&dyn Model]) -> Vec<Vec<String>> {
    let gradients = kd_nn::backward(loss, models).unwrap();
    let names = |(model, g): (&&dyn Model, &Option<kd_nn::NetworkGradients>)| {
        let flat = values(&g.as_ref().unwrap().flat);
        let entries = model.params().unwrap().entries().iter();
        entries.filter(|e| flat[e.range()].iter().any(|&x| x != 0.0)).map(|e| e.name.clone()).collect()
    };
    models.iter().zip(&gradients.networks).map(names).collect()
}
