//! One pass of one network, or of several beside each other, over the same samples.

use candle_core::{DType, Tensor};
use kd_core::{BatchSource, Cut, Error, Mode, Model, Outputs};

use crate::Result;
use crate::evaluate::on_device_of;

/// A network of a pass. Every side has a source of its own, since networks may want the images normalised differently.
pub struct Side<'a> {
    /// What it is called in errors: `teacher`, `student`.
    pub name: &'a str,
    /// The network.
    pub model: &'a dyn Model,
    /// Its images, in an order that is the same for all sides.
    pub source: &'a mut dyn BatchSource,
    /// What is wanted of it.
    pub cuts: &'a [Cut],
}

/// Numbers in rows of equal length, one row a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Row after row.
    pub values: Vec<f64>,
    /// Numbers of a row.
    pub width: usize,
}

impl Rows {
    /// From the values and the length of a row, which must divide their number.
    pub fn new(values: Vec<f64>, width: usize) -> Self {
        debug_assert!(width > 0 && values.len().is_multiple_of(width));
        Self { values, width }
    }

    /// The rows.
    pub fn iter(&self) -> impl Iterator<Item = &[f64]> + Clone {
        self.values.chunks_exact(self.width.max(1))
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// One batch, as every side saw it.
pub struct Seen<'a> {
    /// The number of samples before this batch.
    pub first: usize,
    /// The labels.
    pub labels: &'a [i64],
    outputs: &'a [(String, Outputs)],
}

impl Seen<'_> {
    /// The tensor of side `side` at `cut`.
    pub fn tensor(&self, side: usize, cut: Cut) -> Result<&Tensor> {
        Ok(self.outputs[side].1.get(cut)?)
    }

    /// What side `side` has at `cut`, one row a sample.
    ///
    /// # Errors
    /// A value that is not finite, with the side, the cut and the sample.
    pub fn rows(&self, side: usize, cut: Cut) -> Result<Rows> {
        let tensor = self.tensor(side, cut)?.flatten_from(1)?;
        let width = tensor.dim(1)?;
        let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let what = format!("{} of the {}, sample {}", cut, self.outputs[side].0, self.first + at / width);
            return Err(Error::NonFinite { what, value: values[at], index: at % width }.into());
        }
        Ok(Rows { values, width })
    }
}

/// Runs every side in eval mode over one epoch of its source, batch by batch side by side, and hands what they computed to `each`.
/// Returns the number of samples.
///
/// # Errors
/// Sources that do not hand out the same samples; a source without any; what a network or `each` refuses.
pub fn sweep(sides: &mut [Side<'_>], mut each: impl FnMut(&Seen<'_>) -> Result<()>) -> Result<usize> {
    for side in sides.iter_mut() {
        side.source.start(0, 0)?;
    }
    let mut first = 0;
    loop {
        let mut labels: Option<Vec<i64>> = None;
        let mut outputs = vec![];
        let mut ended = 0;
        for side in sides.iter_mut() {
            let Some(batch) = side.source.next_batch()? else {
                ended += 1;
                continue;
            };
            let own = batch.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
            if labels.get_or_insert_with(|| own.clone()) != &own {
                return Err(Error::refused(format!("the {} was given other samples than the network beside it", side.name)).into());
            }
            let images = batch.images.first().ok_or_else(|| Error::missing("an analysis", "images"))?;
            let out = side.model.run(&on_device_of(side.model, images)?, Cut::Input, side.cuts, Mode::Eval)?;
            outputs.push((side.name.to_string(), out.detach()));
        }
        let Some(labels) = labels else { break };
        if ended > 0 {
            return Err(Error::refused("one network was given fewer samples than the other").into());
        }
        each(&Seen { first, labels: &labels, outputs: &outputs })?;
        first += labels.len();
    }
    if first == 0 {
        return Err(Error::refused("an analysis of no sample at all").into());
    }
    Ok(first)
}
