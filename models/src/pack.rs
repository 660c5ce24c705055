//! Packed weights of a model: a file beside its data, made once, mapped ever after.
//!
//! Quantised matrices are multiplied as tiles ([`dormouse_kernels::packed`]), which no model file holds. The tiles of a model
//! lie in `<model file>.<weights hash>-v<version>.pack`, so a changed model or layout finds no file and makes another one; it is written
//! beside and renamed, so that a crash leaves none. Layout: magic, length of the index (u64, little-endian), BLAKE3 of the
//! index, the index as JSON, then each matrix at a multiple of 4 KiB.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_kernels::cpu::Pool;
use dormouse_kernels::{GgmlType, packed};
use memmap2::{Advice, Mmap, MmapMut, MmapOptions};
use rustix::fs::{FallocateFlags, FlockOperation};
use serde::{Deserialize, Serialize};

use crate::ModelError;
use crate::machine::Memory;
use crate::weights::{Operand, Tensor, WeightSource};

const MAGIC: &[u8; 8] = b"DORMPACK";
const HEADER_BYTES: usize = 8 + 8 + 32;
const ALIGNMENT: usize = 4096;
/// Looked up row by row; where it is not the output matrix too, it is never multiplied with.
const EMBEDDING: &str = "token_embd.weight";

/// The packed matrices of one model.
pub struct PackedWeights {
    map: Arc<Mmap>,
    matrices: HashMap<String, Place>,
    /// The file that is mapped; None: they lie in memory.
    file: Option<PathBuf>,
    /// Whether the places hold their matrices.
    filled: bool,
}

/// What a loaded model's weights take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HeldBytes {
    /// The tiles of every quantised matrix that is multiplied with.
    pub packed: u64,
    /// The pack file, when the tiles lie in one; 0 where there is nothing to pack.
    pub pack_file: u64,
    /// Float tensors, which are used where they lie in the model's file.
    pub floats: u64,
    /// The quantised embedding, of which single rows are read from the model's file.
    pub looked_up: u64,
}

impl HeldBytes {
    /// What the weights of `source` will take; reads nothing but its header.
    pub fn of(source: &dyn WeightSource) -> HeldBytes {
        let room = index_room(source);
        let places = plan(source, room);
        let packed = places.iter().filter_map(Place::bytes).sum::<usize>() as u64;
        let (mut floats, mut looked_up) = (0, 0);
        for name in source.names() {
            let Some(tensor) = source.tensor(name) else { continue };
            let bytes = tensor.bytes().len() as u64;
            match tensor.ty.is_packed() {
                false => floats += bytes,
                true if name == EMBEDDING => looked_up += bytes,
                true => {}
            }
        }
        let pack_file = if places.is_empty() { 0 } else { end(&places, room) as u64 };
        HeldBytes { packed, pack_file, floats, looked_up }
    }
}

/// Where packed weights are kept, and who hears of the work of making them.
pub struct PackFile<'a> {
    /// Folders that may hold the pack; it is made in the first that can be written.
    pub folders: &'a [PathBuf],
    /// BLAKE3 of the model ([`crate::hash_weights`]).
    pub weights_hash: [u8; 32],
    /// Told (bytes done, bytes in all) while a pack is made.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

#[derive(Serialize, Deserialize)]
struct Index {
    version: u32,
    weights: String,
    bytes: usize,
    matrices: Vec<Place>,
}

/// A matrix in a pack.
#[derive(Clone, Serialize, Deserialize)]
struct Place {
    name: String,
    #[serde(rename = "type")]
    ty: String,
    rows: usize,
    cols: usize,
    offset: usize,
}

impl Place {
    fn ty(&self) -> Option<GgmlType> {
        GgmlType::ALL.into_iter().find(|ty| ty.name() == self.ty && ty.is_packed())
    }

