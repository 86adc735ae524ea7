//! The order in which products of few rows read their rows, and what of a card it depends on.

use candle_core::{DType, Device};

use super::launch::{RawMatrix, kernels};
use crate::device::{Error, Matrix, argument, compute_capability, multiprocessors};

/// Columns of a step of a sum, see `packed_product.cuh`.
pub(super) const CHUNK: usize = 128;
/// Outputs from which a few rows are enough for warp groups.
const MANY_OUTPUTS: usize = 16_384;
/// Rows that warp groups multiply at a time.
const MOST_GROUP_ROWS: usize = 256;

kernels! {
    // Of `packed_product_sm90.cu`.
    fn trainer_has_packed_product_sm90() -> i32;
}

/// The order of the columns of rows that products read, see `mma.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowLayout {
    /// As they are.
    Plain,
    /// In the order in which a warp reads them.
    Fragments,
    /// In blocks of 64 columns of this many rows, a power of two from 8 to 256, for Hopper's warp groups.
    Tiles(usize),
}

/// What the products of rows in such an order read as their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// 16-bit values.
    Dense,
    /// 4-bit codes of NF4 or FP4.
    Codes,
    /// GGUF blocks, in places beside 16-bit values.
    Blocks,
}

/// Rows in such an order.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'b> {
    matrix: Matrix<'b>,
    layout: RowLayout,
    is_scaled: bool,
}

impl<'b> Rows<'b> {
    /// Rows as they are.
    pub fn plain(matrix: Matrix<'b>) -> Self {
        Self { matrix, layout: RowLayout::Plain, is_scaled: false }
    }

    /// `m` rows in memory without gaps: `[rows of the layout, K]`, whose order is the layout's.
    ///
    /// # Errors
    /// If the memory is too small or not aligned, or K is no multiple of 128.
    pub fn new(memory: Matrix<'b>, m: usize, layout: RowLayout) -> Result<Self, Error> {
        let rows = layout.rows(m);
        let is_ordered = layout != RowLayout::Plain;
        let fits = memory.rows >= rows && memory.stride == memory.cols && rows >= m;
        let is_aligned = memory.address.is_multiple_of(128) && memory.cols.is_multiple_of(CHUNK);
        if !fits || is_ordered && !is_aligned {
            return Err(argument("rows", "memory", memory, format!("{rows} rows for {m}, aligned, in {layout:?}")));
        }
        Ok(Self { matrix: Matrix { rows: m, ..memory }, layout, is_scaled: false })
    }

    /// The same memory for values as products with 4-bit codes read them: f16, a 64th of each, whatever the type of the activations.
    #[must_use]
    pub fn scaled(self) -> Self {
        Self { is_scaled: true, ..self }
    }

    /// Whether they are.
    pub fn is_scaled(&self) -> bool {
        self.is_scaled
    }

    /// `(M, K)`.
    pub fn shape(&self) -> (usize, usize) {
        self.matrix.shape()
    }

    /// The type of the activations.
    pub fn dtype(&self) -> DType {
        self.matrix.dtype()
    }

    pub(super) fn layout(&self) -> RowLayout {
        self.layout
    }

    pub(super) fn memory(&self) -> Matrix<'b> {
        self.matrix
    }

    pub(super) fn raw(&self) -> RawMatrix {
        let raw = RawMatrix::from(self.matrix);
        let raw = if self.is_scaled { raw.scaled() } else { raw };
        match self.layout {
            RowLayout::Plain => raw,
            RowLayout::Fragments => raw.ordered(1, self.matrix.stride),
            RowLayout::Tiles(rows) => raw.ordered(2, rows),
        }
    }
}

impl RowLayout {
    /// The layout in which products of `m` rows with so many outputs are fastest.
    pub fn choose(m: usize, outputs: usize, weights: WeightKind, card: ProductCard) -> Self {
        // For fewer rows, warps that need not go in step make values of packed bytes faster, and cut a small matrix more evenly.
        let (least, smallest) = match (weights, outputs) {
            (WeightKind::Dense, _) => (1, 8),
            (WeightKind::Codes, MANY_OUTPUTS..) => (9, 16),
            _ => (17, 32),
        };
        if card.has_groups && (least..=MOST_GROUP_ROWS).contains(&m) {
            return Self::Tiles(m.next_power_of_two().max(smallest));
        }
        Self::Fragments
    }

    /// The column that stands at a place of a row, for those who put other rows in this order.
    pub fn column(self, place: usize) -> usize {
        let (chunk, at) = (place / CHUNK * CHUNK, place % CHUNK);
        chunk
            + match self {
                Self::Plain => at,
                Self::Fragments => 32 * (at / 8 % 4) + 8 * (at / 32) + at % 8,
                Self::Tiles(_) => 32 * (at % 8 / 2) + 4 * (at / 16) + at % 2 + 2 * (at / 8 % 2),
            }
    }

    /// Rows that `m` rows take.
    pub fn rows(self, m: usize) -> usize {
        if let Self::Tiles(rows) = self { rows } else { m }
    }
}

/// What of a card the cut of products depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductCard {
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// Whether it has Hopper's warp groups, and the program code for them.
    pub has_groups: bool,
    /// Whether a block has more than 64 KiB of shared memory.
    pub has_large_blocks: bool,
}

impl ProductCard {
    /// The card of a device.
    ///
    /// # Errors
    /// If the device is no GPU.
    pub fn of(device: &Device) -> Result<Self, Error> {
        let (major, _) = compute_capability(device)?;
        // SAFETY: the function takes nothing and asks the runtime about a kernel.
        let has_groups = major == 9 && unsafe { trainer_has_packed_product_sm90() } == 1;
        let multiprocessors = multiprocessors(device)? as usize;
        Ok(Self { multiprocessors, has_groups, has_large_blocks: major >= 8 })
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, RowLayout};

    #[test]
    fn a_layout_is_an_order_of_the_columns_of_each_chunk() {
        for layout in [RowLayout::Plain, RowLayout::Fragments, RowLayout::Tiles(8)] {
            for chunk in 0..3 {
                let mut columns: Vec<usize> =
                    (chunk * CHUNK..(chunk + 1) * CHUNK).map(|place| layout.column(place)).collect();
                columns.sort_unstable();
                assert!(columns.into_iter().eq(chunk * CHUNK..(chunk + 1) * CHUNK), "{layout:?}");
            }
        }
    }
}
