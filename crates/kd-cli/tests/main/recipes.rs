//! The configs of self-distillation and fine-tuning, run on digits as they are (with fewer epochs), and their starts.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::data::{json, steps};
use crate::{floats, folder, load, ok, refused};

/// A config of the workspace; a packaged crate has none around it.
fn config(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(name);
    path.is_file().then_some(path)
}

#[test]
fn a_network_teaches_one_of_its_own_kind() {
    for name in ["self-kd", "self-kd-fn"] {
        let Some(path) = config(&format!("{name}.toml")) else { return };
        let dir = folder();
        let short = ["--set", "teacher.train.schedule.epochs=3", "--set", "schedule.epochs=2", "--set", "run.allow_bad_teacher=true"];
        let args = [&["distill", "--config", path.to_str().unwrap(), "--quiet", "--json"][..], &short].concat();
        let table = json(&ok(dir.path(), &args));
        let rows = table["rows"].as_array().unwrap();
        assert!(rows.iter().all(|r| r["model"] == "resnet8" && r["parameters"] == rows[0]["parameters"]), "{name}: {table}");
        let student = load(&dir.path().join("runs").join(name).join("student/student.safetensors"));
        let teacher = load(&dir.path().join("runs").join(name).join("teacher/student.safetensors"));
        // Begun anew, not copied.
        assert_eq!(student.keys().collect::<Vec<_>>(), teacher.keys().collect::<Vec<_>>());
        assert_ne!(floats(&student["fc.weight"]), floats(&teacher["fc.weight"]));
    }
}

#[test]
fn hypersphere_embedding_fine_tunes_a_trained_network() {
    let Some(path) = config("he-finetune.toml") else { return };
    let dir = folder();
    let text = std::fs::read_to_string(&path).unwrap();
    let path = path.to_str().unwrap();
    // The start's path is relative to where one is, and said when it is not there.
    assert!(refused(dir.path(), &["train", "--config", path]).contains("runs/he-start/student.safetensors"));
    let start = ["train", "--model", "resnet8", "--data", "digits", "--out", "runs/he-start", "--quiet"];
    ok(
        dir.path(),
        &[&start[..], &["--set", "data.train_limit=200", "--set", "schedule.epochs=10", "--set", "data.batch_size=50"]].concat(),
    );
    ok(dir.path(), &["train", "--config", path, "--quiet", "--out", "tuned"]);
    let fresh: Vec<&str> = text.lines().filter(|line| !line.starts_with("weights")).collect();
    std::fs::write(dir.path().join("fresh.toml"), fresh.join("\n")).unwrap();
    ok(dir.path(), &["train", "--config", "fresh.toml", "--quiet", "--out", "fresh", "--set", "schedule.epochs=1"]);
    let first = |run: &str| steps(&dir.path().join(run))[0]["terms"]["he.ce"].as_f64().unwrap();
    // A trained network's logits already point the right way.
    assert!(first("tuned") < first("fresh"), "{} and {}", first("tuned"), first("fresh"));
}

#[test]
fn a_pretrained_student_may_get_a_new_classifier() {
    let dir = folder();
    super::data::picture_folder(&dir.path().join("own"), 12);
    let short = ["--quiet", "--set", "schedule.epochs=1", "--set", "data.batch_size=20", "--set", "data.train_limit=60"];
    // Three channels, ten classes.
    let start = ["train", "--model", "resnet8", "--data", "imagefolder:own", "--out", "start"];
    ok(dir.path(), &[&start[..], &short[..5], &["--set", "data.train_limit=30"]].concat());
    let colour = load(&dir.path().join("start/student.safetensors"));
    // The same images in two classes only.
    std::fs::remove_dir_all(dir.path().join("own/train/two")).unwrap();
    std::fs::remove_dir_all(dir.path().join("own/test/two")).unwrap();
    let go = ["train", "--model", "resnet8", "--data", "imagefolder:own", "--set", "student.weights=start/student.safetensors"];
    let short = [&short[..5], &["--set", "data.train_limit=20"]].concat();
    let message = refused(dir.path(), &[&go[..], &short, &["--out", "no"]].concat());
    assert!(message.contains("fc.weight") && message.contains("new_head"), "{message}");
    let headed = [&go[..], &short, &["--set", "student.new_head=true"]].concat();
    ok(dir.path(), &[&headed[..], &["--out", "tuned"]].concat());
    let tuned = load(&dir.path().join("tuned/student.safetensors"));
    assert_eq!(tuned["fc.weight"].dims(), [2, colour["fc.weight"].dims()[1]]);
    // One epoch of one step moves the body a little; a network begun anew is far away.
    let gap = |a: &Tensor, b: &Tensor| floats(&(a - b).unwrap()).iter().map(|v| v * v).sum::<f64>().sqrt();
    let name = "conv1.weight";
    let moved = gap(&tuned[name], &colour[name]);
    assert!(moved > 0.0 && moved < 0.5 * floats(&colour[name]).iter().map(|v| v * v).sum::<f64>().sqrt(), "{moved}");
    assert!(refused(dir.path(), &["train", "--model", "resnet8", "--set", "student.new_head=true"]).contains("weights"));
}
