//! `cifar10:DIR`, `cifar100:DIR`, `cifar100-coarse:DIR`: the published binary layout of the CIFAR sets (A. Krizhevsky, "Learning Multiple
//! Layers of Features from Tiny Images", 2009).
//!
//! ```text
//! cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin   record: label u8, 3072 pixels            names: batches.meta.txt
//! cifar-100-binary/{train,test}.bin                       record: coarse u8, fine u8, 3072 pixels  names: fine_label_names.txt, coarse_label_names.txt
//! ```
//! Pixels are the R, G and B plane, each 32x32 row-major. `DIR` is that folder or the one that holds it. Without the file of names the official
//! names are used. A set whose files are missing is absent (a folder with the test batch alone can be evaluated); one that is there but
//! damaged is an error. The constants of normalisation are those that public CIFAR weights were trained with: CIFAR-100's are its pixels' mean and
//! deviation, CIFAR-10's deviations (0.2023, 0.1994, 0.2010) are smaller than its pixels' (0.2470, 0.2435, 0.2616). The superclass of each of CIFAR-100's classes is read from the records, which carry both labels.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::registry::SourceEntry;
use crate::{Dataset, Error, Info, Normalise, Result, Splits};

pub(crate) const CIFAR10: SourceEntry = SourceEntry {
    name: "cifar10",
    about: "CIFAR-10: 50,000 + 10,000 images of 32x32, 10 classes",
    argument: "DIR",
    augment: AUGMENT,
    open: open_cifar10,
};
pub(crate) const CIFAR100: SourceEntry = SourceEntry {
    name: "cifar100",
    about: "CIFAR-100: 50,000 + 10,000 images of 32x32, 100 classes in 20 groups",
    argument: "DIR",
    augment: AUGMENT,
    open: |dir| open_cifar100(dir, Label::Fine),
};
pub(crate) const CIFAR100_COARSE: SourceEntry = SourceEntry {
    name: "cifar100-coarse",
    about: "CIFAR-100 with its 20 superclasses as labels",
    argument: "DIR",
    augment: AUGMENT,
    open: |dir| open_cifar100(dir, Label::Coarse),
};

const AUGMENT: &[&str] = &["pad-crop:4", "flip"];
const SHAPE: [usize; 3] = [3, 32, 32];
const PIXELS: usize = 3072;

const NAMES10: &str = "airplane automobile bird cat deer dog frog horse ship truck";
const COARSE: &str = "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture insects \
    large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals \
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2";
const FINE: &str = "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar \
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house \
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid \
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew \
    skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout \
    tulip turtle wardrobe whale willow_tree wolf woman worm";

#[derive(Clone, Copy, PartialEq)]
enum Label {
    Fine,
    Coarse,
}

fn open_cifar10(dir: &str) -> Result<Splits> {
    let train = (1..=5).map(|i| format!("data_batch_{i}.bin")).collect::<Vec<_>>();
    let test = ["test_batch.bin".to_string()];
    let dir = locate(dir, "cifar-10-batches-bin", [&train, &test])?;
    let info = Arc::new(Info {
        name: "cifar10".to_string(),
        shape: SHAPE,
        class_names: class_names(&dir.join("batches.meta.txt"), NAMES10)?,
        normalise: Normalise::new(&[0.4914, 0.4822, 0.4465], &[0.2023, 0.1994, 0.2010]),
        groups: None,
    });
    let read = |files: &[String]| match missing(&dir, files) {
        Some(why) => Ok(Err(why)),
        None => {
            let mut records = Records::default();
            for file in files {
                records.read(&dir.join(file), &[10])?;
            }
            let labels = records.labels.iter().map(|l| u32::from(l[0])).collect();
            Dataset::new(info.clone(), records.pixels, labels).map(Ok)
        }
    };
    Ok(Splits { train: read(&train)?, test: read(&test)?, validation: None, notes: vec![], info })
}

