//! Running a plan forwards.

use std::sync::{Arc, Mutex};

use kd_core::{Mode, Params, Result, Rng};
use rayon::prelude::*;

use super::plan::{ConvStep, Kind, Plan, Shape, Step};
use super::value::{Norm, Packed, Value};
use crate::graph::{BatchNorm, NodeId};
use crate::kernels::buffer::{Buffer, Pool};
use crate::kernels::conv::{Conv, Epilogue, Group};
use crate::kernels::norm::{self, Lens, Moments};
use crate::kernels::pool::{self, Average, Maximum};
use crate::kernels::sweep::Padded;
use crate::kernels::threads::{Lanes, cut, each, scratch};
use crate::kernels::tile::Activation;
use crate::kernels::{Level, clock, elementwise, layout};
use crate::reference;

/// Packed weights by step.
pub(super) type Packs = Arc<Vec<Option<Arc<Packed>>>>;

/// One run of a plan: what it read, and what it leaves for the backward pass.
pub(super) struct Tape {
    pub plan: Arc<Plan>,
    pub params: Arc<Params>,
    pub lanes: Lanes,
    pub pool: Pool,
    /// Outputs by node; those that nobody needs any more are gone.
    values: Vec<Option<Value>>,
    /// Packed weights by step.
    packed: Packs,
    /// The stream of dropout and drop-path; without it there are none.
    rng: Option<Rng>,
    /// Whether parameters get gradients.
    pub tracked: bool,
}

/// What a run is for.
#[derive(Clone, Copy)]
pub(super) struct Purpose {
    pub mode: Mode,
    /// Whether the parameters will want gradients.
    pub params: bool,
    /// Whether the input will.
    pub input: bool,
}

/// A plan about to be run.
pub(super) struct Batch<'a> {
    pub plan: &'a Arc<Plan>,
    pub params: &'a Arc<Params>,
    pub packed: Packs,
    pub purpose: Purpose,
}

impl Tape {
    /// Runs the plan on the images `x`.
    pub(super) fn run(job: &Batch, x: Buffer, lanes: Lanes, pool: &Pool) -> Result<Self> {
        let (plan, purpose) = (job.plan, job.purpose);
        let keep = purpose.params || purpose.input;
        let mut tape = Self {
            plan: plan.clone(),
            params: job.params.clone(),
            lanes,
            pool: pool.clone(),
            values: vec![None; plan.shapes.len()],
            packed: job.packed.clone(),
            rng: if let Mode::Train(rng) = purpose.mode { Some(rng) } else { None },
            tracked: purpose.params,
        };
        tape.values[plan.from] = Some(Value::Stored(Arc::new(x)));
        // Moments that a convolution leaves for the batch norm behind it, by node.
        let mut moments: Vec<Option<Vec<Moments>>> = plan.shapes.iter().map(|_| None).collect();
        for (at, step) in plan.steps.iter().enumerate() {
            let (place, cost) = (|| plan.place(step, job.params, "forward"), || plan.cost(step, lanes.images));
            let value = clock::at(place, lanes.alone, cost, || -> Result<Value> {
                Ok(match &step.kind {
                    Kind::Conv(conv) => {
                        let (out, found) = tape.conv(at, conv);
                        moments[step.out] = found;
                        Value::Stored(Arc::new(out))
                    }
                    Kind::Norm { x, norm, activation, batch, .. } => {
                        let raw = tape.store(*x);
                        let found = batch.then(|| moments[*x].take().unwrap_or_else(|| tape.moments(&raw, tape.shape(*x))));
                        let norm = tape.norm(norm, *activation, found, matches!(purpose.mode, Mode::Train(_)))?;
                        Value::Seen { raw, norm: Arc::new(norm), stored: None }
                    }
                    kind => Value::Stored(Arc::new(tape.other(step, kind))),
                })
            })?;
            tape.values[step.out] = Some(value);
            if !keep {
                let unused = step.inputs().into_iter().filter(|&i| plan.last_use[i] == at);
                unused.for_each(|i| tape.values[i] = None);
            }
        }
        plan.wanted.iter().for_each(|&w| drop(tape.store(w)));
        Ok(tape)
    }

    /// The output of a node.
    pub(super) fn value(&self, node: NodeId) -> &Value {
        self.values[node].as_ref().expect("invariant: steps run in order and what is read later is kept")
    }

