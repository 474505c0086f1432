//! Batches, made ahead of time by a thread of their own.
//!
//! The thread builds batch after batch (bytes, augmented, normalised, as tensors on the wanted device) and hands them over through a channel of
//! `prefetch` places; both sides block, neither polls. With `threads` > 1 the samples of a batch are spread over that many threads. Nothing of a
//! batch depends on who built it or when: the order is the permutation of stream (seed, `"order"`, epoch), sample `i` as view `v` draws from
//! stream (seed, `"augment"`, epoch, i, v), and the mixture of the b-th batch from (seed, `"mix"`, epoch, b). Starting at batch `first` of an
//! epoch gives what an unbroken epoch gives from there on.
//!
//! Images in files are decoded for each batch. Those decoded first stay in memory, as they are after the steps of `augment` that hold no chance,
//! until `cache_bytes` are used up; what is kept changes the speed alone.
//!
//! Images without labels ([`LoaderOptions::unlabelled`]) are samples `N`, `N + 1`, .. after the `N` labelled ones, with the label
//! [`UNLABELLED`]. Each kind has a random order of its own (the labelled one's is what it would be alone); the two are
//! merged evenly, so that every batch has the same number of labelled samples, give or take one. A last batch that is not full is left out.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, WithDType};
use kd_core::{Batch, BatchSource, Rng, UNLABELLED};
use rayon::prelude::*;

use crate::files::TO_DEFAULT_SIZE;
use crate::{Dataset, Error, Image, Normalise, Pipeline, Result, Unlabelled, unlabelled};

/// How a [`Loader`] makes batches.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Samples of a batch; the last one of an epoch may have fewer.
    pub batch_size: usize,
    /// The run's seed.
    pub seed: u64,
    /// Differently augmented copies of each sample, 1 or more.
    pub views: usize,
    /// The augmentation of each view; the last entry serves the views beyond it, none at all leaves the images as they are. Mixtures are taken
    /// from the first.
    pub augment: Vec<Pipeline>,
    /// Leaves out a last batch that is not full.
    pub drop_last: bool,
    /// Threads that decode and augment; 0: as many as there are cores for images in files, 1 (which is enough) for images in memory.
    pub threads: usize,
    /// Batches made ahead, 1 or more.
    pub prefetch: usize,
    /// Bytes that decoded images may keep.
    pub cache_bytes: usize,
    /// Type of the images, f32 or f64.
    pub dtype: DType,
    /// Where the tensors go.
    pub device: Device,
    /// Mean and deviation other than the data set's own.
    pub normalise: Option<Normalise>,
    /// Images of no class that join the training set; see the [module](self).
    pub unlabelled: Option<Unlabelled>,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self {
            batch_size: 64,
            seed: 0,
            views: 1,
            augment: vec![],
            drop_last: false,
            threads: 0,
            prefetch: 3,
            cache_bytes: 1 << 30,
            dtype: DType::F32,
            device: Device::Cpu,
            normalise: None,
            unlabelled: None,
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

    /// A loader for evaluation: every sample once, in the data set's order, not augmented
    /// ([`Pipeline::at_evaluation`] of the first view's list), one view, none left out.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn eval(data: &Dataset, options: &LoaderOptions) -> Result<Self> {
        let augment = options.augment.first().map(Pipeline::at_evaluation).into_iter().collect();
        Self::new(data, LoaderOptions { views: 1, augment, drop_last: false, unlabelled: None, ..options.clone() }, false)
    }

    /// A loader for statistics under augmentation: every sample once, in the data set's order, augmented as the first view of an epoch is,
    /// mixtures left out.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn augmented(data: &Dataset, options: &LoaderOptions) -> Result<Self> {
        let augment = options.augment.first().map(Pipeline::without_mixes).into_iter().collect();
        Self::new(data, LoaderOptions { views: 1, augment, drop_last: false, unlabelled: None, ..options.clone() }, false)
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
        let channels = data.info().shape[0];
        let normalise = options.normalise.as_ref().unwrap_or(&data.info().normalise);
        normalise.check(channels)?;
        let table = normalise.table();

        let options = join(data, options)?;
        let list = |v| options.augment.get(v).or(options.augment.last()).cloned().unwrap_or_default();
        let sized = (0..options.views).map(|v| to_one_size(list(v), data)).collect::<Result<Vec<_>>>()?;
        let size = sized[0].1;
        if let Some((_, other)) = sized.iter().find(|(_, s)| *s != size) {
            return Err(Error::option("augment", format!("views of {size:?} and {other:?} pixels"), "of one size in all views"));
        }
        let views: Vec<Pipeline> = sized.into_iter().map(|(view, _)| view).collect();
        let fixed = views.iter().map(|v| views[0].common_fixed_steps(v)).min().unwrap_or(0);

        let samples = data.len() + options.unlabelled.as_ref().map_or(0, Unlabelled::len);
        let in_files = data.file(0).is_some() || options.unlabelled.as_ref().is_some_and(|u| u.images().file(0).is_some());
        let threads = match options.threads {
            0 if in_files => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let pool = (threads > 1).then(|| {
            let built = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kd-data-{i}")).build();
            built.map_err(|e| Error::Loader(format!("cannot start {threads} loader threads: {e}")))
        });
        let cache = in_files.then(|| Cache::new(samples, options.cache_bytes));
        let shape = [channels, size[0], size[1]];
        let plan = Plan { data: data.clone(), options, shuffle, shape, views, fixed, table, pool: pool.transpose()?, cache };
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

    /// Mean and deviation (of the population, as the published constants) of every channel, over all samples as the first epoch's first view
    /// shows them: of an evaluating loader over a training set, what `normalise` should be.
    ///
    /// # Errors
    /// A file that cannot be read as an image.
    pub fn mean_std(&self) -> Result<Normalise> {
        let plan = &self.plan;
        let samples: Vec<u32> = (0..plan.data.len() as u32).collect();
        let sums: Vec<Result<Vec<(u64, u64)>>> = plan.each(samples, |buffers, sample| {
            let image = plan.view(sample, plan.augment_rng(0), 0, buffers)?;
            let sum = |plane: &[u8]| plane.iter().fold((0, 0), |(sum, squares), &v| (sum + u64::from(v), squares + u64::from(v).pow(2)));
            Ok(image.planes().map(sum).collect())
        });
        let mut totals = vec![(0u64, 0u64); plan.shape[0]];
        for sums in sums {
            totals.iter_mut().zip(sums?).for_each(|(total, sum)| *total = (total.0 + sum.0, total.1 + sum.1));
        }
        let n = (plan.data.len() * plan.shape[1] * plan.shape[2]) as f64;
        let mean = |total: &(u64, u64)| total.0 as f64 / n / 255.0;
        let std = |total: &(u64, u64)| (total.1 as f64 / n / (255.0 * 255.0) - mean(total).powi(2)).max(0.0).sqrt();
        Ok(Normalise { mean: totals.iter().map(mean).collect(), std: totals.iter().map(std).collect() })
    }
}

