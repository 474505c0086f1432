//! A pickle machine that can build tensors, containers and plain values, and nothing else.
//!
//! Values live in an arena and refer to one another by index. A value that is used twice is not copied, a cycle or a nest of any depth costs
//! nothing, and nothing recurses; strings are slices of the file. Classes are looked up in one table ([`class`]); a name that is not in it is
//! refused as soon as it appears.

use std::collections::BTreeMap;

use super::Read;
use super::bytes::{Bytes, text};
use super::tensor::{Budget, Element, count};
use crate::limits;

/// Index of a value in its [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u32);

/// A value.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A number of more than 64 bits.
    Long,
    Float(f64),
    Text(&'a str),
    Tuple(Box<[Id]>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Class(Class),
    Storage(Box<Storage<'a>>),
    Tensor(Box<View<'a>>),
    /// An object that weights have no use for (an optimiser's settings, command-line arguments).
    Inert,
}

/// A run of numbers that lies beside the pickle.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) element: Element,
    /// Numbers in the run.
    pub(super) len: usize,
    /// The part that this object sees.
    part: (usize, usize),
}

/// A tensor: a strided view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View<'a> {
    pub(super) storage: Storage<'a>,
    offset: usize,
    pub(super) shape: Vec<usize>,
    stride: Vec<usize>,
}

/// What a class name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Class {
    Dict,
    Tensor,
    Parameter,
    Storage(Element),
    Inert,
}

/// The classes that are read. Inert ones are common in checkpoints; their objects are passed over.
fn class(module: &str, name: &str) -> Option<Class> {
    Some(match (module, name) {
        ("collections", "OrderedDict" | "defaultdict" | "Counter") | ("builtins" | "__builtin__", "dict") => Class::Dict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Class::Tensor,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Class::Parameter,
        ("torch", "DoubleStorage") => Class::Storage(Element::F64),
        ("torch", "FloatStorage") => Class::Storage(Element::F32),
        ("torch", "HalfStorage") => Class::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Class::Storage(Element::Bf16),
        ("torch", "LongStorage") => Class::Storage(Element::I64),
        ("torch", "IntStorage") => Class::Storage(Element::I32),
        ("torch", "ShortStorage") => Class::Storage(Element::I16),
        ("torch", "CharStorage") => Class::Storage(Element::I8),
        ("torch", "ByteStorage" | "BoolStorage") => Class::Storage(Element::U8),
        ("torch", "Size" | "device" | "float64" | "float32" | "float16" | "bfloat16" | "int64" | "int32" | "uint8" | "bool")
        | ("argparse", "Namespace")
        | ("types", "SimpleNamespace")
        | (
            "builtins" | "__builtin__",
            "set" | "frozenset" | "complex" | "slice" | "bytearray" | "list" | "tuple" | "int" | "float" | "str" | "object",
        )
        | ("_codecs", "encode")
        | ("datetime", "datetime" | "date" | "timedelta")
        | ("pathlib", "Path" | "PosixPath" | "WindowsPath" | "PurePosixPath")
        | ("numpy", "dtype" | "ndarray")
        | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct")
        | ("yacs.config", "CfgNode")
        | ("easydict", "EasyDict") => Class::Inert,
        _ => return None,
    })
}

/// A pickle that was run.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    /// Bytes that it took.
    pub(super) len: usize,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle that `bytes` begins with.
    pub(super) fn run(bytes: &'a [u8]) -> Read<Self> {
        let bytes = &bytes[..bytes.len().min(limits::PICKLE_BYTES)];
        let mut machine =
            Machine { bytes: Bytes::new(bytes), values: vec![], stack: vec![], marks: vec![], memo: BTreeMap::new(), tensors: 0 };
        for _ in 0..limits::PICKLE_STEPS {
            let at = machine.bytes.position();
            let done = machine.step().map_err(|e| format!("its pickle, at byte {at}: {e}"))?;
            if let Some(root) = done {
                return Ok(Self { values: machine.values, root, len: machine.bytes.position() });
            }
        }
        Err(format!("its pickle has more than {} instructions", limits::PICKLE_STEPS))
    }

    pub(super) fn root(&self) -> &Value<'a> {
        self.get(self.root)
    }

    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// The entries of a dictionary whose keys are text.
    pub(super) fn entries<'s>(&'s self, dict: &'s Value<'a>) -> impl Iterator<Item = (&'a str, &'s Value<'a>)> {
        let pairs: &[(Id, Id)] = if let Value::Dict(pairs) = dict { pairs } else { &[] };
        pairs.iter().filter_map(|&(k, v)| if let Value::Text(k) = self.get(k) { Some((*k, self.get(v))) } else { None })
    }

    /// Every storage that a tensor refers to, once.
    pub(super) fn storages(&self) -> Read<BTreeMap<&'a str, &Storage<'a>>> {
        let mut found: BTreeMap<&str, &Storage<'_>> = BTreeMap::new();
        for value in &self.values {
            if let Value::Storage(storage) = value {
                let first = *found.entry(storage.key).or_insert(storage);
                if first.element != storage.element || first.len != storage.len {
                    return Err(format!("the storage `{}` is described in two ways", storage.key));
                }
            }
        }
        Ok(found)
    }
}

