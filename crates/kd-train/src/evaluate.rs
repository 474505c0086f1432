//! How good a network is on a data set.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Tensor};
use kd_core::metrics::{Accuracy, Calibration, Mean};
use kd_core::{Batch, BatchSource, Cut, Error, Mode, Model};
use serde::{Deserialize, Deserializer, Serialize};

use crate::Result;

/// Bins of the expected calibration error.
const BINS: usize = 15;

/// Accuracy, mean cross-entropy and calibration over a data set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Percent of the samples whose label ranks first.
    pub top1: f64,
    /// Percent of the samples whose label is among the first five.
    pub top5: f64,
    /// Mean cross-entropy; NaN (null in a file) when an output is.
    #[serde(deserialize_with = "nan_from_null")]
    pub loss: f64,
    /// Expected calibration error, 15 bins, in `[0, 1]`.
    pub ece: f64,
    /// Samples whose label ranks first.
    pub correct: usize,
    /// Samples whose label is among the first five.
    pub correct5: usize,
    /// Samples seen.
    pub total: usize,
}

fn nan_from_null<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

/// Evaluates `model` on one epoch of `source`, in eval mode.
///
/// A network with more outputs than the data has classes is ranked over all of its outputs; warning about it is the caller's part.
///
/// # Errors
/// A label beyond the network's outputs; an empty source.
pub fn evaluate(model: &dyn Model, source: &mut dyn BatchSource) -> Result<Evaluation> {
    let evaluation = evaluate_unless(model, source, &AtomicBool::new(false))?;
    Ok(evaluation.expect("invariant: nothing sets the flag"))
}

/// As [`evaluate`], giving up with `None` between two batches once `stop` is set.
pub(crate) fn evaluate_unless(model: &dyn Model, source: &mut dyn BatchSource, stop: &AtomicBool) -> Result<Option<Evaluation>> {
    let (mut accuracy, mut calibration, mut loss) = (Accuracy::default(), Calibration::new(BINS), Mean::default());
    source.start(0, 0)?;
    while let Some(batch) = source.next_batch()? {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let images = first_view(&batch)?;
        let outputs = model.run(&on_device_of(model, images)?, Cut::Input, &[Cut::Logits], Mode::Eval)?;
        let logits = outputs.logits()?.detach();
        let classes = logits.dim(1)?;
        let labels = batch.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        check_labels(&labels, classes)?;
        let logits = logits.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        for (row, &label) in logits.chunks_exact(classes).zip(&labels) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            loss.add(max + sum.ln() - row[label as usize], 1.0);
        }
        let logits: Vec<f32> = logits.iter().map(|&v| v as f32).collect();
        accuracy.add(&logits, classes, &labels);
        calibration.add(&logits, classes, &labels);
    }
    if accuracy.total == 0 {
        return Err(Error::refused("an evaluation on no sample at all").into());
    }
    Ok(Some(Evaluation {
        top1: accuracy.top1_percent(),
        top5: accuracy.top5_percent(),
        loss: loss.get(),
        ece: calibration.error(),
        correct: accuracy.top1,
        correct5: accuracy.top5,
        total: accuracy.total,
    }))
}

/// Mean embedding of each class over one epoch of `source`, which must not augment: `[classes, D]` f64 on the CPU.
///
/// # Errors
/// A class without a sample, a class whose mean is zero, a label outside the classes.
pub fn class_means(teacher: &dyn Model, source: &mut dyn BatchSource, classes: usize) -> Result<Tensor> {
    class_means_rounded(teacher, source, classes, None)
}

/// As [`class_means`], with every number rounded to `decimals` before it is averaged and every mean rounded again: what KD++'s released
/// script does with 4, over one augmented epoch.
///
/// # Errors
/// As [`class_means`].
pub fn class_means_rounded(teacher: &dyn Model, source: &mut dyn BatchSource, classes: usize, decimals: Option<u32>) -> Result<Tensor> {
    let means = class_means_by(teacher, source, classes, decimals, &AtomicBool::new(false))?;
    Ok(means.expect("invariant: nothing sets the flag"))
}

/// As [`class_means`], giving up with `None` between two batches once `stop` is set.
pub(crate) fn class_means_unless(
    teacher: &dyn Model,
    source: &mut dyn BatchSource,
    classes: usize,
    stop: &AtomicBool,
) -> Result<Option<Tensor>> {
    class_means_by(teacher, source, classes, None, stop)
}

/// As [`class_means_rounded`], giving up with `None` between two batches once `stop` is set.
pub(crate) fn class_means_by(
    teacher: &dyn Model,
    source: &mut dyn BatchSource,
    classes: usize,
    decimals: Option<u32>,
    stop: &AtomicBool,
) -> Result<Option<Tensor>> {
    let scale = decimals.map(|d| 10f64.powi(d as i32));
    let rounded = |v: f64| scale.map_or(v, |scale| (v * scale).round_ties_even() / scale);
    let width = teacher.spec().embedding;
    let mut sums = vec![0.0; classes * width];
    let mut counts = vec![0usize; classes];
    source.start(0, 0)?;
    while let Some(batch) = source.next_batch()? {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let outputs = teacher.run(&on_device_of(teacher, first_view(&batch)?)?, Cut::Input, &[Cut::Embedding], Mode::Eval)?;
        let embedding = outputs.embedding()?.detach();
        if embedding.dims() != [batch.len(), width] {
            return Err(Error::shape("the teacher's embedding", format!("[{}, {width}]", batch.len()), embedding.dims()).into());
        }
        let labels = batch.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        check_labels(&labels, classes)?;
        let embedding = embedding.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        for (row, &label) in embedding.chunks_exact(width).zip(&labels) {
            let class = label as usize;
            counts[class] += 1;
            sums[class * width..][..width].iter_mut().zip(row).for_each(|(sum, v)| *sum += rounded(*v));
        }
    }
    for (class, (mean, &count)) in sums.chunks_exact_mut(width).zip(&counts).enumerate() {
        if count == 0 {
            return Err(Error::refused(format!("class means: class {class} has no training sample")).into());
        }
        mean.iter_mut().for_each(|v| *v = rounded(*v / count as f64));
        if !mean.iter().any(|&v| v != 0.0) {
            return Err(Error::refused(format!("class means: the mean embedding of class {class} is zero")).into());
        }
    }
    Ok(Some(Tensor::from_vec(sums, (classes, width), &candle_core::Device::Cpu)?))
}

fn first_view(batch: &Batch) -> Result<&Tensor> {
    Ok(batch.images.first().ok_or_else(|| Error::missing("an evaluation", "images"))?)
}

/// Images in the type and place of the network's parameters.
pub(crate) fn on_device_of(model: &dyn Model, images: &Tensor) -> Result<Tensor> {
    match crate::parts::home(model) {
        Some((dtype, device)) => Ok(images.to_device(&device)?.to_dtype(dtype)?),
        None => Ok(images.clone()),
    }
}

fn check_labels(labels: &[i64], classes: usize) -> Result<()> {
    match labels.iter().position(|&label| label < 0 || label >= classes as i64) {
        Some(position) => Err(Error::Label { label: labels[position], position, classes }.into()),
        None => Ok(()),
    }
}
