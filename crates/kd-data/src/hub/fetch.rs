//! The Parquet files of a repository, from the cache or the network.

use std::path::{Component, Path, PathBuf};

use hf_hub::{HFClientSync, HFError, HFRepositorySync, RepoTypeDataset};

use super::Place;
use crate::{Error, Result};

/// Whether `HF_HUB_OFFLINE` forbids the network, read as the Hub's own tools read it.
pub(super) fn is_offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

/// An error of the Hub about `spec`.
pub(super) fn failed(spec: &str, e: impl std::fmt::Display) -> Error {
    let cache = hf_hub::resolve_cache_dir();
    Error::spec(spec, format!("the Hub could not be read: {e}; nothing complete is in the cache {}", cache.display()))
}

/// What to say where the network is forbidden and the cache does not help.
pub(super) fn not_cached(spec: &str) -> Error {
    let cache = hf_hub::resolve_cache_dir();
    Error::spec(spec, format!("HF_HUB_OFFLINE is set, and the cache {} does not hold it", cache.display()))
}

/// Names within the repository, and the files.
pub(super) fn parquet_files(spec: &str, place: &Place<'_>) -> Result<Vec<(String, PathBuf)>> {
    find(spec, place, &HFClientSync::new().map_err(|e| failed(spec, e))?, is_offline())
}

fn find(spec: &str, place: &Place<'_>, client: &HFClientSync, offline: bool) -> Result<Vec<(String, PathBuf)>> {
    let repo = client.dataset(place.owner, place.name);
    let mut files = match offline {
        true => cached(spec, &repo, place.revision)?,
        false => {
            let info = repo.info().revision(place.revision).send().map_err(|e| failed(spec, e))?;
            let names = info.siblings.unwrap_or_default().into_iter().map(|s| s.rfilename).filter(|name| name.ends_with(".parquet"));
            names.map(|name| Ok((name.clone(), download(spec, &repo, place.revision, &name)?))).collect::<Result<Vec<_>>>()?
        }
    };
    if files.is_empty() {
        return Err(Error::spec(spec, format!("there is no Parquet file under the revision {}", place.revision)));
    }
    files.sort_unstable();
    Ok(files)
}

/// One file, which the cache may hold already.
fn download(spec: &str, repo: &HFRepositorySync<RepoTypeDataset>, revision: &str, name: &str) -> Result<PathBuf> {
    // The name comes from the network and becomes a path.
    if !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) || name.contains('\\') {
        return Err(Error::spec(spec, format!("the repository lists a file called {name:?}, which is no relative path")));
    }
    let request = repo.download_file().filename(name).revision(revision);
    match request.clone().local_files_only(true).send() {
        Err(HFError::LocalEntryNotFound { .. }) => request.send(),
        cached => cached,
    }
    .map_err(|e| failed(spec, e))
}

/// What the cache holds of a revision.
fn cached(spec: &str, repo: &HFRepositorySync<RepoTypeDataset>, revision: &str) -> Result<Vec<(String, PathBuf)>> {
    let snapshot = repo.snapshot_download().revision(revision).local_files_only(true).send().map_err(|_| not_cached(spec))?;
    let mut files = vec![];
    let mut pending = vec![snapshot.clone()];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == "parquet")
                && let Some(name) = path.strip_prefix(&snapshot).ok().and_then(Path::to_str)
            {
                files.push((name.replace('\\', "/"), path));
            }
        }
    }
    if files.is_empty() { Err(not_cached(spec)) } else { Ok(files) }
}

#[cfg(test)]
mod tests {
    use hf_hub::HFClient;

    use super::*;

    const PLACE: Place<'static> = Place { owner: "a", name: "b", config: None, revision: Place::CONVERTED };

    /// A client of `cache` that no server answers.
    fn client(cache: &Path) -> HFClientSync {
        HFClient::builder().endpoint("http://127.0.0.1:9").cache_dir(cache).retry_max_attempts(0).build_sync().unwrap()
    }

    #[test]
    fn without_a_network_the_cache_decides() {
        let dir = tempfile::tempdir().unwrap();
        let client = client(dir.path());
        let refusal = |offline| find("hub:a/b", &PLACE, &client, offline).unwrap_err().to_string();
        assert!(refusal(true).contains("HF_HUB_OFFLINE is set") && refusal(true).contains("hub:a/b"), "{}", refusal(true));
        assert!(refusal(false).contains("the Hub could not be read"), "{}", refusal(false));

        let (repo, commit) = (dir.path().join("datasets--a--b"), "0123456789012345678901234567890123456789");
        let reference = repo.join("refs").join(Place::CONVERTED);
        std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
        std::fs::write(&reference, commit).unwrap();
        let snapshot = repo.join("snapshots").join(commit);
        assert!(refusal(true).contains("does not hold it"));
        for name in ["plain/train/0001.parquet", "plain/train/0000.parquet", "README.md"] {
            std::fs::create_dir_all(snapshot.join(name).parent().unwrap()).unwrap();
            std::fs::write(snapshot.join(name), "x").unwrap();
        }
        let found = find("hub:a/b", &PLACE, &client, true).unwrap();
        assert_eq!(found.iter().map(|f| f.0.as_str()).collect::<Vec<_>>(), ["plain/train/0000.parquet", "plain/train/0001.parquet"]);
    }

    #[test]
    fn a_name_that_leaves_its_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let repo = client(dir.path()).dataset("a", "b");
        for name in ["../x.parquet", "/x.parquet", "a/../../x.parquet", "a\\x.parquet"] {
            assert!(download("hub:a/b", &repo, "main", name).unwrap_err().to_string().contains("no relative path"), "{name}");
        }
    }
}
