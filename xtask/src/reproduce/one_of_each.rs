//! One row of each method and one of each family of networks, two steps each: what `.ci/run` does so that no table can rot.
//!
//! Rows come from the tables, those with small networks first; a method or network that is in no table gets a row of its own with default
//! parameters, taught by a ResNet-20.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::json;

use super::kd_cli::Registry;
use super::table::{Row, Table, Teacher};

/// Networks with more parameters are left out.
const LARGEST: u64 = 30_000_000;

/// The rows, as a table of their own.
pub(super) fn table(registry: &Registry) -> Result<(Table, Vec<Row>)> {
    let mut whole = Table::parse(
        "one-of-each",
        "title = \"One row of each method and of each family of networks\"\nsource = \"none\"\ndata = \"noise\"\nbudget = \"smoke\"\npair = []\nmethod = []\n",
    )?;
    let mut candidates: Vec<(u64, Row)> = vec![];
    for name in Table::names()? {
        let table = Table::load(&name)?;
        for mut row in table.rows("*")? {
            let size = row.networks().map(|n| registry.parameters(n)).max().unwrap_or(0);
            if registry.missing(&row).is_none() && size <= LARGEST {
                row.id = format!("{name}.{}", row.id);
                row.published.clear();
                row.notes.clear();
                // Two tables may give one name to different networks; here a teacher is its network, untrained.
                row.teacher.clone_from(&row.teacher_model);
                candidates.push((size, row));
            }
        }
    }
    candidates.sort_by_key(|(size, _)| *size);
    let rows = cover(candidates.into_iter().map(|(_, row)| row).chain(own(registry)));
    whole.teacher = rows.iter().filter_map(|r| Some((r.teacher.clone()?, Teacher::default()))).collect();
    Ok((whole, rows))
}

/// The first rows that bring a method or a family which none before them had.
fn cover(rows: impl Iterator<Item = Row>) -> Vec<Row> {
    let mut seen = BTreeSet::new();
    rows.filter(|row| {
        let methods = row.losses.iter().filter_map(|l| l.get("method")?.as_str()).map(|m| format!("method {m}"));
        let new: Vec<String> =
            methods.chain(row.networks().map(|n| format!("family {}", family(n)))).filter(|x| !seen.contains(x)).collect();
        let any = !new.is_empty();
        seen.extend(new);
        any
    })
    .collect()
}

/// A row for every method and every network, for those that no table has.
fn own(registry: &Registry) -> Vec<Row> {
    let row = |id: String, student: &str, methods: &[&str]| Row {
        id,
        pair: "own".to_string(),
        method: methods.last().copied().unwrap_or_default().to_string(),
        teacher: Some("resnet20".to_string()),
        teacher_model: Some("resnet20".to_string()),
        student: student.to_string(),
        losses: methods.iter().map(|m| [("method".to_string(), json!(m))].into_iter().collect()).collect(),
        config: Default::default(),
        published: vec![],
        notes: vec![],
        unknown: None,
    };
    let methods = registry.method_names().map(|m| row(format!("own.{m}"), "resnet8", &["ce", m]));
    let networks = registry.networks(LARGEST).into_iter().map(|n| row(format!("own.{n}"), n, &["ce", "kd"]));
    methods.chain(networks).collect()
}

/// `resnet20` and `resnet8x4` are one family, `mobilenet_v1` and `mobilenet_v2` two.
fn family(network: &str) -> String {
    let mut name = String::new();
    for c in network.chars() {
        if !c.is_ascii_digit() || name.ends_with(['v', 'V']) {
            name.push(c);
        }
    }
    name
}

impl Row {
    /// Its networks.
    fn networks(&self) -> impl Iterator<Item = &str> {
        self.teacher_model.iter().chain([&self.student]).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_go_by_their_names_without_sizes() {
        let same = |a: &str, b: &str| family(a) == family(b);
        assert!(same("resnet20", "resnet110") && same("vgg8", "vgg19") && same("wrn_40_2", "wrn_16_1"));
        assert!(
            !same("ShuffleV1", "ShuffleV2") && !same("imagenet_mobilenet_v1", "imagenet_mobilenet_v2") && !same("resnet20", "ResNet18")
        );
    }

    #[test]
    fn every_method_and_family_gets_one_row() {
        let registry = Registry::of(&json!([
            {"kind": "method", "name": "ce", "parameters": []}, {"kind": "method", "name": "kd", "parameters": []},
            {"kind": "method", "name": "brand_new", "parameters": []},
            {"kind": "model", "name": "resnet8", "parameters": {"params": 80_000}}, {"kind": "model", "name": "resnet20", "parameters": {"params": 280_000}},
            {"kind": "model", "name": "giant", "parameters": {"params": 90_000_000}}, {"kind": "model", "name": "new_net4", "parameters": {"params": 5}},
        ]))
        .unwrap();
        let (whole, _) = table(&registry).unwrap();
        assert_eq!(whole.budget.name(), "smoke");
        let rows = cover(own(&registry).into_iter());
        let ids: Vec<&str> = rows.iter().map(|r| r.id.as_str()).collect();
        // `ce` comes with the first row; the giant is left out.
        assert_eq!(ids, ["own.brand_new", "own.kd", "own.new_net4"]);
    }
}
