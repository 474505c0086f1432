//! The distance `d(z, v)` between two networks' logits: any method of kd-losses that needs these and the labels, nothing else.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Error, MethodEntry, Needs, ParityInputs, Result};
use kd_losses::{dkd, kd};
use kd_nn::ops::log_softmax;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Params;

/// A logit method by name, with what is to differ from its defaults: `"dkd"`, or `{ method = "nkd", gamma = 1.0 }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Distance {
    /// Its name in kd-losses.
    pub method: String,
    /// Its parameters; those that are left out come from Block-KD (`temperature`, `dkd_alpha`, `dkd_beta`), then from its defaults.
    pub params: Map<String, Value>,
}

impl Distance {
    /// `method` as Block-KD's own parameters set it.
    pub fn new(method: &str) -> Self {
        Self { method: method.to_string(), params: Map::new() }
    }
}

impl TryFrom<Value> for Distance {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        let bad = |value: Value| Error::param("distance", value, "the name of a logit method, or a table with `method` and its parameters");
        match value {
            Value::String(method) => Ok(Self::new(&method)),
            Value::Object(mut params) => match params.remove("method") {
                Some(Value::String(method)) => Ok(Self { method, params }),
                _ => Err(bad(Value::Object(params))),
            },
            other => Err(bad(other)),
        }
    }
}

impl From<Distance> for Value {
    fn from(distance: Distance) -> Self {
        let Distance { method, mut params } = distance;
        if params.is_empty() {
            return Self::String(method);
        }
        params.insert("method".to_string(), Self::String(method));
        Self::Object(params)
    }
}

/// A distance with all its parameters.
pub(crate) struct Measure {
    entry: &'static MethodEntry,
    params: Value,
}

impl Measure {
    pub(crate) fn new(distance: &Distance, block_kd: &Params) -> Result<Self> {
        let entry = kd_losses::find(&distance.method).map_err(|e| match e {
            Error::Param { value, allowed, .. } => Error::Param { key: "distance".to_string(), value, allowed },
            e => e,
        })?;
        let mut params = distance.params.clone();
        let mut fill = |key: &str, value: f64| {
            if entry.parameters.iter().any(|p| p.name == key) {
                params.entry(key).or_insert_with(|| value.into());
            }
        };
        fill("temperature", block_kd.temperature);
        if entry.name == dkd::ENTRY.name {
            fill("alpha", block_kd.dkd_alpha);
            fill("beta", block_kd.dkd_beta);
        }
        Ok(Self { entry, params: Value::Object(params) })
    }

    /// Whether [`Measure::both_ways`] is known.
    pub(crate) fn differentiates_both(&self) -> bool {
        [kd::ENTRY.name, dkd::ENTRY.name].contains(&self.entry.name)
    }

    /// Refuses a method that is no distance between logits, and parameters that it does not take.
    pub(crate) fn check(&self) -> Result<()> {
        let needs = (self.entry.build)(&self.params)?.needs();
        let plain = Needs { labels: needs.labels, ..Needs::logits() };
        let refuse = |why: String| {
            Err(Error::param("distance", format!("\"{}\"", self.entry.name), format!("a method that compares logits: {why}")))
        };
        if needs != plain {
            let cuts = |cuts: &[Cut]| cuts.iter().map(Cut::to_string).collect::<Vec<_>>().join(", ");
            return refuse(format!(
                "this one needs {} of the student, {} of the teacher, or more",
                cuts(&needs.student),
                cuts(&needs.teacher)
            ));
        }
        // A method may still keep a memory, or train something: then it misses it here.
        let logits = Tensor::new(&[[0.5f64, -0.25, 0.0], [0.0, 1.0, 0.25]], &Device::Cpu)?;
        match self.between(&logits, &(&logits * 0.5)?, &Tensor::new(&[0i64, 2], &Device::Cpu)?) {
            Err(Error::Missing { input, .. }) => refuse(format!("this one needs `{input}` besides")),
            other => other.map(|_| ()),
        }
    }

