//! A TOML document whose every value knows where it was written, so that any error about it can say so.
//!
//! [`Node::deserialize`] feeds the tree to serde; [`Node::place`] finds the place of a key that was found wrong later.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::de::{self, DeserializeOwned, DeserializeSeed, Expected, IntoDeserializer, Unexpected, Visitor};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::{Error, Result};

/// A value and where it was written: `file:line`, or the override that set it.
#[derive(Clone, Debug)]
pub(super) struct Node {
    at: String,
    value: Value,
}

#[derive(Clone, Debug)]
enum Value {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Table(BTreeMap<String, Node>),
}

impl Node {
    /// Reads a document.
    pub(super) fn parse(text: &str, file: &str) -> Result<Self> {
        let place = |span: Range<usize>| format!("{file}:{}", 1 + text[..span.start.min(text.len())].matches('\n').count());
        let table = DeTable::parse(text).map_err(|e| Error::Config {
            at: e.span().map_or_else(|| file.to_string(), place),
            message: e.message().trim().to_string(),
            hint: None,
        })?;
        Ok(Self { at: file.to_string(), value: Value::table(table.get_ref(), &place)? })
    }

    /// Applies `a.b.0.c=value`. The value is TOML; what is not TOML is a string. An index one past the end of a list appends.
    pub(super) fn set(&mut self, assignment: &str) -> Result<()> {
        let at = format!("--set {assignment}");
        let wrong =
            |message: String| Error::Config { at: at.clone(), message, hint: Some("write it as --set section.key=value".to_string()) };
        let (path, text) = assignment.split_once('=').ok_or_else(|| wrong("no `=`".to_string()))?;
        let (path, text) = (path.trim(), text.trim());
        if path.is_empty() || path.split('.').any(str::is_empty) {
            return Err(wrong(format!("`{path}` is no key")));
        }
        let document = format!("value = {text}");
        let value = match DeTable::parse(&document) {
            Ok(table) if table.get_ref().len() == 1 => match Value::table(table.get_ref(), &|_| at.clone())? {
                Value::Table(mut entries) => entries.remove("value").map(|node| node.value),
                _ => None,
            },
            _ => None,
        };
        let leaf = Self { at: at.clone(), value: value.unwrap_or_else(|| Value::Text(text.to_string())) };
        let mut node = self;
        for key in path.split('.') {
            let empty = || Self { at: at.clone(), value: Value::Table(BTreeMap::new()) };
            node = match &mut node.value {
                Value::Table(entries) => entries.entry(key.to_string()).or_insert_with(empty),
                Value::List(items) => {
                    let len = items.len();
                    let index = key.parse::<usize>().ok().filter(|&i| i <= len);
                    let index = index.ok_or_else(|| wrong(format!("`{key}` in `{path}` must be an index from 0 to {len}")))?;
                    if index == len {
                        items.push(empty());
                    }
                    &mut items[index]
                }
                _ => return Err(wrong(format!("`{path}`: what stands before `{key}` is no section"))),
            };
        }
        *node = leaf;
        Ok(())
    }

    /// Turns the single table at `key` into a list of one, so that both spellings are read alike.
    pub(super) fn make_list(&mut self, key: &str) {
        if let Value::Table(entries) = &mut self.value
            && let Some(node) = entries.get_mut(key)
            && let Value::Table(_) = node.value
        {
            let one = node.clone();
            node.value = Value::List(vec![one]);
        }
    }

    /// Takes the list at `key` out of a section; `None`, and nothing happens, when there is none.
    pub(super) fn take_list(&mut self, key: &str) -> Option<Vec<Self>> {
        let Value::Table(entries) = &mut self.value else { return None };
        match entries.get(key)?.value {
            Value::List(_) => match entries.remove(key)?.value {
                Value::List(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    /// Gives the entry `from` of a section the key `to`, which must be free.
    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        if let Value::Table(entries) = &mut self.value
            && let Some(node) = entries.remove(from)
        {
            if entries.contains_key(to) {
                let message = format!("`{from}` and `{to}` are two names of the same section");
                return Err(Error::Config { at: node.at, message, hint: None });
            }
            entries.insert(to.to_string(), node);
        }
        Ok(())
    }

    /// The keys of a section.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        let entries = if let Value::Table(entries) = &self.value { Some(entries) } else { None };
        entries.into_iter().flatten().map(|(key, _)| key.as_str())
    }

    /// The text at `key` of a section.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match &self.value {
            Value::Table(entries) => match &entries.get(key)?.value {
                Value::Text(text) => Some(text),
                _ => None,
            },
            _ => None,
        }
    }

    /// Puts `over` on top: sections key by key, everything else as a whole.
    pub(super) fn overlay(&mut self, over: Self) {
        match (&mut self.value, over.value) {
            (Value::Table(entries), Value::Table(new)) => {
                for (key, node) in new {
                    match entries.get_mut(&key) {
                        Some(old) => old.overlay(node),
                        None => drop(entries.insert(key, node)),
                    }
                }
            }
            (value, new) => (*value, self.at) = (new, over.at),
        }
    }

    /// Where the value at the dotted `path` was written; its nearest written parent when it stands nowhere.
    pub(super) fn place(&self, path: &str) -> &str {
        let mut node = self;
        for key in path.split('.') {
            let child = match &node.value {
                Value::Table(entries) => entries.get(key),
                Value::List(items) => key.parse::<usize>().ok().and_then(|i| items.get(i)),
                _ => None,
            };
            match child {
                Some(child) => node = child,
                None => break,
            }
        }
        &node.at
    }

