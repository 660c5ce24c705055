use std::io::Write;

use super::*;

/// Writes the header fields of a GGUF file.
#[derive(Clone, Default)]
struct Builder(Vec<u8>);

impl Builder {
    fn new(version: u32, tensors: u64, settings: u64) -> Builder {
        let mut builder = Builder(MAGIC.to_vec());
        builder.0.extend(version.to_le_bytes());
        builder.0.extend(tensors.to_le_bytes());
        builder.0.extend(settings.to_le_bytes());
        builder
    }

    fn string(mut self, text: &str) -> Builder {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    fn u32(mut self, number: u32) -> Builder {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Builder {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn tensor(self, name: &str, ty: u32, dims: &[u64], offset: u64) -> Builder {
        let builder = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(builder, |builder, &dim| builder.u64(dim)).u32(ty).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Builder {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 1);
        self
    }

    fn open(&self) -> Result<GgufFile, ModelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&self.0).unwrap();
        GgufFile::open(file.path())
    }

    fn error(&self) -> String {
        self.open().err().expect("the file is malformed").to_string()
    }
}

fn small_file() -> Builder {
    Builder::new(3, 2, 3)
        .string("general.architecture")
        .u32(8)
        .string("llama")
        .string("llama.block_count")
        .u32(4)
        .u32(7)
        .string("tokenizer.ggml.tokens")
        .u32(9)
        .u32(8)
        .u64(2)
        .string("a")
        .string("é")
        .tensor("matrix", 0, &[4, 2], 0)
        .tensor("blocks", 3, &[32, 3], 32)
        .data(32 + 60)
}

#[test]
fn settings_and_tensors_of_a_small_file_are_read() {
    let file = small_file().open().unwrap();
    assert_eq!(file.architecture().unwrap(), "llama");
    assert_eq!(file.u32("llama.block_count"), Some(7));
    assert_eq!(file.strings("tokenizer.ggml.tokens").unwrap(), ["a", "é"]);
    assert_eq!(file.u32("general.architecture"), None);
    let matrix = file.tensor("matrix").unwrap();
    assert_eq!((matrix.rows, matrix.cols, matrix.bytes().len()), (2, 4, 32));
    let blocks = file.tensor("blocks").unwrap();
    assert_eq!((blocks.ty, blocks.rows, blocks.bytes().len()), (GgmlType::Q4_1, 3, 60));
    assert!(file.tensor("other").is_none());
}

#[test]
fn a_file_cut_anywhere_is_an_error_that_tells_its_size() {
    let whole = small_file();
    for len in 0..whole.0.len() {
        let error = Builder(whole.0[..len].to_vec()).error();
        assert!(
            len < 4 || error.contains(&format!("{len} bytes")) || error.contains("left"),
            "{len}: {error}"
        );
    }
}

#[test]
fn the_real_model_cut_at_steps_through_its_header_never_panics() {
    let path = crate::test_model();
    let mut head = vec![0; 1_800_000];
    std::io::Read::read_exact(&mut File::open(&path).unwrap(), &mut head).unwrap();
    // Every 64 bytes at first, then coarser: the long arrays repeat themselves.
    for len in (0..16_384).step_by(64).chain((16_384..head.len()).step_by(65_537)) {
        let reader = Reader { path: &path, bytes: &head[..len], at: 0 };
        assert!(reader.header().is_err(), "{len}");
    }
}

#[test]
fn a_flipped_byte_anywhere_never_panics() {
    let whole = small_file();
    for at in 0..whole.0.len() - 92 {
        for value in [0, 0x7f, 0xff] {
            let mut bytes = whole.clone();
            bytes.0[at] = value;
            if let Ok(file) = bytes.open() {
                for (name, info) in file.tensors() {
                    assert_eq!(file.tensor(name).unwrap().bytes().len(), info.bytes);
                }
                let _ = file.strings("tokenizer.ggml.tokens");
            }
        }
    }
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    assert!(Builder::new(3, u64::MAX, 0).error().contains("number of tensors"));
    assert!(Builder::new(3, 0, u64::MAX).error().contains("number of settings"));
    assert!(Builder::new(3, 0, 1).u64(u64::MAX).data(64).error().contains("a setting's name"));
    let array = Builder::new(3, 0, 1).string("k").u32(9).u32(8).u64(1 << 60).data(64);
    assert!(array.error().contains("k is 1152921504606846976"));
    let nested = (0..8).fold(Builder::new(3, 0, 1).string("k").u32(9), |b, _| b.u32(9).u64(1));
    assert!(nested.data(64).error().contains("nests arrays"));
}

#[test]
fn versions_and_byte_orders_that_cannot_be_read_say_so() {
    assert!(Builder::new(1, 0, 0).error().contains("version 1"));
    assert!(Builder::new(4, 0, 0).error().contains("version 4"));
    assert!(Builder::new(3u32.swap_bytes(), 0, 0).error().contains("big-endian"));
    assert!(Builder(b"not a model".to_vec()).error().contains("not a GGUF file"));
    let split = Builder::new(3, 0, 1).string("split.count").u32(2).0;
    let split = Builder([split, 3u16.to_le_bytes().to_vec()].concat());
    assert!(split.error().contains("one of 3 parts"));
}

#[test]
fn tensors_that_cannot_be_right_are_named() {
    let one = |ty, dims: &[u64], offset| Builder::new(3, 1, 0).tensor("w", ty, dims, offset).data(64).error();
    assert!(one(16, &[32], 0).contains("tensor 'w' has type IQ2_XXS"));
    assert!(one(99, &[32], 0).contains("number 99"));
    assert!(one(3, &[31], 0).contains("impossible shape"));
    assert!(one(0, &[0], 0).contains("impossible shape"));
    assert!(one(0, &[1 << 40, 1 << 40], 0).contains("impossible shape"));
    assert!(one(0, &[1, 1, 1, 1, 1], 0).contains("5 dimensions"));
    assert!(one(0, &[4], 3).contains("alignment"));
    assert!(one(0, &[4], u64::MAX - 31).contains("ends at byte"));
    assert!(one(0, &[17], 0).contains("file has only"));
    let pair = Builder::new(3, 2, 0).tensor("a", 0, &[16], 0).tensor("b", 0, &[8], 32).data(64);
    assert!(pair.error().contains("overlap"));
    let twice = Builder::new(3, 2, 0).tensor("a", 0, &[8], 0).tensor("a", 0, &[8], 32).data(64);
    assert!(twice.error().contains("twice"));
}
