//! Measuring the disk under the data directory, and reading memory, a little at a time.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

/// Enough to get past the disk's own short bursts, little enough to be done in a moment.
const PROBE_BYTES: usize = 64 << 20;
const CHUNK_BYTES: usize = 1 << 20;
const SYNCS: u32 = 8;
/// Larger than last-level caches are, so that reading it is reading RAM.
const MEMORY_BYTES: usize = 256 << 20;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct DiskSpeed {
    /// Written and flushed.
    pub write_mb_per_s: f64,
    /// Read back after the page cache was dropped.
    pub read_mb_per_s: f64,
    /// One 4 KiB write made durable.
    pub fdatasync_ms: f64,
}

/// Writes, flushes and reads a temporary file in `folder`.
pub fn measure_disk(folder: &Path) -> Result<DiskSpeed> {
    let path = folder.join(format!("speed-{}.tmp", std::process::id()));
    let measured = measure_file(&path).with_context(|| format!("measuring the disk with {}", path.display()));
    let removed = std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()));
    let speed = measured?;
    removed?;
    Ok(speed)
}

fn measure_file(path: &Path) -> Result<DiskSpeed> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    // Bytes that no file system or disk can compress away.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let chunk: Vec<u8> = (0..CHUNK_BYTES)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let begun = Instant::now();
    for _ in 0..PROBE_BYTES / CHUNK_BYTES {
        file.write_all(&chunk)?;
    }
    file.sync_data()?;
    let write_mb_per_s = megabytes_per_second(PROBE_BYTES, begun);

    let begun = Instant::now();
    for index in 0..SYNCS {
        file.seek(SeekFrom::Start(u64::from(index) * 4096))?;
        file.write_all(&chunk[..4096])?;
        file.sync_data()?;
    }
    let fdatasync_ms = begun.elapsed().as_secs_f64() * 1e3 / f64::from(SYNCS);

    drop_cache(&file)?;
    Ok(DiskSpeed { write_mb_per_s, read_mb_per_s: read_speed(&mut file)?, fdatasync_ms })
}

/// Reads the whole file from its beginning.
pub fn read_speed(file: &mut File) -> Result<f64> {
    let mut chunk = vec![0; CHUNK_BYTES];
    file.seek(SeekFrom::Start(0))?;
    let begun = Instant::now();
    let mut total = 0;
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(megabytes_per_second(total, begun)),
            count => total += count,
        }
    }
}

/// Asks the system to forget the file's clean pages in RAM.
pub fn drop_cache(file: &File) -> Result<()> {
    dormouse_kv::drop_cache(file).context("the page cache of the file cannot be dropped")
}

fn megabytes_per_second(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64().max(1e-9)
}

/// Reads memory with `threads` threads; GB/s.
pub fn measure_memory(threads: usize) -> f64 {
    let words = MEMORY_BYTES / 8;
    let data: Vec<u64> = (0..words as u64).collect();
    let begun = Instant::now();
    let passes = 4;
    let total: u64 = std::thread::scope(|scope| {
        let parts = data.chunks(words.div_ceil(threads.max(1)));
        let readers: Vec<_> = parts
            .map(|part| {
                scope.spawn(move || {
                    (0..passes).map(|_| sum(std::hint::black_box(part))).fold(0, u64::wrapping_add)
                })
            })
            .collect();
        // A reader only adds numbers; it does not panic.
        readers.into_iter().filter_map(|reader| reader.join().ok()).fold(0, u64::wrapping_add)
    });
    std::hint::black_box(total);
    (MEMORY_BYTES * passes) as f64 / 1e9 / begun.elapsed().as_secs_f64().max(1e-9)
}

fn sum(part: &[u64]) -> u64 {
    part.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measuring_the_disk_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let speed = measure_disk(folder.path()).unwrap();
        assert!(speed.write_mb_per_s > 0.0 && speed.read_mb_per_s > 0.0 && speed.fdatasync_ms > 0.0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
