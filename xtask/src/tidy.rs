//! Rules of the house that no linter knows, as tests. Each collects every breach before it fails.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::workspace::{Workspace, output, root};

/// Larger files do not belong into git.
const LARGEST: u64 = 600_000;

/// The files that git tracks, relative to the root, sorted. What else lies in a checkout (data, runs) is its user's affair.
/// Outside a git checkout (an unpacked archive) the files of the folders that hold code and documentation.
fn files() -> Vec<PathBuf> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z"]).current_dir(root());
    let mut found: Vec<PathBuf> = match output(&mut git) {
        Ok(list) if list.contains("xtask/src/tidy.rs\0") => list.split_terminator('\0').map(PathBuf::from).collect(),
        _ => {
            let mut found = vec![PathBuf::from("README.md"), PathBuf::from("CONTRIBUTING.md")];
            ["crates", "xtask", "docs", "configs", ".ci"].iter().for_each(|folder| walk(&root().join(folder), &mut found));
            found
        }
    };
    found.retain(|f| root().join(f).is_file());
    found.sort();
    found.dedup();
    assert!(found.iter().any(|f| f.ends_with("src/tidy.rs")), "this file is not among the {} files found", found.len());
    found
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, found);
        } else if let Ok(relative) = path.strip_prefix(root()) {
            found.push(relative.to_path_buf());
        }
    }
}

/// The text files with one of these extensions, with their text.
fn texts(extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let wanted = |f: &PathBuf| f.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
    files().into_iter().filter(wanted).filter_map(|f| fs::read_to_string(root().join(&f)).ok().map(|text| (f, text))).collect()
}

/// Source files of the crates and of xtask, without tests, examples and benches.
fn sources() -> Vec<(PathBuf, String)> {
    texts(&["rs"]).into_iter().filter(|(f, _)| f.iter().any(|part| part == "src")).collect()
}

/// What stands between `open` and the next quotation mark, for every `open` in `text`.
fn quoted<'a>(text: &'a str, open: &str) -> Vec<&'a str> {
    text.split(open).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

#[track_caller]
fn none(what: &str, breaches: &[String]) {
    assert!(breaches.is_empty(), "{what}:\n  {}", breaches.join("\n  "));
}

#[test]
fn packages_say_what_they_are() {
    let workspace = Workspace::load().unwrap();
    assert!(workspace.published().count() >= 9);
    let mut breaches: Vec<String> =
        workspace.published().flat_map(|p| p.gaps().into_iter().map(|gap| format!("{}: {gap}", p.name()))).collect();
    breaches
        .extend(workspace.packages.iter().filter(|p| p.text("description").is_empty()).map(|p| format!("{}: no description", p.name())));
    none("what a registry shows of a package", &breaches);
}

#[test]
fn source_files_open_with_their_manual() {
    let manual = |f: &Path| f.iter().any(|part| part == "src" || part == "examples");
    let silent = texts(&["rs"]).into_iter().filter(|(f, text)| manual(f) && !text.starts_with("//!"));
    none("a source file begins with `//!` and what it is for", &silent.map(|(f, _)| f.display().to_string()).collect::<Vec<_>>());
}

#[test]
fn methods_have_a_formula_and_a_registry_line() {
    let mut breaches = vec![];
    let mut methods = 0;
    for (file, text) in sources() {
        // A generic implementation is what several methods share; each of them has a file of its own, with its entry.
        if !text.lines().any(|line| line.starts_with("impl Method for ") || line.starts_with("pub const ENTRY: MethodEntry")) {
            continue;
        }
        methods += 1;
        if !text.contains(": MethodEntry = ") {
            breaches.push(format!("{}: a method without a `MethodEntry`", file.display()));
        }
        if !text.lines().take_while(|line| line.starts_with("//!")).any(|line| line.starts_with("//! ```text")) {
            breaches.push(format!("{}: no formula (a ```text block) in the module's documentation", file.display()));
        }
    }
    assert!(methods >= 6, "{methods} methods found");
    none("a method is one file with its manual page and its line", &breaches);
}

#[test]
fn entries_are_registered() {
    let sources = sources();
    let mut breaches = vec![];
    for (file, text) in &sources {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        for line in text.lines() {
            let Some((name, rest)) = line.split_once("const ").and_then(|(_, rest)| rest.split_once(": ")) else { continue };
            if line.starts_with(' ') || !rest.split(' ').next().is_some_and(|kind| kind.ends_with("Entry")) {
                continue;
            }
            let path = format!("{stem}::{name}");
            let same_crate = |other: &Path| other != file && other.iter().take(2).eq(file.iter().take(2));
            if !sources.iter().any(|(other, text)| same_crate(other) && text.contains(&path)) {
                breaches.push(format!("{}: `{path}` stands in no registry", file.display()));
            }
        }
    }
    none("an entry is in its crate's registry", &breaches);
}

