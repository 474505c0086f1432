//! `kdsvd`: the leading singular vectors of the maps, and how they relate from stage to stage.
//!
//! Lee et al., "Self-supervised Knowledge Distillation Using Singular Value Decomposition", ECCV 2018, arXiv 1807.06819.
//!
//! ```text
//! X = U Sigma V^T of each sample's map as a matrix,   sigma = sigma_t[:k] / |sigma_t[:k]|
//! v_t = the teacher's k leading columns of V,   v_s = for each of them the student's nearest of k + 3 (largest |cos|) with the sign of the cosine
//! both times sigma by columns;   R[a,b] = exp(-(v_i[a] - v_{i-1}[b])^2 / 8) by columns, i from the second stage on
//! value = sum_i (1/B) sum (R_s - R_t)^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of stage i | `[B,C,H,W]` |
//! | `X` | `matrix = "ch_w"`: rows are channels and heights; `"hw_c"`: positions | `[C H, W]`, `[H W, C]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `k` | 1 | 1..=width of X | |
//! | `stages` | null | ascending, two or more | null: from stage 1 on, until one network has no more |
//! | `matrix` | `"ch_w"` | `"ch_w"`, `"hw_c"` | mdistiller's or RepDistiller's; the widths of X must agree (with `"hw_c"` the channels) |
//!
//! Terms: `stage.<i>` from the second on. Weight: 1 in mdistiller, beside `ce` 1; RepDistiller's tables leave the method out. No adapter, no
//! state. Cost: a symmetric eigenproblem of X's width for each sample, stage and side, on the host in f64; with `"hw_c"`, where the width is
//! the channels, slow. Memory `O(B W^2)` a stage.
//!
//! The signs of singular vectors are arbitrary, and those of the teacher's between stages change the value: here the entry of largest
//! magnitude of each teacher's vector is positive (the first of equals). Student's vectors follow the teacher's. The gradient of a vector is
//! that of an eigenvector of `X^T X`, its gaps no less than 1e-6 of the largest eigenvalue; the teacher's side, the choice of vectors
//! and the singular values are constants.

use candle_core::{DType, Tensor};
use kd_core::{Error, LossTerms, MethodEntry, ParamDoc, ParityInputs, ParityOutput, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::features::{Choice, Plain, StagePair, Stages, map, stages_doc};
use crate::registry::parse;

/// Student's vectors among which the teacher's find their nearest, beyond `k`.
const SPARE: usize = 3;
/// Smallest gap of eigenvalues, as a share of the largest.
const GAP: f64 = 1e-6;

/// How a map becomes a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matrix {
    /// `[C H, W]`.
    ChW,
    /// `[H W, C]`.
    HwC,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Singular vectors, at least 1.
    pub k: usize,
    /// The stages to compare, two or more; none: from stage 1 on.
    pub stages: Option<Vec<usize>>,
    /// How a map becomes a matrix.
    pub matrix: Matrix,
}

impl Default for Params {
    fn default() -> Self {
        Self { k: 1, stages: None, matrix: Matrix::ChW }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.k == 0 {
            return Err(Error::param("k", 0, "at least 1"));
        }
        if let Some(list) = self.stages.as_ref().filter(|list| list.len() < 2) {
            return Err(Error::param("stages", format!("{list:?}"), "two or more: relations between neighbours are compared"));
        }
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::Bodies)
    }

    /// `X` of a map.
    fn matrix(&self, what: &str, x: &Tensor) -> Result<Tensor> {
        let [b, c, h, w] = map(what, x)?;
        Ok(match self.matrix {
            Matrix::ChW => x.reshape((b, c * h, w))?,
            Matrix::HwC => x.reshape((b, c, h * w))?.t()?.contiguous()?,
        })
    }
}

