//! Parameters as flat buffers under PyTorch names.
//!
//! A network owns one 1-D tensor of parameter values, one of gradients (the *sink*), one of running statistics, and the step
//! counters of its batch norms. An optimiser is one sweep over the values, clipping one norm, a checkpoint one tensor each.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var, WithDType};

use crate::{Error, Result};

/// A float type that flat buffers can be made of on the CPU.
pub trait Element: WithDType {
    /// The elements of a CPU storage of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Element for f32 {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(v) = storage { Some(v) } else { None }
    }
}

impl Element for f64 {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(v) = storage { Some(v) } else { None }
    }
}

/// A contiguous 1-D tensor that is updated in place. Its version changes with every update.
pub struct Flat {
    tensor: RwLock<Tensor>,
    version: AtomicU64,
}

impl Flat {
    /// `len` zeros.
    pub fn zeros(len: usize, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self { tensor: RwLock::new(Tensor::zeros(len, dtype, device)?), version: AtomicU64::new(0) })
    }

    /// The live tensor: later updates show in it. For a copy that stays, see [`Flat::snapshot`].
    pub fn tensor(&self) -> Tensor {
        self.tensor.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// A copy of the present values.
    pub fn snapshot(&self) -> Result<Tensor> {
        Ok(self.tensor().copy()?)
    }

    /// Replaces the values; `values` must have the same length and is converted to this buffer's type and device.
    pub fn set(&self, values: &Tensor) -> Result<()> {
        let mut t = self.tensor.write().unwrap_or_else(|e| e.into_inner());
        if values.dims() != t.dims() {
            return Err(Error::shape("flat buffer", format!("{:?}", t.dims()), values.dims()));
        }
        // Not `copy`, which would keep the storage and offset of a view: readers expect the buffer to begin at 0.
        *t = values.to_device(t.device())?.to_dtype(t.dtype())?.force_contiguous()?.detach();
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Changes with every update.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Reads the values on the CPU without a copy. Errors when they are elsewhere or of another type.
    pub fn read<T: Element, R>(&self, f: impl FnOnce(&[T]) -> R) -> Result<R> {
        let t = self.tensor.read().unwrap_or_else(|e| e.into_inner());
        let (storage, _) = t.storage_and_layout();
        match &*storage {
            Storage::Cpu(s) => Ok(f(s.as_slice::<T>()?)),
            _ => Err(Error::refused("a flat buffer on another device cannot be read in place")),
        }
    }

    /// Changes the values in place on the CPU. Errors when they are elsewhere or of another type.
    pub fn write<T: Element, R>(&self, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
        let t = self.tensor.write().unwrap_or_else(|e| e.into_inner());
        let op = InPlace::<T, _, R> { f: Mutex::new(Some(f)), result: Mutex::new(None), element: std::marker::PhantomData };
        t.inplace_op1(&op)?;
        self.version.fetch_add(1, Ordering::Release);
        let result = op.result.into_inner().unwrap_or_else(|e| e.into_inner());
        result.ok_or_else(|| Error::refused("a flat buffer could not be written"))
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.tensor().elem_count()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// candle's door to a mutable CPU storage, opened for one closure.
struct InPlace<T, F, R> {
    f: Mutex<Option<F>>,
    result: Mutex<Option<R>>,
    element: std::marker::PhantomData<T>,
}

impl<T: Element, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for InPlace<T, F, R> {
    fn name(&self) -> &'static str {
        "flat-write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        let Some(values) = T::slice_mut(storage) else {
            candle_core::bail!("a flat buffer was written as another type than its own");
        };
        if let Some(f) = self.f.lock().unwrap_or_else(|e| e.into_inner()).take() {
            *self.result.lock().unwrap_or_else(|e| e.into_inner()) = Some(f(values));
        }
        Ok(())
    }
}

/// One named tensor inside a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamEntry {
    /// Its PyTorch name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where it begins in the buffer.
    pub offset: usize,
}

impl ParamEntry {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its range in the buffer.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Which buffer a state-dict entry lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Value(usize),
    Stat(usize),
    Counter(usize),
}

/// Collects names and shapes in PyTorch's state-dict order.
#[derive(Clone, Debug, Default)]
pub struct ParamsBuilder {
    entries: Vec<ParamEntry>,
    stats: Vec<ParamEntry>,
    counters: Vec<String>,
    order: Vec<Slot>,
}

