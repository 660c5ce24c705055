//! Packed weights: the layout that integer matrix products read, made once from a GGUF tensor.
//!
//! A tile is sixteen rows of a matrix, every column of them. Columns go in blocks of 32, and a block's codes in lines
//! of 64 bytes, `[row][4 columns]`: one line feeds sixteen dot products of four columns each. A line of nibbles holds
//! two such groups of columns, a line of bit pairs four, a line of bits eight; types of 3, 5 and 6 bits have two kinds
//! of lines. All scales of a tile lie before its codes. Codes and scales are the source's own, so a packed weight stands
//! for the same number, bit for bit, as [`crate::quant::dequantize`] gives.

use half::bf16;

use crate::GgmlType;
use crate::cpu::Pool;
use crate::cpu::disjoint::Disjoint;
use crate::quant::{IQ4_LEVELS, MXFP4_LEVELS, half_e8m0, scale_min_k4};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a block of codes.
pub const BLOCK: usize = 32;
/// Blocks that share the f16 scales of a super-block.
pub(crate) const BLOCKS_PER_SUPER: usize = 8;
/// Version of this layout; part of a pack file's name.
pub const PACK_VERSION: u32 = 1;

/// What the scales of a tile are. Each entry is an array of one value per row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// A block's scale, f16.
    Half,
    /// A block's scale, bf16: powers of two beyond f16's reach.
    Brain,
    /// A block's scale and minimum, f16: weight = scale · code + minimum.
    HalfMin,
    /// A super-block's scale, f16, and an i8 factor for each group.
    Super,
    /// A super-block's scale and minimum, f16, and u8 factors of both for each group: weight = (scale · factor) · code −
    /// minimum · factor.
    SuperMin,
}

/// The packed form of one GGML type.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    pub scales: Scales,
    /// Groups of columns with a scale of their own in a block: 1 of 32 columns, or 2 of 16.
    pub groups: usize,
    /// What is taken from a code to make it a signed number.
    pub offset: i32,
    /// What a code stands for before the offset is taken, for types that look their levels up.
    pub levels: Option<[u8; 16]>,
}

impl Form {
    /// The form of a quantised type; None for the float types, which stay as they are.
    pub(crate) const fn of(ty: GgmlType) -> Option<Form> {
        Some(match ty {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => return None,
            GgmlType::Q4_0 => form(4, Scales::Half, 1, 8),
            GgmlType::Q4_1 => form(4, Scales::HalfMin, 1, 0),
            GgmlType::Q5_0 => form(5, Scales::Half, 1, 16),
            GgmlType::Q5_1 => form(5, Scales::HalfMin, 1, 0),
            GgmlType::Q8_0 => form(8, Scales::Half, 1, 128),
            GgmlType::Q2K => form(2, Scales::SuperMin, 2, 0),
            GgmlType::Q3K => form(3, Scales::Super, 2, 4),
            GgmlType::Q4K => form(4, Scales::SuperMin, 1, 0),
            GgmlType::Q5K => form(5, Scales::SuperMin, 1, 0),
            GgmlType::Q6K => form(6, Scales::Super, 2, 32),
            GgmlType::Iq4Nl => {
                Form { levels: Some(raised(IQ4_LEVELS, 128)), ..form(4, Scales::Half, 1, 128) }
            }
            GgmlType::Iq4Xs => {
                Form { levels: Some(raised(IQ4_LEVELS, 128)), ..form(4, Scales::Super, 1, 128) }
            }
            GgmlType::Mxfp4 => {
                Form { levels: Some(raised(MXFP4_LEVELS, 12)), ..form(4, Scales::Brain, 1, 12) }
            }
        })
    }

    /// Bytes of a block's codes.
    pub(crate) const fn code_bytes(&self) -> usize {
        self.bits * TILE_ROWS * BLOCK / 8
    }

    /// Whether the scales come in super-blocks.
    pub(crate) const fn is_super(&self) -> bool {
        matches!(self.scales, Scales::Super | Scales::SuperMin)
    }

    /// Whether weights have a minimum added.
    pub(crate) const fn has_minimum(&self) -> bool {
        matches!(self.scales, Scales::HalfMin | Scales::SuperMin)
    }

    /// Offset of a block's scales in its tile, and of the super-block's before them (the same where there is none).
    pub(crate) const fn scale_offsets(&self, block: usize) -> (usize, usize) {
        let factors = self.groups * TILE_ROWS * if self.has_minimum() { 2 } else { 1 };
        if self.is_super() {
            let header = TILE_ROWS * if self.has_minimum() { 4 } else { 2 };
            let start = block / BLOCKS_PER_SUPER * (header + BLOCKS_PER_SUPER * factors);
            (start + header + block % BLOCKS_PER_SUPER * factors, start)
        } else {
            (block * 2 * factors, block * 2 * factors)
        }
    }