/// `list` and the size that all images have after it. Where they differ and the list has no say in sizes, they are first brought to
/// [`Info::shape`](crate::Info::shape).
fn to_one_size(list: Pipeline, data: &Dataset) -> Result<(Pipeline, [usize; 2])> {
    if let Some(size) = list.size(data.size())? {
        return Ok((list, size));
    }
    if list.changes_size() {
        return Err(Error::option("augment", "images that still differ in size", "a list with `center-crop:N` or `random-resized-crop:N`"));
    }
    let size = [data.info().shape[1], data.info().shape[2]];
    let list = list.after(&Pipeline::parse(&TO_DEFAULT_SIZE)?);
    let size = list.size(Some(size))?.unwrap_or(size);
    Ok((list, size))
}

/// What images without labels ask of the other options.
fn join(data: &Dataset, options: LoaderOptions) -> Result<LoaderOptions> {
    let Some(unlabelled) = &options.unlabelled else { return Ok(options) };
    let (labelled, all) = (data.len(), data.len() + unlabelled.len());
    if options.augment.first().is_some_and(|list| !list.mixes().is_empty()) {
        return Err(Error::option("augment", "a list with mixup or cutmix", "one without: images that have no label have none to mix"));
    }
    let [from, to] = [unlabelled.images(), data].map(|set| set.info().shape[0]);
    if from != to && !matches!((from, to), (3, 1) | (1, _)) {
        return Err(Error::option(
            "unlabelled",
            format!("images of {from} channels"),
            format!("images of {to} channels, as the labelled ones"),
        ));
    }
    // Two labelled samples in every batch: batch norm on an embedding needs as many.
    if options.batch_size * labelled / all < 2 {
        let least = (2 * all).div_ceil(labelled);
        let allowed =
            format!("at least {least}, so that every batch has two of the {labelled} labelled among {all} images, and at most {all}");
        return Err(Error::option("batch_size", options.batch_size, allowed));
    }
    if options.batch_size > all {
        return Err(Error::option("batch_size", options.batch_size, format!("at most {all}, the images with and without labels")));
    }
    Ok(LoaderOptions { drop_last: true, ..options })
}