struct Machine<'a> {
    bytes: Bytes<'a>,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
    /// Made so far.
    tensors: usize,
}

impl<'a> Machine<'a> {
    fn push(&mut self, value: Value<'a>) {
        // At most one value per step: the index fits.
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
    }

    fn pop(&mut self) -> Read<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("takes a value where there is none".to_string());
        }
        self.stack.pop().ok_or_else(|| "takes a value where there is none".to_string())
    }

    fn top(&self) -> Read<Id> {
        self.stack.last().copied().ok_or_else(|| "needs a value where there is none".to_string())
    }

    /// What was pushed since the last mark.
    fn since_mark(&mut self) -> Read<Vec<Id>> {
        let mark = self.marks.pop().ok_or("closes what was not opened")?;
        Ok(self.stack.split_off(mark))
    }

    fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    fn tuple(&mut self, n: usize) -> Read<()> {
        let mut parts = (0..n).map(|_| self.pop()).collect::<Read<Vec<_>>>()?;
        parts.reverse();
        self.push(Value::Tuple(parts.into()));
        Ok(())
    }

    fn text(&mut self, n: usize) -> Read<()> {
        let text = text(self.bytes.take(n)?)?;
        self.push(Value::Text(text));
        Ok(())
    }

    /// Bytes that are not text.
    fn raw(&mut self, n: usize) -> Read<()> {
        self.bytes.take(n)?;
        self.push(Value::Inert);
        Ok(())
    }

    /// An integer of `n` bytes, little endian, two's complement.
    fn long(&mut self, n: usize) -> Read<()> {
        let raw = self.bytes.take(n)?;
        self.push(if n <= 8 {
            let fill = if raw.last().is_some_and(|b| b & 0x80 != 0) { 0xFF } else { 0 };
            let mut wide = [fill; 8];
            wide[..n].copy_from_slice(raw);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            Value::Long
        });
        Ok(())
    }

    fn remember(&mut self, index: u32) -> Read<()> {
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Read<()> {
        let id = self.memo.get(&index).copied().ok_or_else(|| format!("recalls value {index}, which was never stored"))?;
        self.stack.push(id);
        Ok(())
    }

    fn extend(&mut self, items: Vec<Id>) -> Read<()> {
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::List(own) => own.extend(items),
            Value::Inert => {}
            _ => return Err("appends to something that is not a list".to_string()),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Read<()> {
        let dict = self.top()?;
        match &mut self.values[dict.0 as usize] {
            Value::Dict(own) if items.len().is_multiple_of(2) => own.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Value::Inert => {}
            _ => return Err("sets items of something that is not a dictionary".to_string()),
        }
        Ok(())
    }

    fn class(&mut self, module: &str, name: &str) -> Read<()> {
        let class = class(module, name).ok_or_else(|| {
            format!("names `{module}.{name}`; only tensors, containers and plain values are read, so save `model.state_dict()` instead of the model")
        })?;
        self.push(Value::Class(class));
        Ok(())
    }

    /// One instruction; the result, when it was the last.
    fn step(&mut self) -> Read<Option<Id>> {
        match self.bytes.u8()? {
            0x80 => match self.bytes.u8()? {
                2..=5 => {}
                v => return Err(format!("protocol {v}; 2 to 5 are read")),
            },
            0x95 => {
                self.bytes.take(8)?; // FRAME: a hint to unbuffered readers
            }
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => drop(self.since_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => {
                let v = self.bytes.u8()?;
                self.push(Value::Int(v.into()));
            }
            b'M' => {
                let v = self.bytes.u16()?;
                self.push(Value::Int(v.into()));
            }
            b'J' => {
                let v = self.bytes.i32()?;
                self.push(Value::Int(v.into()));
            }
            0x8a => {
                let n = self.bytes.u8()?;
                self.long(n.into())?;
            }
            0x8b => {
                let n = self.bytes.u32()?;
                self.long(n as usize)?;
            }
            b'G' => {
                let v = self.bytes.f64_be()?;
                self.push(Value::Float(v));
            }
            b'X' => {
                let n = self.bytes.u32()?;
                self.text(n as usize)?;
            }
            0x8c => {
                let n = self.bytes.u8()?;
                self.text(n.into())?;
            }
            0x8d => {
                let n = self.bytes.length()?;
                self.text(n)?;
            }
            b'U' => {
                let n = self.bytes.u8()?;
                self.short_string(n.into())?;
            }
            b'T' => {
                let n = self.bytes.u32()?;
                self.short_string(n as usize)?;
            }
            b'C' => {
                let n = self.bytes.u8()?;
                self.raw(n.into())?;
            }
            b'B' => {
                let n = self.bytes.u32()?;
                self.raw(n as usize)?;
            }
            0x8e => {
                let n = self.bytes.length()?;
                self.raw(n)?;
            }
            b')' => self.tuple(0)?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let parts = self.since_mark()?;
                self.push(Value::Tuple(parts.into()));
            }
            b']' => self.push(Value::List(vec![])),
            b'l' => {
                let items = self.since_mark()?;
                self.push(Value::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.extend(items)?;
            }
            b'}' => self.push(Value::Dict(vec![])),
            b'd' => {
                let items = self.since_mark()?;
                self.push(Value::Dict(vec![]));
                self.set(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(&items)?;
            }
            0x8f => self.push(Value::Inert),  // EMPTY_SET
            0x90 => drop(self.since_mark()?), // ADDITEMS
            0x91 => {
                self.since_mark()?; // FROZENSET
                self.push(Value::Inert);
            }
            b'q' => {
                let index = self.bytes.u8()?;
                self.remember(index.into())?;
            }
            b'r' => {
                let index = self.bytes.u32()?;
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let index = self.bytes.u8()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = self.bytes.u32()?;
                self.recall(index)?;
            }
            b'c' => {
                let (module, name) = (self.bytes.line()?, self.bytes.line()?);
                self.class(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (&Value::Text(module), &Value::Text(name)) = (self.get(module), self.get(name)) else {
                    return Err("names a class by something that is not text".to_string());
                };
                self.class(module, name)?;
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.call(callable, args)?;
            }
            0x92 => {
                let (_, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, args)?;
            }
            b'b' => {
                self.pop()?; // BUILD: attributes, which nothing here has
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(Value::Storage(storage.into()));
            }
            op => return Err(format!("instruction {op:#04x} is not read")),
        }
        Ok(None)
    }

    /// Python 2's strings: names, unless they hold other bytes.
    fn short_string(&mut self, n: usize) -> Read<()> {
        let raw = self.bytes.take(n)?;
        self.push(std::str::from_utf8(raw).map_or(Value::Inert, Value::Text));
        Ok(())
    }

    fn call(&mut self, callable: Id, args: Id) -> Read<()> {
        let (&Value::Class(class), Value::Tuple(args)) = (self.get(callable), self.get(args)) else {
            return Err("calls something that is not a class".to_string());
        };
        let first = args.first().copied();
        let made = match class {
            Class::Dict => Value::Dict(self.pairs(first)?),
            Class::Tensor => Value::Tensor(self.view(args)?.into()),
            Class::Parameter => match first.map(|f| self.get(f)) {
                Some(Value::Tensor(view)) => Value::Tensor(view.clone()),
                _ => return Err("makes a parameter of something that is not a tensor".to_string()),
            },
            Class::Storage(_) => return Err("calls a storage".to_string()),
            Class::Inert => Value::Inert,
        };
        if matches!(made, Value::Tensor(_)) {
            self.tensors += 1;
            if self.tensors > limits::TENSORS {
                return Err(format!("makes more than {} tensors", limits::TENSORS));
            }
        }
        self.push(made);
        Ok(())
    }

    /// What a dictionary is made of: a list of pairs, which Python 2 wrote, or another dictionary. Moved out of there: copies of one list,
    /// over and over, would cost what no file of its size should.
    fn pairs(&mut self, from: Option<Id>) -> Read<Vec<(Id, Id)>> {
        match from.map(|f| &mut self.values[f.0 as usize]) {
            Some(Value::Dict(pairs)) => Ok(std::mem::take(pairs)),
            Some(Value::List(items)) => {
                let items = std::mem::take(items);
                items.into_iter().map(|item| self.pair(item)).collect()
            }
            _ => Ok(vec![]),
        }
    }

    fn pair(&self, id: Id) -> Read<(Id, Id)> {
        match self.get(id) {
            Value::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            Value::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => Err("fills a dictionary with something that is not a pair".to_string()),
        }
    }

    fn size(&self, id: Id) -> Read<usize> {
        match self.get(id) {
            Value::Int(n) => usize::try_from(*n).map_err(|_| format!("has a size or offset of {n}")),
            Value::Long => Err("has a size or offset of more than 64 bits".to_string()),
            _ => Err("has a size or offset that is not a number".to_string()),
        }
    }

    fn sizes(&self, id: Id) -> Read<Vec<usize>> {
        match self.get(id) {
            Value::Tuple(sizes) if sizes.len() <= limits::DIMENSIONS => sizes.iter().map(|&s| self.size(s)).collect(),
            Value::Tuple(sizes) => Err(format!("has {} dimensions; at most {} are read", sizes.len(), limits::DIMENSIONS)),
            _ => Err("has a shape that is not a tuple".to_string()),
        }
    }

    /// `("storage", class, key, location, length)`; legacy files add `None` or `(key, offset, length)` of a part of it.
    fn storage(&self, id: Id) -> Read<Storage<'a>> {
        let unknown = || "refers to something outside that is not a storage".to_string();
        let Value::Tuple(parts) = self.get(id) else { return Err(unknown()) };
        let [tag, class, key, _, len, rest @ ..] = &**parts else { return Err(unknown()) };
        let (Value::Text("storage"), &Value::Class(Class::Storage(element)), &Value::Text(key)) =
            (self.get(*tag), self.get(*class), self.get(*key))
        else {
            return Err(unknown());
        };
        let len = self.size(*len)?;
        let part = match rest.first().map(|&r| self.get(r)) {
            Some(Value::Tuple(view)) if view.len() == 3 => (self.size(view[1])?, self.size(view[2])?),
            _ => (0, len),
        };
        match part.0.checked_add(part.1) {
            Some(end) if end <= len => Ok(Storage { key, element, len, part }),
            _ => Err(format!("takes numbers {part:?} of the storage `{key}`, which has {len}")),
        }
    }

    /// `(storage, offset, shape, strides, ..)`.
    fn view(&self, args: &[Id]) -> Read<View<'a>> {
        let [storage, offset, shape, stride, ..] = args else {
            return Err("makes a tensor of too little".to_string());
        };
        let Value::Storage(storage) = self.get(*storage) else {
            return Err("makes a tensor of something that is not a storage".to_string());
        };
        let view =
            View { storage: (**storage).clone(), offset: self.size(*offset)?, shape: self.sizes(*shape)?, stride: self.sizes(*stride)? };
        view.check()?;
        Ok(view)
    }
}

impl View<'_> {
    /// The view must lie inside its storage and not repeat it.
    fn check(&self) -> Read<()> {
        let (n, have) = (count(&self.shape)?, self.storage.part.1);
        let outside =
            || format!("views shape {:?}, strides {:?}, offset {} of a storage of {have} numbers", self.shape, self.stride, self.offset);
        if self.stride.len() != self.shape.len() || n > have {
            return Err(outside());
        }
        let mut last = self.offset;
        for (&size, &stride) in self.shape.iter().zip(&self.stride) {
            let reach = size.saturating_sub(1).checked_mul(stride);
            last = reach.and_then(|r| last.checked_add(r)).ok_or_else(outside)?;
        }
        if n > 0 && last >= have { Err(outside()) } else { Ok(()) }
    }

    /// The tensor, from the bytes of its storage.
    pub(super) fn tensor(&self, storage: &[u8], budget: &mut Budget) -> Read<candle_core::Tensor> {
        let (n, width) = (count(&self.shape)?, self.storage.element.size());
        budget.spend(n * width)?;
        let at = |i: usize| (self.storage.part.0 + self.offset + i) * width;
        let mut dense = 1;
        let is_dense = self.shape.iter().zip(&self.stride).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == dense;
            dense *= size;
            fits
        });
        if n == 0 || is_dense {
            let from = if n == 0 { 0 } else { at(0) };
            return self.storage.element.tensor(&storage[from..from + n * width], &self.shape);
        }
        let mut data = Vec::with_capacity(n * width);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..n {
            let from = at(index.iter().zip(&self.stride).map(|(i, s)| i * s).sum());
            data.extend_from_slice(&storage[from..from + width]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        self.storage.element.tensor(&data, &self.shape)
    }
}
