//! Bad input: one clear error each, exit code 2, nothing left that blocks the next try.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::data::picture_folder;
use crate::{folder, load, ok, refused, save, tiny};

/// Four epochs of a small network on a folder.
const ON_FOLDER: [&str; 8] = ["train", "--model", "resnet8", "--data", "imagefolder:own", "--quiet", "--set", "schedule.epochs=1"];

fn on_folder(dir: &Path) -> String {
    refused(dir, &ON_FOLDER)
}

#[test]
fn a_bad_folder_is_refused_with_the_path_at_fault() {
    let dir = folder();
    let own = dir.path().join("own");
    picture_folder(&own, 40);
    // Not among those that are looked at on opening.
    std::fs::write(own.join("train/one/007.png"), "no image").unwrap();
    let message = on_folder(dir.path());
    assert!(message.contains("own/train/one/007.png") && message.contains("not an image"), "{message}");
    assert!(!dir.path().join("runs/resnet8-ce").exists());
    std::fs::remove_file(own.join("train/one/007.png")).unwrap();
    std::fs::create_dir(own.join("train/three")).unwrap();
    let message = on_folder(dir.path());
    assert!(message.contains("own/train/three") && message.contains("without an image"), "{message}");
    for class in ["train/three", "train/two", "test/two", "train/one", "test/one"] {
        std::fs::remove_dir_all(own.join(class)).unwrap();
    }
    assert!(on_folder(dir.path()).contains("only one class (`nought`)"));
    std::fs::remove_dir_all(own.join("train")).unwrap();
    assert!(on_folder(dir.path()).contains("own"));
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let dir = folder();
    let d = dir.path();
    tiny(d);
    ok(d, &["train", "--model", "resnet8", "--data", "digits", "--out", "digits", "--quiet", "--set", "schedule.epochs=1"]);
    picture_folder(&d.join("own"), 12);
    let good = "digits/student.safetensors";
    let with = |source: &str, teacher: &str, start: &str| {
        let text = format!(
            "[data]\nsource = {source:?}\nbatch_size = 20\n[teacher]\nmodel = \"resnet8\"\nweights = {teacher:?}\n[student]\nmodel = \"resnet8\"\n{start}[schedule]\nepochs = 1\n"
        );
        std::fs::write(d.join("run.toml"), text).unwrap();
        refused(d, &["distill", "--config", "run.toml", "--quiet"])
    };
    // A teacher of ten classes and one channel on three classes; a grey folder has three channels, so bring the teacher in.
    ok(d, &["train", "--model", "resnet8", "--data", "imagefolder:own", "--out", "three", "--quiet", "--set", "schedule.epochs=1"]);
    std::fs::remove_dir_all(d.join("own/train/two")).unwrap();
    std::fs::remove_dir_all(d.join("own/test/two")).unwrap();
    let message = with("imagefolder:own", "three/student.safetensors", "");
    assert!(message.contains("3 outputs") && message.contains("2 classes"), "{message}");

    let mut tensors = load(&d.join(good));
    let bad = Tensor::full(f32::NAN, tensors["fc.bias"].shape(), &Device::Cpu).unwrap();
    tensors.insert("fc.bias".to_string(), bad);
    let list: Vec<(&str, Tensor)> = tensors.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
    save(&d.join("nan.safetensors"), &list);
    let message = with("digits", "nan.safetensors", "");
    assert!(message.contains("nan.safetensors") && message.contains("fc.bias") && message.contains("finite"), "{message}");
    let message = with("digits", good, "weights = \"nan.safetensors\"\n");
    assert!(message.contains("nan.safetensors") && message.contains("fc.bias"), "{message}");
    assert!(!d.join("runs").exists(), "a refused run leaves nothing behind");
}

