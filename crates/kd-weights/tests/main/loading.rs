//! What `load_into` promises: everything or nothing, by whatever names.

use candle_core::{DType, Device, Tensor};
use kd_core::Rng;
use kd_models::{Config, network};
use kd_nn::Network;
use kd_weights::{Error, LoadOptions, Mismatch, WeightFile, classes, load_into};

use crate::write::{tensor, values};

fn net(name: &str, classes: usize, seed: u64) -> Network {
    let network = network(name, &Config::new(classes, [3, 32, 32]), DType::F32, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    network
}

fn file(tensors: Vec<(String, Tensor)>) -> WeightFile {
    WeightFile { path: "some/weights.pth".into(), tensors, metadata: Default::default() }
}

fn state(network: &Network) -> Vec<(String, Tensor)> {
    network.parameters().state_dict().unwrap()
}

fn numbers(network: &Network) -> Vec<(String, Vec<f64>)> {
    state(network).into_iter().map(|(name, t)| (name, values(&t))).collect()
}

fn mismatch(error: Error) -> Mismatch {
    match error {
        Error::Mismatch(report) => *report,
        other => panic!("{other}"),
    }
}

#[test]
fn a_state_dict_fits_its_network_in_any_type() {
    let (from, into) = (net("resnet8", 10, 1), net("resnet8", 10, 2));
    from.parameters().set_counters(&vec![7; from.parameters().counters().len()]).unwrap();
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64, DType::I32] {
        let cast = |t: &Tensor| if t.dtype().is_float() { ((t * 16.0).unwrap()).to_dtype(dtype).unwrap() } else { t.clone() };
        let weights: Vec<_> = state(&from).iter().map(|(name, t)| (name.clone(), cast(t))).collect();
        let report = load_into(&into, &file(weights.clone()), &LoadOptions::default()).unwrap();
        assert_eq!((report.loaded, report.mapping), (56, "as they are"));
        let expected: Vec<_> = weights.iter().map(|(name, t)| (name.clone(), values(t))).collect();
        assert_eq!(numbers(&into), expected, "{dtype:?}");
    }
}

#[test]
fn every_fault_is_in_one_error_and_nothing_is_loaded() {
    let (from, into) = (net("resnet8", 10, 1), net("resnet8", 10, 2));
    let before = numbers(&into);
    let mut weights = state(&from);
    weights.retain(|(name, _)| name != "fc.bias" && name != "layer2.0.bn1.running_mean");
    weights.push(("extra.weight".to_string(), tensor(&[1.0], &[1])));
    weights[0].1 = weights[0].1.narrow(0, 0, 8).unwrap();
    let error = load_into(&into, &file(weights), &LoadOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("some/weights.pth: not the weights of resnet8"), "{text}");
    let found = mismatch(error);
    assert_eq!(found.missing, ["layer2.0.bn1.running_mean", "fc.bias"]);
    assert_eq!(found.unexpected, ["extra.weight"]);
    assert_eq!(found.misshaped, [("conv1.weight".to_string(), vec![8, 3, 3, 3], vec![16, 3, 3, 3])]);
    for part in
        ["missing: layer2.0.bn1.running_mean, fc.bias", "unexpected: extra.weight", "conv1.weight [8, 3, 3, 3] instead of [16, 3, 3, 3]"]
    {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(numbers(&into), before);
}

#[test]
fn another_network_s_weights_are_told_briefly() {
    let error = load_into(&net("vgg8", 10, 1), &file(state(&net("resnet20", 10, 1))), &LoadOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("and 22 more") && text.contains("and 118 more") && text.len() < 1500, "{text}");
    let found = mismatch(error);
    assert_eq!((found.network.as_str(), found.missing.len(), found.unexpected.len()), ("vgg8", 32, 128));
}

#[test]
fn numbers_must_be_finite_in_the_network_s_type() {
    let into = net("resnet8", 10, 2);
    let before = numbers(&into);
    for (value, shown) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (1e300, "inf")] {
        let mut weights = state(&net("resnet8", 10, 1));
        let (name, bias) = weights.last_mut().unwrap();
        let mut numbers10 = values(bias);
        numbers10[3] = value;
        *bias = Tensor::from_vec(numbers10, 10, &Device::Cpu).unwrap();
        assert_eq!(name, "fc.bias");
        let text = load_into(&into, &file(weights.clone()), &LoadOptions::default()).unwrap_err().to_string();
        assert_eq!(text, format!("some/weights.pth: `fc.bias` holds {shown} at flat index 3; weights must be finite"));
        assert_eq!(numbers(&into), before);
        let options = LoadOptions { allow_non_finite: true, ..LoadOptions::default() };
        assert_eq!(load_into(&net("resnet8", 10, 3), &file(weights), &options).unwrap().loaded, 56);
    }
}

