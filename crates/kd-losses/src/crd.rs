//! `crd`: contrastive representation distillation against memories of the whole training set.
//!
//! Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.
//!
//! ```text
//! u = W e + b,  a = u / |u|                                            of both sides, both heads trained
//! M_s, M_t [n,dim]: a row for each training sample, uniform in +-sqrt(3/dim) at first
//! o_s[b,j] = exp(M_t[i_bj] . a_s[b] / T),  o_t[b,j] = exp(M_s[i_bj] . a_t[b] / T)       i_b0 the positive, i_b1.. k negatives
//! Z = n mean(o) of the first batch, a constant from then on;  x = o / Z,  c = k / n
//! L(x) = -(1/B) sum_b [ log(x_b0 / (x_b0 + c + eps)) + sum_j log(c / (x_bj + c + eps)) ]
//! value = L(x_s) + L(x_t)
//! then M_s[y] = norm(m M_s[y] + (1 - m) a_s), likewise M_t, for the samples y of the batch
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `e_s`, `e_t` | embeddings of student and teacher (detached) | `[B,D_s]`, `[B,D_t]` |
//! | `W`, `b` | `embed_s` and `embed_t`, linear layers of the method's own | `[dim,D]`, `[dim]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `negatives` | 16384 | >= 1 | k, for each sample |
//! | `dim` | 128 | >= 1 | |
//! | `temperature` | 0.07 | > 0 | T; the paper: 0.1 on CIFAR-100 |
//! | `momentum` | 0.5 | 0..=1 | m |
//! | `positive` | `"exact"` | `"exact"`, `"relaxed"` | the sample itself, or a random one of its class |
//! | `replacement` | false | | negatives drawn with replacement, as the released ImageNet loader does; always where k exceeds their number |
//! | `eps` | 1e-7 | > 0 | |
//!
//! Terms: `student_anchor`, `teacher_anchor`. Recipe: `ce` of weight 1 beside this of weight 0.8, for every pair; CRD+KD: `kd` of weight 1, too.
//!
//! Negatives are drawn anew at every visit, uniformly from the samples of other classes; where the data does not tell its labels, uniformly from
//! all samples. An image without a label has a row, too, and all labelled samples as its others. They are a function of (seed, step, row), as everything random.
//!
//! State, in every checkpoint: both memories, `2 n dim` numbers (51 MB in f32 for CIFAR-100, 1.3 GB for ImageNet), and both Z. They stay in the
//! CPU's memory; on a GPU the anchors `[B,dim]` come to them and the gradients go back. Gathered, a step's rows would be `2 B k dim` numbers (1.07 GB
//! in f32 at B = 64): they are streamed instead. A row is read once, for its score and, since the slope of every score is known at once, for its share
//! of the anchor's gradient; what is kept is `B dim` numbers and the indices of a sample at a time. Cost `4 B k dim` multiply-adds a step, over all threads.
//! Sampling without replacement holds `n` indices a thread.
//!
//! Z is one random batch's, so results depend on the seed through it. Of a sample that is twice in a batch the later row is kept. Needs sample
//! indices below the number of training samples.

use std::sync::Arc;

use candle_core::{DType, Device, Storage, Tensor, WithDType};
use kd_core::{
    Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Rng, Setup, StateDict, StepView,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::heads::{self, Heads};
use crate::norms::unit;
use crate::registry::{parity_without, parse};
use crate::{inputs, pkt};

/// What an anchor is drawn towards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positive {
    /// The sample itself.
    Exact,
    /// A random sample of its class.
    Relaxed,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Negatives of each sample, at least 1.
    pub negatives: usize,
    /// Width of the heads and memories, at least 1.
    pub dim: usize,
    /// T, above 0.
    pub temperature: f64,
    /// Share of its old row that a memory keeps, in 0..=1.
    pub momentum: f64,
    /// What an anchor is drawn towards.
    pub positive: Positive,
    /// Whether negatives are drawn with replacement even where there are enough.
    pub replacement: bool,
    /// Added to the denominators, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { negatives: 16384, dim: 128, temperature: 0.07, momentum: 0.5, positive: Positive::Exact, replacement: false, eps: 1e-7 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::at_least_one("negatives", self.negatives)?;
        inputs::at_least_one("dim", self.dim)?;
        inputs::positive("temperature", self.temperature)?;
        inputs::share("momentum", self.momentum)?;
        inputs::positive("eps", self.eps)
    }
}

/// The memories of both sides and their normalisers.
#[derive(Clone, Debug)]
pub struct Memory {
    /// `[n,dim]` of the student and of the teacher, on the CPU, changed in place.
    banks: [Tensor; 2],
    /// Z of the student's and of the teacher's anchors, once there was a batch.
    z: [Option<f64>; 2],
}

