//! Dense f32 multiplies of strided matrices.
//!
//! Called by `ops` for attention, heads and weight gradients. The sum over the inner dimension runs in one fixed order
//! for each output element, so results do not depend on the number of threads.
#![expect(unsafe_code, reason = "the multiply works on raw pointers")]

/// A read-only strided matrix: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows start `row_stride` apart.
    ///
    /// # Panics
    /// If the slice is too short to hold it.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_holds(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// A dense row-major matrix.
    ///
    /// # Panics
    /// If the slice is too short to hold it.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose, without a copy.
    #[must_use]
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

fn assert_holds(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(len >= needed, "a [{rows}, {cols}] matrix of stride {row_stride} needs {needed} values, got {len}");
}

/// Threads a multiply may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only: inside a parallel loop.
    One,
    /// The whole pool.
    All,
}

/// `out = keep * out + scale * left · right`, with `out` row-major and its rows `out_stride` apart.
///
/// # Shapes
/// `left`: f32 `[M, K]`; `right`: f32 `[K, N]`; `out`: f32 `[M, N]`.
///
/// # Panics
/// If the shapes do not fit together or `out` is too short.
pub fn multiply(
    out: &mut [f32],
    out_stride: usize,
    keep: f32,
    scale: f32,
    left: Matrix<'_>,
    right: Matrix<'_>,
    threads: Threads,
) {
    assert_eq!(left.cols, right.rows, "inner dimensions of a multiply differ");
    assert_holds(out.len(), left.rows, right.cols, out_stride);
    assert!(out_stride >= right.cols, "rows of the output overlap");
    if left.rows == 0 || right.cols == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: `Matrix::strided` and the assertion above have checked that every element of the three matrices lies
    // inside its slice; `out` is borrowed mutably and so overlaps neither input.
    unsafe {
        gemm::gemm(
            left.rows,
            right.cols,
            left.cols,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            keep != 0.0,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{Matrix, Threads, multiply};
    use crate::rng::Stream;

    fn random(count: usize, item: u64) -> Vec<f32> {
        let mut stream = Stream::new(1, "matmul test", 0, item);
        (0..count).map(|_| stream.normal() as f32).collect()
    }

    #[test]
    fn all_transpositions_strides_and_scales_match_a_plain_loop() {
        for (case, &(m, n, k)) in [(1, 1, 1), (3, 5, 7), (17, 33, 64), (64, 9, 130), (1, 40, 96)].iter().enumerate() {
            let (left, right) = (random(m * k, case as u64), random(k * n, 100 + case as u64));
            let start = random(m * (n + 3), 200 + case as u64);
            let transposed: Vec<f32> = (0..n * k).map(|i| right[(i % k) * n + i / k]).collect();
            for threads in [Threads::One, Threads::All] {
                for right in [Matrix::new(&right, k, n), Matrix::new(&transposed, n, k).t()] {
                    let mut out = start.clone();
                    multiply(&mut out, n + 3, 0.5, 2.0, Matrix::new(&left, m, k), right, threads);
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 =
                                (0..k).map(|l| f64::from(left[i * k + l]) * f64::from(transposed[j * k + l])).sum();
                            let expected = 0.5 * f64::from(start[i * (n + 3) + j]) + 2.0 * sum;
                            let got = f64::from(out[i * (n + 3) + j]);
                            assert!((got - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{got} {expected}");
                        }
                        assert_eq!(
                            &out[i * (n + 3) + n..(i + 1) * (n + 3)],
                            &start[i * (n + 3) + n..(i + 1) * (n + 3)]
                        );
                    }
                }
            }
        }
    }
}