#[test]
fn absent_counters_are_zero_and_lists_of_one_count() {
    let (from, into) = (net("resnet8", 10, 1), net("resnet8", 10, 2));
    into.parameters().set_counters(&[7; 9]).unwrap();
    let mut weights = state(&from);
    weights.retain(|(name, _)| !name.ends_with("num_batches_tracked"));
    weights.push(("bn1.num_batches_tracked".to_string(), Tensor::new(&[5i64], &Device::Cpu).unwrap()));
    assert_eq!(load_into(&into, &file(weights), &LoadOptions::default()).unwrap().loaded, 48);
    assert_eq!(into.parameters().counters(), [5, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_part_can_be_loaded_when_asked() {
    let (from, into) = (net("resnet8", 10, 1), net("resnet8", 10, 2));
    let before = numbers(&into);
    let mut weights: Vec<_> = state(&from).into_iter().filter(|(name, _)| name.starts_with("layer1.")).collect();
    weights.push(("extra".to_string(), tensor(&[1.0], &[1])));
    let options = LoadOptions { partial: true, ..LoadOptions::default() };
    let report = load_into(&into, &file(weights), &options).unwrap();
    assert_eq!((report.loaded, report.unexpected), (12, vec!["extra".to_string()]));
    assert!(report.missing.contains(&"fc.weight".to_string()));
    for ((name, new), ((_, old), (_, theirs))) in numbers(&into).into_iter().zip(before.into_iter().zip(numbers(&from))) {
        assert_eq!(new, if name.starts_with("layer1.") { theirs } else { old }, "{name}");
    }
    let nothing = file(vec![("extra".to_string(), tensor(&[1.0], &[1]))]);
    assert_eq!(mismatch(load_into(&into, &nothing, &options).unwrap_err()).unexpected, ["extra"]);
}

#[test]
fn a_new_head_keeps_its_own_numbers() {
    let (from, into) = (net("resnet8", 100, 1), net("resnet8", 10, 2));
    let before = numbers(&into);
    let strict = mismatch(load_into(&into, &file(state(&from)), &LoadOptions::default()).unwrap_err());
    assert_eq!(strict.misshaped.len(), 2);
    let report = load_into(&into, &file(state(&from)), &LoadOptions { new_head: true, ..LoadOptions::default() }).unwrap();
    assert_eq!((report.loaded, report.ignored), (54, vec!["fc.weight".to_string(), "fc.bias".to_string()]));
    for ((name, new), ((_, old), (_, theirs))) in numbers(&into).into_iter().zip(before.into_iter().zip(numbers(&from))) {
        assert_eq!(new, if name.starts_with("fc.") { old } else { theirs }, "{name}");
    }
}

/// Each dialect on a network that it serves: our names turned into theirs.
#[test]
fn other_projects_names_are_understood() {
    let swapped = |name: &str, parts: &[(&str, &str)]| parts.iter().fold(name.to_string(), |n, (from, to)| n.replacen(from, to, 1));
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&str) -> String);
    let cases: [Case; 8] = [
        ("resnet8", "a distiller's student", &|n| format!("student.{n}")),
        ("ShuffleV1", "fc for linear", &|n| swapped(n, &[("linear.", "fc.")])),
        ("resnet20", "linear for fc", &|n| swapped(n, &[("fc.", "linear.")])),
        ("ResNet18", "torchvision's", &|n| swapped(n, &[("linear.", "fc."), (".shortcut.", ".downsample.")])),
        ("wrn_16_1", "KD++'s WRN", &|n| if n.starts_with("bn1.") { swapped(n, &[("bn1.", "bn.")]) } else { n.to_string() }),
        ("imagenet_resnet18", "MMClassification's", &|n| {
            if n.starts_with("fc.") { format!("head.{n}") } else { format!("backbone.{n}") }
        }),
        ("ResNet34", "MMClassification's for CIFAR", &|n| match n.strip_prefix("linear.") {
            Some(rest) => format!("head.fc.{rest}"),
            None => format!("backbone.{}", n.replace(".shortcut.", ".downsample.")),
        }),
        ("fnkd_resnet20_v2", "FNKD's MXNet", &gluon),
    ];
    for (model, mapping, theirs) in cases {
        let (from, into) = (net(model, 10, 1), net(model, 10, 2));
        let weights: Vec<_> = state(&from).into_iter().map(|(name, t)| (theirs(&name), t)).collect();
        let mut weights: Vec<_> = weights.into_iter().filter(|(name, _)| !name.ends_with("num_batches_tracked")).collect();
        if model == "resnet8" {
            weights.push(("teacher.conv1.weight".to_string(), tensor(&[1.0], &[1])));
        }
        let found = file(weights);
        let report = load_into(&into, &found, &LoadOptions::default()).unwrap();
        assert_eq!(report.mapping, mapping);
        assert_eq!(report.ignored.len(), usize::from(model == "resnet8"));
        assert_eq!(numbers(&into), numbers(&from), "{model}");
        assert_eq!(classes(&found, net(model, 100, 3).graph()), Some(10), "{model}");
    }
}

/// Gluon's numbering, from the network's side.
fn gluon(name: &str) -> String {
    let (module, field) = name.rsplit_once('.').unwrap();
    let kind = if field.starts_with("running") { "aux" } else { "arg" };
    let norm = module.rsplit('.').next().unwrap().starts_with("bn");
    let field = match field {
        "weight" if norm => "gamma",
        "bias" if norm => "beta",
        other => other,
    };
    let layer = match *module.split('.').collect::<Vec<_>>() {
        ["fc"] => "dense0".to_string(),
        ["conv0"] => "conv0".to_string(),
        [top] => top.replace("bn", "batchnorm"),
        [stage, _, "downsample"] => format!("{stage}_conv2"),
        [stage, unit, layer] => {
            let unit: usize = unit.parse().unwrap();
            let second = usize::from(layer.ends_with('2'));
            let behind_shortcut = usize::from(!norm && stage != "stage1" && unit > 0);
            format!("{stage}_{}{}", if norm { "batchnorm" } else { "conv" }, 2 * unit + second + behind_shortcut)
        }
        _ => panic!("{name}"),
    };
    format!("{kind}:cifarresnetv20_{layer}_{field}")
}

#[test]
fn classes_are_the_classifier_s_rows() {
    let graph = |name: &str| net(name, 10, 1).graph().clone();
    assert_eq!(classes(&file(state(&net("resnet8", 37, 1))), &graph("resnet8")), Some(37));
    assert_eq!(classes(&file(state(&net("vgg8", 5, 1))), &graph("vgg8")), Some(5));
    assert_eq!(classes(&file(vec![("a".to_string(), tensor(&[1.0], &[1]))]), &graph("resnet8")), None);
    assert_eq!(classes(&file(vec![("fc.weight".to_string(), tensor(&[1.0], &[1]))]), &graph("resnet8")), None);
}