    /// The output of a node as plain memory, which it becomes if it was not.
    pub(super) fn store(&mut self, node: NodeId) -> Arc<Buffer> {
        let data = self.stored(node);
        if let Some(Value::Seen { stored, .. }) = &mut self.values[node] {
            *stored = Some(data.clone());
        }
        data
    }

    /// The output of a node as plain memory.
    pub(super) fn stored(&self, node: NodeId) -> Arc<Buffer> {
        match self.value(node) {
            Value::Stored(data) | Value::Seen { stored: Some(data), .. } => data.clone(),
            seen @ Value::Seen { .. } => {
                let ((raw, lens), shape, level) = (seen.view(), self.shape(node), self.plan.level);
                let (len, around) = (shape.len(), shape.unpadded());
                Arc::new(self.map(len, |i, out| norm::fill(level, nth(raw, len, i), lens, &around, out)))
            }
        }
    }

    pub(super) fn shape(&self, node: NodeId) -> Shape {
        self.plan.shapes[node]
    }

    /// The packed weights of a step.
    pub(super) fn packed(&self, at: usize) -> &Packed {
        self.packed[at].as_ref().expect("invariant: the weights of every convolution are packed before a run")
    }

    /// A new buffer of `len` floats per image, each image written by `f`.
    pub(super) fn map(&self, len: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Buffer {
        let mut out = self.pool.take(self.lanes.images * len);
        self.for_each(&mut out, len, f);
        out
    }

    /// Calls `f` with every image's `len` floats of `out`.
    pub(super) fn for_each(&self, out: &mut [f32], len: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let shares = self.lanes.shares();
        let parts = cut(out, shares.iter().map(|s| s.images.len() * len));
        each(shares.into_iter().zip(parts).collect(), |(share, part)| {
            share.images.zip(part.chunks_exact_mut(len)).for_each(|(i, out)| f(i, out));
        });
    }

    pub(super) fn conv(&mut self, at: usize, step: &ConvStep) -> (Buffer, Option<Vec<Moments>>) {
        let residual = step.residual.map(|r| self.store(r));
        let (level, conv, packed) = (self.plan.level, &step.conv, self.packed(at));
        let (x, lens) = self.value(step.x).view();
        let (in_len, out_len) = (conv.input.image(), conv.out_image());
        let mut out = self.pool.take(self.lanes.images * out_len);
        let mut moments: Vec<Moments> = (0..if step.moments { self.lanes.count } else { 0 }).map(|_| Moments::new(conv.co)).collect();
        let shares = self.lanes.shares();
        let outs = cut(&mut out, shares.iter().map(|s| s.images.len() * out_len));
        let sums = cut(&mut moments, shares.iter().map(|s| if step.moments { s.lanes.len() } else { 0 }));
        let parts: Vec<_> = shares.into_iter().zip(outs).zip(sums).collect();
        each(parts, |((share, out), sums)| {
            let inputs = Inputs { conv, x, lens };
            let group = conv.group();
            let pad_len = inputs.scratch_len(group);
            scratch(pad_len + conv.work_len(), |memory| {
                let (pad, work) = memory.split_at_mut(pad_len);
                inputs.clear(pad);
                for (start, out) in (share.images.start..).step_by(group).zip(out.chunks_mut(group * out_len)) {
                    let n = out.len() / out_len;
                    let epilogue = Epilogue {
                        bias: packed.bias.as_deref(),
                        residual: residual.as_ref().map(|r| &r[start * out_len..(start + n) * out_len]),
                        activation: step.activation,
                    };
                    let ahead = [inputs.ahead(start + n, share.images.end.min(start + 2 * n), in_len)];
                    let images = Group {
                        images: n,
                        x: inputs.read(level, start, n, in_len, pad),
                        ahead: if self.lanes.alone { None } else { Some(&ahead) },
                    };
                    conv.forward(images, &packed.forward, out, epilogue, work);
                    for (i, image) in (start..).zip(out.chunks_exact(out_len)) {
                        if let Some(sums) = sums.get_mut(self.lanes.of(i) - share.lanes.start) {
                            sums.add(level, image);
                        }
                    }
                }
            });
        });
        (out, step.moments.then_some(moments))
    }

    /// Moments of a whole batch, by lane.
    fn moments(&self, x: &[f32], shape: Shape) -> Vec<Moments> {
        let (level, len) = (self.plan.level, shape.len());
        let mut moments: Vec<Moments> = (0..self.lanes.count).map(|_| Moments::new(shape.channels())).collect();
        let shares = self.lanes.shares();
        let sums = cut(&mut moments, shares.iter().map(|s| s.lanes.len()));
        each(shares.into_iter().zip(sums).collect(), |(share, sums)| {
            for (lane, sums) in share.lanes.zip(sums) {
                self.lanes.lane(lane).for_each(|i| sums.add(level, nth(x, len, i)));
            }
        });
        moments
    }

    /// The numbers of a batch norm, from the batch's moments or the running statistics; the former may update the latter.
    fn norm(&self, bn: &BatchNorm, activation: Activation, moments: Option<Vec<Moments>>, update: bool) -> Result<Norm> {
        let (mean_at, var_at) = (self.params.stat_entries()[bn.running.0].range(), self.params.stat_entries()[bn.running.1].range());
        let (mean, var): (Vec<f64>, Vec<f64>) = match &moments {
            Some(moments) => Moments::merge(moments).into_iter().unzip(),
            None => self.params.stats().read::<f32, _>(|s| {
                s[mean_at.clone()].iter().zip(&s[var_at.clone()]).map(|(m, v)| (f64::from(*m), f64::from(*v))).unzip()
            })?,
        };
        if let (Some(moments), true) = (&moments, update) {
            let n = Moments::count(moments) as f64;
            // PyTorch keeps the unbiased variance; of a single value it would be infinite.
            let unbias = n / (n - 1.0).max(1.0);
            self.params.stats().write::<f32, _>(|s| {
                let blend = |old: &mut f32, new: f64| *old = ((1.0 - bn.momentum) * f64::from(*old) + bn.momentum * new) as f32;
                s[mean_at].iter_mut().zip(&mean).for_each(|(s, m)| blend(s, *m));
                s[var_at].iter_mut().zip(&var).for_each(|(s, v)| blend(s, v * unbias));
            })?;
            self.params.bump_counter(bn.counter);
        }
        let affine = match bn.affine {
            Some((g, b)) => {
                let (g, b) = (self.params.entries()[g].range(), self.params.entries()[b].range());
                Some(self.params.values().read::<f32, _>(|v| (v[g].to_vec(), v[b].to_vec()))?)
            }
            None => None,
        };
        let inv: Vec<f64> = var.iter().map(|v| 1.0 / (v + bn.eps).sqrt()).collect();
        let factor = |c: usize| affine.as_ref().map_or(1.0, |a| f64::from(a.0[c])) * inv[c];
        let offset = |c: usize| affine.as_ref().map_or(0.0, |a| f64::from(a.1[c])) - mean[c] * factor(c);
        Ok(Norm {
            scale: (0..bn.channels).map(|c| factor(c) as f32).collect(),
            shift: (0..bn.channels).map(|c| offset(c) as f32).collect(),
            mean: mean.iter().map(|m| *m as f32).collect(),
            inv: inv.iter().map(|i| *i as f32).collect(),
            activation,
        })
    }

    /// Everything but convolutions and batch norms.
    fn other(&mut self, step: &Step, kind: &Kind) -> Buffer {
        let (level, shape) = (self.plan.level, self.shape(step.out));
        let (len, channels) = (shape.len(), shape.channels());
        if let Kind::Add { a, b, activation } = kind {
            let ((a, la), (b, lb)) = (self.value(*a).view(), self.value(*b).view());
            return self.map(len, |i, out| norm::add(level, channels, (nth(a, len, i), la), (nth(b, len, i), lb), *activation, out));
        }
        if let Kind::Channels { sources, full } = kind {
            let views: Vec<_> = sources.iter().map(|(node, moves)| (self.value(*node).view(), self.shape(*node), moves)).collect();
            return self.map(len, |i, out| {
                if !full {
                    out.fill(0.0);
                }
                for ((x, lens), from, moves) in &views {
                    let x = nth(x, from.len(), i);
                    match lens {
                        None => layout::move_channels(moves, x, from.channels(), out, channels, false),
                        Some(_) => scratch(from.len(), |seen| {
                            norm::fill(level, x, *lens, &from.unpadded(), seen);
                            layout::move_channels(moves, seen, from.channels(), out, channels, false);
                        }),
                    }
                }
            });
        }
        let inputs: Vec<_> = step.inputs().into_iter().map(|i| (self.store(i), self.shape(i))).collect();
        let (x, from) = &inputs[0];
        let image = |i: usize| nth(x, from.len(), i);
        match kind {
            Kind::Rectify { activation, .. } => self.map(len, |i, out| elementwise::rectify(level, *activation, image(i), out)),
            Kind::Function { function, .. } => self.map(len, |i, out| function.forward(image(i), out)),
            Kind::Mul { .. } => {
                let (gate, by) = &inputs[1];
                self.map(len, |i, out| {
                    let factors = nth(gate, by.len(), i).iter().cycle();
                    out.iter_mut().zip(image(i)).zip(factors).for_each(|((o, x), g)| *o = x * g);
                })
            }
            Kind::Subsample { stride, .. } => self.map(len, |i, out| {
                let (pixels, x) = (subsampled(*from, *stride), image(i));
                pixels.zip(out.chunks_exact_mut(channels)).for_each(|(at, out)| out.copy_from_slice(&x[at..at + channels]));
            }),
            Kind::Max { windows, .. } => self.map(len, |i, out| pool::run(level, Maximum { windows, x: image(i), out })),
            Kind::Average { windows, .. } => self.map(len, |i, out| pool::run(level, Average { windows, x: image(i), out })),
            Kind::Flatten { .. } => self.map(len, |i, out| layout::flatten(image(i), from.channels(), out)),
            Kind::Drop { p, samples, .. } => self.map(len, |i, out| {
                out.copy_from_slice(image(i));
                self.drop_out(step.out, *p, *samples, i, out);
            }),
            Kind::Conv(_) | Kind::Norm { .. } | Kind::Add { .. } | Kind::Channels { .. } => {
                unreachable!("invariant: done by their own functions")
            }
        }
    }

    /// Applies dropout or drop-path to image `i` of node `id`, or to its gradient: the factors are drawn by index, so they come again.
    pub(super) fn drop_out(&self, id: NodeId, p: f64, samples: bool, i: usize, image: &mut [f32]) {
        let Some(rng) = self.rng.filter(|_| p > 0.0) else { return };
        let rng = reference::node_rng(rng, id);
        if samples {
            let factor = reference::keep_factor(rng, i as u64, p) as f32;
            return image.iter_mut().for_each(|v| *v *= factor);
        }
        let channels = self.shape(id).channels();
        let pixels = image.len() / channels;
        for (pixel, values) in image.chunks_exact_mut(channels).enumerate() {
            for (c, v) in values.iter_mut().enumerate() {
                *v *= reference::keep_factor(rng, ((i * channels + c) * pixels + pixel) as u64, p) as f32;
            }
        }
    }
}

/// Image `i` of a batch of images of `len` floats.
pub(super) fn nth(x: &[f32], len: usize, i: usize) -> &[f32] {
    &x[i * len..(i + 1) * len]
}

/// Where the pixels that a subsampling keeps begin in an image.
pub(super) fn subsampled(from: Shape, stride: usize) -> impl Iterator<Item = usize> {
    let [c, h, w] = from.image;
    (0..h).step_by(stride).flat_map(move |y| (0..w).step_by(stride).map(move |x| (y * w + x) * c))
}

/// The input images of a convolution as its kernels read them.
pub(super) struct Inputs<'a> {
    pub conv: &'a Conv,
    pub x: &'a [f32],
    pub lens: Option<Lens<'a>>,
}

