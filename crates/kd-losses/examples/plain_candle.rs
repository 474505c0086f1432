//! A plain candle-nn model distilled with one loss function: no `Method`, no training loop of kd.
//!
//! ```sh
//! cargo run -p kd-losses --example plain_candle
//! ```
#![allow(clippy::print_stdout, reason = "an example")]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module, Optimizer, SGD, Sequential, seq};
use kd_core::{Result, Rng};
use kd_losses::nkd;

/// A linear layer of candle-nn with repeatable weights (candle's own generator cannot be seeded on the CPU).
fn linear(inputs: usize, outputs: usize, rng: Rng, vars: &mut Vec<Var>) -> Result<Linear> {
    let weight: Vec<f32> = (0..inputs * outputs).map(|i| (rng.normal(i as u64) / (inputs as f64).sqrt()) as f32).collect();
    let weight = Var::from_vec(weight, (outputs, inputs), &Device::Cpu)?;
    let bias = Var::zeros(outputs, DType::F32, &Device::Cpu)?;
    let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    vars.extend([weight, bias]);
    Ok(layer)
}

fn mlp(hidden: usize, rng: Rng) -> Result<(Sequential, Vec<Var>)> {
    let mut vars = vec![];
    let net = seq().add(linear(2, hidden, rng.fork(0), &mut vars)?).add(candle_nn::Activation::Relu);
    let net = net.add(linear(hidden, 3, rng.fork(1), &mut vars)?);
    Ok((net, vars))
}

fn main() -> Result<()> {
    // Three clouds of points in the plane, one for each class.
    let (n, rng) = (96u64, Rng::new(7));
    let corner = |class: u64| [(-2.0, 0.0), (2.0, 0.0), (0.0, 3.0)][class as usize];
    let points: Vec<f32> = (0..n)
        .flat_map(|i| {
            let (x, y) = corner(i % 3);
            [(x + rng.normal(2 * i)) as f32, (y + rng.normal(2 * i + 1)) as f32]
        })
        .collect();
    let x = Tensor::from_vec(points, (n as usize, 2), &Device::Cpu)?;
    let labels = Tensor::from_vec((0..n as i64).map(|i| i % 3).collect(), n as usize, &Device::Cpu)?;

    let (teacher, vars) = mlp(32, rng.named("teacher"))?;
    let mut sgd = SGD::new(vars, 0.2)?;
    for _ in 0..100 {
        sgd.backward_step(&kd_losses::ce(&teacher.forward(&x)?, &labels)?.total()?)?;
    }
    let teacher_logits = teacher.forward(&x)?; // the loss detaches them

    let (student, vars) = mlp(4, rng.named("student"))?;
    let mut sgd = SGD::new(vars, 0.2)?;
    let mut losses = vec![];
    for step in 0..60 {
        let terms = nkd(&student.forward(&x)?, &teacher_logits, &labels, &Default::default())?;
        let loss = terms.total()?;
        sgd.backward_step(&loss)?;
        losses.push(loss.to_scalar::<f32>()?);
        if step % 20 == 0 {
            let parts: Vec<String> =
                terms.terms.iter().map(|t| Ok(format!("{} {:.3}", t.name, t.raw.to_scalar::<f32>()?))).collect::<Result<_>>()?;
            println!("step {step:2}  nkd {:.3}  ({})", losses[step], parts.join(", "));
        }
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("step 59  nkd {last:.3}");
    assert!(last < 0.8 * first, "the loss did not fall: {first} to {last}");
    Ok(())
}
