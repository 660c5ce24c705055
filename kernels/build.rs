//! Compiles `cuda/*.cu` where the feature `cuda` asks for it: each file to one fat binary with code for compute capability
//! 8.0 and 9.0, and with PTX that drivers translate for later ones.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O3",
    // Sums and products are fused where the source says so, and nowhere else: bits must not depend on the compiler's mood.
    "-fmad=false",
    "-fatbin",
    "-gencode",
    "arch=compute_80,code=sm_80",
    "-gencode",
    "arch=compute_90,code=sm_90",
    "-gencode",
    "arch=compute_80,code=compute_80",
    "-o",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder for results"));
    let nvcc = nvcc();
    let mut running = Vec::new();
    for source in sources() {
        let image = folder.join(source.with_extension("fatbin").file_name().expect("a file has a name"));
        let child = Command::new(&nvcc).args(FLAGS).arg(&image).arg(&source).spawn();
        let child = child.unwrap_or_else(|error| {
            panic!(
                "the CUDA compiler {} cannot be started ({error}): set NVCC to it, or build without the feature cuda",
                nvcc.display()
            )
        });
        running.push((source, child));
    }
    for (source, mut child) in running {
        let status = child.wait().expect("a started compiler can be waited for");
        assert!(status.success(), "{} could not compile {}: {status}", nvcc.display(), source.display());
    }
}

fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("cuda").expect("kernels/cuda is there");
    let paths = entries.map(|entry| entry.expect("kernels/cuda can be read").path());
    let mut sources: Vec<PathBuf> = paths.filter(|path| path.extension() == Some("cu".as_ref())).collect();
    sources.sort();
    sources
}

/// `NVCC`, or the one in `CUDA_HOME`, or that on the path.
fn nvcc() -> PathBuf {
    let given = env::var_os("NVCC").map(PathBuf::from);
    let home = || env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    given.or_else(home).unwrap_or_else(|| "nvcc".into())
}