    /// Offset of the codes in a tile of `cols` columns; a multiple of a line.
    pub(crate) const fn codes_offset(&self, cols: usize) -> usize {
        self.scale_offsets(cols / BLOCK).1.next_multiple_of(64)
    }

    pub(crate) const fn tile_bytes(&self, cols: usize) -> usize {
        self.codes_offset(cols) + cols / BLOCK * self.code_bytes()
    }
}

const fn form(bits: usize, scales: Scales, groups: usize, offset: i32) -> Form {
    Form { bits, scales, groups, offset, levels: None }
}

const fn raised(levels: [i8; 16], by: i32) -> [u8; 16] {
    let mut raised = [0; 16];
    let mut i = 0;
    while i < 16 {
        raised[i] = (levels[i] as i32 + by) as u8;
        i += 1;
    }
    raised
}

impl GgmlType {
    /// Whether products with this type go through packed tiles: every type but the floats.
    pub fn is_packed(self) -> bool {
        Form::of(self).is_some()
    }

    /// Bytes of a matrix of `rows × cols` weights as tiles; a multiple of 64. The float types have no packed form: 0.
    pub fn packed_bytes(self, rows: usize, cols: usize) -> usize {
        Form::of(self).map_or(0, |form| rows.div_ceil(TILE_ROWS) * form.tile_bytes(cols))
    }
}

/// Packs up to sixteen rows of `cols` weights of a quantised type, given as their GGUF bytes, into one tile; the rows that
/// are missing are zeros.
fn pack_tile(ty: GgmlType, cols: usize, rows: &[u8], tile: &mut [u8]) {
    let Some(form) = Form::of(ty) else { panic!("{} has no packed form", ty.name()) };
    assert_eq!(tile.len(), form.tile_bytes(cols), "a tile of {cols} columns of {}", ty.name());
    assert!(rows.len() <= TILE_ROWS * ty.row_bytes(cols), "a tile has sixteen rows");
    tile.fill(0);
    let codes_offset = form.codes_offset(cols);
    let blocks_per_source = ty.block_len() / BLOCK;
    for (row, bytes) in rows.chunks_exact(ty.row_bytes(cols)).enumerate() {
        for (index, bytes) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
            let source = Source::read(ty, bytes);
            for part in 0..blocks_per_source {
                let block = index * blocks_per_source + part;
                put_scales(&form, &source, block, part, row, tile);
                let lines = &mut tile[codes_offset + block * form.code_bytes()..][..form.code_bytes()];
                for (column, code) in source.codes[part * BLOCK..][..BLOCK].iter().enumerate() {
                    put_code(form.bits, lines, row, column, *code);
                }
            }
        }
    }
}

/// Packs a whole matrix, given as its GGUF bytes, on all threads of the pool.
pub fn pack(pool: &Pool, ty: GgmlType, rows: usize, cols: usize, source: &[u8], tiles: &mut [u8]) {
    assert_eq!(source.len(), rows * ty.row_bytes(cols), "{rows} × {cols} weights of {}", ty.name());
    assert_eq!(tiles.len(), ty.packed_bytes(rows, cols), "{rows} × {cols} packed weights of {}", ty.name());
    let (tile_bytes, source_bytes) = (ty.packed_bytes(1, cols), TILE_ROWS * ty.row_bytes(cols));
    let tiles = Disjoint::new(tiles);
    pool.run(rows.div_ceil(TILE_ROWS), &|tile| {
        let from = &source[tile * source_bytes..source.len().min((tile + 1) * source_bytes)];
        pack_tile(ty, cols, from, tiles.part(tile * tile_bytes..(tile + 1) * tile_bytes));
    });
}

/// Where the scales of one row and block go.
fn put_scales(form: &Form, source: &Source, block: usize, part: usize, row: usize, tile: &mut [u8]) {
    let (at, header) = form.scale_offsets(block);
    let mut put = |start: usize, value: [u8; 2]| tile[start + 2 * row..][..2].copy_from_slice(&value);
    put(header, source.scale);
    if form.has_minimum() {
        put(header + 2 * TILE_ROWS, source.minimum);
    }
    if form.is_super() {
        for group in 0..form.groups {
            let entry = part * form.groups + group;
            let width = if form.has_minimum() { 2 } else { 1 };
            tile[at + group * width * TILE_ROWS + row] = source.factors[entry];
            if form.has_minimum() {
                tile[at + (group * 2 + 1) * TILE_ROWS + row] = source.minimum_factors[entry];
            }
        }
    }
}

