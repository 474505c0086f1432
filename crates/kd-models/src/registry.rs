//! The list of networks.

use kd_core::Result;
use kd_nn::Graph;

use crate::regnet::Plan;
use crate::{Config, Family, ModelEntry, fnkd, mobilenet_v1, mobilenet_v2, regnet, resnet, resnet_cifar, shuffle_v1, shuffle_v2, vgg, wrn};

type Build = fn(&str, &Config) -> Result<Graph>;

const fn cifar(name: &'static str, about: &'static str, family: &'static Family, build: Build) -> ModelEntry {
    ModelEntry { name, about, aliases: &[], family, classes: 100, input: [3, 32, 32], build }
}

const fn cifar10(name: &'static str, about: &'static str, family: &'static Family, build: Build) -> ModelEntry {
    ModelEntry { classes: 10, ..cifar(name, about, family, build) }
}

const fn imagenet(name: &'static str, about: &'static str, family: &'static Family, build: Build) -> ModelEntry {
    ModelEntry { classes: 1000, input: [3, 224, 224], ..cifar(name, about, family, build) }
}

const fn also(entry: ModelEntry, aliases: &'static [&'static str]) -> ModelEntry {
    ModelEntry { aliases, ..entry }
}

const NARROW: [usize; 4] = [16, 16, 32, 64];
const FOURFOLD: [usize; 4] = [32, 64, 128, 256];
const X_1_6: Plan = Plan { units: [2, 4, 10, 2], widths: [72, 168, 408, 912], group: 24, gate: false };
const Y_1_6: Plan = Plan { units: [2, 6, 17, 2], widths: [48, 120, 336, 888], group: 24, gate: true };
const Y_16: Plan = Plan { units: [2, 4, 11, 1], widths: [224, 448, 1232, 3024], group: 112, gate: true };