impl ParamsBuilder {
    /// A trainable tensor; returns its index among the parameters.
    pub fn param(&mut self, name: impl Into<String>, shape: &[usize]) -> usize {
        let offset = self.entries.last().map_or(0, |e| e.range().end);
        self.entries.push(ParamEntry { name: name.into(), shape: shape.to_vec(), offset });
        self.order.push(Slot::Value(self.entries.len() - 1));
        self.entries.len() - 1
    }

    /// A running statistic; returns its index among the statistics.
    pub fn stat(&mut self, name: impl Into<String>, shape: &[usize]) -> usize {
        let offset = self.stats.last().map_or(0, |e| e.range().end);
        self.stats.push(ParamEntry { name: name.into(), shape: shape.to_vec(), offset });
        self.order.push(Slot::Stat(self.stats.len() - 1));
        self.stats.len() - 1
    }

    /// A counter (`num_batches_tracked`); returns its index among the counters.
    pub fn counter(&mut self, name: impl Into<String>) -> usize {
        self.counters.push(name.into());
        self.order.push(Slot::Counter(self.counters.len() - 1));
        self.counters.len() - 1
    }

    /// The parameters declared so far.
    pub fn entries(&self) -> &[ParamEntry] {
        &self.entries
    }

    /// The running statistics declared so far.
    pub fn stats(&self) -> &[ParamEntry] {
        &self.stats
    }

    /// Zero-filled buffers for what was declared.
    pub fn build(self, dtype: DType, device: &Device) -> Result<Params> {
        let values = self.entries.last().map_or(0, |e| e.range().end);
        let stats = self.stats.last().map_or(0, |e| e.range().end);
        Ok(Params {
            values: Flat::zeros(values, dtype, device)?,
            grads: Flat::zeros(values, dtype, device)?,
            stats: Flat::zeros(stats, dtype, device)?,
            counts: Mutex::new(vec![0; self.counters.len()]),
            reached: Mutex::new(vec![false; self.entries.len()]),
            leaves: Mutex::new(None),
            entries: self.entries,
            stat_entries: self.stats,
            counters: self.counters,
            order: self.order,
            dtype,
            device: device.clone(),
        })
    }
}

/// The flat values, gradients and statistics of one network.
pub struct Params {
    entries: Vec<ParamEntry>,
    stat_entries: Vec<ParamEntry>,
    counters: Vec<String>,
    order: Vec<Slot>,
    values: Flat,
    grads: Flat,
    stats: Flat,
    counts: Mutex<Vec<i64>>,
    reached: Mutex<Vec<bool>>,
    leaves: Mutex<Option<(u64, Vec<Var>)>>,
    dtype: DType,
    device: Device,
}

impl Params {
    /// Names, shapes and offsets of the trainable tensors, in PyTorch's order.
    pub fn entries(&self) -> &[ParamEntry] {
        &self.entries
    }

    /// Names, shapes and offsets of the running statistics.
    pub fn stat_entries(&self) -> &[ParamEntry] {
        &self.stat_entries
    }

    /// The parameter values.
    pub fn values(&self) -> &Flat {
        &self.values
    }

    /// The gradient sink: what the last backward pass added up.
    pub fn grads(&self) -> &Flat {
        &self.grads
    }

    /// The running statistics.
    pub fn stats(&self) -> &Flat {
        &self.stats
    }

    /// f32 or f64.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the buffers are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number of trainable scalars.
    pub fn count(&self) -> usize {
        self.entries.last().map_or(0, |e| e.range().end)
    }

    /// A copy of one parameter or statistic by name, in its shape.
    pub fn get(&self, name: &str) -> Option<Result<Tensor>> {
        let find = |flat: &Flat, entries: &[ParamEntry]| entries.iter().find(|e| e.name == name).map(|e| slice(&flat.tensor(), e));
        find(&self.values, &self.entries).or_else(|| find(&self.stats, &self.stat_entries))
    }

    /// One parameter by index, a copy in its shape.
    pub fn value(&self, index: usize) -> Result<Tensor> {
        slice(&self.values.tensor(), &self.entries[index])
    }

    /// One running statistic by index, a copy in its shape.
    pub fn stat(&self, index: usize) -> Result<Tensor> {
        slice(&self.stats.tensor(), &self.stat_entries[index])
    }

    /// The gradient of parameter `index` in `flat` (a buffer laid out as the values), in its shape.
    pub fn grad_of(&self, flat: &Tensor, index: usize) -> Result<Tensor> {
        slice(flat, &self.entries[index])
    }

    /// The batch counter of batch norm number `index`.
    pub fn counter(&self, index: usize) -> i64 {
        self.counts.lock().unwrap_or_else(|e| e.into_inner())[index]
    }

