//! The methods of this crate, by name.

use candle_core::Tensor;
use kd_core::{Error, MethodEntry, ParityInputs, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Every method of this crate, in the order of the listings.
pub fn registry() -> &'static [MethodEntry] {
    static METHODS: &[MethodEntry] = &[
        crate::ce::ENTRY,
        crate::label_smoothing::ENTRY,
        crate::anisotropic_label_smoothing::ENTRY,
        crate::kd::ENTRY,
        crate::dkd::ENTRY,
        crate::nkd::ENTRY,
        crate::tf_nkd::ENTRY,
        crate::uskd::ENTRY,
        crate::fnkd::ENTRY,
        crate::he::ENTRY,
        crate::nd::ENTRY,
        crate::nd_cosine::ENTRY,
        crate::nd_infonce::ENTRY,
        crate::norm_match::ENTRY,
        crate::sifn::ENTRY,
        crate::kd_pp::ENTRY,
        crate::dkd_pp::ENTRY,
        crate::dist::ENTRY,
        crate::pkt::ENTRY,
        crate::rkd::ENTRY,
        crate::cc::ENTRY,
        crate::crd::ENTRY,
        crate::wsld::ENTRY,
        crate::logit_standardization::ENTRY,
        crate::mlld::ENTRY,
        crate::ctkd::ENTRY,
        crate::sdd::ENTRY,
        crate::dist_pp::ENTRY,
        crate::fitnet::ENTRY,
        crate::at::ENTRY,
        crate::nst::ENTRY,
        crate::sp::ENTRY,
        crate::srrl::ENTRY,
        crate::simkd::ENTRY,
        crate::ofa::ENTRY,
        crate::vid::ENTRY,
        crate::ofd::ENTRY,
        crate::reviewkd::ENTRY,
        crate::reviewkd_pp::ENTRY,
        crate::catkd::ENTRY,
        crate::mgd::ENTRY,
        crate::kdsvd::ENTRY,
        crate::ab::ENTRY,
        crate::ft::ENTRY,
        crate::fsp::ENTRY,
        crate::wttm::ENTRY,
        crate::rld::ENTRY,
        crate::crld::ENTRY,
        crate::wkd_l::ENTRY,
        crate::wkd_f::ENTRY,
        crate::fcfd::ENTRY,
    ];
    METHODS
}

/// The method called `name`.
///
/// # Errors
/// When there is none: the message names the nearest one.
pub fn find(name: &str) -> Result<&'static MethodEntry> {
    registry().iter().find(|entry| entry.name == name).ok_or_else(|| {
        let names: Vec<&str> = registry().iter().map(|entry| entry.name).collect();
        let wanted = name.to_lowercase().replace('-', "_");
        let nearest = names.iter().map(|n| (strsim::damerau_levenshtein(n, &wanted), *n)).min();
        let hint = match nearest {
            Some((distance, nearest)) if distance <= nearest.len().div_ceil(3) => format!("; did you mean `{nearest}`?"),
            _ => String::new(),
        };
        Error::param("method", name, format!("one of {}{hint}", names.join(", ")))
    })
}

/// A method's parameters from JSON, checked.
pub(crate) fn parse<P: DeserializeOwned>(params: &Value, validate: impl Fn(&P) -> Result<()>) -> Result<P> {
    let params = serde_json::from_value(params.clone())?;
    validate(&params)?;
    Ok(params)
}

/// What a parity call's samples are labelled with: its soft targets if it has them, its labels otherwise.
pub(crate) fn parity_labels(inputs: &ParityInputs) -> Result<&Tensor> {
    inputs.find("targets").map_or_else(|| inputs.get("labels"), Ok)
}

/// Takes a parameter out of a parity call that only fixtures have: its value and the other parameters.
pub(crate) fn parity_without(inputs: &ParityInputs, key: &str) -> (Option<Value>, Value) {
    let mut params = inputs.params.clone();
    let value = params.as_object_mut().and_then(|p| p.remove(key));
    (value, params)
}
