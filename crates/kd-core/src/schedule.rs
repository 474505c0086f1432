//! Learning rates over a run.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// `base * gamma^(milestones passed)`.
    Multistep,
    /// Half a cosine from `base` to `min_lr`.
    Cosine,
    /// `base` throughout.
    Constant,
}

/// Whether a cosine moves once an epoch or every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleUnit {
    /// Once an epoch.
    Epoch,
    /// Every step.
    Step,
}

/// The learning rate of every step. Epochs count from 0 and include the warm-up.
///
/// ```text
/// warm-up      s < W*P:  base * (s + 1) / (W*P)                                  (per step; base on its last step)
/// multistep              base * gamma^#{m in milestones: m <= e}
/// cosine, unit epoch     min + (base - min)/2 * (1 + cos(pi (e - W)/(E - W)))
/// cosine, unit step      the same with (s - W*P)/(E*P - W*P)
/// ```
/// `s` global step, `e` epoch, `P` steps per epoch, `E` epochs, `W` warm-up epochs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Epochs to train.
    pub epochs: usize,
    /// How the rate moves.
    pub kind: ScheduleKind,
    /// Whether a cosine moves per epoch or per step.
    pub unit: ScheduleUnit,
    /// Epochs at which `multistep` multiplies by `gamma`, ascending.
    pub milestones: Vec<usize>,
    /// Factor at a milestone.
    pub gamma: f64,
    /// Where a cosine ends.
    pub min_lr: f64,
    /// Epochs of linear warm-up, per step.
    pub warmup_epochs: usize,
}

impl Default for Schedule {
    /// The schedule of the CIFAR-100 tables: 240 epochs, x0.1 at 150, 180, 210.
    fn default() -> Self {
        Self {
            epochs: 240,
            kind: ScheduleKind::Multistep,
            unit: ScheduleUnit::Epoch,
            milestones: vec![150, 180, 210],
            gamma: 0.1,
            min_lr: 0.0,
            warmup_epochs: 0,
        }
    }
}

impl Schedule {
    /// The learning rate of global step `step` in epoch `epoch`.
    pub fn lr(&self, base: f64, epoch: usize, step: usize, steps_per_epoch: usize) -> f64 {
        let warm = self.warmup_epochs * steps_per_epoch;
        if step < warm {
            return base * (step + 1) as f64 / warm as f64;
        }
        match self.kind {
            ScheduleKind::Constant => base,
            ScheduleKind::Multistep => base * self.gamma.powi(self.milestones.iter().filter(|&&m| m <= epoch).count() as i32),
            ScheduleKind::Cosine => {
                let t = match self.unit {
                    ScheduleUnit::Epoch => (epoch - self.warmup_epochs) as f64 / (self.epochs - self.warmup_epochs).max(1) as f64,
                    ScheduleUnit::Step => (step - warm) as f64 / (self.epochs * steps_per_epoch - warm).max(1) as f64,
                };
                self.min_lr + (base - self.min_lr) / 2.0 * (1.0 + (std::f64::consts::PI * t).cos())
            }
        }
    }

    /// Refuses values that make no schedule.
    pub fn validate(&self) -> Result<()> {
        if self.epochs == 0 {
            return Err(Error::param("schedule.epochs", self.epochs, "at least 1"));
        }
        if self.warmup_epochs >= self.epochs {
            return Err(Error::param("schedule.warmup_epochs", self.warmup_epochs, format!("less than schedule.epochs ({})", self.epochs)));
        }
        if !(self.gamma > 0.0 && self.gamma.is_finite()) {
            return Err(Error::param("schedule.gamma", self.gamma, "a positive number"));
        }
        if !(self.min_lr >= 0.0 && self.min_lr.is_finite()) {
            return Err(Error::param("schedule.min_lr", self.min_lr, "at least 0"));
        }
        if self.milestones.windows(2).any(|w| w[0] >= w[1]) {
            return Err(Error::param("schedule.milestones", format!("{:?}", self.milestones), "in ascending order"));
        }
        Ok(())
    }
}

/// The factor of a loss that warms up linearly: `min(1, (epoch + first) / warmup)`, 1 without warm-up.
///
/// `first` is what the first epoch counts as: 1 in mdistiller (DKD), 0 in the ND repository, whose first epoch has factor 0.
pub fn warmup_factor(epoch: usize, warmup_epochs: usize, first: usize) -> f64 {
    if warmup_epochs == 0 { 1.0 } else { ((epoch + first) as f64 / warmup_epochs as f64).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multistep_drops_at_its_milestones() {
        let s = Schedule::default();
        assert_eq!(s.lr(0.05, 149, 0, 10), 0.05);
        assert!((s.lr(0.05, 150, 1500, 10) - 0.005).abs() < 1e-15);
        assert!((s.lr(0.05, 239, 2399, 10) - 0.00005).abs() < 1e-15);
    }

    #[test]
    fn warmup_reaches_base_on_its_last_step() {
        let s = Schedule { warmup_epochs: 2, kind: ScheduleKind::Cosine, unit: ScheduleUnit::Step, epochs: 4, ..Schedule::default() };
        assert!((s.lr(1.0, 0, 0, 5) - 0.1).abs() < 1e-15);
        assert_eq!(s.lr(1.0, 1, 9, 5), 1.0);
        assert_eq!(s.lr(1.0, 2, 10, 5), 1.0);
        assert!((s.lr(1.0, 3, 15, 5) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn loss_warmup_counts_from_its_base() {
        assert_eq!(warmup_factor(0, 4, 0), 0.0);
        assert_eq!(warmup_factor(0, 4, 1), 0.25);
        assert_eq!(warmup_factor(9, 4, 1), 1.0);
        assert_eq!(warmup_factor(0, 0, 0), 1.0);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Schedule { epochs: 0, ..Schedule::default() }.validate().is_err());
        assert!(Schedule { warmup_epochs: 240, ..Schedule::default() }.validate().is_err());
        assert!(Schedule { milestones: vec![3, 2], ..Schedule::default() }.validate().is_err());
        assert!(Schedule { gamma: f64::NAN, ..Schedule::default() }.validate().is_err());
    }
}
