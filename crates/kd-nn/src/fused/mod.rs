//! The fused executor: a piece of a graph as one plan of CPU kernels, seen by candle as one node.
//!
//! A piece is compiled once per input size into steps (`plan`), run forwards (`forward`) and backwards (`backward`) over activations kept
//! channels last, and hung into candle's graph by `node`. Memory comes from a pool of the network and goes back to it.

pub(crate) mod alone;
mod backward;
mod conv_grad;
mod finish;
mod forward;
mod node;
mod plan;
mod value;

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Mode, Params, Result};

use crate::graph::{Graph, NodeId};
use crate::kernels::Level;
use crate::kernels::buffer::{Buffer, Pool};
use crate::kernels::clock::{self, Cost, Place};
use crate::kernels::threads::{Lanes, cut, each};
use crate::network::Precision;
use forward::{Batch, Packs, Purpose, Tape};
use plan::Plan;

/// Buffers and compiled plans of one network.
pub struct State {
    level: Level,
    pool: Pool,
    /// Memory of each thread's own, for what a thread does alone.
    own: Mutex<Vec<Pool>>,
    plans: Mutex<Vec<(Key, Arc<Vec<Link>>)>>,
}

/// What a piece is compiled for.
#[derive(PartialEq, Eq)]
struct Key {
    from: NodeId,
    given: Vec<usize>,
    wanted: Vec<NodeId>,
    batch: bool,
    tracked: bool,
    precision: Precision,
}

/// A plan, and the packed weights of its last run.
struct Link {
    plan: Arc<Plan>,
    packs: Mutex<Packs>,
    /// Images that a thread takes through it at a time; all of the batch at once where there is none.
    group: Option<usize>,
}

/// Compiled pieces that a network keeps: pieces times input sizes times modes in use at the same time.
const PLANS: usize = 32;

impl Default for State {
    fn default() -> Self {
        Self::new(Level::current())
    }
}

impl State {
    /// For kernels of the given level.
    pub fn new(level: Level) -> Self {
        Self { level, pool: Pool::default(), own: Mutex::default(), plans: Mutex::default() }
    }

    /// The plans of a piece, one after another: several where nothing is kept and every image is on its own.
    fn compiled(&self, job: &Job, precision: Precision) -> Result<Arc<Vec<Link>>> {
        let key = Key {
            from: job.from,
            given: job.x.dims()[1..].to_vec(),
            wanted: job.wanted.iter().copied().filter(|&w| w != job.from).collect(),
            batch: !matches!(job.mode, Mode::Eval),
            tracked: job.tracked || job.x.track_op(),
            precision,
        };
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, found)) = plans.iter().find(|(k, _)| *k == key) {
            return Ok(found.clone());
        }
        let source = plan::Source { level: self.level, graph: job.graph, batch: key.batch, fast: precision == Precision::Fast };
        let alone = !key.batch && !key.tracked;
        let links = source.chain(job.from, &key.given, job.piece, &key.wanted, alone)?;
        let link = |(plan, group)| Link { plan: Arc::new(plan), packs: Mutex::default(), group };
        let links = Arc::new(links.into_iter().map(link).collect::<Vec<_>>());
        if plans.len() == PLANS {
            plans.remove(0);
        }
        plans.push((key, links.clone()));
        Ok(links)
    }

    /// The memory of `threads` threads.
    fn own(&self, threads: usize) -> Vec<Pool> {
        let mut own = self.own.lock().unwrap_or_else(|e| e.into_inner());
        if own.len() < threads {
            own.resize_with(threads, Pool::default);
        }
        own[..threads].to_vec()
    }
}

/// One run of a piece.
pub struct Job<'a> {
    /// The network's layers.
    pub graph: &'a Graph,
    /// Its parameters.
    pub params: &'a Arc<Params>,
    /// The tensor at `from`, any strides.
    pub x: &'a Tensor,
    /// Where it is fed in.
    pub from: NodeId,
    /// The nodes to compute, in order.
    pub piece: &'a [NodeId],
    /// The nodes whose outputs are wanted, ascending, without repetition.
    pub wanted: &'a [NodeId],
    /// Train, batch statistics, or eval.
    pub mode: Mode,
    /// Whether parameter gradients are wanted.
    pub tracked: bool,
}

/// Whether every node of the piece has a fused kernel.
pub fn supports(graph: &Graph, piece: &[NodeId]) -> bool {
    piece.iter().all(|&id| plan::supports(graph, id))
}