const BANKS: [&str; 2] = ["bank_student", "bank_teacher"];
const NORMALISERS: [&str; 2] = ["z_student", "z_teacher"];

impl Memory {
    /// For `n` training samples, uniform in `+-sqrt(3/dim)`.
    ///
    /// # Errors
    /// A type other than f32 and f64.
    pub fn new(n: usize, dim: usize, dtype: DType, rng: Rng) -> Result<Self> {
        let bound = (3.0 / dim as f64).sqrt();
        let bank = |name: &str| -> Result<Tensor> {
            let rng = rng.named(name);
            let values: Vec<f32> = (0..(n * dim) as u64).into_par_iter().map(|i| ((2.0 * rng.uniform(i) - 1.0) * bound) as f32).collect();
            Ok(Tensor::from_vec(values, (n, dim), &Device::Cpu)?.to_dtype(dtype)?)
        };
        Ok(Self { banks: [bank(BANKS[0])?, bank(BANKS[1])?], z: [None; 2] })
    }

    /// From tensors by name: `bank_student`, `bank_teacher` `[n,dim]`, `z_student`, `z_teacher` (below 0: no batch yet).
    ///
    /// # Errors
    /// Tensors that are missing or of another shape than `[n,dim]` and scalars.
    pub fn from_tensors<'a>(n: usize, dim: usize, dtype: DType, find: impl Fn(&str) -> Result<&'a Tensor>) -> Result<Self> {
        let bank = |name: &str| -> Result<Tensor> {
            let bank = find(name)?;
            if bank.dims() != [n, dim] {
                return Err(Error::shape(name, format!("[{n}, {dim}], a row for each training sample"), bank.dims()));
            }
            // A copy: rows change in place.
            Ok(bank.to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?.copy()?)
        };
        let z = |name: &str| -> Result<Option<f64>> {
            let z = find(name)?;
            if z.elem_count() != 1 {
                return Err(Error::shape(name, "one number", z.dims()));
            }
            Ok(Some(z.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?[0]).filter(|&z| z > 0.0))
        };
        Ok(Self { banks: [bank(BANKS[0])?, bank(BANKS[1])?], z: [z(NORMALISERS[0])?, z(NORMALISERS[1])?] })
    }

    /// What [`Memory::from_tensors`] takes, with `z` in the type `dtype`.
    fn tensors(&self, dtype: DType) -> Result<StateDict> {
        let mut state = StateDict::new();
        for side in 0..2 {
            state.insert(BANKS[side].to_string(), self.banks[side].copy()?);
            let z = Tensor::new(self.z[side].unwrap_or(-1.0), &Device::Cpu)?.to_dtype(dtype)?;
            state.insert(NORMALISERS[side].to_string(), z);
        }
        Ok(state)
    }

    /// The memories `[n,dim]` of the student and of the teacher.
    pub fn banks(&self) -> &[Tensor; 2] {
        &self.banks
    }

    /// Samples.
    fn len(&self) -> usize {
        self.banks[0].dims()[0]
    }
}

/// Writes the indices that row `b` of a batch is compared with: the positive, then the negatives.
pub type Contrast<'a> = &'a (dyn Fn(usize, &mut Vec<u32>) + Sync);

/// CRD on the heads' outputs `[B,dim]` of `student` and `teacher`, both with gradients, for the training samples `index`. Updates the memory.
///
/// # Errors
/// Outputs that are not finite or not `[B,dim]`, indices outside the memory, parameters out of range.
pub fn crd(
    student: &Tensor,
    teacher: &Tensor,
    index: &[u32],
    contrast: Contrast<'_>,
    memory: &mut Memory,
    params: &Params,
) -> Result<LossTerms> {
    params.validate()?;
    let (n, dim) = (memory.len(), memory.banks[0].dims()[1]);
    for (what, x) in [("the student's head", student), ("the teacher's head", teacher)] {
        inputs::embedding(what, x)?;
        if x.dims() != [index.len(), dim] {
            return Err(Error::shape(what, format!("[{}, {dim}], as many rows as sample indices", index.len()), x.dims()));
        }
    }
    in_range(index, n)?;
    let anchors = [unit(student, 1e-12)?, unit(teacher, 1e-12)?];
    let host = |t: &Tensor, dtype| -> Result<Tensor> { Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?) };
    let dtype = memory.banks[0].dtype();
    let rows = [host(&anchors[0], dtype)?, host(&anchors[1], dtype)?];
    let scored = match dtype {
        DType::F32 => score::<f32>(&rows, contrast, memory, params)?,
        DType::F64 => score::<f64>(&rows, contrast, memory, params)?,
        other => return Err(Error::param("dtype", other.as_str(), "f32 or f64")),
    };
    remember(&rows, index, memory, params)?;
    let term = |side: usize| -> Result<Tensor> {
        let (value, slope) = &scored[side];
        let anchor = &anchors[side];
        let slope = slope.to_dtype(anchor.dtype())?.to_device(anchor.device())?;
        let value = Tensor::new(*value, anchor.device())?.to_dtype(anchor.dtype())?;
        Ok((((anchor - anchor.detach())? * slope)?.sum_all()? + value)?)
    };
    Ok(LossTerms::one("student_anchor", term(0)?).with("teacher_anchor", term(1)?, 1.0))
}