/// Adds a code's bits to the lines of its block (see [`code_at`], which reads them).
fn put_code(bits: usize, lines: &mut [u8], row: usize, column: usize, code: u8) {
    let (four, byte) = (column / 4, row * 4 + column % 4);
    let (main, rest) = lines.split_at_mut(64 * main_bits(bits));
    match main_bits(bits) {
        8 => main[64 * four + byte] |= code,
        4 => main[64 * (four % 4) + byte] |= (code & 15) << (4 * (four / 4)),
        _ => main[64 * (four / 4) + byte] |= (code & 3) << (2 * (four % 4)),
    }
    match bits - main_bits(bits) {
        0 => {}
        1 => rest[byte] |= (code >> main_bits(bits)) << four,
        _ => rest[64 * (four / 4) + byte] |= (code >> 4) << (2 * (four % 4)),
    }
}

/// Bits of a code that lie in the first lines: all, or the low ones of 3, 5 and 6.
pub(crate) const fn main_bits(bits: usize) -> usize {
    match bits {
        8 => 8,
        4..8 => 4,
        _ => 2,
    }
}

/// One block of the source, taken apart.
struct Source {
    codes: [u8; 256],
    scale: [u8; 2],
    minimum: [u8; 2],
    factors: [u8; 16],
    minimum_factors: [u8; 16],
}

