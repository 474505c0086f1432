//! The pickle machine, with everything taken out that could run code.
//!
//! The object of a pickle is a table of nodes ([`Object`]) whose values point at one another by number: shared and cyclic structures cost what
//! they take in the file, and nothing here recurses. Of Python's functions a handful is recognised by name (tensors, ordered dictionaries, sizes); whatever
//! else a pickle calls becomes [`Node::Opaque`].

use std::collections::BTreeMap;

use crate::MAX_TENSORS;
use crate::element::Element;

/// The longest pickle.
pub(crate) const MAX_BYTES: u64 = 64 << 20;
const MAX_OPCODES: usize = 1_000_000;
const MAX_DEPTH: u8 = 64;
/// The longest integer, in bytes: that of a legacy file's magic number, with room.
const MAX_LONG: usize = 16;
const MAX_DIMS: usize = 64;

/// Functions that no weight file needs and that attacks are made of: such a file is refused whole.
const REFUSED_MODULES: [&str; 10] = ["os", "posix", "nt", "subprocess", "pty", "runpy", "importlib", "shutil", "socket", "webbrowser"];
const REFUSED_BUILTINS: [&str; 5] = ["eval", "exec", "compile", "open", "__import__"];

/// What an opcode leaves on the stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits: little-endian, two's complement.
    Long(&'a [u8]),
    Float,
    Str(&'a str),
    Bytes,
    /// The node of this number.
    Node(usize),
}

#[derive(Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// A class or function.
    Global(Box<Function<'a>>),
    Storage(Box<Storage<'a>>),
    Tensor(Box<TensorRef<'a>>),
    /// What this function would have made.
    Opaque(Box<Function<'a>>),
}

/// A Python class or function by its names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function<'a> {
    module: &'a str,
    name: &'a str,
}

/// The elements behind tensors, by their name in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) element: Element,
    pub(super) numel: usize,
}

impl Storage<'_> {
    /// Bytes of all elements; known to fit, as the storage would not have been made otherwise.
    pub(super) fn bytes(&self) -> usize {
        self.numel * self.element.size()
    }
}

/// A tensor: a strided view of a storage, inside it, with no more elements than it.
#[derive(Clone, Debug)]
pub(super) struct TensorRef<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a> TensorRef<'a> {
    fn new(storage: Storage<'a>, offset: usize, shape: Vec<usize>, strides: Vec<usize>) -> Result<Self, String> {
        let fits = || {
            let count = storage.element.bytes(&shape)? / storage.element.size();
            let mut last = Some(offset);
            for (&d, &s) in shape.iter().zip(&strides).filter(|_| count > 0) {
                last = last?.checked_add((d - 1).checked_mul(s)?);
            }
            (count == 0 || (count <= storage.numel && last? < storage.numel)).then_some(())
        };
        if shape.len() != strides.len() || shape.len() > MAX_DIMS {
            return Err(format!("a tensor of shape {shape:?} with strides {strides:?}"));
        }
        fits().ok_or_else(|| {
            let Storage { key, numel, .. } = storage;
            format!("a tensor of shape {shape:?}, strides {strides:?}, offset {offset} over storage `{key}` of {numel} elements")
        })?;
        Ok(Self { storage, offset, shape, strides })
    }

    /// Whether the elements follow one another in the storage.
    pub(super) fn is_row_major(&self) -> bool {
        let mut expected = 1;
        self.shape.contains(&0)
            || self.shape.iter().zip(&self.strides).rev().all(|(&d, &s)| {
                let fits = d == 1 || s == expected;
                expected *= d;
                fits
            })
    }

    /// Where each element stands in the storage, in row-major order.
    pub(super) fn indices(&self) -> Result<Vec<u32>, String> {
        if u32::try_from(self.storage.numel).is_err() {
            return Err(format!("strides {:?} in a storage of {} elements, which are too many", self.strides, self.storage.numel));
        }
        let mut all = vec![self.offset as u32];
        for (&d, &s) in self.shape.iter().zip(&self.strides) {
            all = all.iter().flat_map(|&at| (0..d).map(move |i| at + (i * s) as u32)).collect();
        }
        Ok(all)
    }
}