impl Inputs<'_> {
    /// Whether the images can be read where they are.
    pub(super) fn direct(&self) -> bool {
        self.lens.is_none() && self.conv.input.plain()
    }

    /// Scratch for a group of images.
    pub(super) fn scratch_len(&self, group: usize) -> usize {
        if self.direct() { 0 } else { group * self.conv.input.len() }
    }

    /// Zeroes the borders of the scratch images.
    pub(super) fn clear(&self, pad: &mut [f32]) {
        clear(&self.conv.input, pad);
    }

    /// Images `start..end` as they lie in memory.
    pub(super) fn ahead(&self, start: usize, end: usize, len: usize) -> &[f32] {
        &self.x[start * len..end.max(start) * len]
    }

    /// Images `start..start + n`, padded into the scratch unless they can be read directly.
    pub(super) fn read<'a>(&'a self, level: Level, start: usize, n: usize, len: usize, pad: &'a mut [f32]) -> &'a [f32] {
        if self.direct() {
            return &self.x[start * len..(start + n) * len];
        }
        for (i, whole) in (start..start + n).zip(pad.chunks_exact_mut(self.conv.input.len())) {
            norm::fill(level, nth(self.x, len, i), self.lens, &self.conv.input, whole);
        }
        pad
    }
}

/// Zeroes the borders of padded images.
pub(super) fn clear(padded: &Padded, images: &mut [f32]) {
    images.chunks_exact_mut(padded.len()).for_each(|whole| padded.clear_border(whole));
}

