//! Groups of classes, what anisotropic label smoothing favours a label's neighbours by.
//!
//! CIFAR-100 has its 20 superclasses; CUB-200-2011 gets its groups by [`by_last_word`], as FNKD (Xu et al., ECCV 2020) takes them; any other
//! data set by the same rule or from a file ([`read`]).

use std::collections::BTreeMap;
use std::path::Path;

use crate::{Error, Result};

/// Classes whose names end in the same word, numbered in the order in which the words first appear. Words are parted by spaces and
/// underscores; capitals do not count.
///
/// ```
/// let names = ["Downy_Woodpecker", "Sooty_Albatross", "red-bellied woodpecker"].map(String::from);
/// assert_eq!(kd_data::groups::by_last_word(&names), [0, 1, 0]);
/// ```
pub fn by_last_word(class_names: &[String]) -> Vec<i64> {
    number(class_names.iter().map(|name| name.rsplit([' ', '_']).find(|w| !w.is_empty()).unwrap_or("").to_lowercase()))
}

/// From a text file: the group of each class, a name or a number, one a line in the order of the classes. Blank lines do not count.
///
/// # Errors
/// A file that cannot be read, or has another number of lines than there are `class_names`; the message names the first class without a line.
pub fn read(path: &Path, class_names: &[String]) -> Result<Vec<i64>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.len() != class_names.len() {
        let first = class_names.get(lines.len()).map(|name| format!("; class `{name}` is the first without one")).unwrap_or_default();
        let why = format!("{} lines: expected the group of each of the {} classes, one a line{first}", lines.len(), class_names.len());
        return Err(Error::corrupt(path, why));
    }
    Ok(number(lines.into_iter()))
}

/// Numbers what differs, in order of appearance.
fn number<T: Ord>(items: impl Iterator<Item = T>) -> Vec<i64> {
    let mut known = BTreeMap::new();
    items
        .map(|item| {
            let next = known.len() as i64;
            *known.entry(item).or_insert(next)
        })
        .collect()
}
