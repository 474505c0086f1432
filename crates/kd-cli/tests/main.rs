//! The binary from outside: what it prints, writes and returns.

#[path = "main/analyse.rs"]
mod analyse;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

mod main {
    mod data;
    mod recipes;
    mod refusals;
}

fn kd(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kd-cli")).args(args).current_dir(dir).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output of a command that must succeed.
fn ok(dir: &Path, args: &[&str]) -> String {
    let out = kd(dir, args);
    assert!(out.status.success(), "{args:?}: {:?}\n{}", out.status, text(&out.stderr));
    text(&out.stdout)
}

/// Standard error of a command that must be refused as unusable: one error, exit code 2.
fn refused(dir: &Path, args: &[&str]) -> String {
    let out = kd(dir, args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {err}");
    assert_eq!(err.matches("error:").count(), 1, "{args:?}: {err}");
    err
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let map: std::collections::HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&map, path).unwrap();
}

fn load(path: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

fn floats(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A run of seconds: one-channel digits, two small networks.
const TINY: &str = r#"
name = "tiny"
baseline = true
[data]
source = "digits"
batch_size = 20
train_limit = 60
[teacher]
model = "resnet8"
[teacher.train.schedule]
kind = "constant"
epochs = 2
[student]
model = "resnet8"
[schedule]
kind = "constant"
epochs = 4
[run]
checkpoint_steps = 2
allow_bad_teacher = true
"#;

fn tiny(dir: &Path) -> PathBuf {
    let path = dir.join("tiny.toml");
    std::fs::write(&path, TINY).unwrap();
    path
}

#[test]
fn lists_are_objects_with_the_stated_keys() {
    let dir = folder();
    for kind in ["models", "methods", "datasets"] {
        let all: Value = serde_json::from_str(&ok(dir.path(), &["list", kind, "--json"])).unwrap();
        let all = all.as_array().unwrap();
        assert!(!all.is_empty());
        for object in all {
            for key in ["name", "about", "needs", "parameters"] {
                assert!(object.get(key).is_some(), "{kind}: {object} has no `{key}`");
            }
        }
    }
    let table = ok(dir.path(), &["list"]);
    for name in ["resnet20", "nkd", "digits"] {
        assert!(table.contains(name), "{table}");
    }
}

#[test]
fn info_counts_what_the_zoo_counts() {
    let dir = folder();
    let info: Value = serde_json::from_str(&ok(dir.path(), &["info", "resnet20", "--json"])).unwrap();
    assert_eq!(info["parameters"], 278_324);
    assert_eq!(info["spec"]["stages"].as_array().unwrap().len(), 4);
    assert!(ok(dir.path(), &["info", "resnet20", "--input", "1,8,8", "--classes", "10"]).contains("1 x 8 x 8"));
}

#[test]
fn unusable_arguments_are_one_clear_error_and_exit_code_2() {
    let dir = folder();
    let d = dir.path();
    assert!(refused(d, &["frobnicate"]).contains("frobnicate"));
    assert!(refused(d, &["info", "resnet21"]).contains("did you mean"));
    assert!(refused(d, &["distill", "--config", "nowhere.toml"]).contains("nowhere.toml"));
    assert!(refused(d, &["distill", "--resume", "nowhere"]).contains("nowhere"));
    assert!(refused(d, &["eval", "--model", "resnet20", "--weights", "none.pth", "--data", "digits"]).contains("none.pth"));
    assert!(refused(d, &["eval", "--model", "resnet20", "--weights", "none.pth", "--data", "digit"]).contains("none.pth"));
    let config = tiny(d);
    let config = config.to_str().unwrap();
    let e = refused(d, &["distill", "--config", config, "--set", "optim.lrr=1"]);
    assert!(e.contains("lrr") && e.contains("lr"), "{e}");
    let e = refused(d, &["distill", "--config", config, "--set", "student.model=resnet9"]);
    assert!(e.contains("resnet9") && e.contains("did you mean"), "{e}");
    std::fs::write(d.join("bad.toml"), "[student]\nmodel = \"resnet8\"\n[optim]\nlr = \"fast\"\n").unwrap();
    let e = refused(d, &["distill", "--config", "bad.toml"]);
    assert!(e.contains("bad.toml:4"), "{e}");
    std::fs::write(d.join("weights.toml"), "[teacher]\nmodel = \"resnet20\"\nweights = \"gone.pth\"\n[student]\nmodel = \"resnet8\"\n")
        .unwrap();
    let e = refused(d, &["distill", "--config", "weights.toml"]);
    assert!(e.contains("gone.pth"), "{e}");
    assert!(!d.join("runs").exists(), "a refused run leaves nothing behind");
}

#[test]
fn init_writes_the_quickstart_and_never_overwrites() {
    let dir = folder();
    ok(dir.path(), &["init", "my.toml"]);
    let written = std::fs::read_to_string(dir.path().join("my.toml")).unwrap();
    assert!(written.contains("[student]"));
    std::fs::write(dir.path().join("my.toml"), "mine").unwrap();
    assert!(refused(dir.path(), &["init", "my.toml"]).contains("--force"));
    assert_eq!(std::fs::read_to_string(dir.path().join("my.toml")).unwrap(), "mine");
}

#[test]
fn the_copy_in_configs_is_the_quickstart() {
    let copy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
    // A packaged crate has no workspace around it.
    if let Ok(copy) = std::fs::read_to_string(copy) {
        assert_eq!(copy, include_str!("../quickstart.toml"));
    }
}

#[test]
fn the_page_of_methods_is_up_to_date() {
    let dir = folder();
    let page = ok(dir.path(), &["list", "methods", "--markdown"]);
    for name in ["| [`kd`](#kd) | 2015 | both: logits |", "## fitnet", "| `temperature` |"] {
        assert!(page.contains(name), "{page}");
    }
    // A packaged crate has no workspace around it.
    if let Ok(file) = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/methods.md")) {
        let differs = file.lines().zip(page.lines()).find(|(a, b)| a != b);
        assert!(file == page, "docs/methods.md is stale; write it with `kd-cli list methods --markdown`. First difference: {differs:?}");
    }
    assert!(refused(dir.path(), &["list", "--markdown"]).contains("list methods --markdown"));
}

#[test]
fn loss_gives_value_terms_and_gradients() {
    let dir = folder();
    let logits = Tensor::new(&[[1f64, 2.0, -1.0], [0.5, 0.0, 0.25]], &Device::Cpu).unwrap();
    let teacher = Tensor::new(&[[0f64, 3.0, 0.0], [1.0, 0.0, -1.0]], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[1i64, 0], &Device::Cpu).unwrap();
    save(&dir.path().join("in.safetensors"), &[("student.logits", logits.clone()), ("teacher.logits", teacher), ("labels", labels)]);
    ok(dir.path(), &["loss", "ce", "--inputs", "in.safetensors", "--output", "out.safetensors"]);
    let out = load(&dir.path().join("out.safetensors"));
    let keys: Vec<&str> = out.keys().map(String::as_str).collect();
    assert_eq!(keys, ["grad.student.logits", "term.ce", "value"]);
    let lse = |r: [f64; 3]| r.iter().map(|v| v.exp()).sum::<f64>().ln();
    let expected = (lse([1.0, 2.0, -1.0]) - 2.0 + lse([0.5, 0.0, 0.25]) - 0.5) / 2.0;
    assert!((floats(&out["value"])[0] - expected).abs() < 1e-12);
    ok(
        dir.path(),
        &["loss", "kd", "--inputs", "in.safetensors", "--params", r#"{"temperature": 2}"#, "--dtype", "f32", "--output", "kd.safetensors"],
    );
    assert_eq!(load(&dir.path().join("kd.safetensors"))["value"].dtype(), DType::F32);
    let e = refused(dir.path(), &["loss", "kd", "--inputs", "in.safetensors", "--params", r#"{"temperature": 0}"#, "--output", "x"]);
    assert!(e.contains("temperature"), "{e}");
    assert!(refused(dir.path(), &["loss", "kdd", "--inputs", "in.safetensors", "--output", "x"]).contains("did you mean"));
    let nan = Tensor::new(&[[f64::NAN, 2.0]], &Device::Cpu).unwrap();
    save(&dir.path().join("nan.safetensors"), &[("student.logits", nan), ("labels", Tensor::new(&[0i64], &Device::Cpu).unwrap())]);
    assert!(refused(dir.path(), &["loss", "ce", "--inputs", "nan.safetensors", "--output", "x"]).contains("not finite"));
    assert!(!dir.path().join("x").exists());
    let whole = Tensor::new(&[[1i64, 2]], &Device::Cpu).unwrap();
    save(&dir.path().join("int.safetensors"), &[("student.logits", whole), ("labels", Tensor::new(&[0i64], &Device::Cpu).unwrap())]);
    assert!(refused(dir.path(), &["loss", "ce", "--inputs", "int.safetensors", "--output", "x"]).contains("student.logits"));
    assert!(refused(dir.path(), &["loss", "kd", "--inputs", "in.safetensors", "--params", "[1]", "--output", "x"]).contains("object"));
}

#[test]
fn a_run_goes_on_with_what_it_began_with() {
    let dir = folder();
    tiny(dir.path());
    let args = ["train", "--config", "tiny.toml", "--out", "run", "--set", "schedule.epochs=4000"];
    let mut child = start_until(dir.path(), &args, |line| line.contains("epoch   1/"));
    child.kill().unwrap();
    child.wait().unwrap();
    let config = dir.path().join("run/config.toml");
    let edited = std::fs::read_to_string(&config).unwrap().replace("momentum = 0.9", "momentum = 0.8");
    std::fs::write(&config, edited).unwrap();
    assert!(refused(dir.path(), &["train", "--resume", "run"]).contains("configuration"));
    assert!(refused(dir.path(), &["train", "--model", "resnet8", "--resume", "run"]).contains("--model"));
}

#[test]
fn forward_gives_outputs_gradients_and_statistics() {
    let dir = folder();
    let n = 2 * 3 * 16 * 16;
    let pixels: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let images = Tensor::from_vec(pixels, (2, 3, 16, 16), &Device::Cpu).unwrap();
    save(&dir.path().join("in.safetensors"), &[("images", images), ("labels", Tensor::new(&[3i64, 7], &Device::Cpu).unwrap())]);
    let run = |name: &str, more: &[&str]| {
        let mut args =
            vec!["forward", "resnet8", "--weights", "splitmix64", "--inputs", "in.safetensors", "--classes", "10", "--output", name];
        args.extend(more);
        ok(dir.path(), &args);
        load(&dir.path().join(name))
    };
    let truth = run("a", &["--mode", "train", "--dtype", "f64"]);
    for key in
        ["logits", "embedding", "stage.0", "stage.3", "preact.3", "loss", "grad.conv1.weight", "grad.images", "running.bn1.running_mean"]
    {
        assert!(truth.contains_key(key), "no {key}");
    }
    let single = run("b", &["--mode", "train"]);
    for (key, t) in &truth {
        let (a, b) = (floats(t), floats(&single[key]));
        let norm = a.iter().map(|v| v * v).sum::<f64>().sqrt();
        let gap = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt();
        assert!(gap <= 2e-3 * norm + 1e-5, "{key}: {gap} of {norm}");
    }
    let eval = run("c", &["--executor", "reference"]);
    assert!(eval.contains_key("grad.fc.weight") && !eval.keys().any(|k| k.starts_with("running.")));
    assert_ne!(floats(&eval["logits"]), floats(&truth["logits"]));
}

#[test]
fn distill_ends_with_a_table_and_a_student_that_evaluates_alike() {
    let dir = folder();
    let config = tiny(dir.path());
    let table = ok(dir.path(), &["distill", "--config", config.to_str().unwrap()]);
    for word in ["teacher", "student alone", "student distilled", "parameters", "MACs", "top-1", "runs/tiny"] {
        assert!(table.contains(word), "no `{word}` in\n{table}");
    }
    for part in ["teacher", "baseline", "student"] {
        for file in ["config.toml", "run.json", "metrics.jsonl", "student.safetensors"] {
            assert!(dir.path().join("runs/tiny").join(part).join(file).is_file(), "{part}/{file}");
        }
    }
    // Finished: a resume says the same again.
    assert_eq!(ok(dir.path(), &["distill", "--resume", "runs/tiny"]), table);
    // A second start takes another place.
    let json: Value = serde_json::from_str(&ok(dir.path(), &["distill", "--config", "tiny.toml", "--json", "--quiet"])).unwrap();
    assert_eq!(json["run"], "runs/tiny-2");
    let top1 = json["rows"][2]["top1"].as_f64().unwrap();
    let eval: Value = serde_json::from_str(&ok(
        dir.path(),
        &["eval", "--weights", "runs/tiny-2/student/student.safetensors", "--data", "digits", "--json"],
    ))
    .unwrap();
    assert_eq!(eval["top1"].as_f64().unwrap(), top1);
    assert_eq!(eval["total"], 500);
    // The same seed gives the same bits.
    let student = |run: &str| std::fs::read(dir.path().join("runs").join(run).join("student/student.safetensors")).unwrap();
    assert!(student("tiny") == student("tiny-2"));
}

/// Five students of one teacher: no need of it, its logits, its class means and an adapter, its blocks, its logits on two views.
const GROUP: &str = r#"
name = "group"
[data]
source = "digits"
batch_size = 20
train_limit = 60
[teacher]
model = "resnet14"
[teacher.train.schedule]
kind = "constant"
epochs = 2
[student]
model = "resnet8"
[schedule]
kind = "constant"
epochs = 3
[options]
checkpoint_steps = 2
allow_bad_teacher = true
[[run]]
name = "ce"
loss = [{ method = "ce" }]
[[run]]
name = "kd"
schedule.epochs = 5
[[run]]
name = "nd"
student.model = "resnet8x4"
optim.lr = 0.01
loss = [{ method = "ce" }, { method = "nd" }]
[[run]]
name = "block"
loss = [{ method = "block_kd" }]
[[run]]
name = "views"
loss = [{ method = "mlld" }]
"#;

const MEMBERS: [&str; 5] = ["ce", "kd", "nd", "block", "views"];

fn weights(dir: &Path, run: &str) -> Vec<u8> {
    std::fs::read(dir.join(run).join("student.safetensors")).unwrap()
}

#[test]
fn runs_side_by_side_end_as_each_would_alone() {
    let dir = folder();
    let d = dir.path();
    std::fs::write(d.join("group.toml"), GROUP).unwrap();
    let table = ok(d, &["distill", "--config", "group.toml", "--out", "group", "--quiet"]);
    for word in ["teacher", "ce ", "kd ", "nd ", "block ", "resnet8x4", "group"] {
        assert!(table.contains(word), "no `{word}` in\n{table}");
    }
    assert_eq!(ok(d, &["distill", "--resume", "group"]), table);

    // Each by itself, from a config that has never heard of the others.
    let given = GROUP.split("[[run]]").next().unwrap().replace("[options]", "[run]");
    let teacher = "[teacher]\nmodel = \"resnet14\"\nweights = \"group/teacher/student.safetensors\"\n";
    let (before, after) = (given.split("[teacher]").next().unwrap(), given.split("[student]").nth(1).unwrap());
    std::fs::write(d.join("one.toml"), format!("{before}{teacher}[student]{after}")).unwrap();
    let own: [&[&str]; 5] = [
        &["loss=[{method='ce'}]"],
        &["schedule.epochs=5"],
        &["student.model=resnet8x4", "optim.lr=0.01", "loss=[{method='ce'},{method='nd'}]"],
        &["loss=[{method='block_kd'}]"],
        &["loss=[{method='mlld'}]"],
    ];
    for (name, own) in MEMBERS.into_iter().zip(own) {
        let mut args = vec!["distill", "--config", "one.toml", "--quiet", "--out", name];
        own.iter().for_each(|set| args.extend(["--set", set]));
        ok(d, &args);
        assert!(weights(d, name) == weights(d, &format!("group/{name}")), "{name}");
    }
}

#[test]
fn a_cache_of_logits_changes_no_bit() {
    let dir = folder();
    let d = dir.path();
    let text = TINY
        .replace("baseline = true", "")
        .replace("model = \"resnet8\"\n[teacher.train", "model = \"resnet8\"\ncache = \"logits\"\n[teacher.train");
    std::fs::write(d.join("tiny.toml"), text).unwrap();
    let run = |out: &str, more: &[&str]| {
        let result = kd(d, &[&["distill", "--config", "tiny.toml", "--out", out][..], more].concat());
        assert!(result.status.success(), "{}", text_of(&result));
        text_of(&result)
    };
    let first = run("first", &[]);
    assert!(first.contains("note: the logits of teacher resnet8 take 0.0 MiB in first/cache-resnet8"), "{first}");
    assert!(d.join("first/cache-resnet8/000003-0.logits").is_file());
    run("second", &["--set", "teacher.cache_dir=first/cache-resnet8"]);
    assert!(weights(d, "first/student") == weights(d, "second/student"));
    let seed = ["--set", "seed=2", "--set", "teacher.cache_dir=first/cache-resnet8"];
    let e = refused(d, &[&["distill", "--config", "tiny.toml", "--out", "third"][..], &seed].concat());
    assert!(e.contains("stale"), "{e}");
}

fn text_of(out: &Output) -> String {
    text(&out.stderr)
}

#[test]
fn several_teachers_teach_together_and_one_by_one() {
    let dir = folder();
    let d = dir.path();
    let teacher = |name: &str, model: &str, weight: f64| {
        format!(
            "[[teacher]]\nname = {name:?}\nmodel = {model:?}\nweight = {weight}\n[teacher.train.schedule]\nkind = \"constant\"\nepochs = 1\n"
        )
    };
    let (before, after) = GROUP.split_once("[teacher]").unwrap();
    let after = after.split_once("[student]").unwrap().1.split("[[run]]").next().unwrap();
    let teachers = teacher("small", "resnet8", 1.0) + &teacher("large", "resnet14", 3.0);
    let losses = "[[run]]\nname = \"mean\"\n[[run]]\nname = \"one\"\n[[run.loss]]\nmethod = \"nd\"\nteacher = \"large\"\n[[run.loss]]\nmethod = \"kd\"\n";
    std::fs::write(d.join("two.toml"), format!("{before}{teachers}[student]{after}{losses}")).unwrap();
    let table = ok(d, &["distill", "--config", "two.toml", "--out", "two", "--quiet"]);
    for word in ["teacher small", "teacher large", "mean ", "one "] {
        assert!(table.contains(word), "no `{word}` in\n{table}");
    }
    let written = std::fs::read_to_string(d.join("two/one/config.toml")).unwrap();
    assert!(written.contains("teacher = \"large\""), "{written}");
    assert_eq!(ok(d, &["distill", "--resume", "two/one"]).matches("teacher").count(), 2);
    let e = refused(d, &["distill", "--config", "two.toml", "--set", "run.1.loss.0.teacher=huge"]);
    assert!(e.contains("no teacher `huge`"), "{e}");
}

#[test]
fn a_killed_group_goes_on_together_or_one_by_one() {
    let dir = folder();
    let d = dir.path();
    std::fs::write(d.join("group.toml"), GROUP).unwrap();
    ok(d, &["distill", "--config", "group.toml", "--out", "whole", "--quiet"]);
    let seen = |line: &str| line.starts_with("nd ") && line.contains("epoch   1/");
    let mut child = start_until(d, &["distill", "--config", "group.toml", "--out", "group"], seen);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!d.join("group/ce/student.safetensors").exists());
    // One alone to its end: the teacher that was trained for all lies beside it.
    ok(d, &["distill", "--resume", "group/nd", "--quiet"]);
    assert!(weights(d, "group/nd") == weights(d, "whole/nd"));
    assert!(!d.join("group/nd/teacher").exists());
    ok(d, &["distill", "--resume", "group", "--quiet"]);
    for name in MEMBERS {
        assert!(weights(d, &format!("group/{name}")) == weights(d, &format!("whole/{name}")), "{name}");
    }
}

#[test]
fn a_run_that_fails_leaves_the_others_alone() {
    let dir = folder();
    let d = dir.path();
    std::fs::write(d.join("group.toml"), GROUP).unwrap();
    let args = ["distill", "--config", "group.toml", "--out", "group", "--quiet", "--set", "run.0.optim.lr=1e30"];
    let out = kd(d, &args);
    let (table, err) = (text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert_eq!(err.matches("error:").count(), 1, "{err}");
    assert!(err.contains("1 of 5 runs failed; ce: epoch"), "{err}");
    assert!(table.lines().any(|l| l.starts_with("ce ") && l.contains("failed")), "{table}");
    for name in &MEMBERS[1..] {
        assert!(d.join("group").join(name).join("student.safetensors").is_file(), "{name}");
    }
}

#[test]
fn what_runs_cannot_have_for_themselves_is_refused() {
    let dir = folder();
    std::fs::write(dir.path().join("group.toml"), GROUP).unwrap();
    for (set, words) in [
        ("run.1.seed=2", ["`run.1.seed` cannot differ", "share"]),
        ("run.1.data.batch_size=2", ["`run.1.data` cannot differ", "share"]),
        ("run.1.precision=strict", ["`run.1.precision` cannot differ", "share"]),
        ("run.1.name=ce", ["`run.1.name` is ce", "another name"]),
        ("run.1.name=a/b", ["\"a/b\"", "a folder's name"]),
        ("run.1.name=teacher", ["\"teacher\"", "its own"]),
        ("run.1.optim.lrr=2", ["lrr", "did you mean `lr`"]),
        ("run.5.student.model=resnet8", ["`run.5` has no `name`", "must be given"]),
    ] {
        let e = refused(dir.path(), &["distill", "--config", "group.toml", "--set", set]);
        assert!(words.iter().all(|w| e.contains(w)), "{set}: {e}");
    }
    assert!(refused(dir.path(), &["train", "--config", "group.toml"]).contains("several runs"));
    assert!(!dir.path().join("runs").exists());
}

/// Starts a run and waits for a line of progress that `seen` accepts.
fn start_until(dir: &Path, args: &[&str], seen: impl Fn(&str) -> bool) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kd-cli"))
        .args(args)
        .current_dir(dir)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| seen(&line.unwrap())), "the run ended before the line that was waited for");
    // The pipe stays open behind the child's back, so that its further lines do not fail.
    std::thread::spawn(move || lines.for_each(drop));
    child
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let dir = folder();
    tiny(dir.path());
    ok(dir.path(), &["distill", "--config", "tiny.toml", "--out", "whole", "--quiet"]);
    for (part, epoch) in [("teacher", "1/2"), ("student", "2/4")] {
        let seen = |line: &str| line.starts_with(part) && line.contains(&format!("epoch   {epoch}"));
        let mut child = start_until(dir.path(), &["distill", "--config", "tiny.toml", "--out", part], seen);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!dir.path().join(part).join("student/student.safetensors").exists());
        ok(dir.path(), &["distill", "--resume", part, "--quiet"]);
        for network in ["teacher", "baseline", "student"] {
            let bits = |run: &str| std::fs::read(dir.path().join(run).join(network).join("student.safetensors")).unwrap();
            assert!(bits("whole") == bits(part), "{network} after a kill in {part}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_exits_with_130() {
    let dir = folder();
    tiny(dir.path());
    let args = ["distill", "--config", "tiny.toml", "--out", "run", "--set", "schedule.epochs=4000"];
    let mut child = start_until(dir.path(), &args, |line| line.starts_with("baseline") && line.contains("epoch   1/"));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(dir.path().join("run/baseline/checkpoints/last").read_dir().unwrap().count() > 0);
}

#[test]
fn bench_measures_what_trains() {
    let dir = folder();
    let args =
        ["bench", "step", "--teacher", "resnet8", "--student", "resnet8", "--batch", "3", "--threads", "2", "--seconds", "0", "--json"];
    let found: Value = serde_json::from_str(&ok(dir.path(), &args)).unwrap();
    let ms: f64 = ["teacher", "student", "loss", "backward", "update"].iter().map(|part| found["ms"][part].as_f64().unwrap()).sum();
    assert!(ms > 0.0 && found["img_s"].as_f64().unwrap() > 0.0);
    assert_eq!((&found["steps"], &found["threads"], &found["profile"]), (&7.into(), &2.into(), &Value::Null));
    assert_eq!(found["macs"]["teacher"], found["macs"]["student"]);

    let profiled = ok(dir.path(), &["bench", "step", "--student", "resnet8", "--batch", "2", "--seconds", "0", "--profile"]);
    assert!(
        ["limits of this machine", "winograd products", "resnet8 backward layer1.0.conv1"].iter().all(|w| profiled.contains(w)),
        "{profiled}"
    );

    let found: Value =
        serde_json::from_str(&ok(dir.path(), &["bench", "model", "resnet8", "resnet14", "--batch", "2", "--seconds", "0", "--json"]))
            .unwrap();
    assert!(found[1]["model"] == "resnet14" && found[0]["latency_ms"].as_f64().unwrap() > 0.0);
    let found: Value = serde_json::from_str(&ok(
        dir.path(),
        &["bench", "loader", "--data", "digits", "--augment", "pad-crop:1", "--epochs", "1", "--json"],
    ))
    .unwrap();
    assert!(found["img_s"].as_f64().unwrap() > 0.0);
    let found: Value =
        serde_json::from_str(&ok(dir.path(), &["bench", "conv", "16,16,3,1,1,8", "--batch", "2", "--seconds", "0", "--json"])).unwrap();
    assert!(["fwd", "bwd_x", "bwd_w"].iter().all(|d| found[0][d].as_f64().unwrap() > 0.0));

    assert!(refused(dir.path(), &["bench", "step", "--student", "resnet8", "--batch", "0"]).contains("--batch 0"));
    assert!(refused(dir.path(), &["bench", "conv", "16,16,3,1"]).contains("six numbers"));
    assert!(refused(dir.path(), &["bench", "model", "resnet8x"]).contains("resnet8x"));
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "a benchmark writes nothing");
}
