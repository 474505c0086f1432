//! Parquet files with a column of encoded images and one of labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_datasets::hub::FileReader;
use parquet::basic::Type as Physical;
use parquet::file::reader::SerializedFileReader;
use parquet::record::Field;
use parquet::schema::types::Type;

use crate::files::{Layout, imagenet_normalise};
use crate::root::{Entry, Root};
use crate::{Error, Result, Splits};

/// Encoded images that are taken into memory; more is taken for a mistake.
const MAX_BYTES: u64 = 16 << 30;
/// Columns that hold labels, by preference.
const LABELS: [&str; 6] = ["label", "labels", "fine_label", "class", "target", "y"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Split {
    Train,
    Validation,
    Test,
}

/// The split that a file's name tells; a file that tells none is for training.
fn split_of(name: &str) -> Split {
    let words = name.split(['/', '-', '_', '.']).map(str::to_ascii_lowercase);
    let known = |word: String| match word.as_str() {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "val" | "dev" => Some(Split::Validation),
        "test" => Some(Split::Test),
        _ => None,
    };
    words.filter_map(known).next().unwrap_or(Split::Train)
}

/// `files` by their names in the repository.
pub(super) fn open(spec: &str, config: Option<&str>, mut files: Vec<(String, PathBuf)>) -> Result<Splits> {
    // `CONFIG/SPLIT/NNNN.parquet`
    let config_of = |name: &str| match name.split('/').collect::<Vec<_>>()[..] {
        [config, _, _] => Some(config.to_string()),
        _ => None,
    };
    let configs: BTreeSet<String> = files.iter().filter_map(|(name, _)| config_of(name)).collect();
    let listed = configs.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    match config {
        Some(wanted) if !configs.contains(wanted) => {
            return Err(Error::spec(spec, format!("it has no configuration `{wanted}`; it has {listed}")));
        }
        Some(wanted) => files.retain(|(name, _)| config_of(name).as_deref() == Some(wanted)),
        None if configs.len() > 1 => {
            let first = configs.first().map_or("", String::as_str);
            return Err(Error::spec(spec, format!("it has several configurations: {listed}; name one, OWNER/NAME/{first} say")));
        }
        None => {}
    }
    let bytes: u64 = files.iter().filter_map(|(_, path)| path.metadata().ok()).map(|m| m.len()).sum();
    if bytes > MAX_BYTES {
        return Err(Error::spec(spec, format!("{bytes} bytes, more than the {MAX_BYTES} that are taken into memory")));
    }

    let mut names: Option<Vec<String>> = None;
    let mut images = BTreeMap::new();
    let mut lists: BTreeMap<Split, Vec<(Entry, i64)>> = BTreeMap::new();
    for (name, path) in &files {
        let split = split_of(name);
        let list = lists.entry(split).or_default();
        let table = read(path)?;
        if names.is_none() {
            names = table.class_names;
        }
        for (bytes, label) in table.rows {
            let name = format!("{}/{:07}", format!("{split:?}").to_lowercase(), list.len());
            list.push((Entry { name: name.clone(), bytes: bytes.len() as u64 }, label));
            images.insert(name, bytes);
        }
    }
    let class_names = classes(spec, names, lists.values().flatten().map(|(_, label)| *label))?;
    let mut take = |split| Some(lists.remove(&split)?.into_iter().map(|(entry, label)| (entry, label as u32)).collect::<Vec<_>>());
    let train = take(Split::Train).filter(|list| !list.is_empty()).ok_or_else(|| Error::spec(spec, "it has no training images"))?;
    let (validation, test) = match (take(Split::Validation), take(Split::Test)) {
        (validation, Some(test)) => (validation, Some(test)),
        (validation, None) => (None, validation),
    };
    let root = Root::memory(spec, images);
    Layout { class_names, groups: None, train, validation, test }.open("hub", imagenet_normalise(), root)
}

/// The given names, or the numbers up to the largest label; refuses labels beyond them.
fn classes(spec: &str, names: Option<Vec<String>>, labels: impl Iterator<Item = i64> + Clone) -> Result<Vec<String>> {
    let last = labels.clone().max().unwrap_or(-1);
    let names = names.unwrap_or_else(|| (0..=last).map(|class| class.to_string()).collect());
    if let Some(label) = labels.into_iter().find(|label| !(0..names.len() as i64).contains(label)) {
        return Err(Error::spec(
            spec,
            format!("label {label}: expected 0..={} (a set whose test labels are hidden, perhaps)", names.len() - 1),
        ));
    }
    match &names[..] {
        [] | [_] => Err(Error::spec(spec, format!("{} class: a classifier needs two or more", names.len()))),
        _ => Ok(names),
    }
}

/// What one file holds.
struct Table {
    rows: Vec<(Vec<u8>, i64)>,
    class_names: Option<Vec<String>>,
}

fn read(path: &Path) -> Result<Table> {
    let broken = |e: parquet::errors::ParquetError| Error::corrupt(path, format!("not readable as Parquet: {e}"));
    let reader = SerializedFileReader::new(File::open(path).map_err(Error::io(path))?).map_err(broken)?;
    let about = reader.metadata().file_metadata();
    let fields = about.schema().get_fields();
    let list = || fields.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
    let is_image = |f: &&Arc<Type>| f.is_group() && f.get_fields().iter().any(|inner| inner.name() == "bytes");
    let image =
        fields.iter().find(is_image).ok_or_else(|| Error::corrupt(path, format!("no column of images (with `bytes`) in {}", list())))?;
    let whole: Vec<&Arc<Type>> =
        fields.iter().filter(|f| f.is_primitive() && matches!(f.get_physical_type(), Physical::INT32 | Physical::INT64)).collect();
    let named = LABELS.iter().find_map(|name| whole.iter().find(|f| f.name() == *name));
    let label = named.or(whole.first().filter(|_| whole.len() == 1));
    let label = label.ok_or_else(|| Error::corrupt(path, format!("no column of labels (`label`, whole numbers) in {}", list())))?;

    let both =
        Type::group_type_builder(about.schema().name()).with_fields(vec![Arc::clone(image), Arc::clone(label)]).build().map_err(broken)?;
    let mut rows = vec![];
    for (i, row) in reader.get_row_iter(Some(both)).map_err(broken)?.enumerate() {
        let row = row.map_err(broken)?;
        let field = |name: &str| row.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| field);
        let bytes = match field(image.name()) {
            Some(Field::Group(group)) => group.get_column_iter().find_map(|(name, f)| match f {
                Field::Bytes(b) if name == "bytes" => Some(b.data().to_vec()),
                _ => None,
            }),
            _ => None,
        };
        let class = match field(label.name()) {
            Some(Field::Long(v)) => Some(*v),
            Some(Field::Int(v)) => Some(i64::from(*v)),
            Some(Field::Short(v)) => Some(i64::from(*v)),
            Some(Field::Byte(v)) => Some(i64::from(*v)),
            Some(Field::UInt(v)) => Some(i64::from(*v)),
            Some(Field::UShort(v)) => Some(i64::from(*v)),
            Some(Field::UByte(v)) => Some(i64::from(*v)),
            _ => None,
        };
        match bytes.zip(class) {
            Some(pair) => rows.push(pair),
            None => {
                return Err(Error::corrupt(path, format!("row {i} has no image in `{}` or no label in `{}`", image.name(), label.name())));
            }
        }
    }
    let entry =
        about.key_value_metadata().and_then(|list| list.iter().find(|kv| kv.key == "huggingface")).and_then(|kv| kv.value.as_deref());
    let names = entry.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok()).and_then(|about| {
        let names = about["info"]["features"][label.name()]["names"].as_array()?;
        names.iter().map(|name| name.as_str().map(str::to_string)).collect::<Option<Vec<_>>>()
    });
    Ok(Table { rows, class_names: names })
}