/// An unpickled object.
pub(super) struct Object<'a> {
    nodes: Vec<Node<'a>>,
    pub(super) top: Value<'a>,
    /// Bytes of the pickle, its end included.
    pub(super) len: usize,
}

impl<'a> Object<'a> {
    pub(super) fn node(&self, value: Value<'a>) -> Option<&Node<'a>> {
        match value {
            Value::Node(i) => self.nodes.get(i),
            _ => None,
        }
    }

    pub(super) fn list(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.node(value)? {
            Node::List(items) => Some(items),
            _ => None,
        }
    }

    /// Every storage that the object mentions, in its order.
    pub(super) fn storages(&self) -> impl Iterator<Item = &Storage<'a>> {
        self.nodes.iter().filter_map(|node| match node {
            Node::Storage(storage) => Some(&**storage),
            _ => None,
        })
    }

    /// A value in words.
    pub(super) fn describe(&self, value: Value<'a>) -> String {
        describe(&self.nodes, value)
    }
}

fn describe(nodes: &[Node], value: Value) -> String {
    let what = match value {
        Value::None => "None",
        Value::Bool(_) => "a truth value",
        Value::Int(n) => return format!("the number {n}"),
        Value::Long(_) => "a long number",
        Value::Float => "a number",
        Value::Str(s) => return format!("`{}`", s.chars().take(100).collect::<String>()),
        Value::Bytes => "bytes",
        Value::Node(i) => match nodes.get(i) {
            Some(Node::Tuple(_)) => "a tuple",
            Some(Node::List(_)) => "a list",
            Some(Node::Dict(_)) => "a dictionary",
            Some(Node::Storage(_)) => "a storage",
            Some(Node::Tensor(_)) => "a tensor",
            Some(Node::Global(f)) => return format!("the function or class {}.{}", f.module, f.name),
            Some(Node::Opaque(f)) => return format!("an object made by {}.{}", f.module, f.name),
            None => "nothing",
        },
    };
    what.to_string()
}

