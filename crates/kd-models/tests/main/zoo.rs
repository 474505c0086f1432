//! The registry against the specification's table, and what holds for every network.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Mode, Model, Rng};
use kd_models::{Config, build, find, network, recipe, registry};
use kd_nn::{Graph, Init, Op};

/// Parameters, state-dict entries, multiply-accumulates (millions), stages, which of them have a pre-activation, width of the embedding.
type Row<'a> = (&'a str, usize, usize, &'a str, &'a str, &'a str, usize);

const NARROW: &str = "16x32x32 16x32x32 32x16x16 64x8x8";
const WIDE: &str = "16x32x32 32x32x32 64x16x16 128x8x8";
const FOURFOLD: &str = "32x32x32 64x32x32 128x16x16 256x8x8";
const VGG: &str = "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4";
const BASIC: &str = "64x32x32 64x32x32 128x16x16 256x8x8 512x4x4";
const IMAGENET_BASIC: &str = "64x112x112 64x56x56 128x28x28 256x14x14 512x7x7";
const IMAGENET_BOTTLENECK: &str = "64x112x112 256x56x56 512x28x28 1024x14x14 2048x7x7";

const TABLE: &[Row<'static>] = &[
    ("resnet8", 83_892, 56, "12.51", NARROW, "-yyy", 64),
    ("resnet14", 181_108, 92, "26.66", NARROW, "-yyy", 64),
    ("resnet20", 278_324, 128, "40.82", NARROW, "-yyy", 64),
    ("resnet32", 472_756, 200, "69.13", NARROW, "-yyy", 64),
    ("resnet44", 667_188, 272, "97.44", NARROW, "-yyy", 64),
    ("resnet56", 861_620, 344, "125.75", NARROW, "-yyy", 64),
    ("resnet110", 1_736_564, 668, "253.16", NARROW, "-yyy", 64),
    ("resnet20_a", 269_722, 116, "40.55", NARROW, "-yyy", 64),
    ("resnet32_a", 464_154, 188, "68.86", NARROW, "-yyy", 64),
    ("resnet44_a", 658_586, 260, "97.17", NARROW, "-yyy", 64),
    ("resnet56_a", 853_018, 332, "125.49", NARROW, "-yyy", 64),
    ("resnet110_a", 1_727_962, 656, "252.89", NARROW, "-yyy", 64),
    ("resnet8x4", 1_233_540, 62, "177.07", FOURFOLD, "-yyy", 256),
    ("resnet32x4", 7_433_860, 206, "1083.04", FOURFOLD, "-yyy", 256),
    ("wrn_16_1", 180_916, 82, "26.66", NARROW, "-yyy", 64),
    ("wrn_16_2", 703_284, 83, "101.12", WIDE, "-yyy", 128),
    ("wrn_40_1", 569_780, 226, "83.29", NARROW, "-yyy", 64),
    ("wrn_40_2", 2_255_156, 227, "327.61", WIDE, "-yyy", 128),
    ("vgg8", 3_965_028, 37, "96.19", VGG, "-yyyy", 512),
    ("vgg11", 9_277_284, 58, "209.44", VGG, "-yyyy", 512),
    ("vgg13", 9_462_180, 72, "284.94", VGG, "-yyyy", 512),
    ("vgg16", 14_774_436, 93, "398.18", VGG, "-yyyy", 512),
    ("vgg19", 20_086_692, 114, "511.43", VGG, "-yyyy", 512),
    ("ResNet18", 11_220_132, 122, "555.47", BASIC, "-yyyy", 512),
    ("ResNet34", 21_328_292, 218, "1159.45", BASIC, "-yyyy", 512),
    ("ResNet50", 23_705_252, 320, "1298.01", "64x32x32 256x32x32 512x16x16 1024x8x8 2048x4x4", "-yyyy", 2048),
    ("MobileNetV2", 812_836, 320, "6.52", "16x16x16 12x16x16 16x8x8 48x4x4 160x2x2", "-----", 1280),
    ("ShuffleV1", 949_258, 296, "38.69", "24x32x32 240x16x16 480x8x8 960x4x4", "-yyy", 960),
    ("ShuffleV2", 1_355_528, 338, "44.50", "24x32x32 116x16x16 232x8x8 464x4x4", "-yyy", 1024),
    ("fnkd_resnet20_v2", 278_132, 121, "40.82", NARROW, "-yyy", 64),
    ("fnkd_resnet56_v2", 861_428, 337, "125.75", NARROW, "-yyy", 64),
    ("fnkd_resnet110_v2", 1_736_372, 661, "253.16", NARROW, "-yyy", 64),
    ("fnkd_resnet20_v2_noact", 278_132, 121, "40.82", NARROW, "-yyy", 64),
    ("fnkd_resnet56_v2_noact", 861_428, 337, "125.75", NARROW, "-yyy", 64),
    ("fnkd_resnet110_v2_noact", 1_736_372, 661, "253.16", NARROW, "-yyy", 64),
    ("imagenet_resnet18", 11_689_512, 122, "1814.07", IMAGENET_BASIC, "yyyyy", 512),
    ("imagenet_resnet34", 21_797_672, 218, "3663.76", IMAGENET_BASIC, "yyyyy", 512),
    ("imagenet_resnet50", 25_557_032, 320, "4089.18", IMAGENET_BOTTLENECK, "yyyyy", 2048),
    ("imagenet_resnet101", 44_549_160, 626, "7801.41", IMAGENET_BOTTLENECK, "yyyyy", 2048),
    ("imagenet_resnet152", 60_192_808, 932, "11513.63", IMAGENET_BOTTLENECK, "yyyyy", 2048),
    ("imagenet_mobilenet_v1", 4_231_976, 164, "568.74", "128x56x56 256x28x28 512x14x14 1024x7x7", "yyyy", 1024),
    ("imagenet_mobilenet_v2", 3_504_872, 314, "300.77", "16x112x112 24x56x56 32x28x28 96x14x14 320x7x7", "-----", 1280),
    ("imagenet_shufflenet_v2_x1_0", 2_278_604, 338, "144.91", "24x112x112 116x28x28 232x14x14 464x7x7", "----", 1024),
    ("imagenet_regnet_x_1_6gf", 9_190_136, 356, "1602.85", "32x112x112 72x56x56 168x28x28 408x14x14 912x7x7", "-yyyy", 912),
    ("imagenet_regnet_y_1_6gf", 11_202_430, 626, "1612.08", "32x112x112 48x56x56 120x28x28 336x14x14 888x7x7", "-yyyy", 888),
    ("imagenet_regnet_y_16gf", 83_590_140, 428, "15911.51", "32x112x112 224x56x56 448x28x28 1232x14x14 3024x7x7", "-yyyy", 3024),
];

