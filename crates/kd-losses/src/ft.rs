//! `ft`: factor transfer, the teacher's last map paraphrased, the student's translated.
//!
//! Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, arXiv 1802.04977.
//!
//! ```text
//! phase:    paraphraser = encoder and decoder on the teacher;   value = mean (decoder(encoder(T)) - T)^2
//! then:     F_t = encoder(T), frozen;   F_s = translator(S);   the larger grid average-pooled to the smaller
//! released: Q(F) = N(flatten(mean_c F^p1)),   value = mean |Q(F_s) - Q(F_t)|^p2
//! paper:    Q(F) = N(flatten(F)),             value = mean |Q(F_s) - Q(F_t)|^p2        N(x) = x / max(|x|, 1e-12) by samples
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S`, `T` | outputs of the last stages | `[B,C,H,W]` |
//! | encoder | 3x3 convolutions `C_t, C_t, k C_t, k C_t` | |
//! | decoder | transposed 3x3 convolutions `k C_t, k C_t, C_t, C_t` | |
//! | translator | 3x3 convolutions `C_s, C_s, k C_t, k C_t`, batch norm behind each | |
//!
//! All layers have biases and end in a leaky ReLU.
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `variant` | `"released"` | `"released"`, `"paper"` | |
//! | `p1`, `p2` | 2, 1 | 1..=8 | powers; p1 of `released` alone |
//! | `factor` | 0.5 | > 0 | k, at least one channel |
//! | `slope` | 0.1 | 0..=1 | of the leaky ReLUs |
//! | `init_epochs` | 30 | >= 1 | the initial phase, the paraphraser's |
//! | `init_lr` | 0.01 | > 0, or null | its learning rate; null: the student's |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the translator's batch norms |
//!
//! Terms: `reconstruction` in the phase, `factor` after it. Weight in RepDistiller's CIFAR-100 tables: 200, beside `ce` 1, for every pair; its
//! phase runs at 0.01 for resnet and wrn students, at the student's rate for others. ImageNet R34-R18 (torchdistill): a phase of 1 epoch at 0.01,
//! then weight 1000. Networks, in this order: paraphraser (idle after the phase), translator (idle in it); PyTorch's initialisation. State:
//! running statistics. Cost: three 3x3 convolutions a side at the width of the last stage; memory `O(B C_t H W)`. They run on the reference
//! executor, which knows leaky ReLU and transposed convolutions.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Phase, Result, Setup, StepView,
};
use kd_nn::{Conv, GraphBuilder, Network, Op, ops};
use serde::{Deserialize, Serialize};

use crate::at::channel_mean;
use crate::features::{self, BN_EPS, BN_MOMENTUM, Choice, Match, Stages, batch_statistics, matched};
use crate::inputs;
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// Which form of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Maps of the channels' mean power.
    Released,
    /// The whole factor.
    Paper,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which form of the loss.
    pub variant: Variant,
    /// Power of the factor, in 1..=8.
    pub p1: usize,
    /// Power of the difference, in 1..=8.
    pub p2: usize,
    /// Channels of the factors, as a share of the teacher's, above 0.
    pub factor: f64,
    /// Slope of the leaky ReLUs, in 0..=1.
    pub slope: f64,
    /// Epochs of the initial phase, at least 1.
    pub init_epochs: usize,
    /// Its learning rate, above 0; none: the student's.
    pub init_lr: Option<f64>,
    /// Epsilon of the translator's batch norms, above 0.
    pub bn_eps: f64,
    /// Share of a batch in their running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            variant: Variant::Released,
            p1: 2,
            p2: 1,
            factor: 0.5,
            slope: 0.1,
            init_epochs: 30,
            init_lr: Some(0.01),
            bn_eps: 1e-5,
            bn_momentum: 0.1,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        for (key, power) in [("p1", self.p1), ("p2", self.p2)] {
            if !(1..=8).contains(&power) {
                return Err(Error::param(key, power, "in 1..=8"));
            }
        }
        inputs::positive("factor", self.factor)?;
        inputs::share("slope", self.slope)?;
        if self.init_epochs == 0 {
            return Err(Error::param("init_epochs", 0, "at least 1: an untrained paraphraser says nothing"));
        }
        self.init_lr.map_or(Ok(()), |lr| inputs::positive("init_lr", lr))?;
        self.norm().validate()
    }

    fn norm(&self) -> Norm {
        Norm { eps: self.bn_eps, momentum: self.bn_momentum }
    }

    fn width(&self, teacher: usize) -> Result<usize> {
        match (teacher as f64 * self.factor) as usize {
            0 => Err(Error::param("factor", self.factor, format!("large enough for a channel of the teacher's {teacher}"))),
            width => Ok(width),
        }
    }
}

/// Factor transfer of the student's and the teacher's factors, `[B,C,H,W]`; the teacher's is detached.
///
/// # Errors
/// Factors that are not `[B,C,H,W]`, differ in batch, in width but not in height, or (paper) in channels; parameters out of range.
pub fn ft(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let [b, c, ..] = features::map("student's factor", student)?;
    features::map("teacher's factor", teacher)?;
    if teacher.dims()[..2] != [b, c] {
        return Err(Error::shape("teacher's factor", format!("[{b},{c},H,W], as the student's"), teacher.dims()));
    }
    let (s, t) = matched(student, &inputs::constant(teacher, student)?)?;
    let unit = |f: &Tensor| -> Result<Tensor> {
        let rows = match params.variant {
            Variant::Released => channel_mean(&power(&f.flatten_from(2)?, params.p1)?)?,
            Variant::Paper => f.flatten_from(1)?,
        };
        Ok(ops::l2_normalize(&rows, 1, 1e-12)?)
    };
    let gap = (unit(&s)? - unit(&t)?)?;
    // candle's `abs` has the gradient 1 at 0, PyTorch's has 0.
    let distance = (&gap * gap.detach().sign()?)?;
    Ok(LossTerms::one("factor", power(&distance, params.p2)?.mean_all()?))
}

/// The paraphraser's loss: how well it rebuilds the teacher's map, which is detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in shape.
pub fn reconstruction(rebuilt: &Tensor, teacher: &Tensor) -> Result<LossTerms> {
    features::map("rebuilt map", rebuilt)?;
    if rebuilt.dims() != teacher.dims() {
        return Err(Error::shape("rebuilt map", format!("{:?}, as the teacher's", teacher.dims()), rebuilt.dims()));
    }
    let gap = (rebuilt - inputs::constant(teacher, rebuilt)?)?;
    Ok(LossTerms::one("reconstruction", gap.sqr()?.mean_all()?))
}

fn power(x: &Tensor, n: usize) -> Result<Tensor> {
    let mut product = x.clone();
    for _ in 1..n {
        product = (product * x)?;
    }
    Ok(product)
}

struct Prepared {
    found: Match,
    /// The encoder ends at [`Cut::Stage`] 0, the decoder at 1.
    paraphraser: Arc<Network>,
    translator: Arc<Network>,
}

struct Ft {
    params: Params,
    prepared: Option<Prepared>,
}

fn choice() -> Choice {
    Choice::outputs(&None, Stages::Last)
}

impl Ft {
    fn prepared(&self) -> Result<&Prepared> {
        self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its paraphraser and translator (`prepare` builds them)"))
    }
}

impl Method for Ft {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        self.prepared.as_ref().map_or_else(|| choice().before(), |p| features::needs([&p.found]))
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let found = choice().matches(setup, ENTRY.name)?.remove(0);
        let (from, to, slope) = (found.from, found.to, self.params.slope);
        let width = self.params.width(to[0])?;
        batch_statistics(setup, ENTRY.name, from[1] * from[2])?;
        let mut b = GraphBuilder::new("ft", &to);
        for (i, out) in [to[0], width, width].into_iter().enumerate() {
            b.conv(&format!("encoder.conv{}", i + 1), Conv::new(out, 3).pad(1).bias());
            b.layer(Op::LeakyRelu { slope });
        }
        b.stage(0, "encoder", None);
        for (i, out) in [width, to[0], to[0]].into_iter().enumerate() {
            b.conv_transpose(&format!("decoder.conv{}", i + 1), out, 3, 1, 1);
            b.layer(Op::LeakyRelu { slope });
        }
        b.stage(1, "decoder", None);
        let paraphraser = features::network(setup, b)?;
        let (mut b, norm) = (GraphBuilder::new("ft.translator", &from), self.params.norm());
        for (i, out) in [from[0], width, width].into_iter().enumerate() {
            b.conv(&format!("conv{}", i + 1), Conv::new(out, 3).pad(1).bias());
            b.batch_norm_as(&format!("bn{}", i + 1), true, norm.eps, norm.momentum);
            b.layer(Op::LeakyRelu { slope });
        }
        b.stage(0, "translator", None);
        self.prepared = Some(Prepared { found, paraphraser, translator: features::network(setup, b)? });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.prepared.iter().flat_map(|p| [&p.paraphraser, &p.translator]))
    }

    fn phases(&self) -> Vec<Phase> {
        let teacher = self.needs().teacher;
        vec![Phase {
            name: "paraphraser".to_string(),
            epochs: self.params.init_epochs,
            lr: self.params.init_lr,
            needs: Needs { student: vec![], teacher, ..Needs::default() },
            unused: vec![String::new()],
            idle: vec![1],
        }]
    }

    /// The paraphraser after its phase.
    fn idle(&self, _epoch: usize) -> Vec<usize> {
        vec![0]
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let p = self.prepared()?;
        let teacher = step.teacher()?.get(p.found.teacher)?;
        let factor = p.paraphraser.run(teacher, Cut::Input, &[Cut::Stage(0)], Mode::Eval)?.stage(0)?.detach();
        let own = features::run(&p.translator, step.student()?.get(p.found.student)?, Cut::Input, Cut::Stage(0), step)?;
        ft(&own, &factor, &self.params)
    }

    fn phase_loss(&mut self, _phase: usize, step: &StepView<'_>) -> Result<LossTerms> {
        let p = self.prepared()?;
        let teacher = step.teacher()?.get(p.found.teacher)?;
        reconstruction(&features::run(&p.paraphraser, teacher, Cut::Input, Cut::Stage(1), step)?, teacher)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    // A call on named tensors is told which of the two losses it is to compute.
    let mut params = inputs.params.clone();
    let phase = params.as_object_mut().and_then(|p| p.remove("phase")).unwrap_or_else(|| "transfer".into());
    let params: Params = serde_json::from_value(params)?;
    params.validate()?;
    let teacher = inputs.get("teacher.stage.last")?;
    features::map("teacher.stage.last", teacher)?;
    let leaky = |x: Tensor| ops::leaky_relu(&x, params.slope);
    let encode = |layers: &Layers<'_>| -> Result<Tensor> {
        (1..=3).try_fold(teacher.clone(), |x, i| Ok(leaky(layers.conv(&format!("encoder.conv{i}"), &x, 1, 1)?)?))
    };
    let layers = Layers::trained(inputs, params.norm());
    match phase.as_str() {
        Some("paraphrase") => {
            let decode =
                |x: Tensor, i: usize| -> Result<Tensor> { Ok(leaky(layers.conv_transpose(&format!("decoder.conv{i}"), &x, 1, 1)?)?) };
            Ok(reconstruction(&(1..=3).try_fold(encode(&layers)?, decode)?, teacher)?.into())
        }
        Some("transfer") => {
            let student = inputs.get("student.stage.last")?;
            features::map("student.stage.last", student)?;
            let translate = |x: Tensor, i: usize| -> Result<Tensor> {
                let x = layers.conv(&format!("translator.conv{i}"), &x, 1, 1)?;
                Ok(leaky(layers.batch_norm(&format!("translator.bn{i}"), &x)?)?)
            };
            let own = (1..=3).try_fold(student.clone(), translate)?;
            Ok(ParityOutput { terms: ft(&own, &encode(&Layers::frozen(inputs))?, &params)?, state: layers.into_state() })
        }
        _ => Err(Error::param("phase", phase, "\"transfer\" or \"paraphrase\"")),
    }
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ft",
    about: "factor transfer: the teacher's last map paraphrased (initial phase), the student's translated",
    source: "Kim et al., NeurIPS 2018, arXiv 1802.04977",
    year: 2018,
    parameters: &[
        ParamDoc {
            name: "variant",
            default: "\"released\"",
            range: "\"released\" | \"paper\"",
            about: "mean power's maps, or the whole factor",
        },
        ParamDoc { name: "p1", default: "2", range: "1..=8", about: "power of the factor" },
        ParamDoc { name: "p2", default: "1", range: "1..=8", about: "power of the difference" },
        ParamDoc { name: "factor", default: "0.5", range: "> 0", about: "channels of the factors, as a share of the teacher's" },
        ParamDoc { name: "slope", default: "0.1", range: "0..=1", about: "of the leaky ReLUs" },
        ParamDoc { name: "init_epochs", default: "30", range: ">= 1", about: "epochs of the paraphraser's phase" },
        ParamDoc { name: "init_lr", default: "0.01", range: "> 0, or null", about: "its learning rate; null: the student's" },
        BN_EPS,
        BN_MOMENTUM,
    ],
    build: |params| Ok(Box::new(Ft { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
