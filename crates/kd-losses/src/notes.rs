//! Cost class and checks of every method, for `docs/methods.md`: one line a method.

use kd_core::{Check, Cost, MethodNotes};

/// PyTorch in double precision.
const FIXTURES: &[Check] = &[Check::Fixtures];
/// PyTorch in double precision, which was compared with released code.
const RELEASED: &[Check] = &[Check::Fixtures, Check::Released];
/// A double-precision implementation in this repository, and the released code was read.
const READ: &[Check] = &[Check::Independent, Check::Read];
/// A sum of methods that have lines of their own, put together as the released recipe has them.
const RECIPE: &[Check] = &[Check::Read];

const fn notes(name: &'static str, cost: Cost, checks: &'static [Check]) -> MethodNotes {
    MethodNotes { name, cost, checks }
}

/// A line for every method of the registry.
pub const NOTES: &[MethodNotes] = &[
    // The seeds, in the order of the registry.
    notes("ce", Cost::Negligible, FIXTURES),
    notes("label_smoothing", Cost::Negligible, FIXTURES),
    notes("anisotropic_label_smoothing", Cost::Negligible, FIXTURES),
    notes("kd", Cost::Negligible, FIXTURES),
    notes("dkd", Cost::Negligible, FIXTURES),
    notes("nkd", Cost::Negligible, FIXTURES),
    notes("tf_nkd", Cost::Negligible, FIXTURES),
    notes("uskd", Cost::SmallAdapters, FIXTURES),
    notes("fnkd", Cost::Negligible, FIXTURES),
    notes("he", Cost::Negligible, FIXTURES),
    notes("nd", Cost::SmallAdapters, FIXTURES),
    notes("nd_cosine", Cost::SmallAdapters, FIXTURES),
    notes("nd_infonce", Cost::SmallAdapters, FIXTURES),
    notes("norm_match", Cost::SmallAdapters, FIXTURES),
    notes("sifn", Cost::Negligible, FIXTURES),
    notes("kd_pp", Cost::SmallAdapters, FIXTURES),
    notes("dkd_pp", Cost::SmallAdapters, FIXTURES),
    // The common benchmark.
    notes("fitnet", Cost::SmallAdapters, RELEASED),
    notes("at", Cost::Negligible, RELEASED),
    notes("sp", Cost::Pairs, RELEASED),
    notes("rkd", Cost::Triples, RELEASED),
    notes("crd", Cost::MemoryBank, RELEASED),
    notes("ofd", Cost::WideAdapters, RELEASED),
    notes("reviewkd", Cost::WideAdapters, RELEASED),
    notes("dist", Cost::Negligible, RELEASED),
    notes("logit_standardization", Cost::Negligible, RELEASED),
    notes("mlld", Cost::MoreViews, RELEASED),
    notes("ctkd", Cost::Negligible, RELEASED),
    notes("sdd", Cost::SmallAdapters, RELEASED),
    notes("pkt", Cost::Pairs, RELEASED),
    notes("vid", Cost::SmallAdapters, RELEASED),
    notes("cc", Cost::Pairs, RELEASED),
    notes("nst", Cost::ChannelGrams, RELEASED),
    notes("kdsvd", Cost::ChannelGrams, RELEASED),
    notes("srrl", Cost::SmallAdapters, RELEASED),
    notes("simkd", Cost::WideAdapters, RELEASED),
    notes("catkd", Cost::Negligible, RELEASED),
    notes("ofa", Cost::WideAdapters, RELEASED),
    notes("wsld", Cost::Negligible, RELEASED),
    notes("mgd", Cost::SmallAdapters, RELEASED),
    notes("ab", Cost::SmallAdapters, RELEASED),
    notes("ft", Cost::SmallAdapters, RELEASED),
    notes("fsp", Cost::ChannelGrams, RELEASED),
    notes("dist_pp", Cost::SmallAdapters, RECIPE),
    notes("reviewkd_pp", Cost::WideAdapters, RECIPE),
    // Newer methods.
    notes("wttm", Cost::Negligible, READ),
    notes("rld", Cost::Negligible, READ),
    notes("crld", Cost::MoreViews, READ),
    notes("wkd_l", Cost::Pairs, READ),
    notes("wkd_f", Cost::SmallAdapters, READ),
    notes("fcfd", Cost::MorePasses, READ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_one_line() {
        for entry in crate::registry() {
            assert_eq!(NOTES.iter().filter(|n| n.name == entry.name).count(), 1, "{}", entry.name);
        }
    }
}
