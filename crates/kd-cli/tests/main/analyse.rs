//! `kd-cli analyse` on a run of seconds.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use crate::{folder, load, ok, refused, save, tiny};

/// The tiny run, whose training labels are partly noise.
fn noisy_run(dir: &Path) {
    tiny(dir);
    ok(
        dir,
        &["distill", "--config", "tiny.toml", "--out", "run", "--set", "data.label_noise=0.3", "--set", "data.train_limit=200", "--quiet"],
    );
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let mut all = vec!["analyse"];
    all.extend(args);
    all.push("--json");
    serde_json::from_str(&ok(dir, &all)).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn analyses_of_a_run_agree_with_each_other_and_with_eval() {
    let dir = folder();
    let d = dir.path();
    noisy_run(d);
    let student = "run/student/student.safetensors";
    let eval: Value = serde_json::from_str(&ok(d, &["eval", "--weights", student, "--data", "digits", "--json"])).unwrap();

    // Norms: the parts are the whole, and right is what `eval` calls right.
    let norms = json(d, &["feature-norms", "--run", "run", "--sheet", "sheet.png", "--svg", "norms.svg", "--count", "3"]);
    assert_eq!(norms["correct"]["n"], eval["correct"]);
    assert_eq!(norms["norm"]["n"], 500);
    assert_eq!(norms["label_noise"], Value::Null, "test labels are never noise");
    let classes = norms["classes"].as_array().unwrap();
    let total: f64 = classes.iter().map(|c| number(&c["norm"]["n"]) * number(&c["norm"]["mean"])).sum();
    assert!((total / 500.0 - number(&norms["norm"]["mean"])).abs() < 1e-9);
    let ends = norms["extremes"].as_array().unwrap();
    assert_eq!((ends.len(), &ends[0]["norm"], &ends[3]["norm"]), (6, &norms["norm"]["min"], &norms["norm"]["max"]));
    assert!(std::fs::read(d.join("sheet.png")).unwrap().starts_with(b"\x89PNG"));
    assert!(std::fs::read_to_string(d.join("norms.svg")).unwrap().contains("right and wrong predictions"));

    // The run's own noise, or the same drawn by hand.
    let noise = json(d, &["feature-norms", "--run", "run", "--split", "train"]);
    let (noisy, clean) = (number(&noise["label_noise"]["noisy"]["n"]), number(&noise["label_noise"]["clean"]["n"]));
    assert!(noisy + clean == 200.0 && (30.0..90.0).contains(&noisy), "{noisy} noisy, {clean} clean");
    assert!((0.0..=1.0).contains(&number(&noise["label_noise"]["auc_norm"])));
    let by_hand = json(d, &["feature-norms", "--weights", student, "--data", "digits", "--split", "train", "--label-noise", "0.3"]);
    assert_eq!(by_hand["norm"]["n"], 1297);
    assert!((300.0..480.0).contains(&number(&by_hand["label_noise"]["noisy"]["n"])));
    let table = ok(d, &["analyse", "feature-norms", "--run", "run", "--split", "train", "--of", "teacher"]);
    for word in ["noisy label", "clean label", "AUC", "teacher/student.safetensors"] {
        assert!(table.contains(word), "no `{word}` in\n{table}");
    }

    // The student's own directory does as well.
    assert_eq!(json(d, &["feature-norms", "--run", "run/student"])["norm"], norms["norm"]);
    let directions = json(d, &["directions", "--run", "run", "--svg", "directions.svg"]);
    let against = directions["against"].as_array().unwrap();
    assert_eq!(against.len(), 3);
    assert!(against.iter().all(|a| number(&a["all"]["cosine"]["mean"]) <= 1.0 && number(&a["all"]["ratio"]["min"]) > 0.0));
    assert!(number(&against[1]["all"]["nd"]) > 0.0 && against[0]["all"]["nd"].is_null());

    let parts = json(d, &["decompose", "--run", "run", "--temperature", "4", "--svg", "sums.svg"]);
    let all = &parts["all"];
    assert!((number(&all["target"]) + number(&all["rest"]) - number(&all["kd"])).abs() < 1e-9);

    let agreement = json(d, &["agreement", "--run", "run", "--svg", "reliability.svg", "--correlation-svg", "classes.svg"]);
    let a = &agreement["agreement"];
    assert!((100.0 * number(&a["student"]["accuracy"]) - number(&eval["top1"])).abs() < 1e-9);
    assert!((number(&a["student"]["ece"]) - number(&eval["ece"])).abs() < 1e-9);
    let counts = &a["counts"];
    let cases = ["both_right", "teacher_right", "student_right", "same_wrong", "different_wrong"];
    assert_eq!(cases.iter().map(|c| number(&counts[*c])).sum::<f64>(), 500.0);
    assert_eq!(number(&counts["agree"]), number(&counts["both_right"]) + number(&counts["same_wrong"]));
    for figure in ["directions.svg", "sums.svg", "reliability.svg", "classes.svg"] {
        assert!(std::fs::read_to_string(d.join(figure)).unwrap().trim_end().ends_with("</svg>"), "{figure}");
    }
}

#[test]
fn a_network_is_like_itself_and_bad_input_is_refused() {
    let dir = folder();
    let d = dir.path();
    ok(d, &["train", "--model", "resnet8", "--data", "digits", "--out", "r", "--set", "schedule.epochs=1", "--quiet"]);
    let own = "r/student.safetensors";
    let itself = ["--weights", own, "--teacher-weights", own, "--data", "digits", "--limit", "120"];

    let agreement = json(d, &[&["agreement"], &itself[..]].concat());
    assert_eq!(number(&agreement["agreement"]["agreement"]), 1.0);
    assert_eq!(number(&agreement["agreement"]["kl"]), 0.0);
    assert_eq!(number(&agreement["class_correlation"]["max"]), 0.0);
    let directions = json(d, &[&["directions"], &itself[..]].concat());
    assert_eq!(directions["against"][0]["all"]["angle"], directions["against"][2]["all"]["angle"]);
    let alone = ["cka", "--weights", own, "--data", "digits", "--limit", "120", "--batch-size", "60"];
    for more in [&["--estimator", "unbiased"][..], &["--estimator", "plain", "--pool", "--svg", "cka.svg"]] {
        let cka = json(d, &[&alone[..], more].concat());
        let (rows, matrix) = (cka["rows"].as_array().unwrap().len(), cka["cka"].as_array().unwrap());
        assert_eq!((rows, matrix.len()), (6, 6));
        for (i, row) in matrix.iter().enumerate() {
            assert!((number(&row[i]) - 1.0).abs() < 1e-6);
            (0..rows).for_each(|j| assert!((number(&row[j]) - number(&matrix[j][i])).abs() < 1e-6));
        }
    }
    assert!(std::fs::read_to_string(d.join("cka.svg")).unwrap().contains("linear CKA"));

    let no = |args: &[&str]| refused(d, &[&["analyse"], args].concat());
    let on_digits = |what: &str, weights: &str, more: &[&str]| no(&[&[what, "--weights", weights, "--data", "digits"], more].concat());
    assert!(on_digits("feature-norms", "gone.pth", &[]).contains("gone.pth"));
    assert!(on_digits("decompose", own, &[]).contains("--teacher-weights"));
    assert!(on_digits("feature-norms", own, &["--label-noise", "0.2"]).contains("--split train"));
    assert!(on_digits("feature-norms", own, &["--sheet", "s.png", "--classes", "eight"]).contains("eight"));
    assert!(on_digits("feature-norms", own, &["--of", "teacher"]).contains("--run"));
    assert!(on_digits("cka", own, &["--batch-size", "2"]).contains("at least 4"));
    assert!(on_digits("decompose", own, &["--teacher-weights", own, "--temperature", "0"]).contains("temperature"));
    assert!(no(&["agreement", "--run", "nowhere"]).contains("nowhere"));
    assert!(no(&["agreement", "--run", "r"]).contains("--teacher-weights"));
    assert!(no(&["feature-norms", "--weights", own]).contains("--data"));

    // One NaN in the last layer reaches a logit of every sample.
    let mut tensors = load(&d.join(own));
    let weight = &tensors["fc.bias"];
    let broken = (weight.zeros_like().unwrap() + f64::NAN).unwrap();
    tensors.insert("fc.bias".to_string(), broken);
    let named: Vec<(&str, Tensor)> = tensors.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
    save(&d.join("nan.safetensors"), &named);
    let e = on_digits("feature-norms", "nan.safetensors", &["--model", "resnet8", "--svg", "nan.svg", "--sheet", "nan.png"]);
    assert!(e.to_lowercase().contains("nan"), "{e}");
    assert!(!d.join("nan.svg").exists() && !d.join("nan.png").exists());
    // Fewer outputs than classes.
    let fewer = |k: &str| tensors[k].narrow(0, 0, 4).unwrap().zeros_like().unwrap();
    let (w, b) = (fewer("fc.weight"), fewer("fc.bias"));
    tensors.extend([("fc.weight".to_string(), w), ("fc.bias".to_string(), b)]);
    let named: Vec<(&str, Tensor)> = tensors.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
    save(&d.join("four.safetensors"), &named);
    let e = on_digits("feature-norms", "four.safetensors", &["--model", "resnet8"]);
    assert!(e.contains("4 outputs") && e.contains("10 classes"), "{e}");
}