    fn bytes(&self) -> Option<usize> {
        let ty = self.ty()?;
        let whole = self.cols.is_multiple_of(ty.block_len()) && self.rows < 1 << 32 && self.cols < 1 << 32;
        whole.then(|| ty.packed_bytes(self.rows, self.cols))
    }
}

impl PackedWeights {
    /// Packs every quantised matrix of `source` into memory, for as long as the value lives.
    pub fn in_memory(source: &dyn WeightSource) -> Result<PackedWeights, ModelError> {
        let matrices = plan(source, 0);
        let error = |source_error| ModelError::io(source.path(), source_error);
        let mut map = MmapMut::map_anon(end(&matrices, 0).max(1)).map_err(error)?;
        fill(source, &matrices, &mut map, &mut |_, _| {});
        let map = map.make_read_only().map_err(error)?;
        Ok(PackedWeights { map: Arc::new(map), matrices: by_name(matrices), file: None, filled: true })
    }

    /// The places of every matrix over memory that holds nothing: a decoder built on it checks all that the model's file
    /// says, at no cost, and computes nothing.
    pub fn without_contents(source: &dyn WeightSource) -> Result<PackedWeights, ModelError> {
        let matrices = plan(source, 0);
        let map = MmapOptions::new().len(end(&matrices, 0).max(1)).no_reserve_swap().map_anon();
        let map =
            map.and_then(MmapMut::make_read_only).map_err(|error| ModelError::io(source.path(), error))?;
        Ok(PackedWeights { map: Arc::new(map), matrices: by_name(matrices), file: None, filled: false })
    }

    /// Maps the pack of `source`, which is made first where there is none that can be used. Where no folder takes it, the
    /// weights are packed into memory, at every start.
    pub fn open(source: &dyn WeightSource, file: PackFile<'_>) -> Result<PackedWeights, ModelError> {
        if plan(source, 0).is_empty() {
            return PackedWeights::in_memory(source);
        }
        let name = pack_name(source.path(), &file.weights_hash);
        let paths = file.folders.iter().map(|folder| folder.join(&name));
        if let Some(packed) = paths.clone().find_map(|path| map_pack(&path, &file.weights_hash)) {
            return Ok(packed);
        }
        for path in paths {
            match make_pack(source, &path, &file.weights_hash, file.progress) {
                Ok(()) => {
                    remove_older(source.path(), &path);
                    if let Some(packed) = map_pack(&path, &file.weights_hash) {
                        return Ok(packed);
                    }
                }
                Err(error) => tracing::warn!(%error, "packed weights cannot be kept here"),
            }
        }
        tracing::warn!("no folder takes the packed weights: they are made in memory, at every start");
        PackedWeights::in_memory(source)
    }

    /// The file that holds them; None where they lie in memory, or there are none.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The matrix to multiply with for a tensor of the source.
    pub(crate) fn operand(&self, name: &str, tensor: &Tensor) -> Option<Operand> {
        if !tensor.ty.is_packed() {
            return Some(Operand::floats(tensor));
        }
        let place = self.matrices.get(name)?;
        let same = (place.ty()?, place.rows, place.cols) == (tensor.ty, tensor.rows, tensor.cols);
        same.then(|| Operand::tiles(tensor.ty, tensor.rows, tensor.cols, self.map.clone(), place.offset))
    }

    /// Some consecutive rows of a tensor as a matrix of their own. Rows of quantised weights that begin or end inside of a tile
    /// are packed once more, into memory.
    pub(crate) fn rows(
        &self,
        name: &str,
        tensor: &Tensor,
        range: Range<usize>,
    ) -> Result<Option<Operand>, ModelError> {
        let Some(whole) = self.operand(name, tensor) else { return Ok(None) };
        if let Some(part) = whole.rows(range.clone()) {
            return Ok(Some(part));
        }
        let Tensor { ty, cols, .. } = *tensor;
        let error =
            |error| ModelError::malformed(Path::new(name), format!("no memory for its rows: {error}"));
        let bytes = ty.packed_bytes(range.len(), cols);
        let mut map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon().map_err(error)?;
        if self.filled {
            let row_bytes = ty.row_bytes(cols);
            let rows = &tensor.bytes()[range.start * row_bytes..range.end * row_bytes];
            packed::pack(&Pool::new(1), ty, range.len(), cols, rows, &mut map);
        }
        let map = Arc::new(map.make_read_only().map_err(error)?);
        Ok(Some(Operand::tiles(ty, range.len(), cols, map, 0)))
    }
}