/// Reads the pickle that `bytes` begin with.
///
/// # Errors
/// Anything that `torch.save` does not write, and more of it than the limits; the text says what and at which byte.
pub(super) fn read(bytes: &[u8]) -> Result<Object<'_>, String> {
    // No more values than opcodes, and no more of those than bytes: room at once instead of by doubling.
    let room = bytes.len().min(MAX_OPCODES);
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::with_capacity(room),
        marks: Vec::new(),
        memo: BTreeMap::new(),
        nodes: Vec::with_capacity(room),
        depths: Vec::with_capacity(room),
        tensors: 0,
    };
    for _ in 0..MAX_OPCODES {
        let at = machine.at;
        if machine.step().map_err(|e| format!("{e} (byte {at})"))? {
            let top = machine.pop().map_err(|e| format!("{e} (byte {at})"))?;
            return Ok(Object { nodes: machine.nodes, top, len: machine.at });
        }
    }
    Err(format!("more than {MAX_OPCODES} opcodes"))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack that MARK noted.
    marks: Vec<usize>,
    /// Grows by small steps, which a hash table does not.
    memo: BTreeMap<u32, Value<'a>>,
    nodes: Vec<Node<'a>>,
    /// Levels inside each node, known when it was made.
    depths: Vec<u8>,
    tensors: usize,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; whether it was the last.
    fn step(&mut self) -> Result<bool, String> {
        let [opcode] = self.array()?;
        match opcode {
            b'.' => return Ok(true),
            // PROTO, FRAME: nothing that matters here.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),

            // The stack and the memo.
            b'(' => {
                if self.marks.len() >= usize::from(MAX_DEPTH) {
                    return Err(format!("more than {MAX_DEPTH} levels"));
                }
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.peek()?;
                self.stack.push(top);
            }
            b'q' => {
                let [i] = self.array()?;
                self.put(i.into())?;
            }
            b'r' => {
                let i = u32::from_le_bytes(self.array()?);
                self.put(i)?;
            }
            0x94 => self.put(self.memo.len() as u32)?,
            b'h' => {
                let [i] = self.array()?;
                self.get(i.into())?;
            }
            b'j' => {
                let i = u32::from_le_bytes(self.array()?);
                self.get(i)?;
            }

            // Plain values.
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(n.into()));
            }
            b'K' => {
                let [n] = self.array()?;
                self.stack.push(Value::Int(n.into()));
            }
            b'M' => {
                let n = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(n.into()));
            }
            0x8a => {
                let len = self.length::<1>()?;
                self.long(len)?;
            }
            0x8b => {
                let len = self.length::<4>()?;
                self.long(len)?;
            }
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            // Text: UTF-8, and the byte strings of Python 2, which the old files' keys are.
            b'X' => self.text::<4>()?,
            0x8c => self.text::<1>()?,
            0x8d => self.text::<8>()?,
            b'T' => self.text::<4>()?,
            b'U' => self.text::<1>()?,
            b'B' => self.byte_string::<4>()?,
            b'C' => self.byte_string::<1>()?,
            0x8e | 0x96 => self.byte_string::<8>()?,

            // Containers.
            b')' => self.make(Node::Tuple(Vec::new()))?,
            0x85..=0x87 => {
                let height = self.height(usize::from(opcode - 0x84))?;
                let items = self.stack.split_off(height);
                self.make(Node::Tuple(items))?;
            }
            b't' | 0x91 => {
                let items = self.pop_mark()?;
                self.make(Node::Tuple(items))?;
            }
            b']' | 0x8f => self.make(Node::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Node::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            b'}' => self.make(Node::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.make(Node::Dict(Vec::new()))?;
                self.insert(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.insert(items)?;
            }

            // Functions and classes, none of which is called.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Str(name), Value::Str(module)) => self.global(module, name)?,
                _ => return Err("a function whose name is not a text".to_string()),
            },
            b'R' | 0x81 => {
                let (args, function) = (self.pop()?, self.pop()?);
                self.call(function, args)?;
            }
            0x92 => {
                let (_, args, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(class, args)?;
            }
            // BUILD would set attributes: of the ordered dictionary (`_metadata`), a parameter, an opaque object.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.make(Node::Storage(Box::new(storage)))?;
            }
            _ => return Err(format!("opcode 0x{opcode:02x}, which torch.save does not write")),
        }
        Ok(false)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..len).ok_or_else(|| format!("cut short: {len} bytes wanted, {} left", rest.len()))?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        Ok(*taken.first_chunk().expect("invariant: as many as were asked for"))
    }

    /// A length written in `N` bytes.
    fn length<const N: usize>(&mut self) -> Result<usize, String> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.array::<N>()?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|e| e.to_string())
    }

    fn long(&mut self, len: usize) -> Result<(), String> {
        if len > MAX_LONG {
            return Err(format!("an integer of {len} bytes"));
        }
        let bytes = self.take(len)?;
        self.stack.push(if len > 8 {
            Value::Long(bytes)
        } else {
            let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..len].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        });
        Ok(())
    }

    fn text<const N: usize>(&mut self) -> Result<(), String> {
        let len = self.length::<N>()?;
        let bytes = self.take(len)?;
        // A byte string of Python 2 may be anything (NumPy's data); only text can be a key.
        self.stack.push(std::str::from_utf8(bytes).map_or(Value::Bytes, Value::Str));
        Ok(())
    }

    fn byte_string<const N: usize>(&mut self) -> Result<(), String> {
        let len = self.length::<N>()?;
        self.take(len)?;
        self.stack.push(Value::Bytes);
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("cut short: a name without an end")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not UTF-8".to_string())
    }

    /// The height of the stack below its last `count` values, none of which lies below a mark.
    fn height(&self, count: usize) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(count).filter(|&h| h >= floor).ok_or_else(|| "a value is missing".to_string())
    }

    fn pop(&mut self) -> Result<Value<'a>, String> {
        let height = self.height(1)?;
        let value = self.stack[height];
        self.stack.truncate(height);
        Ok(value)
    }

    fn peek(&self) -> Result<Value<'a>, String> {
        Ok(self.stack[self.height(1)?])
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let height = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(height))
    }

    fn put(&mut self, index: u32) -> Result<(), String> {
        let top = self.peek()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn get(&mut self, index: u32) -> Result<(), String> {
        let value = self.memo.get(&index).ok_or_else(|| format!("value {index} is used before it is made"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn node(&self, value: Value<'a>) -> Option<&Node<'a>> {
        match value {
            Value::Node(i) => self.nodes.get(i),
            _ => None,
        }
    }

    /// Levels of a container of these values.
    fn depth(&self, items: &[Value<'a>]) -> Result<u8, String> {
        let inside = items.iter().map(|v| if let Value::Node(i) = v { self.depths.get(*i).copied().unwrap_or(0) } else { 0 });
        match inside.max().unwrap_or(0) {
            MAX_DEPTH.. => Err(format!("more than {MAX_DEPTH} levels")),
            inside => Ok(inside + 1),
        }
    }

    fn make(&mut self, node: Node<'a>) -> Result<(), String> {
        let depth = match &node {
            Node::Tuple(items) | Node::List(items) => self.depth(items)?,
            _ => 1,
        };
        self.nodes.push(node);
        self.depths.push(depth);
        self.stack.push(Value::Node(self.nodes.len() - 1));
        Ok(())
    }

    /// The node on top of the stack, which is about to get `items`.
    fn container(&mut self, items: &[Value<'a>]) -> Result<&mut Node<'a>, String> {
        let depth = self.depth(items)?;
        let Value::Node(i) = self.peek()? else { return Err("something is put into a value that is no container".to_string()) };
        self.depths[i] = self.depths[i].max(depth);
        Ok(&mut self.nodes[i])
    }

    fn append(&mut self, mut items: Vec<Value<'a>>) -> Result<(), String> {
        match self.container(&items)? {
            // Most are filled once: not more room than for that.
            Node::List(list) if list.is_empty() => *list = items,
            Node::List(list) => list.append(&mut items),
            Node::Opaque(..) => {}
            _ => return Err("an item is put into a value that is no list".to_string()),
        }
        Ok(())
    }

    fn insert(&mut self, items: Vec<Value<'a>>) -> Result<(), String> {
        let entries = items.chunks_exact(2).map(|e| (e[0], e[1]));
        if items.len() % 2 == 1 {
            return Err("a key without a value".to_string());
        }
        match self.container(&items)? {
            Node::Dict(dict) if dict.is_empty() => *dict = entries.collect(),
            Node::Dict(dict) => dict.extend(entries),
            Node::Opaque(..) => {}
            _ => return Err("an entry is put into a value that is no dictionary".to_string()),
        }
        Ok(())
    }

    fn global(&mut self, module: &'a str, name: &'a str) -> Result<(), String> {
        let builtin = matches!(module, "builtins" | "__builtin__") && REFUSED_BUILTINS.contains(&name);
        if builtin || REFUSED_MODULES.contains(&module.split('.').next().unwrap_or_default()) {
            return Err(format!("asks Python to call {module}.{name}: an attack, not a file of weights"));
        }
        self.make(Node::Global(Box::new(Function { module, name })))
    }

    /// What `function(*args)` stands for.
    fn call(&mut self, function: Value<'a>, args: Value<'a>) -> Result<(), String> {
        let Some(Node::Tuple(args)) = self.node(args) else { return Err("a function is called without a tuple".to_string()) };
        let callee = match self.node(function) {
            Some(Node::Global(callee)) => **callee,
            // An object made by an object.
            Some(Node::Opaque(callee)) => return self.make(Node::Opaque(callee.clone())),
            _ => return Err(format!("{} is called", describe(&self.nodes, function))),
        };
        let made = match (callee.module, callee.name, args.as_slice()) {
            ("torch._utils", "_rebuild_tensor_v2", [storage, offset, shape, strides, _, ..])
            | ("torch._utils", "_rebuild_tensor", [storage, offset, shape, strides]) => {
                let Some(Node::Storage(storage)) = self.node(*storage) else { return Err("a tensor without a storage".to_string()) };
                let offset = self.dims(&[*offset])?[0];
                let tensor = TensorRef::new(**storage, offset, self.shape(*shape)?, self.shape(*strides)?)?;
                self.tensors += 1;
                if self.tensors > MAX_TENSORS {
                    return Err(format!("more than {MAX_TENSORS} tensors"));
                }
                Node::Tensor(Box::new(tensor))
            }
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state", [data, ..]) => match self.node(*data) {
                Some(Node::Tensor(tensor)) => Node::Tensor(tensor.clone()),
                _ => return Err("a parameter without a tensor".to_string()),
            },
            // A tensor that carries Python attributes.
            ("torch._tensor", "_rebuild_from_type_v2", &[function, _, args, _]) if self.is_tensor_function(function) => {
                return self.call(function, args);
            }
            ("collections", "OrderedDict", []) => Node::Dict(Vec::new()),
            // As Python 2 wrote it.
            ("collections", "OrderedDict", [pairs]) => Node::Dict(self.pairs(*pairs)?),
            ("torch", "Size", &[dims]) => Node::Tuple(self.items(dims)?.to_vec()),
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor", _) => {
                return Err("a tensor from another number of arguments than torch.save writes".to_string());
            }
            _ => Node::Opaque(Box::new(callee)),
        };
        self.make(made)
    }

    fn is_tensor_function(&self, function: Value<'a>) -> bool {
        matches!(self.node(function), Some(Node::Global(f)) if f.module == "torch._utils")
    }

    fn items(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match self.node(value) {
            Some(Node::Tuple(items) | Node::List(items)) => Ok(items),
            _ => Err(format!("{} instead of a tuple", describe(&self.nodes, value))),
        }
    }

    fn pairs(&self, value: Value<'a>) -> Result<Vec<(Value<'a>, Value<'a>)>, String> {
        let pair = |&pair: &Value<'a>| match self.items(pair)? {
            &[key, value] => Ok((key, value)),
            _ => Err("an entry of an ordered dictionary that is not a pair".to_string()),
        };
        self.items(value)?.iter().map(pair).collect()
    }

    fn shape(&self, value: Value<'a>) -> Result<Vec<usize>, String> {
        self.dims(self.items(value)?)
    }

    fn dims(&self, values: &[Value<'a>]) -> Result<Vec<usize>, String> {
        let dim = |&value: &Value<'a>| match value {
            Value::Int(n) => usize::try_from(n).map_err(|_| format!("the size {n}")),
            other => Err(format!("the size {}", describe(&self.nodes, other))),
        };
        values.iter().map(dim).collect()
    }

    /// The storage behind `('storage', class, key, device, elements)`; older files add a sixth entry, None.
    fn storage(&self, id: Value<'a>) -> Result<Storage<'a>, String> {
        let &[Value::Str("storage"), class, Value::Str(key), _, numel, ref view @ ..] = self.items(id)? else {
            return Err("a reference to something else than a storage".to_string());
        };
        if !matches!(view, [] | [Value::None]) {
            return Err(format!("storage `{key}` is a part of another, as PyTorch before 0.4 wrote; save the file again"));
        }
        let Some(Node::Global(class)) = self.node(class) else { return Err(format!("storage `{key}` has no class")) };
        let element = match class.name {
            "FloatStorage" => Element::F32,
            "DoubleStorage" => Element::F64,
            "HalfStorage" => Element::F16,
            "BFloat16Storage" => Element::BF16,
            "LongStorage" => Element::I64,
            "IntStorage" => Element::I32,
            "ShortStorage" => Element::I16,
            "CharStorage" => Element::I8,
            "ByteStorage" => Element::U8,
            "BoolStorage" => Element::Bool,
            _ => return Err(format!("storage `{key}` is a {}.{}, which is not supported", class.module, class.name)),
        };
        let numel = self.dims(&[numel])?[0];
        element.bytes(&[numel]).ok_or_else(|| format!("storage `{key}` of {numel} elements"))?;
        Ok(Storage { key, element, numel })
    }
}