/// Packs the weights that have changed since they were packed last; `cache` keeps them from run to run.
pub(super) fn pack(plan: &Plan, params: &Params, cache: &Mutex<Packs>, pool: &Pool, purpose: Purpose) -> Result<Packs> {
    let mut cache = cache.lock().unwrap_or_else(|e| e.into_inner());
    let versions = (params.values().version(), params.stats().version());
    let tasks: Vec<Option<Task>> = plan
        .steps
        .iter()
        .enumerate()
        .map(|(at, step)| {
            let Kind::Conv(conv) = &step.kind else { return None };
            let versions = (versions.0, if conv.fold.is_some() { versions.1 } else { 0 });
            let backward = plan.wants_grad(conv.x, purpose.params, purpose.input);
            let old = cache.get(at).and_then(Option::as_ref);
            let old = old.filter(|p| p.versions == versions && (p.backward.is_some() || !backward)).cloned();
            Some(Task { conv, versions, backward, old })
        })
        .collect();
    if tasks.iter().flatten().any(|t| t.old.is_none()) {
        // Outdated weights give their memory to those that replace them.
        *cache = Packs::default();
        *cache = Arc::new(params.values().read::<f32, _>(|values| {
            params.stats().read::<f32, Vec<_>>(|stats| {
                let task = |t: &Task| t.old.clone().unwrap_or_else(|| Arc::new(t.pack(params, values, stats, pool)));
                tasks.par_iter().map(|t| t.as_ref().map(task)).collect()
            })
        })??);
    }
    Ok(cache.clone())
}