fn in_range(index: &[u32], n: usize) -> Result<()> {
    match index.iter().find(|&&i| i as usize >= n) {
        Some(i) => Err(Error::param("sample index", i, format!("less than {n}, the number of training samples"))),
        None => Ok(()),
    }
}

/// Loss and gradient `[B,dim]` of both sides' anchors; the first batch sets the normalisers.
fn score<T: WithDType>(rows: &[Tensor; 2], contrast: Contrast<'_>, memory: &mut Memory, params: &Params) -> Result<[(f64, Tensor); 2]> {
    let (n, dim, batch) = (memory.len(), memory.banks[0].dims()[1], rows[0].dims()[0]);
    let anchors = [rows[0].flatten_all()?.to_vec1::<T>()?, rows[1].flatten_all()?.to_vec1::<T>()?];
    let anchor = |side: usize, b: usize| &anchors[side][b * dim..(b + 1) * dim];
    // The student's anchors meet the teacher's memory and the other way round.
    with_slices(&memory.banks[1].clone(), &memory.banks[0].clone(), |of_teacher: &[T], of_student: &[T]| {
        let banks = [of_teacher, of_student];
        let listed = |b: usize| {
            let mut list = Vec::with_capacity(params.negatives + 1);
            contrast(b, &mut list);
            list
        };
        for (side, bank) in banks.iter().enumerate() {
            if memory.z[side].is_none() {
                let sums: Vec<(f64, usize)> = (0..batch)
                    .into_par_iter()
                    .map(|b| {
                        let list = listed(b);
                        let o = |&i: &u32| (dot(row(bank, i, dim), anchor(side, b)).to_f64() / params.temperature).exp();
                        (list.iter().map(o).sum(), list.len())
                    })
                    .collect();
                let (sum, count) = sums.iter().fold((0.0, 0), |(s, c), (sum, count)| (s + sum, c + count));
                memory.z[side] = Some(n as f64 * sum / count as f64);
            }
        }
        let z = memory.z.map(|z| z.unwrap_or(1.0));
        let found: Vec<[(f64, Vec<T>); 2]> = (0..batch)
            .into_par_iter()
            .map(|b| {
                let list = listed(b);
                [0, 1].map(|side| one(anchor(side, b), banks[side], &list, z[side], n, params))
            })
            .collect();
        let side = |side: usize| -> Result<(f64, Tensor)> {
            let value = found.iter().map(|f| f[side].0).sum::<f64>() / batch as f64;
            let slope: Vec<T> = found.iter().flat_map(|f| f[side].1.iter().copied()).collect();
            Ok((value, (Tensor::from_vec(slope, (batch, dim), &Device::Cpu)? / batch as f64)?))
        };
        Ok([side(0)?, side(1)?])
    })
}

/// The loss of one anchor and its gradient.
fn one<T: WithDType>(anchor: &[T], bank: &[T], list: &[u32], z: f64, n: usize, params: &Params) -> (f64, Vec<T>) {
    let dim = anchor.len();
    let c = (list.len() - 1) as f64 / n as f64;
    let (mut loss, mut slope) = (0.0, vec![T::from_f64(0.0); dim]);
    for (j, &i) in list.iter().enumerate() {
        let row = row(bank, i, dim);
        let score = dot(row, anchor).to_f64() / params.temperature;
        let x = score.exp() / z;
        let all = x + c + params.eps;
        let of_score = if j == 0 {
            loss += all.ln() - (score - z.ln());
            -(c + params.eps) / all
        } else {
            loss += ((x + params.eps) / c).ln_1p();
            x / all
        };
        let factor = T::from_f64(of_score / params.temperature);
        slope.iter_mut().zip(row).for_each(|(s, &r)| *s += factor * r);
    }
    (loss, slope)
}