#[test]
fn nothing_is_left_unfinished() {
    // Put together here, so that this file does not hold what it looks for.
    let marks = [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("#[ig", "nore"), concat!("TO", "DO"), concat!("FIX", "ME")];
    let mut breaches = vec![];
    for (file, text) in texts(&["rs", "toml", "yml", "sh", "run"]) {
        for (number, line) in text.lines().enumerate() {
            breaches.extend(marks.iter().filter(|m| line.contains(**m)).map(|m| format!("{}:{}: {m}", file.display(), number + 1)));
        }
    }
    none("stubs, ignored tests and promises", &breaches);
}

#[test]
fn files_are_small() {
    let large = |f: &&PathBuf| fs::metadata(root().join(f)).is_ok_and(|m| m.len() > LARGEST);
    let breaches: Vec<String> = files().iter().filter(large).map(|f| f.display().to_string()).collect();
    none(&format!("files over {LARGEST} bytes"), &breaches);
}

#[test]
fn no_path_of_a_machine() {
    let mut places = vec![root().to_path_buf()];
    places.extend(env::var_os("KD_SHARED").map(PathBuf::from));
    // A folder right below `/` has too common a name to look for.
    let mut needles: Vec<String> = places.iter().filter(|p| p.components().count() > 2).map(|p| p.display().to_string()).collect();
    needles.extend(["home", "Users", "root", "mnt"].map(|top| format!("/{top}/")));
    let mut breaches = vec![];
    for file in files() {
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        for (number, line) in text.lines().enumerate() {
            for needle in &needles {
                // Behind a letter it is the middle of a relative path.
                let absolute = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.})]".contains(c));
                if line.match_indices(needle.as_str()).any(|(at, _)| absolute(at)) {
                    breaches.push(format!("{}:{}: {needle}", file.display(), number + 1));
                }
            }
        }
    }
    none("paths that exist on one machine only", &breaches);
}

#[test]
fn environment_variables_are_documented() {
    let pages: Vec<String> = texts(&["md"]).into_iter().filter(|(f, _)| !f.starts_with("crates")).map(|(_, text)| text).collect();
    let mut breaches = BTreeSet::new();
    for (file, text) in texts(&["rs"]) {
        for open in ["env::var(\"", "env::var_os(\"", "env = \""] {
            let documented = |name: &str| name == "PATH" || pages.iter().any(|page| page.contains(&format!("`{name}`")));
            let is_name = |name: &str| name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
            let missing = quoted(&text, open).into_iter().filter(|name| is_name(name) && !documented(name));
            breaches.extend(missing.map(|name| format!("{}: {name}", file.display())));
        }
    }
    none("environment variables that README, CONTRIBUTING and docs do not name", &Vec::from_iter(breaches));
}

#[test]
fn crates_keep_their_invariants() {
    let mut breaches = vec![];
    for (file, text) in sources() {
        let inside = |folders: &[&str]| folders.iter().any(|folder| file.starts_with(Path::new("crates").join(folder)));
        let mut breach = |what: &str, allowed: bool| {
            if !allowed && text.contains(what) {
                breaches.push(format!("{}: {what}", file.display()));
            }
        };
        breach("std::fs", !inside(&["kd-core", "kd-nn", "kd-losses", "kd-models", "kd-blockwise"]));
        breach("std::thread", !inside(&["kd-core", "kd-losses", "kd-models", "kd-blockwise"]));
        breach(concat!("allow(", "unsafe_code)"), inside(&["kd-nn/src/kernels"]));
    }
    none("what docs/architecture.md rules out", &breaches);
}

#[test]
fn packages_include_only_their_own_files() {
    let mut breaches = vec![];
    for (file, text) in sources() {
        let levels = file.components().count();
        for path in ["include_str!(\"", "include_bytes!(\""].iter().flat_map(|open| quoted(&text, open)) {
            // A package is crates/NAME (or xtask): as many steps up as the file stands below it are its own.
            let own = levels - if file.starts_with("crates") { 3 } else { 2 };
            if path.matches("../").count() > own {
                breaches.push(format!("{}: {path}", file.display()));
            }
        }
    }
    none("files of other folders, which would be missing in the package", &breaches);
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut breaches = vec![];
    for (file, text) in texts(&["md"]) {
        let mut code = false;
        for line in text.lines() {
            code ^= line.trim_start().starts_with("```");
            if code {
                continue;
            }
            for target in line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
                let folder = root().join(file.parent().unwrap_or(Path::new("")));
                if !target.is_empty() && !target.contains(':') && !folder.join(target).exists() {
                    breaches.push(format!("{}: {target}", file.display()));
                }
            }
        }
    }
    none("links to files that are not there", &breaches);
}
