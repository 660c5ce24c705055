//! ad hoc
use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PagePtr};
use dormouse_models::config::ModelConfig;
use dormouse_models::decoder::{Activations, Batch, Decoder};
use dormouse_models::gguf::GgufFile;
use std::time::Instant;
fn main() {
    let file = GgufFile::open(std::path::Path::new(&std::env::args().nth(1).unwrap())).unwrap();
    let d = Decoder::new(&file, ModelConfig::from_gguf(&file).unwrap()).unwrap();
    let layout = d.page_layout(KvDtype::F16);
    let n = 4400usize;
    let mut memory = vec![vec![0u32; layout.page_bytes() / 4]; n.div_ceil(PAGE_TOKENS)];
    let pages: Vec<PagePtr> =
        memory.iter_mut().map(|p| unsafe { PagePtr::new(p.as_mut_ptr().cast()) }).collect();
    let cpu = Cpu::new(2).unwrap();
    println!("{}", cpu.numerics());
    let mut work = Activations::default();
    let mut go = |start: usize, rows: usize| {
        let tokens: Vec<u32> =
            (start..start + rows).map(|i| 300 + (i as u32).wrapping_mul(2654435761) % 40000).collect();
        let seq = Sequence { pages: &pages, first_row: 0, rows, start };
        let t = Instant::now();
        d.forward(
            &cpu,
            &layout,
            &Batch { tokens: &tokens, sequences: &[seq], logit_rows: &[rows - 1] },
            &mut work,
        );
        t.elapsed().as_secs_f64()
    };
    let p512: f64 = go(0, 256) + go(256, 256);
    println!("prefill 512: {:.0} tok/s", 512.0 / p512);
    let dec: f64 = (0..30).map(|i| go(512 + i, 1)).sum::<f64>() / 30.0;
    println!("decode @512: {:.1} tok/s", 1.0 / dec);
    let dec: f64 = (0..30).map(|i| go(i, 1)).sum::<f64>() / 30.0;
    println!("decode @0: {:.1} tok/s", 1.0 / dec);
    let t = Instant::now();
    for c in 2..16 {
        go(c * 256, 256);
    }
    println!("prefill 512..4096: {:.0} tok/s", 3584.0 / t.elapsed().as_secs_f64());
    let dec: f64 = (0..30).map(|i| go(4096 + i, 1)).sum::<f64>() / 30.0;
    println!("decode @4096: {:.1} tok/s", 1.0 / dec);
}
