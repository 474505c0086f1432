//! Names of other projects for the networks of the zoo.

/// A way of naming a network's tensors.
pub struct Dialect {
    /// Its name in reports.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Brings a name of the dialect, and a name of the zoo, to the same form. `None` for tensors that the zoo's networks do not have
    /// and do not need.
    pub(crate) form: fn(&str) -> Option<String>,
}

/// Every dialect, in the order of preference: a file is read in the first that explains most names.
pub fn dialects() -> &'static [Dialect] {
    &[
        Dialect { name: "zoo", about: "the networks' own names", form: |key| Some(key.to_string()) },
        Dialect {
            name: "synonyms",
            about: "the head as fc, linear, classifier or head.fc, shortcuts as downsample or shortcut, a last norm as bn, below backbone or not",
            form: |key| Some(synonyms(key)),
        },
        Dialect { name: "fnkd-mxnet", about: "FNKD's MXNet networks", form: fnkd },
    ]
}

fn synonyms(key: &str) -> String {
    let key = key.strip_prefix("backbone.").unwrap_or(key);
    let heads = ["head.fc.", "fc.", "linear.", "classifier.", "head."];
    let key = match heads.iter().find_map(|head| key.strip_prefix(head)) {
        Some(rest) => format!("head.{rest}"),
        None => key.strip_prefix("bn.").map_or_else(|| key.to_string(), |rest| format!("bn1.{rest}")),
    };
    key.replace(".shortcut.", ".downsample.")
}

/// `arg:PREFIX_stage2_conv3_weight` and the like to `stage2.1.conv1.weight`; names of the zoo stay.
///
/// The scale and shift of the first batch norm are fixed at 1 and 0 there and do not exist here.
fn fnkd(key: &str) -> Option<String> {
    let Some((_, rest)) = key.split_once(':') else { return Some(key.to_string()) };
    let numbered = |part: &str, kind: &str| part.strip_prefix(kind).and_then(|n| n.parse::<usize>().ok());
    let mut parts: Vec<&str> = rest.split('_').collect();
    let start = parts.iter().position(|p| ["stage", "batchnorm", "conv", "dense"].iter().any(|kind| numbered(p, kind).is_some()))?;
    parts.drain(..start);
    let stage = numbered(parts[0], "stage");
    if stage.is_some() {
        parts.remove(0);
    }
    let (layer, what) = parts.split_first()?;
    let what = match what.join("_").as_str() {
        "gamma" => "weight".to_string(),
        "beta" => "bias".to_string(),
        other => other.to_string(),
    };
    let module = match stage {
        None => match *layer {
            "batchnorm0" if what == "weight" || what == "bias" => return None,
            "batchnorm0" => "bn0".to_string(),
            "batchnorm1" => "bn1".to_string(),
            "conv0" => "conv0".to_string(),
            "dense0" => "fc".to_string(),
            _ => return Some(key.to_string()),
        },
        Some(i) => {
            let (unit, kind, n) = if let Some(n) = numbered(layer, "batchnorm") {
                (n / 2, "bn", n % 2)
            } else {
                // In stages 2 and 3 the third convolution is the shortcut of the first unit.
                match (i, numbered(layer, "conv")?) {
                    (2.., 2) => return Some(format!("stage{i}.0.downsample.{what}")),
                    (2.., n @ 3..) => ((n - 1) / 2, "conv", (n - 1) % 2),
                    (_, n) => (n / 2, "conv", n % 2),
                }
            };
            format!("stage{i}.{unit}.{kind}{}", n + 1)
        }
    };
    Some(format!("{module}.{what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mxnet_names() {
        for (theirs, ours) in [
            ("aux:cifarresnetv20_batchnorm0_running_mean", Some("bn0.running_mean")),
            ("arg:cifarresnetv20_batchnorm0_gamma", None),
            ("arg:cifarresnetv56_conv0_weight", Some("conv0.weight")),
            ("arg:p_stage1_conv3_weight", Some("stage1.1.conv2.weight")),
            ("arg:p_stage2_conv1_weight", Some("stage2.0.conv2.weight")),
            ("arg:p_stage2_conv2_weight", Some("stage2.0.downsample.weight")),
            ("arg:p_stage3_conv3_weight", Some("stage3.1.conv1.weight")),
            ("arg:p_stage3_conv18_weight", Some("stage3.8.conv2.weight")),
            ("arg:p_stage3_batchnorm5_beta", Some("stage3.2.bn2.bias")),
            ("aux:p_batchnorm1_running_var", Some("bn1.running_var")),
            ("arg:p_dense0_bias", Some("fc.bias")),
            ("stage2.0.downsample.weight", Some("stage2.0.downsample.weight")),
        ] {
            assert_eq!(fnkd(theirs).as_deref(), ours, "{theirs}");
        }
    }

    #[test]
    fn synonyms_meet() {
        for (theirs, ours) in [
            ("fc.weight", "linear.weight"),
            ("backbone.head.fc.bias", "linear.bias"),
            ("layer2.0.downsample.1.bias", "layer2.0.shortcut.1.bias"),
            ("bn.running_mean", "bn1.running_mean"),
        ] {
            assert_eq!(synonyms(theirs), synonyms(ours));
        }
        assert_ne!(synonyms("layer1.0.bn1.weight"), synonyms("layer1.0.bn2.weight"));
    }
}
