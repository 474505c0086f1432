//! The losses of logits that wrappers take apart: a value for each row, before means and factors.

use candle_core::Tensor;
use kd_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::labels::Labels;
use crate::{dkd, inputs, kd, nkd};

/// A loss of logits that can be taken apart into rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// [`kd`](mod@crate::kd) with `form = "kl"`.
    #[default]
    Kd,
    /// [`dkd`](mod@crate::dkd).
    Dkd,
    /// [`nkd`](mod@crate::nkd).
    Nkd,
}

/// A base with its parameters, but for the temperature.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) base: Base,
    /// Weights of dkd.
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
    /// Weight of nkd's non-target part.
    pub(crate) gamma: f64,
    /// Whether nkd's label stays among the non-targets.
    pub(crate) keep_target: bool,
}

/// One term of a base.
pub(crate) struct Rows {
    pub(crate) name: &'static str,
    /// `[B]`.
    pub(crate) rows: Tensor,
    pub(crate) weight: f64,
    /// Whether it is of softened logits: then T^2 belongs before it.
    pub(crate) softened: bool,
}

impl Config {
    pub(crate) fn validate(&self) -> Result<()> {
        inputs::not_negative("alpha", self.alpha)?;
        inputs::not_negative("beta", self.beta)?;
        inputs::not_negative("gamma", self.gamma)
    }

    /// Whether it asks for labels.
    pub(crate) fn labels(&self) -> bool {
        self.base != Base::Kd
    }

    /// Its terms for logits `z`, `v`, and the same divided by their temperatures, `z_t`, `v_t`; all `[B,K]`.
    pub(crate) fn rows(&self, [z, v]: [&Tensor; 2], [z_t, v_t]: [&Tensor; 2], labels: Option<&Labels>) -> Result<Vec<Rows>> {
        let y = || labels.ok_or_else(|| Error::missing("this base", "labels"))?.one_hot();
        let softened = |name, rows, weight| Rows { name, rows, weight, softened: true };
        Ok(match self.base {
            Base::Kd => vec![softened("kd", kd::rows(z_t, v_t, kd::Form::Kl)?, 1.0)],
            Base::Dkd => {
                let [tckd, nckd] = dkd::rows(z_t, v_t, &y()?)?;
                vec![softened("tckd", tckd, self.alpha), softened("nckd", nckd, self.beta)]
            }
            Base::Nkd => {
                let y = y()?;
                let keep = if self.keep_target { y.ones_like()? } else { (1.0 - &y)? };
                let target = Rows { name: "target", rows: nkd::target_rows(z, v, &y)?, weight: 1.0, softened: false };
                vec![target, softened("non_target", nkd::non_target_rows(z_t, v_t, &keep)?, self.gamma)]
            }
        })
    }
}
