//! Every data source by name.

use crate::{Error, Result, Splits, cifar, cub, digits, folder, hub, idx, noise, stanford_cars, stl10, tiny_imagenet};

/// A source that [`open`] knows.
#[derive(Debug, serde::Serialize)]
pub struct SourceEntry {
    /// Its name, what stands before the colon.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// What stands after the colon; empty for a source that takes nothing.
    pub argument: &'static str,
    /// The augmentation customary for it, what a config without one gets.
    pub augment: &'static [&'static str],
    /// Opens it with its argument.
    #[serde(skip)]
    pub open: fn(&str) -> Result<Splits>,
}

/// Every source, in the order of listings.
pub const SOURCES: &[SourceEntry] = &[
    digits::ENTRY,
    cifar::CIFAR10,
    cifar::CIFAR100,
    cifar::CIFAR100_COARSE,
    folder::ENTRY,
    idx::MNIST,
    idx::FASHION,
    stl10::ENTRY,
    tiny_imagenet::ENTRY,
    cub::ENTRY,
    stanford_cars::ENTRY,
    noise::ENTRY,
    hub::ENTRY,
    hub::MNIST,
    hub::FASHION,
];

/// `spec` with a path in it made absolute, so that it means the same in any folder. What names no path stays as it is.
pub fn absolute(spec: &str) -> String {
    let is_path = |name: &str| name == "folder" || SOURCES.iter().any(|e| e.name == name && matches!(e.argument, "PATH" | "DIR"));
    match spec.split_once(':') {
        Some((name, path)) if is_path(name) => match std::path::absolute(path) {
            Ok(path) => format!("{name}:{}", path.display()),
            Err(_) => spec.to_string(),
        },
        _ => spec.to_string(),
    }
}

/// Opens the source that `spec` names: `NAME` or `NAME:ARGUMENT`. Paths are taken as they stand, relative to the current directory;
/// nothing but the sources of the feature `hub` reaches for the
/// network or a home directory.
///
/// # Errors
/// An unknown name, files that are missing or do not hold what their format says.
///
/// # Example
/// ```
/// let digits = kd_data::open("digits")?;
/// assert_eq!((digits.train()?.len(), digits.test()?.len()), (1297, 500));
/// # Ok::<(), kd_data::Error>(())
/// ```
pub fn open(spec: &str) -> Result<Splits> {
    let (name, argument) = match spec.split_once(':') {
        Some((name, argument)) => (name, Some(argument)),
        None => (spec, None),
    };
    let Some(entry) = SOURCES.iter().find(|e| e.name == name) else {
        return Err(Error::unknown("data source", name, &SOURCES.iter().map(|e| e.name).collect::<Vec<_>>()));
    };
    match argument {
        Some(_) if entry.argument.is_empty() => Err(Error::spec(spec, format!("`{name}` takes nothing after its name"))),
        None | Some("") if !entry.argument.is_empty() => Err(Error::spec(spec, format!("expected `{name}:{}`", entry.argument))),
        argument => (entry.open)(argument.unwrap_or("")),
    }
}
