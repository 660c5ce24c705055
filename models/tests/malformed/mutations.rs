//! Small changes to a good file, drawn from a seed.

use serde_json::{Value, json};

/// A small generator (splitmix64): a seed plays a test again.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Numbers at the edges of what counts, sizes and offsets can be.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    31,
    0x7fff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 31,
    u64::MAX,
];

/// Changes `bytes` in one to three ways; `head` is the length of its first part, which says how the rest is to be read and is
/// changed more often.
pub fn mutate(dice: &mut Dice, bytes: &[u8], head: usize) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..1 + dice.below(3) {
        if out.is_empty() {
            break;
        }
        let end = if dice.below(8) == 0 { out.len() } else { head.clamp(1, out.len()) };
        let at = dice.below(end);
        match dice.below(8) {
            0 | 1 => out[at] ^= 1 << dice.below(8),
            2 => out[at] = *dice.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            3 => out.truncate(at),
            4 => {
                let from = dice.below(out.len());
                let len = dice.below((out.len() - from).min(64)) + 1;
                let piece = out[from..from + len].to_vec();
                out.splice(at..at, piece);
            }
            5 => {
                let len = dice.below((out.len() - at).min(64)) + 1;
                out.drain(at..at + len);
            }
            edge => {
                let width = if edge == 6 { 4 } else { 8 };
                let number = dice.pick(&EDGES).to_le_bytes();
                let width = width.min(out.len() - at);
                out[at..at + width].copy_from_slice(&number[..width]);
            }
        }
    }
    out
}

/// Puts something else in the place of one value of a JSON document, or takes it away.
pub fn mutate_json(dice: &mut Dice, text: &[u8]) -> Vec<u8> {
    let mut document: Value = serde_json::from_slice(text).unwrap();
    for _ in 0..1 + dice.below(2) {
        let mut place = &mut document;
        // Down into the document, ending early now and then.
        while dice.below(6) != 0 {
            let size =
                place.as_object().map_or(0, serde_json::Map::len) + place.as_array().map_or(0, Vec::len);
            if size == 0 {
                break;
            }
            let index = dice.below(size);
            place = match place {
                Value::Object(object) => object.values_mut().nth(index).unwrap(),
                other => &mut other[index],
            };
        }
        let nested = || (0..200).fold(json!(1), |inner, _| json!([inner]));
        let edge = *dice.pick(&EDGES);
        *place = match dice.below(14) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(""),
            3 => json!([]),
            4 => json!({}),
            5 => nested(),
            6 => json!(-1),
            7 => json!(*dice.pick(&[1e308, -1e308, 1e-320, 0.5, -0.0, 3e38])),
            8 => json!("\u{0}é<|im_end|>"),
            9 => json!([0, 0, 0]),
            10 => match place.take() {
                Value::Array(mut values) => {
                    values.extend(values.clone());
                    Value::Array(values)
                }
                Value::String(text) => json!(text.repeat(1 + dice.below(40))),
                other => other,
            },
            _ => json!(edge),
        };
    }
    serde_json::to_vec(&document).unwrap()
}

#[test]
fn a_seed_gives_the_same_changes_again() {
    let bytes: Vec<u8> = (0..=255).collect();
    let change = |seed| mutate(&mut Dice::new(seed), &bytes, 100);
    assert_eq!(change(7), change(7));
    assert!((0..50).filter(|seed| change(*seed) != bytes).count() > 40);
}