#[test]
fn what_only_the_data_can_tell_is_still_put_to_its_line() {
    let dir = folder();
    let config = "[data]\nsource = \"digits\"\ntrain_limit = 2000\n[student]\nmodel = \"resnet8\"\n";
    std::fs::write(dir.path().join("run.toml"), config).unwrap();
    let message = refused(dir.path(), &["train", "--config", "run.toml"]);
    assert!(message.contains("run.toml:3") && message.contains("1297"), "{message}");
    let message = refused(dir.path(), &["train", "--config", "run.toml", "--set", "data.train_limit=3"]);
    assert!(message.contains("--set data.train_limit=3"), "{message}");
    let message = refused(dir.path(), &["train", "--config", "run.toml", "--set", "data.augment=[\"flop\"]"]);
    assert!(message.contains("--set data.augment") && message.contains("did you mean `flip`"), "{message}");
    let config = config.replace("train_limit = 2000", "augment = [\n  \"flip\",\n  \"pad-crop:x\",\n]");
    std::fs::write(dir.path().join("run.toml"), &config).unwrap();
    let message = refused(dir.path(), &["train", "--config", "run.toml"]);
    assert!(message.contains("run.toml:5") && message.contains("pad-crop:x"), "{message}");
    let config = config.replace("pad-crop:x", "pad-crop:1").replace("\"digits\"", "\"dijits\"");
    std::fs::write(dir.path().join("run.toml"), config).unwrap();
    let message = refused(dir.path(), &["train", "--config", "run.toml"]);
    assert!(message.contains("run.toml:2") && message.contains("did you mean `digits`"), "{message}");
}

#[test]
fn a_refused_run_does_not_block_the_next_try() {
    let dir = folder();
    let d = dir.path();
    ok(d, &["train", "--model", "resnet8", "--data", "digits", "--out", "start", "--quiet", "--set", "schedule.epochs=1"]);
    // A network that knows nothing: the classifier's rows are all alike.
    let mut tensors = load(&d.join("start/student.safetensors"));
    let zero = tensors["fc.weight"].zeros_like().unwrap();
    tensors.insert("fc.weight".to_string(), zero);
    let list: Vec<(&str, Tensor)> = tensors.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
    save(&d.join("bad.safetensors"), &list);
    let config = "name = \"r\"\n[data]\nsource = \"digits\"\ntrain_limit = 60\n[teacher]\nmodel = \"resnet8\"\nweights = \"bad.safetensors\"\n[student]\nmodel = \"resnet8\"\n[schedule]\nepochs = 1\n";
    std::fs::write(d.join("run.toml"), config).unwrap();
    for more in [&[][..], &["--set", "baseline=true"], &["--out", "elsewhere"]] {
        let message = refused(d, &[&["distill", "--config", "run.toml", "--quiet"][..], more].concat());
        assert!(message.contains("hardly more than chance"), "{message}");
        assert!(!d.join("runs/r").exists() && !d.join("elsewhere").exists(), "{more:?} left something behind");
    }
    let table = ok(d, &["distill", "--config", "run.toml", "--quiet", "--set", "run.allow_bad_teacher=true"]);
    assert!(table.contains("run directory: runs/r\n"), "{table}");
}

#[test]
fn a_run_goes_on_from_another_folder() {
    let dir = folder();
    let d = dir.path();
    picture_folder(&d.join("own"), 12);
    ok(d, &["train", "--model", "resnet8", "--data", "imagefolder:own", "--out", "start", "--quiet", "--set", "schedule.epochs=1"]);
    let config = "[data]\nsource = \"imagefolder:own\"\nbatch_size = 20\nunlabelled = \"folder:own\"\n[teacher]\nmodel = \"resnet8\"\nweights = \"start/student.safetensors\"\n[student]\nmodel = \"resnet8\"\nweights = \"start/student.safetensors\"\n[schedule]\nepochs = 2\n[run]\nallow_bad_teacher = true\n";
    std::fs::write(d.join("run.toml"), config).unwrap();
    let table = ok(d, &["distill", "--config", "run.toml", "--quiet", "--out", "done"]);
    std::fs::create_dir(d.join("other")).unwrap();
    // Finished: the run is read again, its teacher, start and data too.
    assert_eq!(ok(&d.join("other"), &["distill", "--resume", "../done", "--quiet"]).lines().next(), table.lines().next());
}
