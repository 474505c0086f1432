//! Every input that is to be refused, with the words that name what is wrong.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use kd_losses::find;
use serde_json::{Value, json};

use crate::main::fixtures::seeds;

const B: usize = 4;
const K: usize = 5;
const D: usize = 3;

fn floats(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_vec((0..n).map(|i| ((i * 37 + 11) % 64) as f64 / 32.0 - 0.9).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

fn ints(values: &[i64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// Tensors and parameters that `method` accepts.
fn good(method: &str) -> (BTreeMap<String, Tensor>, Value) {
    let mut t: BTreeMap<String, Tensor> =
        [("student.logits", floats(&[B, K])), ("student.embedding", floats(&[B, D])), ("labels", ints(&[0, 4, 2, 2]))]
            .map(|(n, t)| (n.to_string(), t))
            .into();
    let mut add = |name: &str, tensor: Tensor| t.insert(name.to_string(), tensor);
    add("teacher.logits", (floats(&[B, K]) * 2.0).unwrap());
    add("teacher.embedding", (floats(&[B, D]) + 1.0).unwrap());
    add("class_means", floats(&[K, D]));
    add("class_groups", ints(&[0, 0, 1, 1, 1]));
    if method == "uskd" {
        add("student.mid_embedding", floats(&[B, 2]));
        add("param.fc.weight", floats(&[K, 2]));
        add("param.fc.bias", floats(&[K]));
    }
    let params = if method.ends_with("_pp") { json!({"epoch": 3}) } else { json!({}) };
    (t, params)
}

fn refusal(method: &str, tensors: &BTreeMap<String, Tensor>, params: &Value) -> String {
    match evaluate(find(method).unwrap(), tensors, params, DType::F64) {
        Ok(_) => panic!("{method} accepted {params}"),
        Err(e) => e.to_string(),
    }
}

/// `method` refuses its good inputs after a change, with a message that holds every one of `words`.
fn refused(method: &str, change: impl Fn(&mut BTreeMap<String, Tensor>, &mut Value), words: &[&str]) {
    let (mut tensors, mut params) = good(method);
    change(&mut tensors, &mut params);
    let message = refusal(method, &tensors, &params);
    for word in words {
        assert!(message.contains(word), "{method}: {message:?} does not say {word:?}");
    }
}

fn with(name: &'static str, tensor: Tensor) -> impl Fn(&mut BTreeMap<String, Tensor>, &mut Value) {
    move |t, _| {
        t.insert(name.to_string(), tensor.clone());
    }
}

fn param(name: &'static str, value: Value) -> impl Fn(&mut BTreeMap<String, Tensor>, &mut Value) {
    move |_, p| p[name] = value.clone()
}

#[test]
fn the_unchanged_inputs_are_accepted() {
    for entry in seeds() {
        let (tensors, params) = good(entry.name);
        let found = evaluate(entry, &tensors, &params, DType::F64).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
        assert!(found.contains_key("value"), "{}", entry.name);
    }
}

/// Which of the common inputs each method looks at.
fn uses(method: &str, input: &str) -> bool {
    let logits = !matches!(method, "nd" | "nd_cosine" | "nd_infonce" | "norm_match" | "sifn");
    match input {
        "student.logits" => logits,
        "student.embedding" => !logits || matches!(method, "fnkd" | "he" | "kd_pp" | "dkd_pp"),
        "teacher.logits" => matches!(method, "kd" | "dkd" | "nkd" | "fnkd" | "kd_pp" | "dkd_pp"),
        "teacher.embedding" => matches!(method, "nd" | "norm_match" | "fnkd" | "kd_pp" | "dkd_pp"),
        "labels" => !matches!(method, "kd" | "fnkd" | "norm_match" | "sifn"),
        "class_means" => matches!(method, "nd" | "nd_cosine" | "nd_infonce" | "kd_pp" | "dkd_pp"),
        _ => unreachable!(),
    }
}

#[test]
fn tensors_that_cannot_be_right_are_refused_by_every_method_that_uses_them() {
    for method in seeds().map(|e| e.name) {
        for (input, columns) in [("student.logits", K), ("student.embedding", D), ("teacher.logits", K), ("teacher.embedding", D)] {
            if !uses(method, input) {
                continue;
            }
            refused(method, |t, _| drop(t.remove(input)), &[input, "not given"]);
            refused(method, with(input, floats(&[0, columns])), &[input, "B >= 1", "got [0, "]);
            refused(method, with(input, floats(&[B])), &[input, "got [4]"]);
            for bad in [f64::NAN, f64::INFINITY] {
                let mut values = floats(&[B, columns]).flatten_all().unwrap().to_vec1::<f64>().unwrap();
                values[2] = bad;
                let tensor = Tensor::from_vec(values, (B, columns), &Device::Cpu).unwrap();
                refused(method, with(input, tensor), &[input, "not finite", "index 2"]);
            }
            let alone =
                matches!(method, "sifn" | "nd_cosine" | "nd_infonce") || (input == "student.logits" && !uses(method, "teacher.logits"));
            if !alone || uses(method, "labels") {
                let other = with(input, floats(&[B + 1, columns]));
                let (mut tensors, mut params) = good(method);
                other(&mut tensors, &mut params);
                assert!(refusal(method, &tensors, &params).contains("shape"), "{method}: another batch in {input}");
            }
        }
        if uses(method, "student.logits") {
            let one = |t: &mut BTreeMap<String, Tensor>, _: &mut Value| {
                for name in ["student.logits", "teacher.logits"] {
                    t.insert(name.to_string(), floats(&[B, 1]));
                }
            };
            refused(method, one, &["logits", "K >= 2", "got [4, 1]"]);
        }
        if uses(method, "teacher.logits") {
            refused(method, with("teacher.logits", floats(&[B, K + 1])), &["teacher.logits", "[4, 5]", "got [4, 6]"]);
        }
        if uses(method, "labels") {
            refused(method, with("labels", ints(&[0, 1, 5, 2])), &["label 5", "position 2", "0..=4"]);
            refused(method, with("labels", ints(&[0, -1, 1, 2])), &["label -1", "position 1"]);
            refused(method, with("labels", ints(&[0, 1])), &["labels", "[4]", "got [2]"]);
            refused(method, with("labels", floats(&[B])), &["labels", "integers"]);
        }
    }
}

#[test]
fn soft_targets_must_be_distributions() {
    let row = |a: f64, b: f64| [a, b, 0.0, 0.0, 0.0];
    for method in ["ce", "label_smoothing", "nkd", "dkd", "tf_nkd", "uskd", "he", "nd", "kd_pp"] {
        let targets = |r: [f64; K]| Tensor::new(&[row(1.0, 0.0), row(0.5, 0.5), r, row(0.3, 0.7)], &Device::Cpu).unwrap();
        refused(method, with("targets", targets(row(0.5, 0.49))), &["targets", "row 2", "sum to 1"]);
        refused(method, with("targets", targets(row(1.5, -0.5))), &["targets", "row 2", "at least 0"]);
        refused(method, with("targets", floats(&[B, K + 1])), &["targets", "[4, 5]"]);
        let (mut tensors, params) = good(method);
        tensors.insert("targets".into(), targets(row(0.5, 0.50005)));
        evaluate(find(method).unwrap(), &tensors, &params, DType::F64).unwrap();
    }
    let targets = Tensor::new(&[row(0.5, 0.5); B], &Device::Cpu).unwrap();
    refused("anisotropic_label_smoothing", with("targets", targets), &["class indices", "mixup"]);
}

#[test]
fn parameters_out_of_range_are_named() {
    let positive = [
        ("kd", "temperature"),
        ("dkd", "temperature"),
        ("nkd", "temperature"),
        ("fnkd", "tau"),
        ("fnkd", "eps"),
        ("he", "radius"),
        ("he", "eps"),
        ("nd", "eps"),
        ("nd", "bn_eps"),
        ("nd_cosine", "eps"),
        ("nd_infonce", "temperature"),
        ("nd_infonce", "eps"),
        ("norm_match", "eps"),
        ("sifn", "eps"),
        ("uskd", "rank_eps"),
        ("kd_pp", "temperature"),
        ("dkd_pp", "temperature"),
    ];
    for (method, key) in positive {
        refused(method, param(key, json!(0.0)), &[key, "= 0", "above 0"]);
        refused(method, param(key, json!(-2.5)), &[key, "= -2.5", "above 0"]);
    }
    let not_negative = [
        ("dkd", "alpha"),
        ("dkd", "beta"),
        ("nkd", "gamma"),
        ("uskd", "alpha"),
        ("uskd", "beta"),
        ("uskd", "mu"),
        ("fnkd", "lambda"),
        ("sifn", "step"),
        ("kd_pp", "ce_weight"),
        ("kd_pp", "kd_weight"),
        ("kd_pp", "nd_weight"),
        ("dkd_pp", "ce_weight"),
        ("dkd_pp", "alpha"),
        ("dkd_pp", "beta"),
        ("dkd_pp", "nd_weight"),
    ];
    for (method, key) in not_negative {
        refused(method, param(key, json!(-0.5)), &[key, "= -0.5", "at least 0"]);
    }
    for (method, key) in [
        ("label_smoothing", "epsilon"),
        ("anisotropic_label_smoothing", "epsilon1"),
        ("anisotropic_label_smoothing", "epsilon2"),
        ("uskd", "weak_smoothing"),
    ] {
        refused(method, param(key, json!(1.5)), &[key, "1.5", "0..=1"]);
        refused(method, param(key, json!(-0.1)), &[key, "-0.1", "0..=1"]);
    }
    refused(
        "anisotropic_label_smoothing",
        |_, p| (p["epsilon1"], p["epsilon2"]) = (json!(0.75), json!(0.5)),
        &["epsilon1 + epsilon2", "1.25", "at most 1"],
    );
    for method in ["nd", "nd_cosine", "nd_infonce", "norm_match", "kd_pp", "dkd_pp"] {
        refused(method, param("dropout", json!(1.0)), &["dropout", "less than 1"]);
        refused(method, param("adapter", json!("conv")), &["conv", "bn_dropout_linear"]);
    }
    for entry in seeds() {
        refused(entry.name, param("temprature", json!(1.0)), &["unknown field", "temprature"]);
        assert!((entry.build)(&json!({"temprature": 1.0})).is_err_and(|e| e.to_string().contains("unknown field `temprature`")));
    }
    refused("kd", param("form", json!("mse")), &["mse", "cross_entropy"]);
    refused("kd", param("temperature", json!("hot")), &["hot"]);
    assert!((find("nkd").unwrap().build)(&json!({"gamma": -1.0})).is_err_and(|e| e.to_string().contains("gamma = -1")));
}

#[test]
fn class_groups_without_a_neighbour_are_refused() {
    let lonely = with("class_groups", ints(&[0, 0, 1, 1, 2]));
    let change = |t: &mut BTreeMap<String, Tensor>, p: &mut Value| {
        lonely(t, p);
        p["include_target"] = json!(false);
    };
    refused("anisotropic_label_smoothing", change, &["include_target", "class 4", "group 2"]);
    let (mut tensors, mut params) = good("anisotropic_label_smoothing");
    lonely(&mut tensors, &mut params);
    evaluate(find("anisotropic_label_smoothing").unwrap(), &tensors, &params, DType::F64).unwrap();
    refused("anisotropic_label_smoothing", with("class_groups", ints(&[0, 0, 1])), &["class_groups", "[5]", "got [3]"]);
}

#[test]
fn embeddings_of_different_width_need_an_adapter() {
    for method in ["nd", "norm_match", "kd_pp", "dkd_pp"] {
        refused(
            method,
            |t, p| {
                t.insert("student.embedding".into(), floats(&[B, D + 2]));
                p["adapter"] = json!("none");
            },
            &["teacher.embedding", "[4, 5]", "adapter"],
        );
    }
    for method in ["nd_cosine", "nd_infonce"] {
        refused(
            method,
            |t, p| {
                t.insert("student.embedding".into(), floats(&[B, D + 2]));
                p["adapter"] = json!("none");
            },
            &["class_means", "[5, 5]", "got [5, 3]"],
        );
    }
    for method in ["nd", "nd_cosine", "nd_infonce", "norm_match", "kd_pp", "dkd_pp"] {
        let adapter = |rows: usize, dropout: f64| {
            move |t: &mut BTreeMap<String, Tensor>, p: &mut Value| {
                for (name, shape) in [
                    ("student.logits", vec![rows, K]),
                    ("teacher.logits", vec![rows, K]),
                    ("student.embedding", vec![rows, 2]),
                    ("teacher.embedding", vec![rows, D]),
                    ("param.adapter.norm.weight", vec![2]),
                    ("param.adapter.norm.bias", vec![2]),
                    ("param.adapter.linear.weight", vec![D, 2]),
                    ("param.adapter.linear.bias", vec![D]),
                ] {
                    t.insert(name.to_string(), floats(&shape));
                }
                t.insert("labels".into(), ints(&vec![1; rows]));
                p["dropout"] = json!(dropout);
            }
        };
        refused(method, adapter(1, 0.0), &["adapter", "at least 2 samples", "got 1"]);
        refused(method, adapter(2, 0.5), &["dropout", "= 0.5", "0 here"]);
        let (mut tensors, mut params) = good(method);
        adapter(2, 0.0)(&mut tensors, &mut params);
        evaluate(find(method).unwrap(), &tensors, &params, DType::F64).unwrap();
        tensors.insert("param.adapter.linear.weight".into(), floats(&[2, D]));
        assert!(refusal(method, &tensors, &params).contains("param.adapter.linear.weight: expected shape [3, 2], got [2, 3]"));
    }
}

#[test]
fn class_means_without_a_direction_are_refused() {
    for method in ["nd", "nd_cosine", "nd_infonce", "kd_pp", "dkd_pp"] {
        let zero = Tensor::cat(&[floats(&[2, D]), Tensor::zeros((1, D), DType::F64, &Device::Cpu).unwrap(), floats(&[2, D])], 0).unwrap();
        refused(method, with("class_means", zero.clone()), &["class_means", "class 2", "zero"]);
        refused(method, with("class_means", (&zero / &zero).unwrap()), &["class_means", "not finite"]);
        let wide = with("class_means", floats(&[K, D + 1]));
        let without_adapter = |t: &mut BTreeMap<String, Tensor>, p: &mut Value| {
            wide(t, p);
            p["adapter"] = json!("none");
        };
        refused(method, without_adapter, &["class_means", "[5, 3]", "got [5, 4]"]);
        refused(method, |t, _| drop(t.remove("class_means")), &["class_means", "not given"]);
    }
    for method in ["kd_pp", "dkd_pp"] {
        refused(method, with("class_means", floats(&[K - 1, D])), &["class_means", "[5, 3]", "each class", "got [4, 3]"]);
    }
    refused("nd", with("class_means", floats(&[K - 1, D])), &["label 4", "0..=3"]);
}

#[test]
fn epochs_count_from_zero() {
    for method in ["kd_pp", "dkd_pp"] {
        refused(method, param("epoch", json!(-1)), &["epoch", "-1", "at least 0"]);
        refused(method, param("epoch", json!(1.5)), &["epoch", "1.5", "whole number"]);
        refused(method, |_, p| *p = json!({}), &["epoch", "not given"]);
        refused(method, param("warmup_epochs", json!(-1)), &["-1"]);
    }
}

#[test]
fn unknown_methods_name_the_nearest() {
    assert_eq!(find("uskd").unwrap().name, "uskd");
    let message = |name: &str| find(name).err().unwrap().to_string();
    assert!(message("label_smothing").contains("did you mean `label_smoothing`?"));
    assert!(message("NKD").contains("did you mean `nkd`?"), "{}", message("NKD"));
    assert!(!message("something else entirely").contains("did you mean"));
}
