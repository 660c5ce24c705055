//! The scalar decoders against the PyPI package `gguf` (vectors made by `make_quant_goldens.py`).
#![allow(clippy::unwrap_used)]

use dormouse_kernels::GgmlType;
use dormouse_kernels::quant::dequantize;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn every_type_decodes_to_the_bits_of_the_reference() {
    let goldens = include_str!("quant_goldens.txt");
    assert_eq!(goldens.lines().count(), GgmlType::ALL.len());
    for line in goldens.lines() {
        let mut fields = line.split(' ');
        let name = fields.next().unwrap();
        let (blocks, expected) = (unhex(fields.next().unwrap()), unhex(fields.next().unwrap()));
        let ty = GgmlType::ALL.into_iter().find(|ty| ty.name() == name).unwrap();
        let mut values = vec![0.0; blocks.len() / ty.block_bytes() * ty.block_len()];
        dequantize(ty, &blocks, &mut values);
        assert_eq!(values.len() * 4, expected.len(), "{name}");
        for (at, (value, bytes)) in values.iter().zip(expected.as_chunks::<4>().0).enumerate() {
            let reference = f32::from_le_bytes(*bytes);
            // A zero's sign is the one thing that numpy and ggml do not agree on.
            let same = value.to_bits() == reference.to_bits() || (*value == 0.0 && reference == 0.0);
            assert!(same, "{name} value {at}: {value} instead of {reference}");
        }
    }
}

#[test]
fn gguf_numbers_name_their_types_and_nothing_else() {
    for ty in GgmlType::ALL {
        assert_eq!(GgmlType::from_gguf(ty.gguf_id()), Some(ty));
    }
    let known = (0..1000).filter(|&id| GgmlType::from_gguf(id).is_some()).count();
    assert_eq!(known, GgmlType::ALL.len());
}