    /// `d(z, v)` in the graph of `z`; `labels` are class indices `[B]` or class probabilities `[B,K]`.
    pub(crate) fn between(&self, z: &Tensor, v: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let labelled = if labels.dtype().is_float() { "targets" } else { "labels" };
        let named = [("student.logits", z), ("teacher.logits", v), (labelled, labels)];
        let tensors: BTreeMap<_, _> = named.into_iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
        (self.entry.parity)(&ParityInputs { tensors, params: self.params.clone(), dtype: z.dtype() })?.terms.total()
    }

    /// `d(z, v)` in the graphs of `z` and of `v`.
    pub(crate) fn both_ways(&self, z: &Tensor, v: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let towards_v = self.in_graph_of_v(&z.detach(), v, labels)?;
        Ok((self.between(z, v, labels)? + (&towards_v - towards_v.detach())?)?)
    }

    /// The definition once more, for the gradient of `v`: kd-losses detaches a teacher.
    fn in_graph_of_v(&self, z: &Tensor, v: &Tensor, labels: &Tensor) -> Result<Tensor> {
        if self.entry.name == kd::ENTRY.name {
            let kd::Params { temperature: t, form, t_squared } = serde_json::from_value(self.params.clone())?;
            let (lp, lq) = (log_softmax(&(z / t)?, 1)?, log_softmax(&(v / t)?, 1)?);
            let rows = match form {
                kd::Form::Kl => kl(&lq, &lp)?,
                kd::Form::CrossEntropy => (lq.exp()? * lp.neg()?)?.sum(1)?,
            };
            return Ok((rows.mean_all()? * if t_squared { t * t } else { 1.0 })?);
        }
        let dkd::Params { temperature: t, alpha, beta } = serde_json::from_value(self.params.clone())?;
        let (z, v) = ((z / t)?, (v / t)?);
        let y = one_hot(labels, &z)?;
        // Far below every logit: its exponential is 0, and so is what it is multiplied by.
        let others = |x: &Tensor| -> Result<Tensor> { Ok((x - (&y * 1e30)?)?) };
        let label_or_not = |x: &Tensor| -> Result<Tensor> {
            let odds = ((x * &y)?.sum_keepdim(1)? - log_sum_exp(&others(x)?)?)?;
            Ok(log_softmax(&Tensor::cat(&[&odds, &odds.zeros_like()?], 1)?, 1)?)
        };
        let target = kl(&label_or_not(&v)?, &label_or_not(&z)?)?;
        let rest = kl(&log_softmax(&others(&v)?, 1)?, &log_softmax(&others(&z)?, 1)?)?;
        Ok((((target * alpha)? + (rest * beta)?)?.mean_all()? * (t * t))?)
    }
}