/// Singular-vector distillation over `pairs`, shallow to deep; the teacher's maps are detached.
///
/// # Errors
/// Fewer than two stages, maps that are not `[B,C,H,W]` or differ in their batch or in the width of X; `k` above that width.
pub fn kdsvd(pairs: &[StagePair<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    if pairs.len() < 2 {
        return Err(Error::refused(format!("kdsvd: relations between stages need two of them, got {}", pairs.len())));
    }
    let mut terms = LossTerms::new();
    let mut before: Option<[Tensor; 2]> = None;
    for pair in pairs {
        let own = params.matrix(&format!("student.{}", pair.name()), pair.student)?;
        let theirs = params.matrix(&format!("teacher.{}", pair.name()), &pair.teacher()?)?;
        let (b, _, width) = own.dims3()?;
        if theirs.dim(2)? != width {
            let (what, expected) = (format!("teacher.{} as a matrix", pair.name()), format!("[B,M,{width}], as the student's"));
            return Err(Error::shape(what, expected, theirs.dims()));
        }
        if params.k > width {
            return Err(Error::param("k", params.k, format!("at most {width}, the width of the matrices of {}", pair.name())));
        }
        let now = vectors(&own, &theirs, params.k)?;
        if let Some(before) = &before {
            let relation = |now: &Tensor, before: &Tensor| -> Result<Tensor> {
                let gap = now.unsqueeze(2)?.broadcast_sub(&before.unsqueeze(1)?)?;
                Ok((gap.sqr()? * (-1.0 / 8.0))?.exp()?)
            };
            let off = (relation(&now[0], &before[0])? - relation(&now[1], &before[1])?)?;
            terms = terms.with(&pair.name(), (off.sqr()?.sum_all()? / b as f64)?, 1.0);
        }
        before = Some(now);
    }
    Ok(terms)
}

/// The student's and the teacher's vectors, `[B,W,k]` each, scaled by the teacher's singular values.
fn vectors(own: &Tensor, theirs: &Tensor, k: usize) -> Result<[Tensor; 2]> {
    let (b, rows, width) = own.dims3()?;
    let (mine, other) = (eigen(own)?, eigen(theirs)?);
    let kept = (k + SPARE).min(width).min(rows).max(1);
    let (mut teacher, mut aligned, mut basis, mut slopes, mut sigmas) = (vec![], vec![], vec![], vec![], vec![]);
    for (s, t) in mine.iter().zip(&other) {
        let sigma: Vec<f64> = t.values[..k].iter().map(|v| v.max(0.0).sqrt()).collect();
        let length = sigma.iter().map(|s| s * s).sum::<f64>().sqrt().max(1e-12);
        sigmas.extend(sigma.iter().map(|s| s / length));
        let vectors: Vec<Vec<f64>> = (0..k).map(|c| upright(&t.vectors[c])).collect();
        // The nearest of the student's vectors to each of the teacher's; of equals both count, as in the release.
        let cos: Vec<Vec<f64>> = vectors.iter().map(|v| s.vectors[..kept].iter().map(|u| dot(u, v)).collect()).collect();
        for u in 0..kept {
            for row in &cos {
                let most = row.iter().fold(0.0f64, |m, c| m.max(c.abs()));
                aligned.push(if row[u].abs() == most { row[u].signum() } else { 0.0 });
            }
        }
        for a in 0..width {
            teacher.extend(vectors.iter().map(|v| v[a]));
            basis.extend(s.vectors.iter().map(|v| v[a]));
        }
        let floor = GAP * s.values[0].max(f64::MIN_POSITIVE);
        for i in 0..width {
            slopes.extend((0..kept).map(|j| {
                let gap = s.values[j] - s.values[i];
                match () {
                    () if i == j => 0.0,
                    () if gap.abs() < floor => (if i > j { 1.0 } else { -1.0 }) / floor,
                    () => 1.0 / gap,
                }
            }));
        }
    }
    let tensor = |v: Vec<f64>, shape: (usize, usize, usize)| Tensor::from_vec(v, shape, own.device())?.to_dtype(own.dtype());
    let sigma = tensor(sigmas, (b, 1, k))?;
    let teacher = tensor(teacher, (b, width, k))?.broadcast_mul(&sigma)?;
    let aligned = tensor(aligned, (b, kept, k))?;
    let basis = tensor(basis, (b, width, width))?;
    let slopes = tensor(slopes, (b, width, kept))?;
    // The eigenvectors of M = X^T X move by V (F o (V^T dM V)): a dM that is zero in value carries the gradient.
    let moment = own.t()?.matmul(own)?;
    let change = (&moment - moment.detach())?;
    let leading = basis.narrow(2, 0, kept)?.contiguous()?;
    let moved = basis.matmul(&(basis.t()?.contiguous()?.matmul(&change.matmul(&leading)?)? * slopes)?)?;
    let student = (leading + moved)?.matmul(&aligned)?.broadcast_mul(&sigma)?;
    Ok([student, teacher])
}

/// The vector or its opposite: its entry of largest magnitude is positive.
fn upright(v: &[f64]) -> Vec<f64> {
    let largest = v.iter().fold(0.0, |m: f64, &x| if x.abs() > m.abs() { x } else { m });
    if largest < 0.0 { v.iter().map(|x| -x).collect() } else { v.to_vec() }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Eigenvalues, descending, and their vectors.
struct Eigen {
    values: Vec<f64>,
    vectors: Vec<Vec<f64>>,
}

/// Of `X^T X` for each sample of `[B,M,W]`.
fn eigen(x: &Tensor) -> Result<Vec<Eigen>> {
    let x = x.detach().to_dtype(DType::F64)?;
    let (b, _, n) = x.dims3()?;
    let moments = x.t()?.matmul(&x)?.reshape((b, n * n))?.to_vec2::<f64>()?;
    Ok(moments.into_par_iter().map(|m| jacobi(m, n)).collect())
}

/// Cyclic Jacobi rotations of a symmetric `n` x `n` matrix, to the last digit.
fn jacobi(mut m: Vec<f64>, n: usize) -> Eigen {
    const SWEEPS: usize = 60;
    let mut v: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let size = m.iter().map(|x| x * x).sum::<f64>();
    for _ in 0..SWEEPS {
        let off: f64 =
            (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).filter(|(i, j)| i != j).map(|(i, j)| m[i * n + j] * m[i * n + j]).sum();
        if off <= size * 1e-34 || !off.is_finite() {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = m[p * n + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (m[q * n + q] - m[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let (c, s) = (1.0 / t.hypot(1.0), t / t.hypot(1.0));
                for k in 0..n {
                    let (a, b) = (m[k * n + p], m[k * n + q]);
                    (m[k * n + p], m[k * n + q]) = (c * a - s * b, s * a + c * b);
                }
                for k in 0..n {
                    let (a, b) = (m[p * n + k], m[q * n + k]);
                    (m[p * n + k], m[q * n + k]) = (c * a - s * b, s * a + c * b);
                }
                let (head, tail) = v.split_at_mut(q);
                for (a, b) in head[p].iter_mut().zip(&mut tail[0]) {
                    (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| m[j * n + j].total_cmp(&m[i * n + i]));
    Eigen { values: order.iter().map(|&i| m[i * n + i]).collect(), vectors: order.iter().map(|&i| v[i].clone()).collect() }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    Ok(kdsvd(&params.choice().parity(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "kdsvd",
    about: "relations between the leading singular vectors of neighbouring stages",
    source: "Lee et al., ECCV 2018, arXiv 1807.06819",
    year: 2018,
    parameters: &[
        ParamDoc { name: "k", default: "1", range: ">= 1, at most the width", about: "singular vectors" },
        stages_doc("what is compared, two or more; null: from stage 1 on"),
        ParamDoc { name: "matrix", default: "\"ch_w\"", range: "\"ch_w\" | \"hw_c\"", about: "how a map becomes a matrix" },
    ],
    build: |params| {
        let params = parse(params, Params::validate)?;
        Ok(Box::new(Plain::new("kdsvd", params.choice(), move |pairs: &[StagePair<'_>]| kdsvd(pairs, &params)).checked(check)))
    },
    parity,
    raw_terms: true,
};

/// Refuses networks with a single stage in common, at the start.
fn check(matches: &[crate::features::Match]) -> Result<()> {
    if matches.len() < 2 { Err(Error::refused("kdsvd: relations between stages need two of them in both networks")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        let n = 7;
        let x: Vec<f64> = (0..n * n).map(|i| kd_core::Rng::new(3).normal(i as u64)).collect();
        let m: Vec<f64> = (0..n * n).map(|ij| (0..n).map(|k| x[k * n + ij / n] * x[k * n + ij % n]).sum()).collect();
        let e = jacobi(m.clone(), n);
        assert!(e.values.windows(2).all(|w| w[0] >= w[1]) && e.values[n - 1] > -1e-12);
        for i in 0..n {
            for j in 0..n {
                let rebuilt: f64 = (0..n).map(|k| e.values[k] * e.vectors[k][i] * e.vectors[k][j]).sum();
                assert!((rebuilt - m[i * n + j]).abs() < 1e-12, "{i} {j}");
                let one = f64::from(u8::from(i == j));
                assert!((dot(&e.vectors[i], &e.vectors[j]) - one).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn nothing_to_decompose_is_no_harm() {
        let e = jacobi(vec![0.0; 9], 3);
        assert_eq!(e.values, [0.0; 3]);
    }
}
