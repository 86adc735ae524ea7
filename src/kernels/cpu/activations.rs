//! Rows of activations, laid out once per product in the order in which a few-row kernel meets the weights.

use super::Level;

/// Rows that a kernel multiplies at a time: each unpacked weight register is used so often.
pub const TILE: usize = 4;

/// Activations `[rows, columns]` in tiles of [`TILE`] rows.
pub struct Activations {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Activations {
    /// Lays out row-major activations.
    ///
    /// # Panics
    /// If `values` are not `rows * columns` many.
    pub fn new(_level: Level, values: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "activations [{rows}, {columns}]");
        Self { rows, columns, values: values.to_vec() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The rows as they came.
    pub fn plain(&self) -> &[f32] {
        &self.values
    }
}