/// The weights of a convolution to be packed.
struct Task<'a> {
    conv: &'a ConvStep,
    versions: (u64, u64),
    /// Whether the input gradient needs them too.
    backward: bool,
    /// As they were packed before, if nothing has changed since.
    old: Option<Arc<Packed>>,
}

impl Task<'_> {
    fn pack(&self, params: &Params, values: &[f32], stats: &[f32], pool: &Pool) -> Packed {
        let step = self.conv;
        let of = |index: usize| &values[params.entries()[index].range()];
        let (mut weight, mut bias) = (of(step.weight), step.bias.map(|b| of(b).to_vec()));
        let folded;
        if let Some(bn) = &step.fold {
            let stat = |index: usize| &stats[params.stat_entries()[index].range()];
            let (mean, var) = (stat(bn.running.0), stat(bn.running.1));
            let per_output = weight.len() / bn.channels;
            let scale: Vec<f64> = (0..bn.channels)
                .map(|c| bn.affine.map_or(1.0, |(g, _)| f64::from(of(g)[c])) / (f64::from(var[c]) + bn.eps).sqrt())
                .collect();
            let shift = |c: usize| {
                let own = bias.as_ref().map_or(0.0, |b| f64::from(b[c]));
                bn.affine.map_or(0.0, |(_, b)| f64::from(of(b)[c])) + (own - f64::from(mean[c])) * scale[c]
            };
            bias = Some((0..bn.channels).map(|c| shift(c) as f32).collect());
            folded = weight.iter().enumerate().map(|(i, w)| (f64::from(*w) * scale[i / per_output]) as f32).collect::<Vec<_>>();
            weight = &folded;
        }
        let mut forward = pool.take(step.conv.forward_len());
        step.conv.pack_forward(weight, &mut forward);
        let backward = self.backward.then(|| {
            let mut panels = pool.take(step.conv.backward_len());
            step.conv.pack_backward(weight, &mut panels);
            panels
        });
        Packed { versions: self.versions, forward, backward, bias }
    }
}