static MODELS: &[ModelEntry] = &[
    cifar("resnet8", "ResNet-8 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 8, NARROW)),
    cifar("resnet14", "ResNet-14 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 14, NARROW)),
    also(
        cifar("resnet20", "ResNet-20 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 20, NARROW)),
        &["cifar10_resnet20", "cifar100_resnet20"],
    ),
    also(
        cifar("resnet32", "ResNet-32 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 32, NARROW)),
        &["cifar10_resnet32", "cifar100_resnet32"],
    ),
    also(
        cifar("resnet44", "ResNet-44 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 44, NARROW)),
        &["cifar10_resnet44", "cifar100_resnet44"],
    ),
    also(
        cifar("resnet56", "ResNet-56 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 56, NARROW)),
        &["cifar10_resnet56", "cifar100_resnet56"],
    ),
    cifar("resnet110", "ResNet-110 for CIFAR", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 110, NARROW)),
    cifar("resnet8x4", "ResNet-8 for CIFAR, four times as wide", &resnet_cifar::OPTION_B, |n, c| resnet_cifar::option_b(n, c, 8, FOURFOLD)),
    cifar("resnet32x4", "ResNet-32 for CIFAR, four times as wide", &resnet_cifar::OPTION_B, |n, c| {
        resnet_cifar::option_b(n, c, 32, FOURFOLD)
    }),
    cifar10("resnet20_a", "ResNet-20 for CIFAR, option A shortcuts", &resnet_cifar::OPTION_A, |n, c| resnet_cifar::option_a(n, c, 20)),
    cifar10("resnet32_a", "ResNet-32 for CIFAR, option A shortcuts", &resnet_cifar::OPTION_A, |n, c| resnet_cifar::option_a(n, c, 32)),
    cifar10("resnet44_a", "ResNet-44 for CIFAR, option A shortcuts", &resnet_cifar::OPTION_A, |n, c| resnet_cifar::option_a(n, c, 44)),
    cifar10("resnet56_a", "ResNet-56 for CIFAR, option A shortcuts", &resnet_cifar::OPTION_A, |n, c| resnet_cifar::option_a(n, c, 56)),
    cifar10("resnet110_a", "ResNet-110 for CIFAR, option A shortcuts", &resnet_cifar::OPTION_A, |n, c| resnet_cifar::option_a(n, c, 110)),
    cifar("wrn_16_1", "Wide ResNet 16-1", &wrn::FAMILY, |n, c| wrn::build(n, c, 16, 1)),
    cifar("wrn_16_2", "Wide ResNet 16-2", &wrn::FAMILY, |n, c| wrn::build(n, c, 16, 2)),
    cifar("wrn_40_1", "Wide ResNet 40-1", &wrn::FAMILY, |n, c| wrn::build(n, c, 40, 1)),
    cifar("wrn_40_2", "Wide ResNet 40-2", &wrn::FAMILY, |n, c| wrn::build(n, c, 40, 2)),
    cifar("vgg8", "VGG-8 with batch norm for CIFAR", &vgg::FAMILY, |n, c| vgg::build(n, c, [1, 1, 1, 1, 1])),
    cifar("vgg11", "VGG-11 with batch norm for CIFAR", &vgg::FAMILY, |n, c| vgg::build(n, c, [1, 1, 2, 2, 2])),
    cifar("vgg13", "VGG-13 with batch norm for CIFAR", &vgg::FAMILY, |n, c| vgg::build(n, c, [2, 2, 2, 2, 2])),
    cifar("vgg16", "VGG-16 with batch norm for CIFAR", &vgg::FAMILY, |n, c| vgg::build(n, c, [2, 2, 3, 3, 3])),
    cifar("vgg19", "VGG-19 with batch norm for CIFAR", &vgg::FAMILY, |n, c| vgg::build(n, c, [2, 2, 4, 4, 4])),
    cifar("ResNet18", "ResNet-18 with a CIFAR stem", &resnet::CIFAR, |n, c| resnet::cifar(n, c, 18)),
    cifar("ResNet34", "ResNet-34 with a CIFAR stem", &resnet::CIFAR, |n, c| resnet::cifar(n, c, 34)),
    cifar("ResNet50", "ResNet-50 with a CIFAR stem", &resnet::CIFAR, |n, c| resnet::cifar(n, c, 50)),
    cifar("MobileNetV2", "MobileNet v2 of half width for CIFAR", &mobilenet_v2::CIFAR, mobilenet_v2::cifar),
    cifar("ShuffleV1", "ShuffleNet v1 for CIFAR", &shuffle_v1::FAMILY, shuffle_v1::build),
    cifar("ShuffleV2", "ShuffleNet v2 for CIFAR", &shuffle_v2::CIFAR, shuffle_v2::cifar),
    cifar("fnkd_resnet20_v2", "Pre-activation ResNet-20 of FNKD", &fnkd::FAMILY, |n, c| fnkd::build(n, c, 20, true)),
    cifar("fnkd_resnet56_v2", "Pre-activation ResNet-56 of FNKD", &fnkd::FAMILY, |n, c| fnkd::build(n, c, 56, true)),
    cifar("fnkd_resnet110_v2", "Pre-activation ResNet-110 of FNKD", &fnkd::FAMILY, |n, c| fnkd::build(n, c, 110, true)),
    cifar("fnkd_resnet20_v2_noact", "Pre-activation ResNet-20 of FNKD without its last ReLU", &fnkd::FAMILY, |n, c| {
        fnkd::build(n, c, 20, false)
    }),
    cifar("fnkd_resnet56_v2_noact", "Pre-activation ResNet-56 of FNKD without its last ReLU", &fnkd::FAMILY, |n, c| {
        fnkd::build(n, c, 56, false)
    }),
    cifar("fnkd_resnet110_v2_noact", "Pre-activation ResNet-110 of FNKD without its last ReLU", &fnkd::FAMILY, |n, c| {
        fnkd::build(n, c, 110, false)
    }),
    imagenet("imagenet_resnet18", "ResNet-18", &resnet::IMAGENET, |n, c| resnet::imagenet(n, c, 18)),
    imagenet("imagenet_resnet34", "ResNet-34", &resnet::IMAGENET, |n, c| resnet::imagenet(n, c, 34)),
    imagenet("imagenet_resnet50", "ResNet-50", &resnet::IMAGENET, |n, c| resnet::imagenet(n, c, 50)),
    imagenet("imagenet_resnet101", "ResNet-101", &resnet::IMAGENET, |n, c| resnet::imagenet(n, c, 101)),
    imagenet("imagenet_resnet152", "ResNet-152", &resnet::IMAGENET, |n, c| resnet::imagenet(n, c, 152)),
    imagenet("imagenet_mobilenet_v1", "MobileNet v1", &mobilenet_v1::FAMILY, mobilenet_v1::build),
    imagenet("imagenet_mobilenet_v2", "MobileNet v2", &mobilenet_v2::IMAGENET, mobilenet_v2::imagenet),
    imagenet("imagenet_shufflenet_v2_x1_0", "ShuffleNet v2", &shuffle_v2::IMAGENET, shuffle_v2::imagenet),
    imagenet("imagenet_regnet_x_1_6gf", "RegNetX, 1.6 billion multiply-adds", &regnet::FAMILY, |n, c| regnet::build(n, c, &X_1_6)),
    imagenet("imagenet_regnet_y_1_6gf", "RegNetY, 1.6 billion multiply-adds", &regnet::FAMILY, |n, c| regnet::build(n, c, &Y_1_6)),
    imagenet("imagenet_regnet_y_16gf", "RegNetY, 16 billion multiply-adds", &regnet::FAMILY, |n, c| regnet::build(n, c, &Y_16)),
];

/// Every network of the zoo, families together.
pub fn registry() -> &'static [ModelEntry] {
    MODELS
}
