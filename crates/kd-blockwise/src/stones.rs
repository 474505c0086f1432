//! Stepping stones: the student's first blocks, a connector, the teacher's remaining blocks and classifier.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Error, Mode, Model, ModelSpec, Outputs, Result, Rng};
use kd_nn::Network;

use crate::connector::{self, OUT};
use crate::split::split;
use crate::{Connector, ConnectorBn, ConnectorRelu, Params, TailBn};

/// One stone.
struct Stone {
    /// i: it has the student's first i blocks.
    number: usize,
    /// Where it leaves the student.
    student: Cut,
    /// Where it enters the teacher.
    teacher: Cut,
    /// What stands between; `None` for the identity.
    connector: Option<Arc<Network>>,
}

/// The stones of a student and a teacher: connectors that train, and the way through the teacher's later blocks.
///
/// For a training loop of one's own; [`BlockKd`](crate::BlockKd) drives it within a run.
pub struct SteppingStones {
    stones: Vec<Stone>,
    blocks: usize,
    tail_bn: TailBn,
}

impl SteppingStones {
    /// Splits both networks into blocks and draws the connectors of the configured stones, each from its own stream.
    ///
    /// # Errors
    /// No split, a stone outside it, networks made for images of different sizes, a teacher that trains, a teacher that does not tell the
    /// statistics of its maps.
    pub fn new(student: &ModelSpec, teacher: &dyn Model, params: &Params, dtype: DType, device: &Device, rng: Rng) -> Result<Self> {
        let spec = teacher.spec();
        if !matches!(teacher.trainable(), kd_core::Trainable::Frozen) {
            return Err(Error::refused(format!("block_kd: teacher {} is trainable; its blocks in the stones must be frozen", spec.name)));
        }
        if student.input != spec.input {
            let sizes = format!("{} was built for images {:?}, {} for {:?}", student.name, student.input, spec.name, spec.input);
            return Err(Error::refused(format!("block_kd: {sizes}; connectors need both for the same")));
        }
        let pairs = split(student, spec, params)?;
        let mut stones = Vec::new();
        for number in params.stones.numbers(pairs.len()) {
            let Some(&(s, t)) = number.checked_sub(1).and_then(|i| pairs.get(i)) else {
                return Err(Error::param("stones", number, format!("within 1..={}, the blocks of both networks", pairs.len())));
            };
            let (from, to) = (&student.blocks[s - 1], &spec.blocks[t - 1]);
            let same = from.channels == to.channels && from.size == to.size;
            let connector = if params.connector == Connector::AutoIdentity && same {
                None
            } else {
                let relu = match params.connector_relu {
                    ConnectorRelu::Auto => to.post_relu,
                    ConnectorRelu::Always => true,
                    ConnectorRelu::Never => false,
                };
                let network = Network::new(connector::graph(number, from, to, relu)?, dtype, device)?;
                network.init(rng.named("connector").fork(number as u64))?;
                if params.connector_bn == ConnectorBn::Teacher {
                    connector::start_like_teacher(&network, teacher, t, relu)?;
                }
                Some(Arc::new(network))
            };
            stones.push(Stone { number, student: Cut::Block(s), teacher: Cut::Block(t), connector });
        }
        Ok(Self { stones, blocks: pairs.len(), tail_bn: params.tail_bn })
    }

    /// n, the number of blocks that both networks are split into.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The numbers of the stones with where each leaves the student and enters the teacher.
    pub fn cuts(&self) -> impl Iterator<Item = (usize, Cut, Cut)> {
        self.stones.iter().map(|s| (s.number, s.student, s.teacher))
    }

    /// The connectors with the numbers of their stones, to be trained with the student; an identity has none.
    pub fn connectors(&self) -> impl Iterator<Item = (usize, &Arc<Network>)> {
        self.stones.iter().filter_map(|s| s.connector.as_ref().map(|c| (s.number, c)))
    }

    /// The logits of the stones numbered in `active`, from the student's outputs at their cuts; connectors run in `mode`.
    ///
    /// With the teacher's batch norms in eval mode every block of it runs once for all stones that pass through it: rows of different stones
    /// do not meet there.
    ///
    /// # Errors
    /// Outputs that were not computed, or are no maps `[B,C,H,W]`.
    pub fn run(&self, student: &Outputs, teacher: &dyn Model, active: &[usize], mode: Mode) -> Result<BTreeMap<usize, Tensor>> {
        let mut maps = Vec::new();
        for stone in self.stones.iter().filter(|s| active.contains(&s.number)) {
            let h = student.get(stone.student)?;
            if h.rank() != 4 {
                return Err(Error::shape(format!("the student's {}", stone.student), "[batch, channels, height, width]", h.dims()));
            }
            let map = match &stone.connector {
                None => h.clone(),
                Some(network) => network.run(h, Cut::Input, &[OUT], mode)?.get(OUT)?.clone(),
            };
            // A teacher may be of another type, or on another device.
            let map = teacher.params().map_or_else(|| Ok(map.clone()), |p| map.to_device(p.device())?.to_dtype(p.dtype()))?;
            maps.push((stone, map));
        }
        let logits = match self.tail_bn {
            TailBn::Eval => together(teacher, maps)?,
            TailBn::Train => maps
                .into_iter()
                .map(|(stone, map)| {
                    let out = teacher.run(&map, stone.teacher, &[Cut::Logits], Mode::BatchStats)?;
                    Ok((stone, out.logits()?.clone()))
                })
                .collect::<Result<_>>()?,
        };
        logits
            .into_iter()
            .map(|(stone, z)| {
                let h = student.get(stone.student)?;
                Ok((stone.number, z.to_device(h.device())?.to_dtype(h.dtype())?))
            })
            .collect()
    }
}

/// Block by block: where a stone enters, its rows join those of the earlier ones.
fn together<'s>(teacher: &dyn Model, maps: Vec<(&'s Stone, Tensor)>) -> Result<Vec<(&'s Stone, Tensor)>> {
    let mut rows = Vec::with_capacity(maps.len());
    let mut flow: Option<(Cut, Tensor)> = None;
    for (stone, map) in maps {
        rows.push((stone, map.dim(0)?));
        let joined = match flow {
            None => map,
            Some((from, x)) => {
                let out = teacher.run(&x, from, &[stone.teacher], Mode::Eval)?;
                Tensor::cat(&[out.get(stone.teacher)?, &map], 0)?
            }
        };
        flow = Some((stone.teacher, joined));
    }
    let Some((from, x)) = flow else { return Ok(vec![]) };
    let out = teacher.run(&x, from, &[Cut::Logits], Mode::Eval)?;
    let mut start = 0;
    rows.into_iter()
        .map(|(stone, len)| {
            let z = out.logits()?.narrow(0, start, len)?;
            start += len;
            Ok((stone, z))
        })
        .collect()
}
