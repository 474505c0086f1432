//! Data of the user's own: folders, normalisation, images without labels, class means, groups.

use std::path::Path;

use kd_data::{Loader, LoaderOptions};
use serde_json::Value;

use crate::{folder, load, ok, refused};

/// The first `n` training images of each of digits' first three classes as `train/<name>/<i>.png`, and as many test images.
pub(crate) fn picture_folder(root: &Path, n: usize) {
    let digits = kd_data::open("digits").unwrap();
    for (split, set) in [("train", digits.train().unwrap()), ("test", digits.test().unwrap())] {
        for (class, name) in ["nought", "one", "two"].iter().enumerate() {
            let dir = root.join(split).join(name);
            std::fs::create_dir_all(&dir).unwrap();
            for (i, &sample) in set.by_class()[class].iter().take(n).enumerate() {
                let grey = set.image(sample as usize).unwrap();
                image::GrayImage::from_raw(8, 8, grey.data).unwrap().save(dir.join(format!("{i:03}.png"))).unwrap();
            }
        }
    }
}

pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// Text metadata of a safetensors file.
fn metadata(path: &Path) -> serde_json::Map<String, Value> {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    json(std::str::from_utf8(&bytes[8..8 + length]).unwrap())["__metadata__"].as_object().unwrap().clone()
}

/// The lines of `metrics.jsonl` that are steps.
pub(crate) fn steps(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(json).filter(|line| line["event"] == "step").collect()
}

#[test]
fn a_folder_of_images_trains_with_its_own_mean_and_names() {
    let dir = folder();
    picture_folder(&dir.path().join("own"), 20);
    let measured = json(&ok(dir.path(), &["info", "imagefolder:own", "--measure", "--json"]));
    let splits = kd_data::open(&format!("imagefolder:{}", dir.path().join("own").display())).unwrap();
    let expected = Loader::eval(splits.train().unwrap(), &LoaderOptions::default()).unwrap().mean_std().unwrap();
    assert_eq!(measured["measured"], serde_json::to_value(&expected).unwrap());
    assert_eq!(measured["sets"]["train"]["by_class"], serde_json::json!([20, 20, 20]));
    assert!(ok(dir.path(), &["info", "imagefolder:own"]).contains("3 classes"));

    let args = ["train", "--model", "resnet8", "--data", "imagefolder:own", "--out", "run", "--quiet", "--json"];
    let more = ["--set", "schedule.epochs=2", "--set", "data.batch_size=20", "--set", "data.normalise=computed"];
    let result = json(&ok(dir.path(), &[&args[..], &more].concat()));
    let about = metadata(&dir.path().join("run/student.safetensors"));
    let list = |key: &str| json(about[key].as_str().unwrap());
    assert_eq!(list("mean"), serde_json::to_value(&expected.mean).unwrap());
    assert_eq!(list("std"), serde_json::to_value(&expected.std).unwrap());
    assert_eq!(list("class_names"), serde_json::json!(["nought", "one", "two"]));
    assert_eq!(list("augment"), serde_json::json!(["flip"]));
    // With the normalisation that it was trained with, it evaluates as the run did.
    let eval = json(&ok(dir.path(), &["eval", "--weights", "run/student.safetensors", "--data", "imagefolder:own", "--json"]));
    assert_eq!(eval["top1"], result["result"]["test"]["top1"]);
    assert_eq!(eval["mean"], list("mean"));
}