impl BatchSource for Loader {
    fn samples(&self) -> usize {
        if self.plan.options.drop_last { self.batches() * self.plan.options.batch_size } else { self.plan.len() }
    }

    /// With `drop_last`, of all samples, though not all are part of every epoch.
    fn labels(&self) -> Option<&[u32]> {
        Some(self.plan.data.labels())
    }

    fn batches(&self) -> usize {
        let (n, size) = (self.plan.len(), self.plan.options.batch_size);
        if self.plan.options.drop_last { n / size } else { n.div_ceil(size) }
    }

    fn records(&self) -> usize {
        self.plan.len()
    }

    fn unlabelled(&self) -> usize {
        self.plan.len() - self.plan.data.len()
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
            for (number, samples) in order.chunks(plan.options.batch_size).enumerate().take(numbers.end).skip(numbers.start) {
                let batch = plan.batch(epoch, number, samples);
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
    /// The list of each view.
    views: Vec<Pipeline>,
    /// How many of their first steps hold no chance and are the same in all of them.
    fixed: usize,
    table: Vec<[f64; 256]>,
    pool: Option<rayon::ThreadPool>,
    cache: Option<Cache>,
}

/// What one thread works in.
#[derive(Default)]
struct Buffers {
    base: Image,
    image: Image,
    spare: Vec<u8>,
}

impl Plan {
    /// All samples, with and without labels.
    fn len(&self) -> usize {
        self.data.len() + self.options.unlabelled.as_ref().map_or(0, Unlabelled::len)
    }

    fn order(&self, epoch: usize) -> Vec<u32> {
        let (labelled, all) = (self.data.len(), self.len());
        let order = |purpose, n| match self.shuffle {
            true => self.rng(purpose, epoch).permutation(n),
            false => (0..n as u32).collect(),
        };
        let first = order("order", labelled);
        if all == labelled {
            return first;
        }
        let (mut first, mut second) = (first.into_iter(), order("unlabelled", all - labelled).into_iter().map(|i| i + labelled as u32));
        // The labelled ones are where k labelled / all passes a whole number.
        let whole = |k: usize| k as u128 * labelled as u128 / all as u128;
        (0..all).filter_map(|k| if whole(k + 1) > whole(k) { first.next() } else { second.next() }).collect()
    }

    /// The set that holds `sample`, and its place there.
    fn set_of(&self, sample: usize) -> (&Dataset, usize) {
        match (sample.checked_sub(self.data.len()), &self.options.unlabelled) {
            (Some(place), Some(unlabelled)) => (unlabelled.images(), place),
            _ => (&self.data, sample),
        }
    }

    fn label(&self, sample: u32) -> i64 {
        self.data.labels().get(sample as usize).map_or(UNLABELLED, |&label| i64::from(label))
    }

    fn rng(&self, purpose: &str, epoch: usize) -> Rng {
        Rng::new(self.options.seed).named(purpose).fork(epoch as u64)
    }

    fn augment_rng(&self, epoch: usize) -> Rng {
        self.rng("augment", epoch)
    }

    fn batch(&self, epoch: usize, number: usize, samples: &[u32]) -> Result<Batch> {
        match self.options.dtype {
            DType::F64 => self.typed_batch::<f64>(epoch, number, samples),
            _ => self.typed_batch::<f32>(epoch, number, samples),
        }
    }

    fn typed_batch<T: WithDType>(&self, epoch: usize, number: usize, samples: &[u32]) -> Result<Batch> {
        let ([channels, height, width], device) = (self.shape, &self.options.device);
        let mut images = self.images::<T>(epoch, samples)?;
        let mut labels: Vec<i64> = samples.iter().map(|&s| self.label(s)).collect();
        let mut targets = None;
        let mixes = self.views[0].mixes();
        if !mixes.is_empty() {
            let rng = self.rng("mix", epoch).fork(number as u64);
            let mix = mixes[rng.below(0, mixes.len() as u64) as usize];
            let drawn = mix.draw(samples.len(), [height, width], rng.fork(0));
            for view in &mut images {
                *view = drawn.images(view, channels * height * width, [height, width]);
            }
            let rows = drawn.targets(&labels, self.data.classes());
            targets =
                Some(Tensor::from_vec(rows, (samples.len(), self.data.classes()), &Device::Cpu)?.to_dtype(T::DTYPE)?.to_device(device)?);
            labels = drawn.labels(&labels);
        }
        let tensor = |view| Ok(Tensor::from_vec(view, (samples.len(), channels, height, width), device)?);
        Ok(Batch {
            images: images.into_iter().map(tensor).collect::<Result<_>>()?,
            labels: Tensor::from_vec(labels, samples.len(), device)?,
            targets,
            indices: Tensor::from_slice(samples, samples.len(), device)?,
        })
    }

    /// The normalised values of every view.
    fn images<T: WithDType>(&self, epoch: usize, samples: &[u32]) -> Result<Vec<Vec<T>>> {
        let table: Vec<[T; 256]> = self.table.iter().map(|t| t.map(T::from_f64)).collect();
        let rng = self.augment_rng(epoch);
        let size: usize = self.shape.iter().product();
        let mut views = vec![vec![T::from_f64(0.0); samples.len() * size]; self.views.len()];
        // Each sample with its place in every view.
        let mut places: Vec<(u32, Vec<&mut [T]>)> = samples.iter().map(|&s| (s, Vec::with_capacity(self.views.len()))).collect();
        for view in &mut views {
            places.iter_mut().zip(view.chunks_exact_mut(size)).for_each(|((_, of_sample), place)| of_sample.push(place));
        }
        let done = self.each(places, |buffers, (sample, places)| {
            for (v, place) in places.into_iter().enumerate() {
                let image = self.view(sample, rng, v, buffers)?;
                let plane = image.height * image.width;
                for ((from, to), table) in image.planes().zip(place.chunks_exact_mut(plane)).zip(&table) {
                    for (to, &from) in to.iter_mut().zip(from) {
                        *to = table[usize::from(from)];
                    }
                }
            }
            Ok(())
        });
        done.into_iter().collect::<Result<()>>()?;
        Ok(views)
    }

    /// Does `work` for every item, on the pool if there is one; results in the order of the items.
    fn each<I: Send, R: Send>(&self, items: Vec<I>, work: impl Fn(&mut Buffers, I) -> R + Send + Sync) -> Vec<R> {
        match &self.pool {
            Some(pool) => pool.install(|| items.into_par_iter().map_init(Buffers::default, work).collect()),
            None => {
                let mut buffers = Buffers::default();
                items.into_iter().map(|item| work(&mut buffers, item)).collect()
            }
        }
    }

    /// Sample `sample` as view `v` of the epoch whose stream is `rng`. Views of a sample must be asked for from 0 on: the first reads the image.
    fn view<'b>(&self, sample: u32, rng: Rng, v: usize, Buffers { base, image, spare }: &'b mut Buffers) -> Result<&'b Image> {
        let rng = rng.fork(u64::from(sample)).fork(v as u64);
        let sample = sample as usize;
        let list = &self.views[v];
        match self.cache.as_ref().and_then(|cache| cache.get(sample)) {
            Some(kept) => image.assign(kept.shape(), &kept.data),
            None => {
                if v == 0 {
                    let (set, place) = self.set_of(sample);
                    set.read(place, base)?;
                    if sample >= self.data.len() {
                        unlabelled::fit(base, spare, self.shape[0], self.data.size());
                    }
                    list.apply_first(self.fixed, base, spare, rng);
                    if let Some(cache) = &self.cache {
                        cache.offer(sample, base);
                    }
                }
                image.assign(base.shape(), &base.data);
            }
        }
        list.apply_rest(self.fixed, image, spare, rng);
        if image.shape() != self.shape {
            let ([_, height, width], [_, h, w]) = (self.shape, image.shape());
            let why =
                format!("{h}x{w} pixels where others have {height}x{width}: add `center-crop:N` or `random-resized-crop:N` to `augment`");
            let (set, place) = self.set_of(sample);
            return Err(match set.file(place) {
                Some(path) => Error::corrupt(&path, why),
                None => Error::Loader(format!("sample {sample}: {why}")),
            });
        }
        Ok(image)
    }
}

/// Decoded images, kept until the budget is used up.
struct Cache {
    budget: usize,
    used: AtomicUsize,
    images: Vec<OnceLock<Image>>,
}

impl Cache {
    fn new(samples: usize, budget: usize) -> Self {
        Self { budget, used: AtomicUsize::new(0), images: (0..samples).map(|_| OnceLock::new()).collect() }
    }

    fn get(&self, sample: usize) -> Option<&Image> {
        self.images[sample].get()
    }

    fn offer(&self, sample: usize, image: &Image) {
        let bytes = image.data.len() + size_of::<Image>();
        if self.used.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.budget {
            self.images[sample].get_or_init(|| image.clone());
        } else {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}