/// The file name of a model's pack: the model's own, some of its hash, and the layout's version.
pub fn pack_name(model: &Path, weights_hash: &[u8; 32]) -> String {
    format!("{}{}-v{}.pack", pack_prefix(model), &hex(weights_hash)[..16], packed::PACK_VERSION)
}

fn pack_prefix(model: &Path) -> String {
    format!("{}.", model.file_name().unwrap_or_default().to_string_lossy())
}

/// Removes the packs of what the model's file held before, or of older layouts. Who still maps one keeps it.
fn remove_older(model: &Path, path: &Path) {
    let Some(Ok(entries)) = path.parent().map(fs::read_dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let older = name.starts_with(&pack_prefix(model)) && name.ends_with(".pack") && entry.path() != path;
        if older && let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(%error, path = %entry.path().display(), "an old file of packed weights stays");
        }
    }
}

/// Every quantised matrix that is multiplied with, in order of name, from `start` on. An embedding that is looked up only is
/// left out.
fn plan(source: &dyn WeightSource, start: usize) -> Vec<Place> {
    let mut names = source.names();
    names.sort_unstable();
    let untied = names.contains(&"output.weight");
    names.retain(|name| !(untied && *name == EMBEDDING));
    let mut offset = start;
    let mut places = Vec::new();
    for name in names {
        let Some(Tensor { ty, rows, cols, .. }) = source.tensor(name) else { continue };
        if ty.is_packed() {
            places.push(Place { name: name.to_owned(), ty: ty.name().to_owned(), rows, cols, offset });
            offset = (offset + ty.packed_bytes(rows, cols)).next_multiple_of(ALIGNMENT);
        }
    }
    places
}

/// Bytes before the first matrix. Places depend on the length of the index, which holds them: room for it is taken
/// generously.
fn index_room(source: &dyn WeightSource) -> usize {
    let names: usize = source.names().iter().map(|name| 160 + 2 * name.len()).sum();
    (HEADER_BYTES + 512 + names).next_multiple_of(ALIGNMENT)
}

fn end(places: &[Place], start: usize) -> usize {
    places.last().map_or(start, |place| place.offset + place.bytes().unwrap_or(0))
}

fn by_name(places: Vec<Place>) -> HashMap<String, Place> {
    places.into_iter().map(|place| (place.name.clone(), place)).collect()
}

/// Packs every matrix to its place.
fn fill(source: &dyn WeightSource, places: &[Place], to: &mut [u8], progress: &mut dyn FnMut(u64, u64)) {
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let total = places.iter().filter_map(Place::bytes).sum::<usize>() as u64;
    let mut done = 0;
    for place in places {
        let (Some(tensor), Some(bytes)) = (source.tensor(&place.name), place.bytes()) else { continue };
        let tiles = &mut to[place.offset..place.offset + bytes];
        packed::pack(&pool, tensor.ty, tensor.rows, tensor.cols, tensor.bytes(), tiles);
        done += bytes as u64;
        progress(done, total);
    }
}