    /// Adds one to a batch counter.
    pub fn bump_counter(&self, index: usize) {
        self.counts.lock().unwrap_or_else(|e| e.into_inner())[index] += 1;
    }

    /// All batch counters, and their replacement.
    pub fn counters(&self) -> Vec<i64> {
        self.counts.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Replaces all batch counters.
    pub fn set_counters(&self, counts: &[i64]) -> Result<()> {
        let mut own = self.counts.lock().unwrap_or_else(|e| e.into_inner());
        if counts.len() != own.len() {
            return Err(Error::shape("batch counters", format!("[{}]", own.len()), &[counts.len()]));
        }
        own.copy_from_slice(counts);
        Ok(())
    }

    /// Names and shapes of the whole state dict in PyTorch's order, counters as scalars.
    pub fn keys(&self) -> Vec<(String, Vec<usize>)> {
        self.order
            .iter()
            .map(|slot| match *slot {
                Slot::Value(i) => (self.entries[i].name.clone(), self.entries[i].shape.clone()),
                Slot::Stat(i) => (self.stat_entries[i].name.clone(), self.stat_entries[i].shape.clone()),
                Slot::Counter(i) => (self.counters[i].clone(), vec![]),
            })
            .collect()
    }

    /// The state dict in PyTorch's order: copies in their shapes, `num_batches_tracked` as i64 scalars.
    pub fn state_dict(&self) -> Result<Vec<(String, Tensor)>> {
        let (values, stats) = (self.values.tensor(), self.stats.tensor());
        self.order
            .iter()
            .map(|slot| match *slot {
                Slot::Value(i) => Ok((self.entries[i].name.clone(), slice(&values, &self.entries[i])?)),
                Slot::Stat(i) => Ok((self.stat_entries[i].name.clone(), slice(&stats, &self.stat_entries[i])?)),
                Slot::Counter(i) => Ok((self.counters[i].clone(), Tensor::new(self.counter(i), &self.device)?)),
            })
            .collect()
    }

    /// Overwrites the tensors that `find` knows, and leaves the others. Shapes must be exact; types are converted.
    ///
    /// # Errors
    /// A tensor of another shape than the parameter's; then nothing has changed.
    pub fn assign(&self, mut find: impl FnMut(&str) -> Option<Tensor>) -> Result<()> {
        let mut collect = |flat: &Flat, entries: &[ParamEntry]| -> Result<Tensor> {
            let old = flat.tensor();
            if entries.is_empty() {
                return Ok(old);
            }
            let parts = entries
                .iter()
                .map(|e| match find(&e.name) {
                    None => Ok(old.narrow(0, e.offset, e.len())?),
                    Some(t) if t.dims() == e.shape.as_slice() => Ok(t.to_device(&self.device)?.to_dtype(self.dtype)?.flatten_all()?),
                    Some(t) => Err(Error::shape(&e.name, format!("{:?}", e.shape), t.dims())),
                })
                .collect::<Result<Vec<_>>>()?;
            Ok(Tensor::cat(&parts, 0)?)
        };
        let values = collect(&self.values, &self.entries)?;
        let stats = collect(&self.stats, &self.stat_entries)?;
        let mut counts = self.counters();
        for (count, name) in counts.iter_mut().zip(&self.counters) {
            if let Some(t) = find(name) {
                *count = t.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?.first().copied().unwrap_or(0);
            }
        }
        self.values.set(&values)?;
        self.stats.set(&stats)?;
        self.set_counters(&counts)
    }

    /// Leaf variables of the parameters, for an executor that differentiates through candle. They are copies of the present
    /// values, shared by all runs until the values change.
    pub fn leaves(&self) -> Result<Vec<Var>> {
        let mut cache = self.leaves.lock().unwrap_or_else(|e| e.into_inner());
        let version = self.values.version();
        match &*cache {
            Some((v, leaves)) if *v == version => Ok(leaves.clone()),
            _ => {
                let flat = self.values.tensor();
                let leaves = self.entries.iter().map(|e| Ok(Var::from_tensor(&slice(&flat, e)?)?)).collect::<Result<Vec<_>>>()?;
                *cache = Some((version, leaves.clone()));
                Ok(leaves)
            }
        }
    }

    /// Empties the gradient sink and forgets what was reached.
    pub fn zero_grads(&self) -> Result<()> {
        match (self.device.is_cpu(), self.dtype) {
            (true, DType::F32) => self.grads.write::<f32, _>(|g| g.fill(0.0))?,
            (true, DType::F64) => self.grads.write::<f64, _>(|g| g.fill(0.0))?,
            _ => self.grads.set(&Tensor::zeros(self.count(), self.dtype, &self.device)?)?,
        }
        self.reached.lock().unwrap_or_else(|e| e.into_inner()).fill(false);
        Ok(())
    }

    /// Adds the gradients that a candle backward pass left for the [`Params::leaves`] into the sink.
    pub fn gather(&self, store: &GradStore) -> Result<()> {
        let cache = self.leaves.lock().unwrap_or_else(|e| e.into_inner());
        let Some((_, leaves)) = &*cache else { return Ok(()) };
        let found: Vec<_> = leaves.iter().map(|leaf| store.get(leaf)).collect();
        if found.iter().all(Option::is_none) {
            return Ok(());
        }
        let old = self.grads.tensor();
        let parts = self
            .entries
            .iter()
            .zip(&found)
            .map(|(e, grad)| {
                let mine = old.narrow(0, e.offset, e.len())?;
                Ok(match grad {
                    Some(g) => (mine + g.flatten_all()?)?,
                    None => mine,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        self.grads.set(&Tensor::cat(&parts, 0)?)?;
        for (i, grad) in found.iter().enumerate() {
            if grad.is_some() {
                self.mark_reached(i);
            }
        }
        Ok(())
    }

    /// Notes that a gradient (possibly zero) arrived at parameter `index`.
    pub fn mark_reached(&self, index: usize) {
        self.reached.lock().unwrap_or_else(|e| e.into_inner())[index] = true;
    }

    /// Which parameters the last backward pass reached.
    pub fn reached(&self) -> Vec<bool> {
        self.reached.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

fn slice(flat: &Tensor, e: &ParamEntry) -> Result<Tensor> {
    // A copy: a view would change with the live buffer. Not `copy`, which on the CPU clones the whole flat storage.
    Ok(flat.narrow(0, e.offset, e.len())?.reshape(e.shape.as_slice())?.force_contiguous()?.detach())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Params {
        let mut b = ParamsBuilder::default();
        b.param("a.weight", &[2, 3]);
        b.stat("a.running_mean", &[2]);
        b.counter("a.num_batches_tracked");
        b.param("b.bias", &[2]);
        b.build(DType::F64, &Device::Cpu).unwrap()
    }

    #[test]
    fn state_dict_keeps_pytorch_order_and_round_trips() {
        let p = two();
        let names: Vec<_> = p.keys().into_iter().map(|k| k.0).collect();
        assert_eq!(names, ["a.weight", "a.running_mean", "a.num_batches_tracked", "b.bias"]);
        let w = Tensor::arange(0.0, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        p.assign(|n| match n {
            "a.weight" => Some(w.clone()),
            "a.num_batches_tracked" => Some(Tensor::new(5i64, &Device::Cpu).unwrap()),
            _ => None,
        })
        .unwrap();
        assert_eq!(p.get("a.weight").unwrap().unwrap().to_vec2::<f64>().unwrap()[1], [3.0, 4.0, 5.0]);
        assert_eq!(p.counter(0), 5);
        assert!(p.assign(|n| (n == "b.bias").then(|| w.clone())).is_err());
    }

    #[test]
    fn leaves_are_shared_until_the_values_change() {
        let p = two();
        let a = p.leaves().unwrap();
        assert_eq!(a[0].id(), p.leaves().unwrap()[0].id());
        p.values().write::<f64, _>(|v| v[0] = 1.0).unwrap();
        assert_ne!(a[0].id(), p.leaves().unwrap()[0].id());
        assert_eq!(p.leaves().unwrap()[0].flatten_all().unwrap().to_vec1::<f64>().unwrap()[0], 1.0);
        assert_eq!(a[0].flatten_all().unwrap().to_vec1::<f64>().unwrap()[0], 0.0);
    }

    #[test]
    fn gradients_add_up_in_the_sink() {
        let p = two();
        p.zero_grads().unwrap();
        let leaves = p.leaves().unwrap();
        let loss = (leaves[0].sum_all().unwrap() * 2.0).unwrap();
        let store = loss.backward().unwrap();
        p.gather(&store).unwrap();
        p.gather(&store).unwrap();
        assert_eq!(p.grads().tensor().to_vec1::<f64>().unwrap(), [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 0.0, 0.0]);
        assert_eq!(p.reached(), [true, false]);
        assert!(p.grads().write::<f32, _>(|_| ()).is_err());
    }
}
