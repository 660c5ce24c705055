//! The kernels of CUDA against f64 and the CPU's. They need a device, or the emulated one that `scripts/check_cuda` brings along.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod attention;
mod graph;
mod products;
mod rows;
#[allow(dead_code)]
#[path = "../../src/testing.rs"]
mod testing;
mod uploads;

use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, DeviceBuffer, Gpu, Graph, Pinned, Plain, Span};
use dormouse_kernels::{GgmlType, cpu, cuda, packed, page, quant};

fn gpu() -> Arc<Gpu> {
    Gpu::open(0)
        .unwrap_or_else(|error| panic!("{error}; scripts/check_cuda runs these tests without a device"))
}

fn on_device<T: Plain>(gpu: &Arc<Gpu>, values: &[T]) -> DeviceBuffer<T> {
    DeviceBuffer::of(gpu, values, "a test").unwrap()
}

fn room<T: Plain>(gpu: &Arc<Gpu>, len: usize) -> DeviceBuffer<T> {
    DeviceBuffer::new(gpu, len, "a test").unwrap()
}

fn read<T: Plain>(gpu: &Arc<Gpu>, span: Span<'_, T>) -> Vec<T> {
    let mut host = Pinned::new(gpu, span.len()).unwrap();
    // SAFETY: it is waited for before the memory is looked at.
    unsafe { span.copy_out(gpu, &mut host).unwrap() };
    gpu.wait().unwrap();
    host.as_slice().to_vec()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_device_that_is_not_there_has_an_error_with_the_count() {
    let error = Gpu::open(99).unwrap_err().to_string();
    assert!(error.contains("no CUDA device 99") && error.contains("counted from 0"), "{error}");
}

#[test]
fn what_has_no_room_says_how_much_is_free() {
    let gpu = gpu();
    let error = DeviceBuffer::<u8>::new(&gpu, 1 << 50, "weights").err().unwrap().to_string();
    assert!(error.contains("1125899906842624 bytes of weights"), "{error}");
}

#[test]
fn copies_of_several_pieces_arrive_whole() {
    let gpu = gpu();
    let values: Vec<u32> = (0..(5 << 20)).collect();
    let buffer = on_device(&gpu, &values);
    assert!(read(&gpu, buffer.span()) == values);
    buffer.span().part(7..9).clear(&gpu).unwrap();
    assert_eq!(read(&gpu, buffer.span().part(5..11)), [5, 6, 0, 0, 9, 10]);
}
