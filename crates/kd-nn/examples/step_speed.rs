//! Times a whole distillation step: teacher forward, student forward and backward, KD loss, SGD with momentum.
//!
//! ```text
//! cargo run --release -p kd-nn --example step_speed -- [teacher blocks] [student blocks] [batch] [seconds] [strict|fast]
//! ```
//!
//! Networks are CIFAR ResNets with so many residual blocks per stage (9 is resnet56, 3 is resnet20) on random 3x32x32 images, 100 classes.
//! `RAYON_NUM_THREADS` sets the threads, `KD_CPU` the instruction set.

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor};
use kd_core::{Cut, Mode, Model, Rng};
use kd_nn::{Conv, GraphBuilder, Level, Network, Precision, backward};

fn resnet(blocks: usize, precision: Precision, seed: u64) -> kd_core::Result<Network> {
    let mut b = GraphBuilder::new(format!("resnet{}", 6 * blocks + 2), &[3, 32, 32]);
    b.conv("conv1", Conv::new(16, 3).pad(1));
    b.batch_norm("bn1");
    b.relu();
    for (stage, channels) in [16, 32, 64].into_iter().enumerate() {
        for block in 0..blocks {
            let name = |part: &str| format!("layer{}.{block}.{part}", stage + 1);
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let x = b.here();
            b.conv(&name("conv1"), Conv::new(channels, 3).stride(stride).pad(1));
            b.batch_norm(&name("bn1"));
            b.relu();
            b.conv(&name("conv2"), Conv::new(channels, 3).pad(1));
            let main = b.batch_norm(&name("bn2"));
            b.at(x);
            if stride == 2 {
                b.conv(&name("downsample.0"), Conv::new(channels, 1).stride(2));
                b.batch_norm(&name("downsample.1"));
            }
            b.add(main);
            b.relu();
        }
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", 100);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish()?, DType::F32, &Device::Cpu)?.with_precision(precision);
    network.init(Rng::new(seed))?;
    Ok(network)
}

fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

fn kd(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    let (s, t) = (log_softmax(&(student / 4.0)?)?, log_softmax(&(teacher / 4.0)?)?);
    (t.exp()? * (t - s)?)?.sum_all()? * (16.0 / student.dims()[0] as f64)
}

#[allow(clippy::print_stdout)]
fn main() -> kd_core::Result<()> {
    let arg = |i: usize, default: usize| std::env::args().nth(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (t, s, batch, seconds) = (arg(1, 9), arg(2, 3), arg(3, 64), arg(4, 10));
    let precision = if std::env::args().nth(5).as_deref() == Some("strict") { Precision::Strict } else { Precision::Fast };
    let (teacher, student) = (resnet(t, precision, 1)?.frozen(), resnet(s, precision, 2)?);
    let pixels: Vec<f32> = (0..(batch * 3072) as u64).map(|i| Rng::new(3).normal(i) as f32).collect();
    let images = Tensor::from_vec(pixels, (batch, 3, 32, 32), &Device::Cpu)?;
    let mut momentum = vec![0.0f32; student.parameters().count()];

    let mut parts: Vec<[f64; 4]> = vec![];
    let begin = Instant::now();
    while begin.elapsed().as_secs() < seconds as u64 || parts.len() < 4 {
        let clock = Instant::now();
        let wanted = [Cut::Logits];
        let target = teacher.run(&images, Cut::Input, &wanted, Mode::Eval)?;
        let at_teacher = clock.elapsed().as_secs_f64();
        let out = student.run(&images, Cut::Input, &wanted, Mode::Train(Rng::new(4)))?;
        let loss = kd(out.logits()?, target.logits()?)?;
        let at_forward = clock.elapsed().as_secs_f64();
        let gradients = backward(&loss, &[&student])?;
        let at_backward = clock.elapsed().as_secs_f64();
        let flat = gradients.networks[0].as_ref().expect("a network of this crate").flat.to_vec1::<f32>()?;
        student.parameters().values().write::<f32, _>(|values| {
            for ((v, m), g) in values.iter_mut().zip(&mut momentum).zip(&flat) {
                *m = 0.9 * *m + g + 5e-4 * *v;
                *v -= 1e-3 * *m;
            }
        })?;
        let all = clock.elapsed().as_secs_f64();
        parts.push([at_teacher, at_forward - at_teacher, at_backward - at_forward, all - at_backward]);
    }
    let mut totals: Vec<f64> = parts.iter().map(|p| p.iter().sum()).collect();
    totals.sort_by(f64::total_cmp);
    let median = |k: usize| {
        let mut v: Vec<f64> = parts.iter().map(|p| p[k] * 1e3).collect();
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    println!(
        "{} -> {}, batch {batch}, {} threads, {}, {precision:?}: {:.0} img/s (best {:.0}); teacher {:.1} ms, forward {:.1}, backward {:.1}, update {:.2}",
        teacher.spec().name,
        student.spec().name,
        rayon::current_num_threads(),
        Level::current().name(),
        batch as f64 / totals[totals.len() / 2],
        batch as f64 / totals[0],
        median(0),
        median(1),
        median(2),
        median(3),
    );
    Ok(())
}
