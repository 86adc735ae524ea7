//! What can go wrong on a device.

/// What went wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel could not be launched, or an earlier one failed.
    #[error("{kernel}: CUDA error {code} ({meaning})")]
    Launch {
        /// Which kernel.
        kernel: &'static str,
        /// CUDA's error number.
        code: i32,
        /// What it means.
        meaning: &'static str,
    },
    /// The driver or one of its libraries reported an error.
    #[error("{what}: {reason}")]
    Driver {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        reason: String,
    },
    /// The device has no memory left.
    #[error(
        "no room on the GPU for {:.2} GiB more: tensors take {:.2} GiB, and {:.2} GiB of the card are free, a limit of the process \
         aside; make batches or sequences smaller, or keep weights or the optimizer's state in host memory: `trainer estimate` says \
         what fits",
        gib(*.bytes), gib(*.used), gib(*.free)
    )]
    Full {
        /// What was asked for.
        bytes: u64,
        /// What tensors take.
        used: u64,
        /// What nobody has of the card.
        free: u64,
    },
    /// The library of matrix products reported an error.
    #[error("matrix product [{m}, {k}] x [{k}, {n}]: {reason}")]
    Product {
        /// Rows of the result.
        m: usize,
        /// Columns of the result.
        n: usize,
        /// Length of the sums.
        k: usize,
        /// Its answer.
        reason: String,
    },
    /// An argument has the wrong shape, type or place.
    #[error("{operation}: `{argument}` is {got}, expected {expected}")]
    Argument {
        /// Which kernel or operation.
        operation: &'static str,
        /// Which argument.
        argument: &'static str,
        /// What was given.
        got: String,
        /// What fits.
        expected: String,
    },
    /// A ticket's moment has not come in time.
    #[error("work was not done at its deadline; an earlier error of the device or of another rank is the reason")]
    Late,
    /// A ticket's moment will not come.
    #[error("work was given up by the thread that did it, whose error says why")]
    GivenUp,
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

pub(crate) fn argument(
    operation: &'static str,
    argument: &'static str,
    got: impl std::fmt::Debug,
    expected: impl std::fmt::Debug,
) -> Error {
    Error::Argument { operation, argument, got: format!("{got:?}"), expected: format!("{expected:?}") }
}

/// A driver's error with what was asked of it.
#[cfg(feature = "cuda")]
pub(crate) fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Error + Copy {
    move |source: E| Error::Driver { what, reason: source.to_string() }
}
