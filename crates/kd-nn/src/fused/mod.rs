//! The fused executor: a piece of a graph as one plan of CPU kernels, seen by candle as one node.
//!
//! A piece is compiled once per input size into steps (`plan`), run forwards (`forward`) and backwards (`backward`) over activations kept
//! channels last, and hung into candle's graph by `node`. Memory comes from a pool of the network and goes back to it.

mod backward;
mod forward;
mod node;
mod plan;
mod value;

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Mode, Params, Result};

use crate::graph::{Graph, NodeId};
use crate::kernels::Level;
use crate::kernels::buffer::Pool;
use crate::network::Precision;
use forward::{Packs, Purpose, Tape};
use plan::Plan;

/// Buffers and compiled plans of one network.
pub struct State {
    level: Level,
    pool: Pool,
    plans: Mutex<Vec<(Key, Arc<Compiled>)>>,
}

/// What a plan is compiled for.
#[derive(PartialEq, Eq)]
struct Key {
    from: NodeId,
    given: Vec<usize>,
    wanted: Vec<NodeId>,
    batch: bool,
    precision: Precision,
}

struct Compiled {
    plan: Arc<Plan>,
    packs: Packs,
}

/// Plans that a network keeps: pieces times input sizes times modes that are in use at the same time.
const PLANS: usize = 32;

impl Default for State {
    fn default() -> Self {
        Self::new(Level::current())
    }
}

impl State {
    /// For kernels of the given level.
    pub fn new(level: Level) -> Self {
        Self { level, pool: Pool::default(), plans: Mutex::default() }
    }

    fn compiled(&self, job: &Job, precision: Precision) -> Result<Arc<Compiled>> {
        let key = Key {
            from: job.from,
            given: job.x.dims()[1..].to_vec(),
            wanted: job.wanted.to_vec(),
            batch: !matches!(job.mode, Mode::Eval),
            precision,
        };
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, found)) = plans.iter().find(|(k, _)| *k == key) {
            return Ok(found.clone());
        }
        let wanted: Vec<NodeId> = job.wanted.iter().copied().filter(|&w| w != job.from).collect();
        let plan = plan::compile(self.level, job.graph, job.from, &key.given, job.piece, &wanted, key.batch, precision == Precision::Fast)?;
        let compiled = Arc::new(Compiled { plan: Arc::new(plan), packs: Packs::default() });
        if plans.len() == PLANS {
            plans.remove(0);
        }
        plans.push((key, compiled.clone()));
        Ok(compiled)
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
    let compiled = state.compiled(job, precision)?;
    let images = job.x.dims()[0];
    let purpose = Purpose { mode: job.mode, params: job.tracked, input: job.x.track_op() };
    let x = node::read(job.x, compiled.plan.shapes[job.from], images, &state.pool)?;
    let tape = Tape::run(&compiled.plan, job.params, &compiled.packs, &state.pool, x, images, purpose)?;
    let mut found = if purpose.params || purpose.input {
        let anchor = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        let anchor = if job.tracked { Var::from_tensor(&anchor)?.into_inner() } else { anchor };
        node::track(tape, job.x, &anchor)?
    } else {
        node::outputs(&tape)?
    }
    .into_iter();
    let own = |&w: &NodeId| if w == job.from { Some(job.x.clone()) } else { found.next() };
    Ok(job.wanted.iter().filter_map(own).collect())
}
