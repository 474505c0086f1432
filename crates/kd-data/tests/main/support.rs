use std::sync::Arc;

use kd_core::{Batch, BatchSource, Rng};
use kd_data::{Dataset, Info, Loader, Normalise};

/// `n` random images, labels by turns.
pub(crate) fn random_set(n: usize, shape: [usize; 3], classes: usize) -> Dataset {
    let labels = (0..n).map(|i| (i % classes) as u32).collect();
    set_with(labels, shape, classes)
}

pub(crate) fn set_with(labels: Vec<u32>, shape: [usize; 3], classes: usize) -> Dataset {
    let size: usize = shape.iter().product();
    let info = Info {
        name: "random".to_string(),
        shape,
        class_names: (0..classes).map(|c| format!("class {c}")).collect(),
        normalise: Normalise::new(&vec![0.4; shape[0]], &vec![0.3; shape[0]]),
        groups: None,
    };
    let rng = Rng::new(99);
    let pixels = (0..(labels.len() * size) as u64).map(|i| rng.bits(i) as u8).collect();
    Dataset::new(Arc::new(info), pixels, labels).unwrap()
}

/// What a run sees of a batch: images of every view, labels, indices.
pub(crate) type Seen = (Vec<Vec<f32>>, Vec<i64>, Vec<u32>);

pub(crate) fn seen(batch: &Batch) -> Seen {
    let images = batch.images.iter().map(|v| v.flatten_all().unwrap().to_vec1().unwrap()).collect();
    (images, batch.labels.to_vec1().unwrap(), batch.indices.to_vec1().unwrap())
}

pub(crate) fn epoch(loader: &mut Loader, epoch: usize, first: usize) -> Vec<Seen> {
    loader.start(epoch, first).unwrap();
    let mut batches = vec![];
    while let Some(batch) = loader.next_batch().unwrap() {
        batches.push(seen(&batch));
    }
    batches
}

/// The message of the error that `result` holds.
pub(crate) fn refusal<T>(result: Result<T, impl std::fmt::Display>) -> String {
    match result {
        Ok(_) => panic!("was not refused"),
        Err(e) => e.to_string(),
    }
}
