//! The GGUF container, versions 2 and 3, little-endian: settings and tensors of one mapped file.
//!
//! Layout (specification: `docs/gguf.md` of ggml): magic, version, tensor count, metadata count, metadata, tensor
//! headers, padding to the alignment, tensor data. Nothing in the header is believed: every count is compared with
//! the bytes that are left before anything is allocated for it, and arrays stay in the file until asked for.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_kernels::GgmlType;
use memmap2::Mmap;

use crate::error::ModelError;
use crate::weights::{Tensor, WeightSource};

const MAGIC: &[u8; 4] = b"GGUF";
/// Longest name of a setting or tensor; the specification says 2^16 - 1 for keys and 64 for tensors.
const NAME_LIMIT: u64 = 65_535;
/// Dimensions of a tensor in the specification.
const DIMENSION_LIMIT: u32 = 4;
/// Arrays inside arrays; real files have none.
const NESTING_LIMIT: usize = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Room that is made for settings or tensors on the word of a header alone; for more, as they are found.
const USUAL_COUNT: usize = 1 << 10;

/// A metadata value. Strings and arrays are places in the file, already checked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Str { start: usize, len: usize },
    Array { element: u32, count: usize, start: usize },
}

/// What a tensor header says, checked against the file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub ty: GgmlType,
    /// Sizes, slowest first: `[rows, cols]` for a matrix (GGUF itself writes the fastest first).
    pub shape: Vec<usize>,
    offset: usize,
    bytes: usize,
}

/// An open GGUF file.
pub struct GgufFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl GgufFile {
    /// Maps the file and checks its header, every setting and every tensor's place.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile, ModelError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
        // SAFETY: the mapping is only read. Weights are written once, by an atomic rename, and never changed in
        // place by Dormouse; someone else who truncates the file while it is served ends the process with SIGBUS.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| ModelError::io(path, source))?;
        let (metadata, tensors) = Reader { path, bytes: &map, at: 0 }.header()?;
        Ok(GgufFile { path: path.to_owned(), map: Arc::new(map), metadata, tensors })
    }

    /// The value of `general.architecture`.
    pub fn architecture(&self) -> Result<&str, ModelError> {
        self.str("general.architecture").ok_or_else(|| self.missing("general.architecture"))
    }

    pub fn u32(&self, key: &str) -> Option<u32> {
        match *self.metadata.get(key)? {
            Value::Unsigned(value) => value.try_into().ok(),
            Value::Signed(value) => value.try_into().ok(),
            _ => None,
        }
    }

    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.metadata.get(key)? {
            Value::Float(value) => Some(value as f32),
            Value::Unsigned(value) => Some(value as f32),
            Value::Signed(value) => Some(value as f32),
            _ => None,
        }
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.metadata.get(key)? {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub fn str(&self, key: &str) -> Option<&str> {
        match *self.metadata.get(key)? {
            Value::Str { start, len } => std::str::from_utf8(&self.map[start..start + len]).ok(),
            _ => None,
        }
    }

    /// The strings of an array, in order.
    pub fn strings(&self, key: &str) -> Option<Vec<&str>> {
        let (count, mut at) = self.array(key, 8)?;
        let mut strings = Vec::with_capacity(count);
        for _ in 0..count {
            let len = u64::from_le_bytes(*self.map[at..].first_chunk()?) as usize;
            strings.push(std::str::from_utf8(&self.map[at + 8..at + 8 + len]).ok()?);
            at += 8 + len;
        }
        Some(strings)
    }

    /// The numbers of an array of `u32` or `i32` (whose bits are taken as they are).
    pub fn u32s(&self, key: &str) -> Option<Vec<u32>> {
        let (count, at) = self.array(key, 4).or_else(|| self.array(key, 5))?;
        Some(
            self.map[at..at + count * 4]
                .as_chunks()
                .0
                .iter()
                .map(|chunk| u32::from_le_bytes(*chunk))
                .collect(),
        )
    }

    /// The numbers of an array of `f32`.
    pub fn f32s(&self, key: &str) -> Option<Vec<f32>> {
        let (count, at) = self.array(key, 6)?;
        Some(
            self.map[at..at + count * 4]
                .as_chunks()
                .0
                .iter()
                .map(|chunk| f32::from_le_bytes(*chunk))
                .collect(),
        )
    }

    /// The values of an array of `bool`.
    pub fn bools(&self, key: &str) -> Option<Vec<bool>> {
        let (count, at) = self.array(key, 7)?;
        Some(self.map[at..at + count].iter().map(|&value| value != 0).collect())
    }

    /// Count and place of an array whose elements have this GGUF value type.
    fn array(&self, key: &str, wanted: u32) -> Option<(usize, usize)> {
        match *self.metadata.get(key)? {
            Value::Array { element, count, start } if element == wanted => Some((count, start)),
            _ => None,
        }
    }

    /// Whether the file has this setting, of whatever type.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// Every tensor's name and header, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> usize {
        self.map.len()
    }

    pub(crate) fn missing(&self, key: &str) -> ModelError {
        ModelError::missing_metadata(&self.path, key)
    }
}