fn open_cifar100(dir: &str, label: Label) -> Result<Splits> {
    let (train, test) = (["train.bin".to_string()], ["test.bin".to_string()]);
    let dir = locate(dir, "cifar-100-binary", [&train, &test])?;
    let read = |files: &[String; 1]| match missing(&dir, files) {
        Some(why) => Ok(Err(why)),
        None => {
            let mut records = Records::default();
            let path = dir.join(&files[0]);
            records.read(&path, &[20, 100])?;
            Ok::<_, Error>(Ok((path, records)))
        }
    };
    let (train, test) = (read(&train)?, read(&test)?);
    let groups = groups([&train, &test].into_iter().flatten())?;
    let (file, builtin) = if label == Label::Fine { ("fine_label_names.txt", FINE) } else { ("coarse_label_names.txt", COARSE) };
    let info = Arc::new(Info {
        name: if label == Label::Fine { "cifar100" } else { "cifar100-coarse" }.to_string(),
        shape: SHAPE,
        class_names: class_names(&dir.join(file), builtin)?,
        normalise: Normalise::new(&[0.5070, 0.4865, 0.4409], &[0.2673, 0.2564, 0.2761]),
        groups: if label == Label::Fine { groups } else { None },
    });
    let set = |read: Result<(PathBuf, Records), String>| match read {
        Err(why) => Ok(Err(why)),
        Ok((_, records)) => {
            let labels = records.labels.iter().map(|l| u32::from(if label == Label::Fine { l[1] } else { l[0] })).collect();
            Dataset::new(info.clone(), records.pixels, labels).map(Ok)
        }
    };
    Ok(Splits { train: set(train)?, test: set(test)?, validation: None, notes: vec![], info })
}

/// `dir` itself or its sub-folder `name`, whichever holds a file of either set.
fn locate(dir: &str, name: &str, sets: [&[String]; 2]) -> Result<PathBuf> {
    let dir = Path::new(dir);
    let holds = |d: &Path| sets.into_iter().flatten().any(|f| d.join(f).is_file());
    [dir.to_path_buf(), dir.join(name)].into_iter().find(|d| holds(d)).ok_or_else(|| {
        let files = sets.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(", ");
        Error::not_found(dir, format!("expected this folder, or {name} in it, to hold {files} (the published binary version)"))
    })
}

/// Why a set cannot be read, when a file of it is not there.
fn missing(dir: &Path, files: &[String]) -> Option<String> {
    let gone = files.iter().map(|f| dir.join(f)).find(|f| !f.is_file())?;
    Some(format!("{} is missing", gone.display()))
}

/// One name a line; the official names where there is no such file.
fn class_names(path: &Path, builtin: &str) -> Result<Vec<String>> {
    let builtin: Vec<_> = builtin.split_whitespace().map(str::to_string).collect();
    if !path.is_file() {
        return Ok(builtin);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let names: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_string).collect();
    if names.len() != builtin.len() {
        return Err(Error::corrupt(path, format!("{} class names, expected {}, one a line", names.len(), builtin.len())));
    }
    Ok(names)
}

/// Labels (one or two bytes each, as the file has them) and pixels.
#[derive(Default)]
struct Records {
    labels: Vec<[u8; 2]>,
    pixels: Vec<u8>,
}

impl Records {
    /// Appends every record of `path`, whose records start with one label below each of `classes`.
    fn read(&mut self, path: &Path, classes: &[u8]) -> Result<()> {
        let file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        let record = (classes.len() + PIXELS) as u64;
        if size == 0 || size % record != 0 {
            let why = format!(
                "{size} bytes, expected a multiple of {record} (a record: {} label bytes, 3072 pixels); is it cut short?",
                classes.len()
            );
            return Err(Error::corrupt(path, why));
        }
        let mut file = BufReader::with_capacity(1 << 18, file);
        let count = (size / record) as usize;
        let start = self.pixels.len();
        self.pixels.resize(start + count * PIXELS, 0);
        for (n, pixels) in self.pixels[start..].chunks_exact_mut(PIXELS).enumerate() {
            let mut label = [0; 2];
            for (label, &classes) in label.iter_mut().zip(classes) {
                file.read_exact(std::slice::from_mut(label)).map_err(Error::io(path))?;
                if *label >= classes {
                    return Err(Error::corrupt(path, format!("record {n} has label {label}, expected one of 0..={}", classes - 1)));
                }
            }
            file.read_exact(pixels).map_err(Error::io(path))?;
            self.labels.push(label);
        }
        Ok(())
    }
}

/// The coarse label of each fine one, once every one of them has been seen.
fn groups<'a>(sets: impl Iterator<Item = &'a (PathBuf, Records)>) -> Result<Option<Vec<i64>>> {
    let mut of = [None; 100];
    for (path, records) in sets {
        for (n, [coarse, fine]) in records.labels.iter().enumerate() {
            let known = of[usize::from(*fine)].get_or_insert(*coarse);
            if known != coarse {
                let why = format!("record {n} puts fine label {fine} into coarse label {coarse}, an earlier record into {known}");
                return Err(Error::corrupt(path, why));
            }
        }
    }
    Ok(of.iter().map(|group| group.map(i64::from)).collect())
}
