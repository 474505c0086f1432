//! Means, deviations and intervals of a few seeds.

use serde::Serialize;

/// Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
const T95: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// What some numbers say together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) n: usize,
    pub(super) mean: f64,
    /// Sample standard deviation; none for a single number.
    pub(super) deviation: Option<f64>,
    /// Half of the 95 % interval of the mean, by Student's t; none for a single number.
    pub(super) half_interval: Option<f64>,
}

/// `None` for no numbers.
pub(super) fn summary(values: &[f64]) -> Option<Summary> {
    let n = values.len();
    if n == 0 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n as f64;
    let deviation = (n > 1).then(|| (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt());
    let t = T95.get(n.wrapping_sub(2)).copied().unwrap_or(1.96);
    Some(Summary { n, mean, deviation, half_interval: deviation.map(|d| t * d / (n as f64).sqrt()) })
}

/// What the differences of numbers with the same key (a seed) say; keys that only one side has do not count.
pub(super) fn paired(ours: &[(u64, f64)], reference: &[(u64, f64)]) -> Option<Summary> {
    let differences: Vec<f64> =
        ours.iter().filter_map(|(key, value)| reference.iter().find(|(k, _)| k == key).map(|(_, r)| value - r)).collect();
    summary(&differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn three_numbers() {
        let s = summary(&[70.0, 71.0, 72.0]).unwrap();
        assert!(s.n == 3 && near(s.mean, 71.0) && near(s.deviation.unwrap(), 1.0));
        assert!(near(s.half_interval.unwrap(), 4.303 / 3f64.sqrt()));
    }

    #[test]
    fn one_number_has_no_spread() {
        let s = summary(&[70.0]).unwrap();
        assert_eq!((s.mean, s.deviation, s.half_interval), (70.0, None, None));
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn two_numbers_have_the_widest_interval() {
        assert!(near(summary(&[0.0, 2.0]).unwrap().half_interval.unwrap(), 12.706));
    }

    #[test]
    fn pairs_go_by_their_key() {
        // Seeds far apart, differences alike: the pairing is what shows it.
        let ours = [(1, 61.0), (2, 71.5), (4, 50.0)];
        let kd = [(2, 71.0), (1, 60.0), (3, 0.0)];
        let s = paired(&ours, &kd).unwrap();
        assert!(s.n == 2 && near(s.mean, 0.75) && near(s.deviation.unwrap(), 0.125f64.sqrt()));
        assert_eq!(paired(&ours, &[(9, 1.0)]), None);
    }
}