impl WeightSource for GgufFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        let info = self.tensors.get(name)?;
        let (cols, outer) = info.shape.split_last()?;
        Some(Tensor::new(info.ty, outer.iter().product(), *cols, self.map.clone(), info.offset))
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }
}

/// A cursor that never leaves the file.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

type Header = (HashMap<String, Value>, HashMap<String, TensorInfo>);

impl<'a> Reader<'a> {
    fn malformed(&self, what: impl Into<String>) -> ModelError {
        ModelError::malformed(self.path, what)
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `len` bytes; `what` names them in the error.
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], ModelError> {
        if len > self.left() {
            return Err(self.malformed(format!(
                "the file ends inside its header: {what} needs {len} bytes at offset {}, the file has {} bytes; \
                 it is damaged or only partly downloaded, fetch it again",
                self.at,
                self.bytes.len()
            )));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn number<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut number = [0; N];
        number.copy_from_slice(self.take(N as u64, what)?);
        Ok(number)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.number(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.number(what)?))
    }

    /// A count of things of which each takes at least `least` bytes.
    fn count(&mut self, what: &str, least: u64) -> Result<usize, ModelError> {
        let count = self.u64(what)?;
        if count > self.left() / least {
            return Err(self.malformed(format!(
                "{what} is {count}, but only {} of the file's {} bytes are left; it is damaged or only partly \
                 downloaded, fetch it again",
                self.left(),
                self.bytes.len()
            )));
        }
        Ok(count as usize)
    }

    fn string(&mut self, what: &str) -> Result<(usize, &'a str), ModelError> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        let text = std::str::from_utf8(bytes)
            .map_err(|error| self.malformed(format!("{what} is not UTF-8 ({error})")))?;
        Ok((self.at - bytes.len(), text))
    }

