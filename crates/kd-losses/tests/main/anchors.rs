//! What holds of every method of the common benchmark and after.

use serde_json::{Map, Value, to_value};

use crate::main::fixtures::SEEDS;

/// Each method's `Params::default()`, in the order of the registry: one line a method.
fn defaults() -> Vec<(&'static str, Value)> {
    let json = |v: serde_json::Result<Value>| v.unwrap();
    vec![
        ("dist", json(to_value(kd_losses::dist::Params::default()))),
        ("pkt", json(to_value(kd_losses::pkt::Params::default()))),
        ("rkd", json(to_value(kd_losses::rkd::Params::default()))),
        ("cc", json(to_value(kd_losses::cc::Params::default()))),
        ("crd", json(to_value(kd_losses::crd::Params::default()))),
        ("wsld", json(to_value(kd_losses::wsld::Params::default()))),
        ("logit_standardization", json(to_value(kd_losses::logit_standardization::Params::default()))),
        ("mlld", json(to_value(kd_losses::mlld::Params::default()))),
        ("ctkd", json(to_value(kd_losses::ctkd::Params::default()))),
        ("sdd", json(to_value(kd_losses::sdd::Params::default()))),
        ("dist_pp", json(to_value(kd_losses::dist_pp::Params::default()))),
        ("fitnet", json(to_value(kd_losses::fitnet::Params::default()))),
        ("at", json(to_value(kd_losses::at::Params::default()))),
        ("nst", json(to_value(kd_losses::nst::Params::default()))),
        ("sp", json(to_value(kd_losses::sp::Params::default()))),
        ("srrl", json(to_value(kd_losses::srrl::Params::default()))),
        ("simkd", json(to_value(kd_losses::simkd::Params::default()))),
        ("ofa", json(to_value(kd_losses::ofa::Params::default()))),
        ("vid", json(to_value(kd_losses::vid::Params::default()))),
        ("ofd", json(to_value(kd_losses::ofd::Params::default()))),
        ("reviewkd", json(to_value(kd_losses::reviewkd::Params::default()))),
        ("reviewkd_pp", json(to_value(kd_losses::reviewkd_pp::Params::default()))),
        ("catkd", json(to_value(kd_losses::catkd::Params::default()))),
        ("mgd", json(to_value(kd_losses::mgd::Params::default()))),
        ("kdsvd", json(to_value(kd_losses::kdsvd::Params::default()))),
        ("ab", json(to_value(kd_losses::ab::Params::default()))),
        ("ft", json(to_value(kd_losses::ft::Params::default()))),
        ("fsp", json(to_value(kd_losses::fsp::Params::default()))),
        ("wttm", json(to_value(kd_losses::wttm::Params::default()))),
        ("rld", json(to_value(kd_losses::rld::Params::default()))),
        ("crld", json(to_value(kd_losses::crld::Params::default()))),
        ("wkd_l", json(to_value(kd_losses::wkd_l::Params::default()))),
        ("wkd_f", json(to_value(kd_losses::wkd_f::Params::default()))),
        ("fcfd", json(to_value(kd_losses::fcfd::Params::default()))),
    ]
}

#[test]
fn the_registry_tells_the_truth_about_parameters() {
    let entries: Vec<_> = kd_losses::registry().iter().filter(|e| !SEEDS.contains(&e.name)).collect();
    assert_eq!(defaults().iter().map(|(n, _)| *n).collect::<Vec<_>>(), entries.iter().map(|e| e.name).collect::<Vec<_>>());
    for (entry, (_, expected)) in entries.iter().zip(defaults()) {
        let documented: Map<String, Value> =
            entry.parameters.iter().map(|p| (p.name.to_string(), serde_json::from_str(p.default).unwrap())).collect();
        assert_eq!(Value::Object(documented.clone()), expected, "{}", entry.name);
        assert_eq!((entry.build)(&Value::Object(documented)).unwrap().name(), entry.name);
        assert_eq!((entry.build)(&Value::Object(Map::new())).unwrap().name(), entry.name);
        assert!(
            (entry.build)(&serde_json::json!({"temprature": 1.0})).is_err_and(|e| e.to_string().contains("unknown field `temprature`"))
        );
        assert!(!entry.about.is_empty() && !entry.source.is_empty() && entry.year > 2014);
    }
}