/// Writes the pack beside `path` and renames it. Of several processes that want it, one makes it and the others wait.
fn make_pack(
    source: &dyn WeightSource,
    path: &Path,
    weights_hash: &[u8; 32],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ModelError> {
    let beside = path.with_extension("pack.new");
    let io = |error| ModelError::io(&beside, error);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))?;
    }
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&beside).map_err(io)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|error| io(error.into()))?;
    if map_pack(path, weights_hash).is_some() {
        return Ok(());
    }
    let room = index_room(source);
    let matrices = plan(source, room);
    let bytes = end(&matrices, room);
    let index = Index { version: packed::PACK_VERSION, weights: hex(weights_hash), bytes, matrices };
    let json = serde_json::to_vec(&index).map_err(|error| io(error.into()))?;
    if HEADER_BYTES + json.len() > room {
        return Err(ModelError::malformed(source.path(), "the names of its tensors are too long for a pack"));
    }
    file.set_len(0).map_err(io)?;
    // Space is taken before it is mapped: a write into a hole of a full disk would be a SIGBUS.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)
        .map_err(|error| io(error.into()))?;
    // SAFETY: the file is locked, is this process's own, and nobody else maps it before it is renamed.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(io)?;
    fill(source, &index.matrices, &mut map, progress);
    map.flush().map_err(io)?;
    // The header comes last: without it the file is nothing.
    file.write_all(MAGIC).map_err(io)?;
    file.write_all(&(json.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(blake3::hash(&json).as_bytes()).map_err(io)?;
    file.write_all(&json).map_err(io)?;
    file.sync_all().map_err(io)?;
    fs::rename(&beside, path).map_err(io)
}

/// The pack at `path`, if it is whole and belongs to these weights.
fn map_pack(path: &Path, weights_hash: &[u8; 32]) -> Option<PackedWeights> {
    let file = File::open(path).ok()?;
    // SAFETY: pack files are only ever renamed into place whole, and never written again.
    let map = unsafe { Mmap::map(&file) }.ok()?;
    let index = read_index(&map, weights_hash);
    if index.is_none() {
        tracing::warn!(path = %path.display(), "a file of packed weights cannot be used, and is made again");
    }
    let packed = PackedWeights {
        matrices: by_name(index?.matrices),
        map: Arc::new(map),
        file: Some(path.to_owned()),
        filled: true,
    };
    read_ahead(&packed.map);
    Some(packed)
}

/// Brings a pack into RAM and into the page tables in the background, so that the first answer does not wait for it piece by
/// piece. One that would take much of the machine's memory is left to be read as it is needed.
fn read_ahead(map: &Arc<Mmap>) {
    if map.len() as u64 > Memory::here().total / 4 {
        return;
    }
    let map = map.clone();
    #[cfg(target_os = "linux")]
    let advice = Advice::PopulateRead;
    #[cfg(not(target_os = "linux"))]
    let advice = Advice::WillNeed;
    let populate = move || {
        if let Err(error) = map.advise(advice) {
            tracing::debug!(%error, "packed weights are read as they are needed");
        }
    };
    // Without a thread for it, they are read as they are needed as well.
    if let Err(error) = std::thread::Builder::new().name("dormouse-read-ahead".into()).spawn(populate) {
        tracing::debug!(%error, "packed weights are read as they are needed");
    }
}

fn read_index(map: &[u8], weights_hash: &[u8; 32]) -> Option<Index> {
    let (header, rest) = map.split_at_checked(HEADER_BYTES)?;
    let length = u64::from_le_bytes(*header[8..].first_chunk()?);
    let json = rest.get(..usize::try_from(length).ok()?)?;
    if &header[..8] != MAGIC || blake3::hash(json).as_bytes() != &header[16..] {
        return None;
    }
    let index: Index = serde_json::from_slice(json).ok()?;
    let inside = |place: &Place| {
        place.bytes().and_then(|bytes| place.offset.checked_add(bytes)).is_some_and(|end| end <= map.len())
    };
    let whole = index.version == packed::PACK_VERSION
        && index.weights == hex(weights_hash)
        && index.bytes == map.len()
        && index.matrices.iter().all(inside);
    whole.then_some(index)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