fn graphs() -> impl Iterator<Item = Graph> {
    registry().iter().map(|e| e.build(&e.config()).unwrap())
}

/// The table counts option A networks with 10 classes and the ImageNet ones with 1000, which are the registry's defaults.
#[test]
fn counts_equal_the_table() {
    for g in graphs() {
        let spec = g.spec();
        let row = TABLE.iter().find(|row| row.0 == spec.name).unwrap_or_else(|| panic!("{} is not in the table", spec.name));
        let keys = g.params().clone().build(DType::F32, &Device::Cpu).unwrap().keys().len();
        let stages = spec.stages.iter().map(|s| format!("{}x{}x{}", s.channels, s.size[0], s.size[1])).collect::<Vec<_>>().join(" ");
        let preacts: String = spec.stages.iter().map(|s| if s.has_preact { 'y' } else { '-' }).collect();
        let macs = format!("{:.2}", g.macs(&spec.input).unwrap() as f64 / 1e6);
        let found: Row<'_> = (row.0, g.param_count(), keys, &macs, &stages, &preacts, spec.embedding);
        assert_eq!(found, *row);
    }
    assert_eq!(registry().len(), TABLE.len());
    println!("{} networks equal the table", TABLE.len());
}

#[test]
fn names_and_keys_are_unique() {
    let mut names = BTreeSet::new();
    for e in registry() {
        assert!(std::iter::once(&e.name).chain(e.aliases).all(|n| names.insert(*n)), "{} is registered twice", e.name);
    }
    for g in graphs() {
        let params = g.params().clone().build(DType::F32, &Device::Cpu).unwrap();
        let keys = params.keys();
        let unique: BTreeSet<_> = keys.iter().map(|k| &k.0).collect();
        assert_eq!(unique.len(), keys.len(), "{}", g.spec().name);
    }
}

