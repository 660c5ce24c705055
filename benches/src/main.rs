//! How fast the decoder computes: prefill and decode at several depths, a short message on a long context, and attention
//! alone, without server, scheduler or disk.
//!
//! `cargo run --release -p dormouse-benches -- MODEL.gguf [THREADS]`

mod attention;

use std::error::Error;
use std::time::Instant;

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{Cpu, KvDtype, PAGE_TOKENS, PageLayout, PagePtr};
use dormouse_models::decoder::{Activations, Batch, Decoder};
use dormouse_models::pack::PackedWeights;
use dormouse_models::source::ModelSource;

const CHUNK: usize = 256;
const DEPTHS: [usize; 3] = [0, 512, 4096];
const DECODE_STEPS: usize = 30;
/// Rows of a new message on a resumed session: the time to its first token.
const MESSAGES: [usize; 3] = [3, 12, 20];
const MESSAGE_REPEATS: usize = 9;
/// Sequences that decode together, each with pages of its own, from a depth that a short chat has.
const SEQUENCES: usize = 8;
const SEQUENCE_DEPTH: usize = 192;
/// Branches of one session that decode together, from a depth that they all share: whole pages.
const BRANCHES: usize = 50;
const BRANCH_DEPTH: usize = 4096;

/// One sequence, with its pages in plain memory.
struct Bench {
    decoder: Decoder,
    layout: PageLayout,
    cpu: Cpu,
    _memory: Vec<Vec<u64>>,
    pages: Vec<PagePtr>,
    work: Activations,
}

impl Bench {
    fn new(path: &str, threads: usize) -> Result<Bench, Box<dyn Error>> {
        let source = ModelSource::open(path)?;
        let decoder = Decoder::new(&source, &PackedWeights::in_memory(&source)?, source.config()?)?;
        let layout = decoder.page_layout(KvDtype::F16);
        let positions = DEPTHS[DEPTHS.len() - 1] + CHUNK;
        let page = vec![0u64; layout.page_bytes().div_ceil(8)];
        let mut memory = vec![page; positions.div_ceil(PAGE_TOKENS) + BRANCHES];
        // SAFETY: each vector holds a page and lives as long as the bench, which alone uses it.
        let pages = memory.iter_mut().map(|page| unsafe { PagePtr::new(page.as_mut_ptr().cast()) }).collect();
        let cpu = Cpu::new(threads)?;
        Ok(Bench { decoder, layout, cpu, _memory: memory, pages, work: Activations::default() })
    }

    /// Computes `rows` tokens from position `start` on; returns the seconds it took.
    fn compute(&mut self, start: usize, rows: usize) -> f64 {
        let vocab = self.decoder.config().vocab as u32;
        let tokens: Vec<u32> =
            (start..start + rows).map(|i| (i as u32).wrapping_mul(2_654_435_761) % vocab).collect();
        let sequence = Sequence { pages: &self.pages, first_row: 0, rows, start };
        let batch = Batch { tokens: &tokens, sequences: &[sequence], logit_rows: &[rows - 1] };
        let begun = Instant::now();
        self.decoder.forward(&self.cpu, &self.layout, &batch, &mut self.work);
        begun.elapsed().as_secs_f64()
    }

    /// Computes one token of each of [`SEQUENCES`]; returns the seconds it took.
    fn compute_sequences(&mut self) -> f64 {
        let tables = self.pages.chunks_exact(SEQUENCE_DEPTH / PAGE_TOKENS + 1).take(SEQUENCES);
        let tables: Vec<_> = tables.map(<[PagePtr]>::to_vec).collect();
        self.compute_together(&tables, SEQUENCE_DEPTH)
    }

    /// Computes one token of each of [`BRANCHES`]; returns the seconds it took.
    fn compute_branches(&mut self) -> f64 {
        let (pages, own) = self.pages.split_at(self.pages.len() - BRANCHES);
        let shared = &pages[..BRANCH_DEPTH / PAGE_TOKENS];
        let tables: Vec<_> = own.iter().map(|page| [shared, &[*page]].concat()).collect();
        self.compute_together(&tables, BRANCH_DEPTH)
    }

    /// Computes the token at `start` of a sequence of each of these pages; returns the seconds it took.
    fn compute_together(&mut self, tables: &[Vec<PagePtr>], start: usize) -> f64 {
        let sequence = |(first_row, pages)| Sequence { pages, first_row, rows: 1, start };
        let sequences: Vec<Sequence<'_>> =
            tables.iter().map(Vec::as_slice).enumerate().map(sequence).collect();
        let (tokens, rows): (Vec<u32>, Vec<usize>) =
            (0..tables.len()).map(|row| (row as u32 + 100, row)).unzip();
        let batch = Batch { tokens: &tokens, sequences: &sequences, logit_rows: &rows };
        let begun = Instant::now();
        self.decoder.forward(&self.cpu, &self.layout, &batch, &mut self.work);
        begun.elapsed().as_secs_f64()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: dormouse-benches MODEL.gguf [THREADS]")?;
    let cores = std::thread::available_parallelism()?.get();
    let threads = arguments.next().map_or(Ok(cores), |threads| threads.parse())?;
    let mut bench = Bench::new(&path, threads)?;
    println!("{path}: {threads} threads, {}", bench.cpu.numerics());

    let mut filled = 0;
    for depth in DEPTHS {
        let begun = filled;
        let mut seconds = 0.0;
        while filled < depth {
            seconds += bench.compute(filled, CHUNK);
            filled += CHUNK;
        }
        if filled > begun {
            println!(
                "prefill {begun:>4} to {filled:<4}  {:>7.1} tokens/s",
                (filled - begun) as f64 / seconds
            );
        }
        let mut steps: Vec<f64> = (0..DECODE_STEPS).map(|step| bench.compute(depth + step, 1)).collect();
        steps.sort_by(f64::total_cmp);
        println!("decode at {depth:<4}       {:>7.1} tokens/s", 1.0 / steps[DECODE_STEPS / 2]);
    }
    let mut steps: Vec<f64> = (0..DECODE_STEPS).map(|_| bench.compute_sequences()).collect();
    steps.sort_by(f64::total_cmp);
    println!(
        "{SEQUENCES} sequences at {SEQUENCE_DEPTH}    {:>7.1} tokens/s",
        SEQUENCES as f64 / steps[DECODE_STEPS / 2]
    );
    let mut steps: Vec<f64> = (0..DECODE_STEPS).map(|_| bench.compute_branches()).collect();
    steps.sort_by(f64::total_cmp);
    println!(
        "{BRANCHES} branches at {BRANCH_DEPTH}   {:>7.1} tokens/s",
        BRANCHES as f64 / steps[DECODE_STEPS / 2]
    );
    for rows in MESSAGES {
        let depth = DEPTHS[DEPTHS.len() - 1];
        let mut times: Vec<f64> = (0..MESSAGE_REPEATS).map(|_| bench.compute(depth, rows)).collect();
        times.sort_by(f64::total_cmp);
        println!("{rows:>3} rows at {depth:<4}     {:>7.1} ms", times[MESSAGE_REPEATS / 2] * 1e3);
    }
    attention::print(&bench.cpu, bench.decoder.config());
    Ok(())
}