impl Source {
    fn read(ty: GgmlType, block: &[u8]) -> Source {
        let mut out = Source {
            codes: [0; 256],
            scale: [0; 2],
            minimum: [0; 2],
            factors: [0; 16],
            minimum_factors: [0; 16],
        };
        let half = |at: usize| [block[at], block[at + 1]];
        // Runs of 32 whose first sixteen values are the low nibbles of sixteen bytes, the others the high ones.
        let nibbles = |codes: &mut [u8], bytes: &[u8]| {
            for (j, byte) in bytes.iter().enumerate() {
                codes[j] = byte & 15;
                codes[j + 16] = byte >> 4;
            }
        };
        let fifth = |codes: &mut [u8], bits: [u8; 4]| {
            let bits = u32::from_le_bytes(bits);
            for (j, code) in codes.iter_mut().enumerate() {
                *code |= (((bits >> j) & 1) << 4) as u8;
            }
        };
        let four = |at: usize| [block[at], block[at + 1], block[at + 2], block[at + 3]];
        match ty {
            GgmlType::Q4_0 | GgmlType::Iq4Nl => {
                out.scale = half(0);
                nibbles(&mut out.codes[..32], &block[2..18]);
            }
            GgmlType::Q4_1 => {
                (out.scale, out.minimum) = (half(0), half(2));
                nibbles(&mut out.codes[..32], &block[4..20]);
            }
            GgmlType::Q5_0 => {
                out.scale = half(0);
                nibbles(&mut out.codes[..32], &block[6..22]);
                fifth(&mut out.codes[..32], four(2));
            }
            GgmlType::Q5_1 => {
                (out.scale, out.minimum) = (half(0), half(2));
                nibbles(&mut out.codes[..32], &block[8..24]);
                fifth(&mut out.codes[..32], four(4));
            }
            GgmlType::Q8_0 => {
                out.scale = half(0);
                for (code, byte) in out.codes.iter_mut().zip(&block[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            GgmlType::Mxfp4 => {
                out.scale = bf16::from_f32(half_e8m0(block[0])).to_le_bytes();
                nibbles(&mut out.codes[..32], &block[1..17]);
            }
            GgmlType::Q2K => {
                (out.scale, out.minimum) = (half(80), half(82));
                for (group, byte) in block[..16].iter().enumerate() {
                    (out.factors[group], out.minimum_factors[group]) = (byte & 15, byte >> 4);
                }
                pairs_of_bits(&block[16..80], &mut out.codes);
            }
            GgmlType::Q3K => {
                let (high, scales) = (&block[..32], &block[96..108]);
                out.scale = half(108);
                for group in 0..16 {
                    let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
                    let pair = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
                    out.factors[group] = ((low | pair << 4) as i8 - 32) as u8;
                }
                pairs_of_bits(&block[32..96], &mut out.codes);
                for (k, code) in out.codes.iter_mut().enumerate() {
                    *code |= ((high[k % 32] >> (k / 32)) & 1) << 2;
                }
            }
            GgmlType::Q4K | GgmlType::Q5K => {
                (out.scale, out.minimum) = (half(0), half(2));
                for run in 0..8 {
                    (out.factors[run], out.minimum_factors[run]) = scale_min_k4(&block[4..16], run);
                }
                let quants = if ty == GgmlType::Q4K { &block[16..144] } else { &block[48..176] };
                for (k, code) in out.codes.iter_mut().enumerate() {
                    *code = (quants[k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4)) & 15;
                    if ty == GgmlType::Q5K {
                        *code |= ((block[16 + k % 32] >> (k / 32)) & 1) << 4;
                    }
                }
            }
            GgmlType::Q6K => {
                let (low, high) = (&block[..128], &block[128..192]);
                out.scale = half(208);
                out.factors.copy_from_slice(&block[192..208]);
                for (k, code) in out.codes.iter_mut().enumerate() {
                    let (half, run, l) = (k / 128, k / 32 % 4, k % 32);
                    let nibble = (low[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4)) & 15;
                    *code = nibble | ((high[half * 32 + l] >> (run * 2)) & 3) << 4;
                }
            }
            GgmlType::Iq4Xs => {
                let high = u16::from_le_bytes([block[2], block[3]]);
                out.scale = half(0);
                for run in 0..8 {
                    let low = (block[4 + run / 2] >> (run % 2 * 4)) & 15;
                    let pair = ((high >> (run * 2)) & 3) as u8;
                    out.factors[run] = ((low | pair << 4) as i8 - 32) as u8;
                    nibbles(&mut out.codes[run * 32..][..32], &block[8 + run * 16..][..16]);
                }
            }
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => {}
        }
        out
    }
}

/// The quants of `Q2_K` and `Q3_K`: 128 values share 32 bytes, a byte's four fields lie 32 values apart.
fn pairs_of_bits(bytes: &[u8], codes: &mut [u8; 256]) {
    for (k, code) in codes.iter_mut().enumerate() {
        *code = (bytes[k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2)) & 3;
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::quant::dequantize;

    /// The code that [`put_code`] stored, by the words of the module's text.
    fn code_at(bits: usize, lines: &[u8], row: usize, column: usize) -> u8 {
        let (four, byte) = (column / 4, row * 4 + column % 4);
        let line = |index: usize| lines[64 * index + byte];
        match bits {
            8 => line(four),
            4 => (line(four % 4) >> (4 * (four / 4))) & 15,
            5 => code_at(4, lines, row, column) | ((line(4) >> four) & 1) << 4,
            6 => code_at(4, lines, row, column) | ((line(4 + four / 4) >> (2 * (four % 4))) & 3) << 4,
            2 => (line(four / 4) >> (2 * (four % 4))) & 3,
            3 => code_at(2, lines, row, column) | ((line(2) >> four) & 1) << 2,
            _ => unreachable!(),
        }
    }

    /// One weight of a tile, by the formulas of [`Scales`].
    fn weight_at(ty: GgmlType, tile: &[u8], cols: usize, row: usize, k: usize) -> f32 {
        let form = Form::of(ty).unwrap();
        let (block, column) = (k / BLOCK, k % BLOCK);
        let lines = &tile[form.codes_offset(cols) + block * form.code_bytes()..][..form.code_bytes()];
        let code = code_at(form.bits, lines, row, column);
        let code = i32::from(form.levels.map_or(code, |levels| levels[code as usize])) - form.offset;
        let (at, header) = form.scale_offsets(block);
        let half =
            |start: usize| f16::from_le_bytes([tile[start + 2 * row], tile[start + 2 * row + 1]]).to_f32();
        let group = column * form.groups / BLOCK;
        match form.scales {
            Scales::Half => code as f32 * half(at),
            Scales::Brain => {
                code as f32 * bf16::from_le_bytes([tile[at + 2 * row], tile[at + 2 * row + 1]]).to_f32()
            }
            Scales::HalfMin => code as f32 * half(at) + half(at + 32),
            Scales::Super => half(header) * f32::from(tile[at + group * 16 + row] as i8) * code as f32,
            Scales::SuperMin => {
                let scale = half(header) * f32::from(tile[at + group * 32 + row]);
                let minimum = half(header + 32) * f32::from(tile[at + group * 32 + 16 + row]);
                scale * code as f32 - minimum
            }
        }
    }

    #[test]
    fn a_packed_weight_is_the_number_that_the_file_holds_for_every_type() {
        for ty in GgmlType::ALL.into_iter().filter(|ty| ty.is_packed()) {
            let (rows, cols) = (13, 512);
            let source = crate::testing::weights(ty, rows, cols, 11);
            let mut expected = vec![0.0; rows * cols];
            dequantize(ty, &source, &mut expected);
            let mut tile = vec![0xaa; ty.packed_bytes(rows, cols)];
            pack_tile(ty, cols, &source, &mut tile);
            for row in 0..TILE_ROWS {
                for k in 0..cols {
                    let wanted = if row < rows { expected[row * cols + k] } else { 0.0 };
                    let got = weight_at(ty, &tile, cols, row, k);
                    assert!(got == wanted, "{} row {row} column {k}: {got} for {wanted}", ty.name());
                }
            }
        }
    }
}