    /// An error about the value at `path`.
    pub(super) fn error(&self, path: &str, message: impl fmt::Display, hint: Option<String>) -> Error {
        Error::Config { at: self.place(path).to_string(), message: message.to_string(), hint }
    }

    /// The document as a type.
    pub(super) fn deserialize<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(self).map_err(|e| Error::Config {
            at: e.at.unwrap_or_else(|| self.at.clone()),
            message: if e.path.is_empty() { e.message } else { format!("`{}` {}", e.path.join("."), e.message) },
            hint: e.hint,
        })
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Bool(v) => Unexpected::Bool(*v),
            Value::Integer(v) => Unexpected::Signed(*v),
            Value::Float(v) => Unexpected::Float(*v),
            Value::Text(v) => Unexpected::Str(v),
            Value::List(_) => Unexpected::Other("a list"),
            Value::Table(_) => Unexpected::Other("a section"),
        }
    }
}

impl Value {
    fn table(table: &DeTable<'_>, place: &dyn Fn(Range<usize>) -> String) -> Result<Self> {
        let entry = |(key, value): (&Spanned<std::borrow::Cow<'_, str>>, &Spanned<DeValue<'_>>)| {
            let at = place(key.span());
            Ok((key.get_ref().to_string(), Node { value: Self::new(value.get_ref(), &at, place)?, at }))
        };
        Ok(Self::Table(table.iter().map(entry).collect::<Result<_>>()?))
    }

    fn new(value: &DeValue<'_>, at: &str, place: &dyn Fn(Range<usize>) -> String) -> Result<Self> {
        let range =
            |what: &dyn fmt::Display| Error::Config { at: at.to_string(), message: format!("{what} is too large a number"), hint: None };
        Ok(match value {
            DeValue::Boolean(v) => Self::Bool(*v),
            DeValue::Integer(v) => Self::Integer(i64::from_str_radix(v.as_str(), v.radix()).map_err(|_| range(v))?),
            DeValue::Float(v) => Self::Float(v.as_str().parse().map_err(|_| range(v))?),
            DeValue::String(v) => Self::Text(v.to_string()),
            DeValue::Datetime(v) => Self::Text(v.to_string()),
            DeValue::Array(items) => {
                let item = |v: &Spanned<DeValue<'_>>| {
                    let at = place(v.span());
                    Ok(Node { value: Self::new(v.get_ref(), &at, place)?, at })
                };
                Self::List(items.iter().map(item).collect::<Result<_>>()?)
            }
            DeValue::Table(table) => Self::table(table, place)?,
        })
    }
}

/// serde's error, with the place and the key of the value it is about.
#[derive(Debug)]
pub(super) struct TreeError {
    at: Option<String>,
    path: Vec<String>,
    message: String,
    hint: Option<String>,
}

impl TreeError {
    fn new(message: String, hint: Option<String>) -> Self {
        Self { at: None, path: vec![], message, hint }
    }

    /// Notes on the way up which value it was about.
    fn inside(mut self, key: &str, node: &Node) -> Self {
        self.at.get_or_insert_with(|| node.at.clone());
        self.path.insert(0, key.to_string());
        self
    }
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TreeError {}

impl de::Error for TreeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string(), None)
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!("is {found}, must be {}", in_words(&expected.to_string())), None)
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::new("is no known key".to_string(), Some(did_you_mean(field, expected.iter().copied())))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!("is \"{variant}\", must be {}", expected.join(", ")), Some(did_you_mean(variant, expected.iter().copied())))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("has no `{field}`, which must be given"), None)
    }
}

/// serde names Rust's types; a config's reader knows others.
fn in_words(expected: &str) -> String {
    match expected {
        "usize" | "u64" | "u32" => "a whole number, 0 or more",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "a section",
        other => other,
    }
    .to_string()
}

/// A hint for a name that is none of `known`: the nearest one, or all of them.
pub fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    let near = known.iter().map(|k| (strsim::damerau_levenshtein(name, k), k)).min();
    match near {
        Some((distance, k)) if distance <= (name.chars().count() / 3).max(1) => format!("did you mean `{k}`?"),
        _ => format!("known: {}", known.join(", ")),
    }
}

impl<'de> de::Deserializer<'de> for &'de Node {
    type Error = TreeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Bool(v) => visitor.visit_bool(*v),
            Value::Integer(v) => visitor.visit_i64(*v),
            Value::Float(v) => visitor.visit_f64(*v),
            Value::Text(v) => visitor.visit_borrowed_str(v),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate() }),
            Value::Table(entries) => visitor.visit_map(Entries { entries: entries.iter(), current: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(self, _: &str, _: &[&str], visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Text(v) => visitor.visit_enum(v.as_str().into_deserializer()),
            _ => Err(de::Error::invalid_type(self.unexpected(), &"a string")),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Items<'de> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Node>>,
}

impl<'de> de::SeqAccess<'de> for Items<'de> {
    type Error = TreeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, TreeError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        seed.deserialize(node).map(Some).map_err(|e| e.inside(&index.to_string(), node))
    }
}

struct Entries<'de> {
    entries: std::collections::btree_map::Iter<'de, String, Node>,
    current: Option<(&'de str, &'de Node)>,
}

impl<'de> de::MapAccess<'de> for Entries<'de> {
    type Error = TreeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, TreeError> {
        let Some((key, node)) = self.entries.next() else { return Ok(None) };
        self.current = Some((key, node));
        seed.deserialize(key.as_str().into_deserializer()).map(Some).map_err(|e: TreeError| e.inside(key, node))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, TreeError> {
        let (key, node) = self.current.take().expect("invariant: serde asks for a value only after its key");
        seed.deserialize(node).map_err(|e| e.inside(key, node))
    }
}