#[cfg(test)]
mod tests {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::metadata::KeyValue;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A file as the Hub's conversion writes it: `image` with bytes and path, `label`, and one column that is neither.
    fn write(path: &Path, labels: &[i64], names: Option<&[&str]>) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let schema = "message schema { optional int64 size_of; optional group image { optional binary bytes; optional binary path (UTF8); } optional int64 label; optional int64 coarse; }";
        let about =
            names.map(|names| serde_json::json!({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}).to_string());
        let about = about.map(|text| vec![KeyValue::new("huggingface".to_string(), text)]);
        let properties = WriterProperties::builder().set_key_value_metadata(about).build();
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = 0;
        while let Some(mut c) = group.next_column().unwrap() {
            let n = labels.len();
            if column == 1 || column == 2 {
                let texts: Vec<ByteArray> =
                    labels.iter().map(|&l| if column == 1 { ByteArray::from(png(l as u8)) } else { "x.png".into() }).collect();
                c.typed::<ByteArrayType>().write_batch(&texts, Some(&vec![2; n]), None).unwrap();
            } else {
                let values: Vec<i64> = if column == 3 { labels.to_vec() } else { vec![9; n] };
                c.typed::<Int64Type>().write_batch(&values, Some(&vec![1; n]), None).unwrap();
            }
            c.close().unwrap();
            column += 1;
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    fn png(mark: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(vec![]);
        ::image::RgbImage::from_pixel(4, 3, ::image::Rgb([mark, 1, 2])).write_to(&mut bytes, ::image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    fn files(root: &Path, names: &[&str]) -> Vec<(String, PathBuf)> {
        names.iter().map(|name| (name.to_string(), root.join(name))).collect()
    }

    #[test]
    fn images_labels_and_names_come_from_the_tables() {
        let dir = tempfile::tempdir().unwrap();
        let all = ["plain/train/0000.parquet", "plain/train/0001.parquet", "plain/test/0000.parquet"];
        write(&dir.path().join(all[0]), &[1, 0], Some(&["cat", "dog"]));
        write(&dir.path().join(all[1]), &[1], Some(&["cat", "dog"]));
        write(&dir.path().join(all[2]), &[0, 1], Some(&["cat", "dog"]));
        let splits = open("hub:a/b", None, files(dir.path(), &all)).unwrap();
        assert_eq!((splits.info.class_names.clone(), splits.info.shape), (vec!["cat".to_string(), "dog".to_string()], [3, 3, 4]));
        let train = splits.train().unwrap();
        assert_eq!(train.labels(), [1, 0, 1]);
        let marks: Vec<u8> = (0..3).map(|i| train.image(i).unwrap().data[0]).collect();
        assert_eq!(marks, [1, 0, 1]);
        assert_eq!(splits.test().unwrap().labels(), [0, 1]);
        assert_eq!(open("hub:a/b", Some("plain"), files(dir.path(), &all)).unwrap().fingerprint(), splits.fingerprint());
    }

    #[test]
    fn splits_follow_from_the_names() {
        for (name, split) in [
            ("data/train-00000-of-00002.parquet", Split::Train),
            ("default/partial-train/0000.parquet", Split::Train),
            ("x/validation/0.parquet", Split::Validation),
            ("test.parquet", Split::Test),
            ("0000.parquet", Split::Train),
        ] {
            assert_eq!(split_of(name), split, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |config, names: &[&str]| open("hub:a/b", config, files(dir.path(), names)).unwrap_err().to_string();
        for name in ["x/train/0.parquet", "y/train/0.parquet"] {
            write(&dir.path().join(name), &[0, 2, 0, 2], None);
        }
        let both = ["x/train/0.parquet", "y/train/0.parquet"];
        assert!(refusal(None, &both).contains("several configurations: x, y"));
        assert!(refusal(Some("z"), &both).contains("no configuration `z`"));
        // No names: numbers up to the largest label; class 1 has no sample, which only shows in training.
        assert_eq!(open("hub:a/b", Some("x"), files(dir.path(), &both)).unwrap().info.class_names, ["0", "1", "2"]);
        write(&dir.path().join("hidden.parquet"), &[0, -1], Some(&["a", "b"]));
        assert!(refusal(None, &["hidden.parquet"]).contains("label -1"));
        write(&dir.path().join("one.parquet"), &[0, 0], None);
        assert!(refusal(None, &["one.parquet"]).contains("two or more"));
        std::fs::write(dir.path().join("bad.parquet"), "PAR1 no").unwrap();
        let message = refusal(None, &["bad.parquet"]);
        assert!(message.contains("bad.parquet") && message.contains("Parquet"), "{message}");
    }
}
