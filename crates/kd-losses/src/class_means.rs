//! Class means of the teacher's embedding, the directions that the KD++ losses turn the student's features to.

use candle_core::{DType, Tensor};
use kd_core::{Error, Result};

use crate::inputs;
use crate::labels::Labels;
use crate::norms::unit;

/// Mean teacher embedding of every class over the training set, checked once.
#[derive(Clone, Debug)]
pub struct ClassMeans {
    means: Tensor,      // [K,D]
    directions: Tensor, // [K,D], rows of length 1
}

impl ClassMeans {
    /// From `[K,D]`, one row for each class.
    ///
    /// # Errors
    /// A class without a sample shows as a row of zeros or NaN: refused with the class named.
    pub fn new(means: &Tensor) -> Result<Self> {
        let (k, _) = inputs::embedding("class_means", means)?;
        if k < 2 {
            return Err(Error::shape("class_means", "[K,D] with K >= 2", means.dims()));
        }
        let means = means.detach();
        let squares = means.to_dtype(DType::F64)?.sqr()?.sum(1)?.to_vec1::<f64>()?;
        if let Some(class) = squares.iter().position(|&s| s == 0.0) {
            return Err(Error::refused(format!("class_means: the mean of class {class} is zero; every class needs a direction")));
        }
        Ok(Self { directions: unit(&means, 0.0)?, means })
    }

    /// Classes and width.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.means.dims()[0], self.means.dims()[1])
    }

    /// Classes.
    pub(crate) fn classes(&self) -> usize {
        self.dims().0
    }

    /// The directions of the classes in the type of `like`, `[K,D]` of length 1.
    pub(crate) fn directions(&self, like: &Tensor) -> Result<Tensor> {
        inputs::constant(&self.directions, like)
    }

    /// The direction of each sample's class `[B,D]`; of soft targets, of the mixed mean.
    pub(crate) fn of(&self, labels: &Labels) -> Result<Tensor> {
        let like = &labels.q;
        if labels.is_soft() {
            return unit(&like.matmul(&inputs::constant(&self.means, like)?)?, 0.0);
        }
        Ok(self.directions(like)?.index_select(&Tensor::new(labels.ids.as_slice(), like.device())?, 0)?)
    }

    /// Refuses embeddings of another width.
    pub(crate) fn check_width(&self, width: usize) -> Result<()> {
        let (k, d) = self.dims();
        let expected = format!("[{k}, {width}], the width of the embeddings");
        if d == width { Ok(()) } else { Err(Error::shape("class_means", expected, &[k, d])) }
    }

    /// Refuses another number of classes.
    pub(crate) fn check_classes(&self, classes: usize) -> Result<()> {
        let (k, d) = self.dims();
        let expected = format!("[{classes}, {d}], a row for each class");
        if k == classes { Ok(()) } else { Err(Error::shape("class_means", expected, &[k, d])) }
    }
}