#[test]
fn images_are_evaluated_in_the_size_of_the_training() {
    let dir = folder();
    picture_folder(&dir.path().join("own"), 12);
    let args = ["train", "--model", "resnet8", "--data", "imagefolder:own", "--out", "run", "--quiet", "--json"];
    let more =
        ["--set", "schedule.epochs=1", "--set", "data.batch_size=20", "--set", "data.augment=[\"random-resized-crop:12\", \"flip\"]"];
    let result = json(&ok(dir.path(), &[&args[..], &more].concat()));
    let about = metadata(&dir.path().join("run/student.safetensors"));
    assert_eq!(about["input"], "[3,12,12]");
    let eval = json(&ok(dir.path(), &["eval", "--weights", "run/student.safetensors", "--data", "imagefolder:own", "--json"]));
    assert_eq!(eval["top1"], result["result"]["test"]["top1"]);
    let forced = ["eval", "--weights", "run/student.safetensors", "--data", "imagefolder:own", "--resize", "resize:8x8"];
    assert!(ok(dir.path(), &forced).contains("top1"));
    assert!(refused(dir.path(), &[&forced[..6], &["reseize:8"]].concat()).contains("did you mean `resize`"));
}

#[test]
fn class_means_come_from_the_loop_or_from_a_file() {
    let dir = folder();
    let config = r#"
[data]
source = "digits"
batch_size = 20
train_limit = 60
[teacher]
model = "resnet8"
weights = "teacher/student.safetensors"
[student]
model = "resnet8"
[[loss]]
method = "ce"
[[loss]]
method = "nd"
[schedule]
epochs = 1
[run]
allow_bad_teacher = true
"#;
    std::fs::write(dir.path().join("nd.toml"), config).unwrap();
    let teacher = ["train", "--model", "resnet8", "--data", "digits", "--out", "teacher", "--quiet", "--set", "schedule.epochs=1"];
    ok(dir.path(), &[&teacher[..], &["--set", "data.train_limit=100"]].concat());
    let means = |args: &[&str]| {
        let command = ["class-means", "--weights", "teacher/student.safetensors", "--data", "digits", "--train-limit", "60"];
        ok(dir.path(), &[&command[..], args].concat())
    };
    let text = means(&["--output", "means.safetensors", "--temperature", "3"]);
    means(&["--output", "means.json"]);
    let plain = load(&dir.path().join("means.safetensors"))["class_means"].to_vec2::<f64>().unwrap();
    // FNKD's rule: lambda = T, tau = mean norm / T.
    let numbers = json(&means(&["--json", "--temperature", "3"]));
    let (norm, tau) = (numbers["mean_feature_norm"].as_f64().unwrap(), numbers["fnkd"]["tau"].as_f64().unwrap());
    assert!((tau - norm / 3.0).abs() < 1e-12 && numbers["fnkd"]["lambda"] == 3.0 && text.contains(&format!("tau = {tau:.4}, lambda = 3")));

    let run = |out: &str, set: &str| {
        ok(dir.path(), &["distill", "--config", "nd.toml", "--quiet", "--out", out, "--set", set]);
        std::fs::read(dir.path().join(out).join("student.safetensors")).unwrap()
    };
    let computed = run("a", "seed=1");
    assert!(computed == run("b", "teacher.class_means.file=means.safetensors"));
    assert!(computed == run("c", "teacher.class_means.file=means.json"));

    // The released recipe rounds twice and augments.
    means(&["--round-decimals", "4", "--output", "rounded.json"]);
    means(&["--round-decimals", "4", "--augment", "--output", "released.json"]);
    let read = |name: &str| json(&std::fs::read_to_string(dir.path().join(name)).unwrap());
    let (rounded, released) = (read("rounded.json"), read("released.json"));
    for (class, row) in plain.iter().enumerate() {
        for (i, value) in row.iter().enumerate() {
            let r = rounded[class.to_string()][i].as_f64().unwrap();
            assert!((r - value).abs() <= 1.01e-4 && ((r * 1e4).round() / 1e4 - r).abs() < 1e-12, "class {class}: {r} for {value}");
        }
    }
    assert_ne!(rounded, released);
    run("d", "teacher.class_means.round_decimals=4");
    let augmented = run("e", "teacher.class_means.augment=true");
    assert!(augmented != computed);

    let refusal = |set: &str| refused(dir.path(), &["distill", "--config", "nd.toml", "--out", "no", "--set", set]);
    assert!(refusal("teacher.class_means.file=gone.json").contains("gone.json"));
    std::fs::write(dir.path().join("short.json"), "{\"0\": [1, 2]}").unwrap();
    let message = refusal("teacher.class_means.file=short.json");
    assert!(message.contains("short.json") && message.contains("class 0"), "{message}");
    let both = ["--set", "teacher.class_means.file=means.json", "--set", "teacher.class_means.augment=true"];
    assert!(refused(dir.path(), &[&["distill", "--config", "nd.toml", "--out", "no"][..], &both].concat()).contains("either read"));
}