/// Runs a piece; the outputs in the order of `job.wanted`.
pub fn run(state: &State, job: &Job<'_>, precision: Precision) -> Result<Vec<Tensor>> {
    let links = state.compiled(job, precision)?;
    let images = job.x.dims()[0];
    let purpose = Purpose { mode: job.mode, params: job.tracked, input: job.x.track_op() };
    let mut found: Vec<(NodeId, Tensor)> = vec![];
    let mut x = node::read(job.x, links[0].plan.shapes[job.from], images, &state.pool)?;
    for (at, link) in links.iter().enumerate() {
        let place = || Place { network: link.plan.name.clone(), layer: "packing of weights".to_string(), pass: "forward" };
        let packed = clock::at(place, false, Cost::default, || forward::pack(&link.plan, job.params, &link.packs, &state.pool, purpose))?;
        let batch = Batch { plan: &link.plan, params: job.params, packed, purpose };
        if let Some(group) = link.group {
            let outputs = in_groups(state, &batch, &x, images, group)?;
            let next = links.get(at + 1).map(|l| l.plan.from);
            for (node, data) in link.plan.wanted.iter().zip(outputs) {
                if job.wanted.contains(node) {
                    found.push((*node, node::tensor(&data, link.plan.shapes[*node], images)?));
                }
                if Some(*node) == next {
                    x = data;
                }
            }
            continue;
        }
        let tape = Tape::run(&batch, std::mem::replace(&mut x, state.pool.take(0)), Lanes::new(images), &state.pool)?;
        if purpose.params || purpose.input {
            let anchor = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
            let anchor = if job.tracked { Var::from_tensor(&anchor)?.into_inner() } else { anchor };
            found.extend(node::track(tape, job.x, &anchor)?);
        } else {
            found.extend(node::outputs(&tape)?);
        }
    }
    let own = |&w: &NodeId| if w == job.from { Some(job.x.clone()) } else { found.iter().find(|f| f.0 == w).map(|f| f.1.clone()) };
    Ok(job.wanted.iter().filter_map(own).collect())
}

/// Takes every thread's images through a plan in small groups, whose activations never leave its cache; the wanted outputs of all.
fn in_groups(state: &State, batch: &Batch, x: &[f32], images: usize, group: usize) -> Result<Vec<Buffer>> {
    let plan = batch.plan;
    let len = |node: NodeId| plan.shapes[node].len();
    let mut outputs: Vec<Buffer> = plan.wanted.iter().map(|&w| state.pool.take(images * len(w))).collect();
    let shares = Lanes::new(images).shares();
    let mut parts: Vec<Vec<&mut [f32]>> = shares.iter().map(|_| vec![]).collect();
    for (buffer, &node) in outputs.iter_mut().zip(&plan.wanted) {
        let cuts = cut(buffer, shares.iter().map(|s| s.images.len() * len(node)));
        parts.iter_mut().zip(cuts).for_each(|(part, cut)| part.push(cut));
    }
    let pools = state.own(shares.len());
    let mut results: Vec<Result<()>> = shares.iter().map(|_| Ok(())).collect();
    let jobs: Vec<_> = shares.into_iter().zip(parts).zip(pools).zip(&mut results).collect();
    each(jobs, |(((share, mut parts), pool), result)| {
        let mut run = |start: usize| -> Result<()> {
            let n = group.min(share.images.end - start);
            let mut own = pool.take(n * len(plan.from));
            own.copy_from_slice(&x[start * len(plan.from)..(start + n) * len(plan.from)]);
            let tape = Tape::run(batch, own, Lanes::alone(n), &pool)?;
            for (part, &node) in parts.iter_mut().zip(&plan.wanted) {
                let at = (start - share.images.start) * len(node);
                part[at..at + n * len(node)].copy_from_slice(&tape.stored(node));
            }
            Ok(())
        };
        *result = share.images.clone().step_by(group).try_for_each(&mut run);
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use kd_core::{Cut, Model, Rng};

    use super::*;
    use crate::{Conv, GraphBuilder, Network, Pool as Pooling};

    use crate::kernels::buffer::ALLOCATED;

    /// A step after the first one takes all its memory (activations, gradients, packed weights, scratch) from what this has given back.
    #[test]
    fn steps_allocate_nothing_after_the_first() {
        let mut b = GraphBuilder::new("small", &[3, 12, 12]);
        b.conv("stem", Conv::new(16, 3).pad(1));
        b.batch_norm("bn");
        let skip = b.relu();
        b.conv("a", Conv::new(16, 3).pad(1));
        b.batch_norm("bn2");
        b.add(skip);
        b.relu();
        b.max_pool(Pooling::new(2));
        b.conv("wide", Conv::new(500, 3).pad(1));
        b.conv("narrow", Conv::new(30, 1));
        b.batch_norm("bn3");
        b.global_avg_pool();
        b.linear("fc", 5);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish().unwrap(), DType::F32, &Device::Cpu).unwrap();
        network.init(Rng::new(1)).unwrap();
        let x = Tensor::ones((20, 3, 12, 12), DType::F32, &Device::Cpu).unwrap();
        let step = |step: u64| {
            for mode in [Mode::Train(Rng::new(step)), Mode::Eval] {
                let y = network.run(&x, Cut::Input, &[Cut::Logits], mode).unwrap().logits().unwrap().clone();
                if y.track_op() {
                    crate::backward(&y.sqr().unwrap().sum_all().unwrap(), &[&network]).unwrap();
                }
            }
            network.parameters().values().write::<f32, _>(|v| v[0] += 0.1).unwrap();
        };
        for threads in 1..4 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            // Every allocation is made by a thread of the pool.
            let allocated = || pool.broadcast(|_| ALLOCATED.get()).into_iter().sum::<usize>();
            let after: Vec<usize> = (0..5)
                .map(|n| {
                    pool.install(|| step(n));
                    allocated()
                })
                .collect();
            assert!(after[0] > 0 && after.iter().all(|&n| n == after[0]), "{threads} threads: {after:?}");
        }
    }
}