fn log_sum_exp(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(1)?;
    Ok((x.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?)
}

/// `KL(q || p)` of each row, from logarithms.
fn kl(lq: &Tensor, lp: &Tensor) -> Result<Tensor> {
    Ok((lq.exp()? * (lq - lp)?)?.sum(1)?)
}

/// 1 at each row's label; of probabilities, at the heaviest class.
fn one_hot(labels: &Tensor, like: &Tensor) -> Result<Tensor> {
    let ids = if labels.dtype().is_float() { labels.argmax(1)? } else { labels.clone() };
    let classes = Tensor::arange(0i64, like.dim(1)? as i64, like.device())?.unsqueeze(0)?;
    Ok(ids.to_dtype(DType::I64)?.unsqueeze(1)?.broadcast_eq(&classes)?.to_dtype(like.dtype())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use kd_core::Rng;
    use serde_json::json;

    use super::*;

    fn logits(seed: u64) -> Tensor {
        let values: Vec<f64> = (0..15).map(|i| 2.0 * Rng::new(seed).normal(i)).collect();
        Tensor::from_vec(values, (3, 5), &Device::Cpu).unwrap()
    }

    fn measure(value: Value) -> Measure {
        Measure::new(&serde_json::from_value(value).unwrap(), &Params::default()).unwrap()
    }

    /// The value is that of `between`, and both gradients are those of central differences.
    #[test]
    fn gradients_go_both_ways() {
        let labels = Tensor::new(&[4i64, 0, 2], &Device::Cpu).unwrap();
        let soft = Tensor::new(&[[0.0, 0.3, 0.0, 0.0, 0.7], [0.6, 0.0, 0.4, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        let kinds = [json!("kd"), json!("dkd"), json!({"method": "kd", "form": "cross_entropy", "t_squared": false, "temperature": 2.0})];
        for (kind, labels) in kinds.iter().flat_map(|k| [(k, &labels), (k, &soft)]) {
            let m = measure(kind.clone());
            let value = |z: &Tensor, v: &Tensor| m.between(z, v, labels).unwrap().to_scalar::<f64>().unwrap();
            let (z, v) = (Var::from_tensor(&logits(1)).unwrap(), Var::from_tensor(&logits(2)).unwrap());
            let both = m.both_ways(&z, &v, labels).unwrap();
            assert_eq!(both.to_scalar::<f64>().unwrap(), value(&z, &v), "{kind}");
            let grads = both.backward().unwrap();
            for i in 0..15usize {
                let step = |t: &Tensor, h: f64| {
                    let mut x: Vec<f64> = t.flatten_all().unwrap().to_vec1().unwrap();
                    x[i] += h;
                    Tensor::from_vec(x, (3, 5), &Device::Cpu).unwrap()
                };
                let h = 1e-5;
                let at = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f64>().unwrap()[i];
                for (found, numeric) in [
                    (at(grads.get(&z).unwrap()), (value(&step(&z, h), &v) - value(&step(&z, -h), &v)) / (2.0 * h)),
                    (at(grads.get(&v).unwrap()), (value(&z, &step(&v, h)) - value(&z, &step(&v, -h))) / (2.0 * h)),
                ] {
                    assert!((found - numeric).abs() < 1e-7, "{kind}, element {i}: {found}, by differences {numeric}");
                }
            }
        }
    }

    #[test]
    fn both_ways_stay_finite_in_f32() {
        for kind in ["kd", "dkd"] {
            let z = Var::new(&[[80f32, -80.0, 0.0], [-80.0, 80.0, 80.0]], &Device::Cpu).unwrap();
            let v = Var::new(&[[-80f32, 80.0, 0.0], [-80.0, -80.0, 80.0]], &Device::Cpu).unwrap();
            let labels = Tensor::new(&[0i64, 2], &Device::Cpu).unwrap();
            let m = measure(json!({"method": kind, "temperature": 1.0}));
            let grads = m.both_ways(&z, &v, &labels).unwrap().backward().unwrap();
            for var in [&z, &v] {
                kd_core::registry::check_finite(kind, grads.get(var).unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn parameters_come_from_the_table_then_from_block_kd_then_from_the_method() {
        assert_eq!(measure(json!("kd")).params, json!({"temperature": 4.0}));
        assert_eq!(measure(json!({"method": "nkd", "gamma": 1.0})).params, json!({"temperature": 4.0, "gamma": 1.0}));
        assert_eq!(measure(json!({"method": "dkd", "temperature": 1.0})).params, json!({"temperature": 1.0, "alpha": 1.0, "beta": 8.0}));
        let back: Value = serde_json::from_value::<Distance>(json!({"method": "nkd", "gamma": 1.0})).unwrap().into();
        assert_eq!(back, json!({"method": "nkd", "gamma": 1.0}));
        assert_eq!(Value::from(Distance::new("kd")), json!("kd"));
    }

    #[test]
    fn what_is_no_distance_is_refused() {
        let refused = |kind: Value| {
            let distance = serde_json::from_value::<Distance>(kind)?;
            let checked = Measure::new(&distance, &Params::default()).and_then(|m| m.check());
            Ok::<_, serde_json::Error>(checked.err().map(|e| e.to_string()).unwrap_or_default())
        };
        for good in [json!("kd"), json!("dkd"), json!("nkd")] {
            assert_eq!(refused(good).unwrap(), "");
        }
        assert!(refused(json!("nkdd")).unwrap().contains("did you mean `nkd`"));
        for bad in ["ce", "fnkd", "uskd", "nd", "tf_nkd", "kd_pp"] {
            let message = refused(json!(bad)).unwrap();
            assert!(message.contains("distance") && message.contains(bad) && message.contains("compares logits"), "{message}");
        }
        assert!(refused(json!({"method": "kd", "gamma": 1.0})).unwrap().contains("gamma"));
        assert!(refused(json!({"method": "kd", "temperature": 0.0})).unwrap().contains("temperature = 0"));
        assert!(refused(json!(7)).unwrap_err().to_string().contains("the name of a logit method"));
    }
}