fn row<T>(bank: &[T], i: u32, dim: usize) -> &[T] {
    &bank[i as usize * dim..(i as usize + 1) * dim]
}

/// In eight lanes, whatever the machine: the same bits everywhere.
fn dot<T: WithDType>(a: &[T], b: &[T]) -> T {
    let zero = T::from_f64(0.0);
    let mut lanes = [zero; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let mut rest = zero;
    a8.remainder().iter().zip(b8.remainder()).for_each(|(&x, &y)| rest += x * y);
    for (x, y) in a8.zip(b8) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    lanes.iter().fold(rest, |sum, &lane| sum + lane)
}

/// Calls `f` with the values of two contiguous tensors on the CPU.
fn with_slices<T: WithDType, R>(a: &Tensor, b: &Tensor, f: impl FnOnce(&[T], &[T]) -> Result<R>) -> Result<R> {
    let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    match (&*a, &*b, a_layout.contiguous_offsets(), b_layout.contiguous_offsets()) {
        (Storage::Cpu(a), Storage::Cpu(b), Some((a0, a1)), Some((b0, b1))) => f(&a.as_slice::<T>()?[a0..a1], &b.as_slice::<T>()?[b0..b1]),
        _ => Err(Error::refused("crd: a memory must be contiguous and on the CPU")),
    }
}

/// Moves the rows of `index` in both memories towards their anchors.
fn remember(rows: &[Tensor; 2], index: &[u32], memory: &mut Memory, params: &Params) -> Result<()> {
    let at = Tensor::new(index, &Device::Cpu)?;
    for (bank, anchors) in memory.banks.iter().zip(rows) {
        // All from the old rows: a sample that is twice in the batch does not see its own first update.
        let mixed = ((bank.index_select(&at, 0)? * params.momentum)? + (anchors * (1.0 - params.momentum))?)?;
        let mixed = unit(&mixed, 1e-12)?;
        for (b, &i) in index.iter().enumerate() {
            bank.slice_set(&mixed.narrow(0, b, 1)?.contiguous()?, 0, i as usize)?;
        }
    }
    Ok(())
}

/// Draws positives and negatives by the labels of the training set.
struct Sampler {
    labels: Vec<u32>,
    /// Samples ordered by class, and where each class begins.
    by_class: Vec<u32>,
    starts: Vec<usize>,
}

impl Sampler {
    /// `labels` of the first of `n` samples; `None`: every sample counts as another class.
    fn new(labels: Option<&[u32]>, n: usize) -> Result<Self> {
        let Some(labels) = labels else { return Ok(Self { labels: vec![], by_class: (0..n as u32).collect(), starts: vec![] }) };
        let n = labels.len();
        let classes = labels.iter().max().map_or(0, |&y| y as usize + 1);
        let mut starts = vec![0; classes + 1];
        labels.iter().for_each(|&y| starts[y as usize + 1] += 1);
        if starts.contains(&n) {
            return Err(Error::refused("crd: all training samples are of one class, so that there is no negative"));
        }
        (0..classes).for_each(|c| starts[c + 1] += starts[c]);
        let mut next = starts.clone();
        let mut by_class = vec![0; n];
        for (i, &y) in labels.iter().enumerate() {
            by_class[next[y as usize]] = i as u32;
            next[y as usize] += 1;
        }
        Ok(Self { labels: labels.to_vec(), by_class, starts })
    }

    /// The list of sample `i`.
    fn draw(&self, i: u32, rng: Rng, params: &Params, list: &mut Vec<u32>) {
        let own = match self.labels.get(i as usize) {
            Some(&y) => self.starts[y as usize]..self.starts[y as usize + 1],
            None => 0..0,
        };
        list.push(match params.positive {
            Positive::Relaxed if !own.is_empty() => self.by_class[own.start + rng.named("positive").below(0, own.len() as u64) as usize],
            _ => i,
        });
        let others = self.by_class.len() - own.len();
        let pick = |r: usize| self.by_class[if r < own.start { r } else { r + own.len() }];
        let k = params.negatives;
        if params.replacement || k > others {
            list.extend((0..k).map(|j| pick(rng.below(j as u64, others as u64) as usize)));
            return;
        }
        let mut left: Vec<u32> = (0..others as u32).collect();
        for j in 0..k {
            left.swap(j, j + rng.below(j as u64, (others - j) as u64) as usize);
            list.push(pick(left[j] as usize));
        }
    }
}

struct Crd {
    params: Params,
    prepared: Option<Prepared>,
}

struct Prepared {
    heads: Heads,
    memory: Memory,
    sampler: Sampler,
}

impl Method for Crd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { indices: true, ..pkt::embeddings() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        // A loader that drops its last batch still deals out the indices of all samples; images without labels come after those with one.
        let n = setup.train_samples.max(setup.train_labels.map_or(0, <[u32]>::len));
        if n < 2 {
            return Err(Error::refused(format!(
                "crd contrasts training samples with each other, of which there must be at least 2, got {n}"
            )));
        }
        self.prepared = Some(Prepared {
            heads: Heads::new(setup, self.params.dim, ENTRY.name)?,
            memory: Memory::new(n, self.params.dim, setup.dtype, setup.rng)?,
            sampler: Sampler::new(setup.train_labels, n)?,
        });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.iter().flat_map(|p| p.heads.networks()).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let missing = || Error::missing(ENTRY.name, "its memory (`prepare` makes it)");
        let Prepared { heads, memory, sampler } = self.prepared.as_mut().ok_or_else(missing)?;
        let [student, teacher] = heads.apply(step)?;
        let index = step.batch.indices.to_device(&Device::Cpu)?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        in_range(&index, memory.len())?;
        let rng = step.rng.named("negatives");
        let contrast = |b: usize, list: &mut Vec<u32>| sampler.draw(index[b], rng.fork(b as u64), &self.params, list);
        crd(&student, &teacher, &index, &contrast, memory, &self.params)
    }

    fn state(&self) -> Result<StateDict> {
        self.prepared.as_ref().map_or(Ok(StateDict::new()), |p| p.memory.tensors(DType::F64))
    }

    fn load_state(&mut self, state: &StateDict) -> Result<()> {
        let prepared = self.prepared.as_mut().ok_or_else(|| Error::missing(ENTRY.name, "its memory (`prepare` makes it)"))?;
        let (n, dtype) = (prepared.memory.len(), prepared.memory.banks[0].dtype());
        let find = |name: &str| state.get(name).ok_or_else(|| Error::missing("the saved state of crd", name));
        prepared.memory = Memory::from_tensors(n, self.params.dim, dtype, find)?;
        Ok(())
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let (n, params) = parity_without(inputs, "num_data");
    let params: Params = parse(&params, Params::validate)?;
    let n = n.ok_or_else(|| Error::missing(ENTRY.name, "num_data"))?;
    let n = n.as_u64().ok_or_else(|| Error::param("num_data", &n, "the number of training samples"))? as usize;
    let [student, teacher] = heads::parity(inputs)?;
    let mut memory = Memory::from_tensors(n, params.dim, inputs.dtype, |name| inputs.get(&format!("state_in.{name}")))?;
    let whole = |name: &str| -> Result<Tensor> { Ok(inputs.get(name)?.to_dtype(DType::U32)?) };
    let index = whole("index")?.to_vec1::<u32>()?;
    let lists = whole("contrast_index")?.to_vec2::<u32>()?;
    if lists.len() != index.len() || lists.iter().any(|l| l.len() != params.negatives + 1) {
        let expected = format!("[{}, {}], the positive and the negatives", index.len(), params.negatives + 1);
        return Err(Error::shape("contrast_index", expected, inputs.get("contrast_index")?.dims()));
    }
    lists.iter().try_for_each(|list| in_range(list, n))?;
    let contrast = |b: usize, list: &mut Vec<u32>| list.extend_from_slice(&lists[b]);
    let terms = crd(&student, &teacher, &index, &contrast, &mut memory, &params)?;
    Ok(ParityOutput { terms, state: memory.tensors(inputs.dtype)? })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "crd",
    about: "contrastive representation distillation against memories of the training set",
    source: "Tian et al., ICLR 2020, arXiv 1910.10699",
    year: 2020,
    parameters: &[
        ParamDoc { name: "negatives", default: "16384", range: ">= 1", about: "negatives of each sample" },
        ParamDoc { name: "dim", default: "128", range: ">= 1", about: "width of heads and memories" },
        ParamDoc { name: "temperature", default: "0.07", range: "> 0", about: "T; the paper: 0.1 on CIFAR-100" },
        ParamDoc { name: "momentum", default: "0.5", range: "0..=1", about: "share of its old row that a memory keeps" },
        ParamDoc { name: "positive", default: "\"exact\"", range: "\"exact\" | \"relaxed\"", about: "the sample, or one of its class" },
        ParamDoc { name: "replacement", default: "false", range: "true | false", about: "draw negatives with replacement" },
        ParamDoc { name: "eps", default: "1e-7", range: "> 0", about: "added to the denominators" },
    ],
    build: |params| Ok(Box::new(Crd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
