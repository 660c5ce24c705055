use super::*;
use crate::ModelSource;

fn open(folder: &Path, source: &ModelSource, hash: u8) -> (Result<PackedWeights, ModelError>, u64) {
    let mut told = 0;
    let mut progress = |done: u64, _total: u64| told = done;
    let folders = [folder.join("not/writable\0"), folder.to_owned()];
    let file = PackFile { folders: &folders, weights_hash: [hash; 32], progress: &mut progress };
    (PackedWeights::open(source, file), told)
}

#[test]
fn a_pack_is_made_once_and_holds_what_packing_in_memory_gives() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::open(crate::test_model()).unwrap();
    let (packed, told) = open(folder.path(), &source, 1);
    let packed = packed.unwrap();
    assert!(told > 50 << 20, "{told} bytes were told of");
    let memory = PackedWeights::in_memory(&source).unwrap();
    assert_eq!(packed.matrices.len(), memory.matrices.len());
    for (name, place) in &packed.matrices {
        let bytes = place.bytes().unwrap();
        let other = &memory.matrices[name];
        assert!(packed.map[place.offset..][..bytes] == memory.map[other.offset..][..bytes], "{name}");
    }
    assert_eq!(open(folder.path(), &source, 1).1, 0, "the second opening packs nothing");
    assert!(open(folder.path(), &source, 2).1 > 0, "other weights have another pack");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "which replaces the old one");
}

#[test]
fn what_weights_will_take_is_known_before_they_are_packed() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::open(crate::test_model()).unwrap();
    let held = HeldBytes::of(&source);
    let packed = open(folder.path(), &source, 1).0.unwrap();
    assert_eq!(held.pack_file, packed.file().unwrap().metadata().unwrap().len());
    assert!(held.packed > 50 << 20 && held.packed < held.pack_file);
    assert!(held.floats > 0 && held.looked_up > 0);
    let empty = PackedWeights::without_contents(&source).unwrap();
    assert_eq!(empty.matrices.len(), packed.matrices.len());
    assert!(crate::decoder::Decoder::new(&source, &empty, source.config().unwrap()).is_ok());
}

#[test]
fn a_truncated_or_flipped_or_unfinished_pack_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::open(crate::test_model()).unwrap();
    open(folder.path(), &source, 1).0.unwrap();
    let path = folder.path().join(pack_name(&crate::test_model(), &[1; 32]));
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[100] ^= 1;
    for damaged in [&whole[..whole.len() - 1], &flipped, &whole[..20], &[]] {
        fs::write(&path, damaged).unwrap();
        let (packed, told) = open(folder.path(), &source, 1);
        assert!(packed.is_ok() && told > 0);
        assert!(fs::read(&path).unwrap() == whole);
    }
    // What a crash in the middle leaves.
    fs::rename(&path, path.with_extension("pack.new")).unwrap();
    assert!(open(folder.path(), &source, 1).1 > 0);
    assert!(fs::read(&path).unwrap() == whole);
}

#[test]
fn rows_of_a_matrix_of_any_type_are_multiplied_alike_wherever_they_begin() {
    use dormouse_kernels::Cpu;
    use dormouse_kernels::cpu::matmul::{Product, matmul};

    const ROWS: usize = 40;
    const COLS: usize = 512;
    let cpu = Cpu::new(1).unwrap();
    let x: Vec<f32> = (0..2 * COLS).map(|i| ((i * 7919 % 1013) as f32 - 506.0) / 400.0).collect();
    for ty in GgmlType::ALL {
        // Any bits are codes; those of scales are small numbers.
        let mut bytes: Vec<u8> =
            (0..ROWS * ty.row_bytes(COLS)).map(|i| (i * 131 + i / 7) as u8 & 0x3b).collect();
        if ty == GgmlType::Mxfp4 {
            bytes.chunks_mut(17).for_each(|block| block[0] = 124);
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        // SAFETY: the file is this test's own, and nobody writes to it any more.
        let map = Arc::new(unsafe { Mmap::map(file.as_file()) }.unwrap());
        let source = OneTensor(Tensor::new(ty, ROWS, COLS, map, 0));
        let packed = PackedWeights::in_memory(&source).unwrap();
        let product = |operand: &Operand| {
            let mut out = vec![0.0; 2 * operand.rows];
            matmul(&cpu, &x, [Product { weights: operand.matrix(), out: &mut out }]);
            out
        };
        let whole = product(&packed.operand("w", &source.0).unwrap());
        assert!(whole.iter().all(|value| value.is_finite()) && whole.iter().any(|value| *value != 0.0));
        for range in [0..16, 16..40, 0..40, 3..20, 39..40, 1..33, 24..40] {
            let part = product(&packed.rows("w", &source.0, range.clone()).unwrap().unwrap());
            for (token, part) in part.chunks(range.len()).enumerate() {
                assert_eq!(part, &whole[token * ROWS..][range.clone()], "{} {range:?}", ty.name());
            }
        }
    }
}

struct OneTensor(Tensor);

impl WeightSource for OneTensor {
    fn path(&self) -> &Path {
        Path::new("one")
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        (name == "w").then(|| self.0.clone())
    }

    fn names(&self) -> Vec<&str> {
        vec!["w"]
    }
}
