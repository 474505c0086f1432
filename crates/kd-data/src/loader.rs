//! Batches, made ahead of time by a thread of their own.
//!
//! The thread builds batch after batch (bytes, augmented, normalised, as tensors on the wanted device) and hands them over through a channel of
//! `prefetch` places; both sides block, neither polls. With `threads` > 1 the samples of a batch are spread over that many threads. Nothing of a
//! batch depends on who built it or when: the order is the permutation of stream (seed, `"order"`, epoch), and sample `i` as view `v` draws from
//! stream (seed, `"augment"`, epoch, i, v). Starting at batch `first` of an epoch gives what an unbroken epoch gives from there on.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, WithDType};
use kd_core::{Batch, BatchSource, Rng};
use rayon::prelude::*;

use crate::{Dataset, Error, Image, Normalise, Pipeline, Result};

/// How a [`Loader`] makes batches.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Samples of a batch; the last one of an epoch may have fewer.
    pub batch_size: usize,
    /// The run's seed.
    pub seed: u64,
    /// Differently augmented copies of each sample, 1 or more.
    pub views: usize,
    /// The augmentation of each view; the last entry serves the views beyond it, none at all leaves the images as they are.
    pub augment: Vec<Pipeline>,
    /// Leaves out a last batch that is not full.
    pub drop_last: bool,
    /// Threads that augment; 0 and 1: the prefetching thread alone, which is enough for images in memory.
    pub threads: usize,
    /// Batches made ahead, 1 or more.
    pub prefetch: usize,
    /// Type of the images, f32 or f64.
    pub dtype: DType,
    /// Where the tensors go.
    pub device: Device,
    /// Mean and deviation other than the data set's own.
    pub normalise: Option<Normalise>,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self {
            batch_size: 64,
            seed: 0,
            views: 1,
            augment: vec![],
            drop_last: false,
            threads: 1,
            prefetch: 3,
            dtype: DType::F32,
            device: Device::Cpu,
            normalise: None,
        }
    }
}

/// A [`BatchSource`] over a [`Dataset`].
pub struct Loader {
    plan: Arc<Plan>,
    epoch: Option<Running>,
    waited: Duration,
}

impl Loader {
    /// A loader for training: every sample once an epoch, in random order, augmented.
    ///
    /// # Errors
    /// Options out of range or that do not fit the images.
    pub fn train(data: &Dataset, options: &LoaderOptions) -> Result<Self> {
        Self::new(data, options.clone(), true)
    }

    /// A loader for evaluation: every sample once, in the data set's order, not augmented, one view, none left out.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn eval(data: &Dataset, options: &LoaderOptions) -> Result<Self> {
        Self::new(data, LoaderOptions { views: 1, augment: vec![], drop_last: false, ..options.clone() }, false)
    }

    fn new(data: &Dataset, options: LoaderOptions, shuffle: bool) -> Result<Self> {
        for (key, value) in [("batch_size", options.batch_size), ("views", options.views), ("prefetch", options.prefetch)] {
            if value == 0 {
                return Err(Error::option(key, value, "at least 1"));
            }
        }
        if data.is_empty() || (options.drop_last && data.len() < options.batch_size) {
            return Err(Error::option("batch_size", options.batch_size, format!("such that {} samples make a batch", data.len())));
        }
        if !matches!(options.dtype, DType::F32 | DType::F64) {
            return Err(Error::option("dtype", options.dtype.as_str(), "f32 or f64"));
        }
        let info = data.info();
        let normalise = options.normalise.as_ref().unwrap_or(&info.normalise);
        normalise.check(info.shape[0])?;
        let shape = view(&options.augment, 0).shape(info.shape)?;
        for v in 1..options.views {
            let other = view(&options.augment, v).shape(info.shape)?;
            if other != shape {
                return Err(Error::option(
                    "augment",
                    format!("images of {other:?} in view {v}"),
                    format!("of one size in all views ({shape:?})"),
                ));
            }
        }
        let pool = match options.threads {
            0 | 1 => None,
            n => {
                let built = rayon::ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("kd-data-{i}")).build();
                Some(built.map_err(|e| Error::Loader(format!("cannot start {n} loader threads: {e}")))?)
            }
        };
        let table = normalise.table();
        let plan = Plan { data: data.clone(), options, shuffle, shape, table, pool };
        Ok(Self { plan: Arc::new(plan), epoch: None, waited: Duration::ZERO })
    }

    /// `[C,H,W]` of every image that the loader hands out.
    pub fn shape(&self) -> [usize; 3] {
        self.plan.shape
    }

    /// How long [`BatchSource::next_batch`] has waited for batches since the loader was made: what a faster loader could save.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl BatchSource for Loader {
    fn samples(&self) -> usize {
        if self.plan.options.drop_last { self.batches() * self.plan.options.batch_size } else { self.plan.data.len() }
    }

    fn batches(&self) -> usize {
        let (n, size) = (self.plan.data.len(), self.plan.options.batch_size);
        if self.plan.options.drop_last { n / size } else { n.div_ceil(size) }
    }

    fn start(&mut self, epoch: usize, first: usize) -> kd_core::Result<()> {
        if first > self.batches() {
            return Err(Error::Loader(format!("batch {first} of epoch {epoch} was asked for, which has {} batches", self.batches())).into());
        }
        // The thread of the epoch before must be gone first, lest two compete for the cores.
        self.epoch = None;
        self.epoch = Some(Running::start(self.plan.clone(), epoch, first..self.batches())?);
        Ok(())
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        let Some(running) = &mut self.epoch else {
            return Err(Error::Loader("a batch was asked for before an epoch was started".to_string()).into());
        };
        let start = Instant::now();
        let batch = running.next();
        self.waited += start.elapsed();
        Ok(batch?)
    }
}

