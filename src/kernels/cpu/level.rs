//! Which vector instructions this machine has.

use std::sync::OnceLock;

/// The instruction set that a kernel uses, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust, what the compiler makes of it.
    Portable,
    /// AVX2, FMA and F16C: 8 floats a register.
    Avx2,
    /// AVX-512 F, BW and VL on top: 16 floats a register.
    Avx512,
}

impl Level {
    /// The best level of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// All levels that this machine can run, weakest first.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|&l| l <= Self::best()).collect()
    }

    /// This level, or the machine's best where that is weaker, so that a kernel never meets an instruction that the
    /// machine lacks.
    pub(crate) fn supported(self) -> Self {
        self.min(Self::best())
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        Level::Portable
    } else if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
    {
        Level::Avx512
    } else {
        Level::Avx2
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}
