//! Weights that others published, read from `$KD_SHARED/data/weights`; the figures were taken out of the files by hand, with Python's `struct`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use kd_models::{Config, network};
use kd_weights::{LoadOptions, classes, load_into};

use crate::write::values;

/// A file, its network, the outputs of that, tensors in the file, tensors loaded, how the keys were read.
type Case = (&'static str, &'static str, usize, usize, usize, &'static str);
/// The network's key, its first and last number, the sum of all.
type Figures = (&'static str, f64, f64, f64);

/// The folder with the weights; `None`, with a line that says so, when it is not there and nobody asked for it.
fn folder() -> Option<PathBuf> {
    let asked = std::env::var_os("KD_SHARED").map(PathBuf::from);
    let shared = asked.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let folder = shared.join("data/weights");
    assert!(folder.is_dir() || asked.is_none(), "KD_SHARED is set, but {} is missing", folder.display());
    if !folder.is_dir() {
        println!("skipped: {} is missing", folder.display());
        return None;
    }
    Some(folder)
}

#[test]
fn published_weights_fit_the_zoo() {
    let Some(folder) = folder() else { return };
    let cases: [(Case, &[Figures]); 7] = [
        (
            ("chenyaofo/cifar100_resnet20.pth", "resnet20", 100, 128, 128, "as they are"),
            &[
                ("conv1.weight", 0.09025099128484726, -0.02066941373050213, -0.4869781823363155),
                ("bn1.num_batches_tracked", 38808.0, 38808.0, 38808.0),
                ("layer1.0.bn1.running_var", 0.03687374293804169, 0.08126247674226761, 1.3893353715538979),
                ("layer3.0.downsample.0.weight", 0.014034715481102467, -0.052732761949300766, -2.1157155447799596),
                ("fc.weight", -0.07787644118070602, 0.6578154563903809, 0.00030059771961532533),
                ("fc.bias", -0.010593828745186329, 0.06903224438428879, 4.222107236273587e-05),
            ],
        ),
        (
            ("chenyaofo/cifar100_resnet56.pth", "resnet56", 100, 344, 344, "as they are"),
            &[
                ("conv1.weight", 0.0219969991594553, -0.025289997458457947, -1.3746162167517468),
                ("bn1.num_batches_tracked", 37828.0, 37828.0, 37828.0),
                ("layer3.0.downsample.0.weight", -0.01670733466744423, -0.0011994275264441967, 2.5584011054997973),
                ("fc.weight", -0.12736418843269348, 0.36244457960128784, -0.0009085738638532348),
            ],
        ),
        (
            ("chenyaofo/cifar10_resnet20.pth", "resnet20", 10, 128, 128, "as they are"),
            &[
                ("conv1.weight", 0.10722458362579346, 0.030285567045211792, -1.9453305034529649),
                ("layer1.0.bn1.running_var", 0.05391710251569748, 0.01660013385117054, 0.5153561076149344),
                ("fc.weight", -0.08991416543722153, 0.031009186059236526, -0.00043202517554163933),
            ],
        ),
        (
            ("chenyaofo/cifar10_resnet56.pth", "resnet56", 10, 344, 344, "as they are"),
            &[
                ("conv1.weight", -0.05675137788057327, 0.03226915001869202, -0.2634886672021821),
                ("fc.bias", -0.012112556025385857, -0.011554480530321598, -3.096926957368851e-05),
            ],
        ),
        (
            ("akamaster/resnet20-12fca82f.th", "resnet20_a", 10, 97, 97, "as they are"),
            &[
                ("conv1.weight", -0.13818146288394928, 0.3087101876735687, 1.3100982000032673),
                ("layer2.1.bn2.running_var", 0.8202887177467346, 0.39068177342414856, 14.657966658473015),
                ("linear.weight", -1.0598125457763672, 0.22667697072029114, -0.04562738863751292),
                ("linear.bias", 0.19355906546115875, -0.27025941014289856, 3.4442171454429626e-05),
                ("bn1.num_batches_tracked", 0.0, 0.0, 0.0),
            ],
        ),
        (
            ("akamaster/resnet32-d509ac18.th", "resnet32_a", 10, 157, 157, "as they are"),
            &[
                ("conv1.weight", 0.40355396270751953, 0.38600531220436096, 1.961148000027606),
                ("layer2.1.bn2.running_var", 0.05394189432263374, 0.13198770582675934, 2.55939750388643),
                ("linear.weight", 1.412300705909729, -0.33422181010246277, 0.0005941537674516439),
            ],
        ),
        (
            ("fnkd/0.8173-cifar_resnet56_v2-best-0106.params", "fnkd_resnet56_v2", 100, 283, 281, "FNKD's MXNet"),
            &[
                ("bn0.running_var", 1.2635011672973633, 1.1216487884521484, 3.641247272491455),
                ("conv0.weight", 0.008676305413246155, -0.614032506942749, -2.330682195373811),
                ("stage1.0.bn2.weight", 0.4613599479198456, 0.5312247276306152, 6.743357263505459),
                ("stage2.0.downsample.weight", 0.06852031499147415, -0.011207114905118942, -1.921991080220323),
                ("stage3.1.bn2.running_var", 1.516947627067566, 2.022916316986084, 128.10850846767426),
                ("stage3.2.conv1.weight", 0.04452713951468468, 0.014555243775248528, -110.00615255921502),
                ("bn1.weight", 2.323115348815918, 2.2164807319641113, 125.16707587242126),
                ("fc.weight", -0.7501958608627319, -0.02888656221330166, 0.2692497562384233),
            ],
        ),
    ];
    for ((name, model, outputs, tensors, loaded, mapping), figures) in cases {
        let file = kd_weights::read(&folder.join(name)).unwrap();
        assert_eq!(file.tensors.len(), tensors, "{name}");
        let entry = kd_models::find(model).unwrap();
        assert_eq!(classes(&file, &entry.build(&Config::new(77, entry.input)).unwrap()), Some(outputs), "{name}");
        let network = network(model, &Config::new(outputs, entry.input), DType::F32, &Device::Cpu).unwrap();
        let report = load_into(&network, &file, &LoadOptions::default()).unwrap();
        assert_eq!((report.loaded, report.mapping), (loaded, mapping), "{name}");
        assert_eq!(report.ignored.len(), tensors - loaded, "{name}");
        let state = network.parameters().state_dict().unwrap();
        for (key, first, last, sum) in figures {
            let (_, tensor) = state.iter().find(|(k, _)| k == key).unwrap();
            let numbers = values(tensor);
            assert_eq!((numbers[0], numbers[numbers.len() - 1]), (*first, *last), "{name} {key}");
            assert!((numbers.iter().sum::<f64>() - sum).abs() < 1e-9, "{name} {key}");
        }
    }
    println!("{} published weight files checked", 7);
}

#[test]
fn published_weights_do_not_fit_other_networks() {
    let Some(folder) = folder() else { return };
    let file = kd_weights::read(&folder.join("chenyaofo/cifar100_resnet20.pth")).unwrap();
    let network = network("resnet56", &Config::new(100, [3, 32, 32]), DType::F32, &Device::Cpu).unwrap();
    let error = load_into(&network, &file, &LoadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("cifar100_resnet20.pth: not the weights of resnet56"), "{error}");
    assert!(error.contains("missing: layer1.3.conv1.weight"), "{error}");
}