/// The thread of one epoch.
struct Running {
    left: usize,
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(plan: Arc<Plan>, epoch: usize, numbers: std::ops::Range<usize>) -> Result<Self> {
        let left = numbers.len();
        let (sender, receiver) = sync_channel(plan.options.prefetch);
        let work = move || {
            let order = plan.order(epoch);
            for samples in order.chunks(plan.options.batch_size).take(numbers.end).skip(numbers.start) {
                let batch = plan.batch(epoch, samples);
                // Nobody listens any more, or nothing more will come.
                let last = batch.is_err();
                if sender.send(batch).is_err() || last {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("kd-data".to_string()).spawn(work);
        let thread = thread.map_err(|e| Error::Loader(format!("cannot start the loader's thread: {e}")))?;
        Ok(Self { left, batches: Some(receiver), thread: Some(thread) })
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        let Some(batches) = self.batches.as_ref().filter(|_| self.left > 0) else { return Ok(None) };
        match batches.recv() {
            Ok(Ok(batch)) => {
                self.left -= 1;
                Ok(Some(batch))
            }
            Ok(Err(e)) => Err(e),
            // The sender is gone although batches are due: after an error that was handed out before, or because the thread panicked.
            Err(_) => Err(Error::Loader(match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => format!("the loader's thread panicked: {}", panic_text(&*panic)),
                _ => "the loader stopped at an earlier error".to_string(),
            })),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without a receiver the thread's next `send` fails, so it ends after the batch it is making.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic that nobody was there to see has nothing left to spoil.
            let _ = thread.join();
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// What is fixed over all epochs.
struct Plan {
    data: Dataset,
    options: LoaderOptions,
    shuffle: bool,
    shape: [usize; 3],
    table: Vec<[f64; 256]>,
    pool: Option<rayon::ThreadPool>,
}

impl Plan {
    fn order(&self, epoch: usize) -> Vec<u32> {
        match self.shuffle {
            true => Rng::new(self.options.seed).named("order").fork(epoch as u64).permutation(self.data.len()),
            false => (0..self.data.len() as u32).collect(),
        }
    }

    fn batch(&self, epoch: usize, samples: &[u32]) -> Result<Batch> {
        let device = &self.options.device;
        let view = |v| match self.options.dtype {
            DType::F64 => self.images::<f64>(epoch, samples, v),
            _ => self.images::<f32>(epoch, samples, v),
        };
        let labels = samples.iter().map(|&s| i64::from(self.data.labels()[s as usize])).collect();
        Ok(Batch {
            images: (0..self.options.views).map(view).collect::<Result<_>>()?,
            labels: Tensor::from_vec(labels, samples.len(), device)?,
            targets: None,
            indices: Tensor::from_slice(samples, samples.len(), device)?,
        })
    }

    fn images<T: WithDType>(&self, epoch: usize, samples: &[u32], v: usize) -> Result<Tensor> {
        let table: Vec<[T; 256]> = self.table.iter().map(|t| t.map(T::from_f64)).collect();
        let pipeline = view(&self.options.augment, v);
        let rng = Rng::new(self.options.seed).named("augment").fork(epoch as u64);
        let make = |(image, spare): &mut (Image, Vec<u8>), sample: u32, out: &mut [T]| {
            self.data.read(sample as usize, image);
            pipeline.apply(image, spare, rng.fork(u64::from(sample)).fork(v as u64));
            let plane = image.height * image.width;
            for ((from, to), table) in image.data.chunks_exact(plane).zip(out.chunks_exact_mut(plane)).zip(&table) {
                for (to, &from) in to.iter_mut().zip(from) {
                    *to = table[usize::from(from)];
                }
            }
        };
        let size: usize = self.shape.iter().product();
        let mut out = vec![T::from_f64(0.0); samples.len() * size];
        match &self.pool {
            Some(pool) => pool.install(|| {
                let work = out.par_chunks_exact_mut(size).zip(samples);
                work.for_each_init(Default::default, |buffers, (out, &sample)| make(buffers, sample, out));
            }),
            None => {
                let mut buffers = Default::default();
                for (out, &sample) in out.chunks_exact_mut(size).zip(samples) {
                    make(&mut buffers, sample, out);
                }
            }
        }
        let [channels, height, width] = self.shape;
        Ok(Tensor::from_vec(out, (samples.len(), channels, height, width), &self.options.device)?)
    }
}

/// The pipeline of view `v`.
fn view(augment: &[Pipeline], v: usize) -> &Pipeline {
    static NONE: Pipeline = Pipeline::none();
    augment.get(v).or(augment.last()).unwrap_or(&NONE)
}