#[test]
fn images_without_labels_join_for_the_losses_that_need_none() {
    let dir = folder();
    picture_folder(&dir.path().join("own"), 30);
    let config = r#"
[data]
source = "digits"
batch_size = 20
train_limit = 60
unlabelled = "folder:own"
[teacher]
model = "resnet8"
[teacher.train.schedule]
epochs = 1
[student]
model = "resnet8"
[[loss]]
method = "ce"
[[loss]]
method = "kd"
[schedule]
epochs = 2
[run]
allow_bad_teacher = true
"#;
    std::fs::write(dir.path().join("joined.toml"), config).unwrap();
    let run = |out: &str, more: &[&str]| {
        ok(dir.path(), &[&["distill", "--config", "joined.toml", "--quiet", "--out", out][..], more].concat());
        std::fs::read(dir.path().join(out).join("student/student.safetensors")).unwrap()
    };
    let joined = run("a", &[]);
    assert!(joined == run("b", &["--set", "threads=1"]));
    // 60 labelled and 180 other images: 12 full batches of 20, the teacher's own training has 3 an epoch.
    assert_eq!(steps(&dir.path().join("a/student")).len(), 24);
    assert_eq!(steps(&dir.path().join("a/teacher")).len(), 3);
    std::fs::remove_dir_all(dir.path().join("own/test/two")).unwrap();
    assert!(joined != run("c", &[]));

    let refusal = |sets: &[&str]| {
        let args: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
        refused(dir.path(), &[&["distill", "--config", "joined.toml", "--out", "no"][..], &args].concat())
    };
    let message = refusal(&["loss.1.method=nkd"]);
    assert!(message.contains("unlabelled") && message.contains("need labels"), "{message}");
    let message = refusal(&["data.unlabelled=folder:gone"]);
    assert!(message.contains("gone") && message.contains("unlabelled"), "{message}");
    assert!(refusal(&["data.batch_size=4"]).contains("batch_size"));
    assert!(refusal(&["data.augment=[\"mixup:0.2\"]"]).contains("mixup"));
}

#[test]
fn class_groups_come_from_a_file_or_the_names() {
    let dir = folder();
    std::fs::write(
        dir.path().join("als.toml"),
        "[data]\nsource = \"digits\"\ntrain_limit = 60\n[student]\nmodel = \"resnet8\"\n[[loss]]\nmethod = \"anisotropic_label_smoothing\"\n[schedule]\nepochs = 1\n",
    )
    .unwrap();
    let command = ["train", "--config", "als.toml", "--quiet"];
    assert!(refused(dir.path(), &command).contains("group"));
    std::fs::write(dir.path().join("groups.txt"), "round\nline\nopen\nopen\nline\nopen\nround\nline\nround\nround\n").unwrap();
    ok(dir.path(), &[&command[..], &["--out", "a", "--set", "data.class_groups=groups.txt"]].concat());
    ok(dir.path(), &[&command[..], &["--out", "b", "--set", "data.class_groups=last-word"]].concat());
    std::fs::write(dir.path().join("short.txt"), "round\n").unwrap();
    let message = refused(dir.path(), &[&command[..], &["--out", "c", "--set", "data.class_groups=short.txt"]].concat());
    assert!(message.contains("short.txt") && message.contains("1 lines") && message.contains("10 classes"), "{message}");
}