    fn name(&mut self, what: &str) -> Result<&'a str, ModelError> {
        let (_, name) = self.string(what)?;
        if name.is_empty() || name.len() as u64 > NAME_LIMIT {
            return Err(
                self.malformed(format!("{what} has {} bytes (1 to {NAME_LIMIT} allowed)", name.len()))
            );
        }
        Ok(name)
    }

    fn header(mut self) -> Result<Header, ModelError> {
        let magic = self.take(4, "the magic number")?;
        if magic != MAGIC {
            return Err(self.malformed("not a GGUF file (it does not begin with the letters GGUF)"));
        }
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            1 => {
                return Err(self.malformed(
                    "GGUF version 1 is not supported: convert the file to version 3 with a current llama.cpp",
                ));
            }
            _ if matches!(version.swap_bytes(), 1..=3) => {
                return Err(
                    self.malformed("a big-endian GGUF file is not supported: convert it to little-endian")
                );
            }
            _ => {
                return Err(self.malformed(format!("GGUF version {version} is not supported (2 and 3 are)")));
            }
        }
        // The smallest tensor header: name (8 + 1), dimension count 4, one dimension 8, type 4, offset 8.
        let tensor_count = self.count("the number of tensors", 33)?;
        // The smallest setting: key (8 + 1), type 4, a value of one byte.
        let metadata_count = self.count("the number of settings", 14)?;

        let mut metadata = HashMap::with_capacity(metadata_count.min(USUAL_COUNT));
        for _ in 0..metadata_count {
            let key = self.name("a setting's name")?;
            let kind = self.u32(key)?;
            let value = self.value(kind, key, 0)?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return Err(self.malformed(format!("the setting '{key}' occurs twice")));
            }
        }
        if let Some(&Value::Unsigned(parts @ 2..)) = metadata.get("split.count") {
            return Err(self.malformed(format!(
                "this is one of {parts} parts of a split model; merge them with `llama-gguf-split --merge` first"
            )));
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(&Value::Unsigned(alignment)) if alignment.is_power_of_two() && alignment <= 1 << 20 => {
                alignment
            }
            Some(other) => {
                return Err(self.malformed(format!("general.alignment is {other:?}, not a power of two")));
            }
        };

        let mut tensors = HashMap::with_capacity(tensor_count.min(USUAL_COUNT));
        for _ in 0..tensor_count {
            let (name, info) = self.tensor_header(alignment)?;
            if tensors.insert(name.to_owned(), info).is_some() {
                return Err(self.malformed(format!("the tensor '{name}' occurs twice")));
            }
        }
        self.place(&mut tensors, alignment)?;
        Ok((metadata, tensors))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Unsigned(self.number::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.number(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.number(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.number(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.number(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.number(key)?).into()),
            7 => match self.number::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.malformed(format!("'{key}' is a boolean of value {other}"))),
            },
            8 => {
                let (start, text) = self.string(key)?;
                Value::Str { start, len: text.len() }
            }
            9 => return self.array(key, depth),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.number(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.number(key)?)),
            _ => return Err(self.malformed(format!("'{key}' has the unknown value type {kind}"))),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Value, ModelError> {
        if depth == NESTING_LIMIT {
            return Err(self.malformed(format!("'{key}' nests arrays more than {NESTING_LIMIT} deep")));
        }
        let element = self.u32(key)?;
        let size = match element {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => {
                return Err(
                    self.malformed(format!("'{key}' is an array of the unknown value type {element}"))
                );
            }
        };
        let count = self.count(key, size)?;
        let start = self.at;
        if matches!(element, 8 | 9) {
            for _ in 0..count {
                self.value(element, key, depth + 1)?;
            }
        } else {
            self.take(count as u64 * size, key)?;
        }
        Ok(Value::Array { element, count, start })
    }

    /// One tensor's header; its offset is still relative to the tensor data.
    fn tensor_header(&mut self, alignment: u64) -> Result<(&'a str, TensorInfo), ModelError> {
        let name = self.name("a tensor's name")?;
        let dimensions = self.u32(name)?;
        if !(1..=DIMENSION_LIMIT).contains(&dimensions) {
            return Err(self.malformed(format!(
                "tensor '{name}' has {dimensions} dimensions (1 to {DIMENSION_LIMIT} allowed)"
            )));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            shape.push(self.u64(name)?);
        }
        shape.reverse();
        let type_number = self.u32(name)?;
        let ty = GgmlType::from_gguf(type_number)
            .ok_or_else(|| ModelError::unsupported_type(self.path, name, type_name(type_number)))?;
        let offset = self.u64(name)?;

        let values = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let cols = shape.last().copied().unwrap_or(0);
        let bytes = values
            .filter(|&values| values > 0 && cols % ty.block_len() as u64 == 0)
            .and_then(|values| (values / ty.block_len() as u64).checked_mul(ty.block_bytes() as u64))
            .ok_or_else(|| {
                self.malformed(format!(
                    "tensor '{name}' has the impossible shape {shape:?} for type {}",
                    ty.name()
                ))
            })?;
        if !offset.is_multiple_of(alignment) {
            return Err(self.malformed(format!(
                "tensor '{name}' lies at offset {offset}, which is no multiple of the alignment {alignment}"
            )));
        }
        let fits = |number: u64| {
            usize::try_from(number)
                .map_err(|_| self.malformed(format!("tensor '{name}' is larger than memory: {number} bytes")))
        };
        let (offset, bytes) = (fits(offset)?, fits(bytes)?);
        let shape = shape.into_iter().map(fits).collect::<Result<_, _>>()?;
        Ok((name, TensorInfo { ty, shape, offset, bytes }))
    }

    /// Turns offsets into places in the file, and checks that all tensors lie inside it and apart.
    fn place(&self, tensors: &mut HashMap<String, TensorInfo>, alignment: u64) -> Result<(), ModelError> {
        let data_start = self.at.next_multiple_of(alignment as usize);
        let mut places: Vec<(&String, &mut TensorInfo)> = tensors.iter_mut().collect();
        places.sort_unstable_by_key(|(name, info)| (info.offset, *name));
        for (name, info) in &mut places {
            let end = info.offset.checked_add(data_start).and_then(|start| start.checked_add(info.bytes));
            match end {
                Some(end) if end <= self.bytes.len() => info.offset += data_start,
                _ => {
                    let end = data_start as u128 + info.offset as u128 + info.bytes as u128;
                    return Err(self.malformed(format!(
                        "tensor '{name}' ends at byte {end}, but the file has only {} bytes; it is damaged or only \
                         partly downloaded, fetch it again",
                        self.bytes.len()
                    )));
                }
            }
        }
        for pair in places.windows(2) {
            let ((first, before), (second, after)) = (&pair[0], &pair[1]);
            if before.offset + before.bytes > after.offset {
                return Err(self.malformed(format!("the tensors '{first}' and '{second}' overlap")));
            }
        }
        Ok(())
    }
}

/// The names of types that exist but have no decoder here, for the error message.
fn type_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        _ => return format!("number {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests;
