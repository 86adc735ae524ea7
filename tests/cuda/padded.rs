//! Matrices inside wider, poisoned ones, and how fast a launch moves its bytes.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, matrix, synchronize};

use crate::support::{download, upload};

/// All types of values.
pub(crate) const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Types of the residual stream and of activations that belong together.
pub(crate) const RESIDUALS: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F32, DType::F16),
    (DType::F32, DType::BF16),
];

/// Columns before and after a matrix: none, such that 16-byte accesses stay possible, and such that they do not.
pub(crate) const MARGINS: [(usize, usize); 3] = [(0, 0), (8, 16), (1, 2)];

/// The largest error of a result that is computed in f32 and rounded once.
pub(crate) fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 5e-4,
        DType::BF16 => 4e-3,
        _ => 5e-6,
    }
}

/// Values as `dtype` holds them.
pub(crate) fn rounded(device: &Device, values: &[f32], dtype: DType) -> Vec<f32> {
    download(&upload(device, values, values.len(), dtype))
}

/// `rows` x `cols` values with columns of "not a number" on both sides.
pub(crate) struct Padded {
    /// The values after rounding, row by row.
    pub(crate) values: Vec<f32>,
    tensor: Tensor,
    cols: usize,
    before: usize,
}

impl Padded {
    pub(crate) fn new(
        device: &Device,
        values: &[f32],
        (rows, cols): (usize, usize),
        (before, after): (usize, usize),
        dtype: DType,
    ) -> Self {
        let width = before + cols + after;
        let mut all = vec![f32::NAN; rows * width];
        for (all, row) in all.chunks_exact_mut(width).zip(values.chunks_exact(cols)) {
            all[before..before + cols].copy_from_slice(row);
        }
        let tensor = upload(device, &all, (rows, width), dtype);
        Self { values: rounded(device, values, dtype), tensor, cols, before }
    }

    /// For results: nothing but "not a number".
    pub(crate) fn poisoned(device: &Device, shape: (usize, usize), margins: (usize, usize), dtype: DType) -> Self {
        Self::new(device, &vec![f32::NAN; shape.0 * shape.1], shape, margins, dtype)
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        matrix(&self.tensor).unwrap().columns(self.before, self.cols)
    }

    /// The values now; nothing may have been written beside them.
    pub(crate) fn read(&self) -> Vec<f32> {
        let width = self.tensor.dims()[1];
        let inside = self.before..self.before + self.cols;
        let mut values = Vec::with_capacity(self.tensor.dims()[0] * self.cols);
        for row in download(&self.tensor).chunks_exact(width) {
            let is_untouched = row.iter().enumerate().all(|(col, v)| inside.contains(&col) || v.is_nan());
            assert!(is_untouched, "values beside the matrix were written");
            values.extend_from_slice(&row[inside.clone()]);
        }
        values
    }
}

/// Prints how long a launch takes and how fast it moves `bytes`.
#[expect(clippy::print_stdout, reason = "a table for the reader")]
pub(crate) fn print_bandwidth(device: &Device, what: &str, bytes: usize, mut launch: impl FnMut()) {
    const TIMES: usize = 20;
    (0..3).for_each(|_| launch());
    synchronize(device).unwrap();
    let start = Instant::now();
    (0..TIMES).for_each(|_| launch());
    synchronize(device).unwrap();
    let secs = start.elapsed().as_secs_f64() / TIMES as f64;
    println!("{what:40} {:9.1} us  {:7.0} GB/s", secs * 1e6, bytes as f64 / secs * 1e-9);
}