/// The cuts are there, the blocks lie where each of them can be run alone, and every OFD margin is a batch norm of the network.
#[test]
fn cuts_are_whole() {
    for g in graphs() {
        let spec = g.spec();
        let name = &spec.name;
        assert!(spec.stages.len() >= 3 && spec.blocks.len() >= 3, "{name}");
        let mut from = g.cut(Cut::Input).unwrap();
        let last = (1..=spec.blocks.len()).map(Cut::Block).chain([Cut::Embedding, Cut::Logits]);
        for cut in last {
            let to = g.cut(cut).unwrap();
            g.piece(from, &[to]).unwrap_or_else(|e| panic!("{name} at {cut}: {e}"));
            from = to;
        }
        for stage in spec.stages.iter().filter_map(|s| s.norm_before_relu.as_ref()) {
            let norm = g.nodes().iter().find(|n| n.name == *stage).unwrap_or_else(|| panic!("{name}: no {stage}"));
            assert!(matches!(norm.op, Op::BatchNorm(_)), "{name}: {stage}");
        }
        assert_eq!(g.spec().stages.iter().filter(|s| s.has_preact && s.channels == 0).count(), 0);
    }
}

#[test]
fn margins_stand_where_the_papers_code_reads_them() {
    let margins = |name: &str| -> Vec<Option<String>> {
        let e = find(name).unwrap();
        e.build(&e.config()).unwrap().spec().stages.iter().map(|s| s.norm_before_relu.clone()).collect()
    };
    let some = |names: &[&str]| -> Vec<Option<String>> { names.iter().map(|n| (!n.is_empty()).then(|| (*n).to_string())).collect() };
    assert_eq!(margins("resnet56"), some(&["", "layer1.8.bn2", "layer2.8.bn2", "layer3.8.bn2"]));
    assert_eq!(margins("ResNet50"), some(&["", "layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]));
    assert_eq!(margins("imagenet_resnet18"), some(&["", "", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]));
    assert_eq!(margins("wrn_40_2"), some(&["", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]));
    assert_eq!(margins("vgg13"), some(&["", "block1.4", "block2.4", "block3.4", "block4.4"]));
    assert_eq!(margins("MobileNetV2"), some(&["", "blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"]));
    assert_eq!(margins("imagenet_mobilenet_v1"), some(&["model.3.4", "model.5.4", "model.11.4", "model.13.4"]));
    assert_eq!(margins("ShuffleV1"), some(&["", "", "", ""]));
}

/// The initial scheme of the first convolution and of the classifier's weight and bias, as the papers' code has them.
#[test]
fn initialisation_is_the_papers() {
    let drawn = |name: &str| {
        let g = build(name, &find(name).unwrap().config()).unwrap();
        let conv = g.nodes().iter().find_map(|n| if let Op::Conv2d(c) = &n.op { Some(*g.init(c.weight)) } else { None });
        let Op::Linear { weight, bias, .. } = &g.nodes()[g.cut(Cut::Logits).unwrap()].op else { panic!("{name}") };
        (conv.unwrap(), *g.init(*weight), *g.init(bias.unwrap()))
    };
    let (zero, small, he) = (Init::Const(0.0), Init::Normal(0.01), Init::HeFanOut);
    assert_eq!(drawn("resnet20"), (he, Init::Default, Init::Uniform(0.125)));
    assert_eq!(drawn("resnet20_a"), (Init::HeFanIn, Init::HeFanIn, Init::Uniform(0.125)));
    assert_eq!(drawn("ResNet18"), (he, Init::Default, Init::default_bias(512)));
    assert_eq!(drawn("wrn_16_2"), (he, Init::Default, zero));
    assert_eq!(drawn("vgg8"), (he, small, zero));
    assert_eq!(drawn("MobileNetV2"), (he, small, zero));
    assert_eq!(drawn("ShuffleV1"), (Init::Default, Init::Default, Init::default_bias(960)));
    assert_eq!(drawn("ShuffleV2"), (Init::Default, Init::Default, Init::default_bias(1024)));
    assert_eq!(drawn("fnkd_resnet20_v2"), (Init::Uniform(0.07), Init::Uniform(0.07), zero));
    assert_eq!(drawn("imagenet_resnet18"), (he, Init::Default, Init::default_bias(512)));
    assert_eq!(drawn("imagenet_mobilenet_v1"), (Init::Default, Init::Default, Init::default_bias(1024)));
    assert_eq!(drawn("imagenet_mobilenet_v2"), (he, small, zero));
    assert_eq!(drawn("imagenet_shufflenet_v2_x1_0"), (Init::Default, Init::Default, Init::default_bias(1024)));
    assert_eq!(drawn("imagenet_regnet_y_1_6gf"), (he, small, zero));
}

fn images(shape: [usize; 4]) -> Tensor {
    Tensor::from_vec(recipe::images("images/zoo", &shape), &shape, &Device::Cpu).unwrap()
}

/// A freshly drawn network of any family tells images apart and neither dies out nor explodes.
#[test]
fn fresh_networks_are_alive() {
    let smallest = |e: &&kd_models::ModelEntry| {
        let first = registry().iter().find(|o| std::ptr::eq(o.family, e.family)).unwrap();
        first.name == e.name
    };
    for e in registry().iter().filter(smallest) {
        let size = if e.input[1] == 224 { 64 } else { 32 };
        let net = network(e.name, &Config::new(10, [3, size, size]), DType::F32, &Device::Cpu).unwrap();
        net.init(Rng::new(3)).unwrap();
        let out = net.run(&images([4, 3, size, size]), Cut::Input, &[Cut::Logits], Mode::BatchStats).unwrap();
        let logits = out.logits().unwrap().to_vec2::<f32>().unwrap();
        let spread = |row: &Vec<f32>| (row.iter().map(|x| x * x).sum::<f32>() / 10.0).sqrt();
        for row in &logits {
            assert!(row.iter().all(|v| v.is_finite()) && (1e-3..20.0).contains(&spread(row)), "{}: {row:?}", e.name);
        }
        assert_ne!(logits[0], logits[1], "{}", e.name);
        net.init(Rng::new(3)).unwrap();
        let again = net.run(&images([4, 3, size, size]), Cut::Input, &[Cut::Logits], Mode::BatchStats).unwrap();
        assert_eq!(again.logits().unwrap().to_vec2::<f32>().unwrap(), logits, "{}: the same seed", e.name);
    }
}

#[test]
fn block_by_block_equals_the_whole_run() {
    let net = network("resnet20", &Config::new(100, [3, 32, 32]), DType::F32, &Device::Cpu).unwrap();
    recipe::load(net.parameters()).unwrap();
    let x = images([2, 3, 32, 32]);
    let cuts = [Cut::Block(1), Cut::Block(2), Cut::Block(3), Cut::Embedding, Cut::Logits];
    let whole = net.run(&x, Cut::Input, &cuts, Mode::Eval).unwrap();
    let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let (mut from, mut here) = (Cut::Input, x);
    for cut in cuts {
        here = net.run(&here, from, &[cut], Mode::Eval).unwrap().get(cut).unwrap().clone();
        assert_eq!(bits(&here), bits(whole.get(cut).unwrap()), "{from} to {cut}");
        from = cut;
    }
}

/// Channels, sizes and class counts other than the data sets'.
#[test]
fn other_inputs_run() {
    for (name, input) in [
        ("resnet8", [1, 8, 8]),
        ("resnet20_a", [3, 40, 40]),
        ("wrn_16_2", [4, 24, 40]),
        ("vgg8", [1, 64, 64]),
        ("vgg8", [3, 8, 8]),
        ("ResNet18", [3, 20, 33]),
        ("MobileNetV2", [3, 64, 48]),
        ("ShuffleV1", [1, 28, 28]),
        ("ShuffleV2", [3, 45, 64]),
        ("fnkd_resnet20_v2", [1, 28, 28]),
        ("imagenet_resnet18", [1, 33, 47]),
        ("imagenet_mobilenet_v2", [3, 96, 32]),
        ("imagenet_regnet_y_1_6gf", [3, 32, 32]),
    ] {
        let net = network(name, &Config::new(7, input), DType::F32, &Device::Cpu).unwrap();
        let x = images([2, input[0], input[1], input[2]]);
        let out = net.run(&x, Cut::Input, &[Cut::Embedding, Cut::Logits], Mode::Eval).unwrap();
        assert_eq!(out.logits().unwrap().dims(), [2, 7], "{name} {input:?}");
    }
}

#[test]
fn bad_requests_are_explained() {
    let message = |name: &str, config: Config| build(name, &config).unwrap_err().to_string();
    let plain = Config::new(10, [3, 32, 32]);
    assert!(message("resnet65", plain.clone()).contains("did you mean `resnet"), "{}", message("resnet65", plain.clone()));
    assert!(message("mobilenetv2", plain.clone()).contains("`MobileNetV2`"));
    assert!(message("qqq", plain).contains("list models"));
    assert!(message("resnet20", Config::new(0, [3, 32, 32])).contains("classes = 0"));
    assert!(message("resnet20", Config::new(10, [0, 32, 32])).contains("channels, height and width"));
    assert!(message("vgg8", Config::new(10, [3, 4, 4])).contains("vgg8"));
    let mut config = Config::new(10, [3, 32, 32]);
    config.dropout = Some(1.0);
    assert!(message("wrn_16_2", config).contains("dropout = 1"));
    assert_eq!(find("cifar100_resnet56").unwrap().name, "resnet56");
}
