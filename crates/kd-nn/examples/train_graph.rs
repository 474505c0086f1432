//! A network written down as a graph, trained with a candle loss and a hand-written optimiser: `cargo run -p kd-nn --example train_graph`.
//!
//! The images are noise with a bright quarter; which quarter is the class.
#![allow(clippy::print_stdout, reason = "an example")]

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Mode, Model, Result, Rng};
use kd_nn::{Conv, Graph, GraphBuilder, Network, Op, backward};

const STEPS: usize = 20;
const LR: f32 = 0.1;

/// Two convolutions with a shortcut around the second.
fn graph() -> Result<Graph> {
    let mut b = GraphBuilder::new("tiny", &[1, 8, 8]);
    b.conv("conv1", Conv::new(8, 3).stride(2).pad(1));
    b.batch_norm("bn1");
    let skip = b.relu();
    b.conv("conv2", Conv::new(8, 3).pad(1));
    b.batch_norm("bn2");
    b.add(skip);
    b.relu();
    b.stage(0, "conv2", None);
    b.layer(Op::Flatten);
    b.cut(Cut::Embedding);
    b.linear("fc", 4);
    b.cut(Cut::Logits);
    b.finish()
}

/// 64 images `[64,1,8,8]` and their classes `[64]`.
fn toy_data(rng: Rng) -> Result<(Tensor, Tensor)> {
    let pixel = |i: u64| {
        let (image, row, column) = (i / 64, i / 8 % 8, i % 8);
        let bright = image % 4 == row / 4 * 2 + column / 4;
        (rng.normal(i) + f64::from(u8::from(bright))) as f32
    };
    let images = Tensor::from_iter((0..64 * 64).map(pixel), &Device::Cpu)?.reshape((64, 1, 8, 8))?;
    let labels = Tensor::from_iter((0..64u32).map(|image| image % 4), &Device::Cpu)?;
    Ok((images, labels))
}

fn main() -> Result<()> {
    let rng = Rng::new(1);
    let (images, labels) = toy_data(rng.named("data"))?;
    let network = Network::new(graph()?, DType::F32, &Device::Cpu)?;
    network.init(rng.named("init"))?;
    println!("{} parameters, {} multiply-accumulates", network.graph().param_count(), network.graph().macs(&[1, 8, 8])?);

    let mut losses = Vec::new();
    for step in 0..STEPS {
        let mode = Mode::Train(rng.named("step").fork(step as u64));
        let outputs = network.run(&images, Cut::Input, &[Cut::Logits], mode)?;
        // Any candle code may follow: to candle the logits are a tensor like any other.
        let loss = candle_nn::loss::cross_entropy(outputs.logits()?, &labels)?;
        losses.push(loss.to_scalar::<f32>()?);

        let gradients = backward(&loss, &[&network])?;
        let gradient = gradients.networks[0].as_ref().expect("invariant: a network has flat parameters").flat.to_vec1::<f32>()?;
        network.parameters().values().write::<f32, _>(|values| {
            values.iter_mut().zip(&gradient).for_each(|(value, g)| *value -= LR * g);
        })?;
        println!("step {step:2}  loss {:.4}", losses[step]);
    }
    assert!(losses[STEPS - 1] < 0.5 * losses[0], "the loss fell from {} to {} only", losses[0], losses[STEPS - 1]);

    let outputs = network.run(&images, Cut::Input, &[Cut::Stage(0), Cut::Logits], Mode::Eval)?;
    let right = outputs.logits()?.argmax(1)?.eq(&labels)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    println!("{right} of 64 right; stage 0 is {:?}", outputs.stage(0)?.dims());
    Ok(())
}
