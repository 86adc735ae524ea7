//! Notes the commit that the program is built from; with the feature `cuda` compiles the kernels.

use std::process::Command;

fn main() {
    let commit = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    if let Some(commit) = commit.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok()) {
        println!("cargo::rustc-env=TRAINER_GIT_COMMIT={}", commit.trim());
        println!("cargo::rerun-if-changed=.git/HEAD");
        println!("cargo::rerun-if-changed=.git/logs/HEAD");
    }
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    compile_kernels();
}

/// Compute capabilities that the kernels are compiled for, beside the one of `CUDA_COMPUTE_CAP` (or of the card found).
/// `TRAINER_CUDA_ARCHS` names others, separated by spaces; empty: none.
#[cfg(feature = "cuda")]
const ARCHS: &str = "75 80 86 89 90a";

#[cfg(feature = "cuda")]
fn compile_kernels() {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    println!("cargo::rerun-if-env-changed=TRAINER_CUDA_ARCHS");
    // A kernel that is new, too.
    println!("cargo::rerun-if-changed=src/kernels/cuda");
    let archs = std::env::var("TRAINER_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let own = cudaforge::detect_compute_cap().map_or_else(|_| "80".into(), |arch| arch.to_nvcc_arch());
    let mut builder = cudaforge::KernelBuilder::default()
        .source_dir("src/kernels/cuda")
        .watch(
            [
                "common.cuh",
                "elementwise.cuh",
                "column_sums.cuh",
                "attention.cuh",
                "attention_sm90.cuh",
                "mma.cuh",
                "paged_attention.cuh",
                "paged_attention_tiles.cuh",
                "draw.cuh",
                "packed_product.cuh",
                "packed_product_sm90.cuh",
                "packed_codes.cuh",
                "packed_product.cu",
                "packed_product_sm90.cu",
                "packed_gguf.cuh",
                "packed_gguf_forms.cuh",
                "packed_gguf_forms_sm90.cuh",
            ]
            .map(|name| format!("src/kernels/cuda/{name}")),
        )
        .include_path("src/kernels/cuda")
        .args(["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-lineinfo"]);
    for arch in archs.split_whitespace().filter(|arch| !own.ends_with(*arch)) {
        builder = builder.arg(&format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    builder.build_lib(out.join("libtrainer_kernels.a")).expect("nvcc compiles the kernels");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=trainer_kernels");
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
}
