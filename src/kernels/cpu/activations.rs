//! Rows of activations, laid out once per product in the order in which a few-row kernel meets the weights.
//!
//! Unpacking 4- to 8-bit codes into float registers is cheapest when the values may come in an order of their own, for
//! example every fourth one. Reordering a few rows of activations once costs nothing beside reordering every row of
//! weights, so the activations are brought into the kernel's order.

use super::Level;

/// Rows that a kernel multiplies at a time: each unpacked register of weights is used so often.
pub const TILE: usize = 4;

/// Values that a kernel unpacks at a time.
pub(crate) const GROUP: usize = 32;

/// Floats beside each group and row that hold sums of the group's activations, for formats with a minimum.
pub(crate) const SUMS: usize = 16;

/// The order of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Row-major as they came.
    Plain,
    /// Groups of 32 signed bytes, widened by AVX2: register `j` holds the bytes `j, j + 4, j + 8, ...`, as the top
    /// byte of an integer, hence 2^24 times too large; the activations are that much smaller.
    Avx2Bytes,
    /// Pairs of groups of 32 codes, those of the high nibbles (even values), then those of the low ones; looked up with AVX2,
    /// register `j` holding 4 bytes of each half.
    Avx2Codes,
    /// Groups of 32 values in their natural order.
    Natural,
    /// Pairs of groups of 32 codes, even values, then odd ones.
    Avx512Codes,
}

impl Order {
    /// For each position in a pair of groups, the value that belongs there.
    const fn sources(self) -> [u8; 2 * GROUP] {
        let mut sources = [0u8; 2 * GROUP];
        let mut position = 0;
        while position < 2 * GROUP {
            let (group, inside) = (position / GROUP, position % GROUP);
            let (register, lane) = (inside / 8, inside % 8);
            sources[position] = match self {
                Self::Plain | Self::Natural => position,
                Self::Avx2Bytes => GROUP * group + 4 * lane + register,
                Self::Avx2Codes => 2 * (16 * (lane / 4) + 4 * register + lane % 4) + group,
                Self::Avx512Codes => 2 * inside + group,
            } as u8;
            position += 1;
        }
        sources
    }
}

/// 16 floats on a cache line of their own, so that no register load crosses two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Activations `[rows, columns]`.
///
/// In any order but [`Order::Plain`] they lie as `[tile][group][row of the tile][32]`, with tiles of up to [`TILE`] rows,
/// and their sums as `[tile][group][row of the tile][16]`.
pub struct Activations {
    rows: usize,
    columns: usize,
    order: Order,
    plain: Vec<f32>,
    lines: Vec<Line>,
    sums: Vec<Line>,
}

impl Activations {
    /// Activations as they came.
    ///
    /// # Panics
    /// If `values` are not `rows * columns` many.
    pub fn plain(values: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "activations [{rows}, {columns}]");
        Self { rows, columns, order: Order::Plain, plain: values.to_vec(), lines: Vec::new(), sums: Vec::new() }
    }

    /// Lays out row-major activations in `order`, with sums where `has_minimum`.
    ///
    /// # Panics
    /// If `values` are not `rows * columns` many, or a row is no whole number of groups.
    pub fn ordered(level: Level, order: Order, has_minimum: bool, values: &[f32], rows: usize, columns: usize) -> Self {
        if order == Order::Plain {
            return Self::plain(values, rows, columns);
        }
        assert_eq!(values.len(), rows * columns, "activations [{rows}, {columns}]");
        let unit = match order {
            Order::Avx2Codes | Order::Avx512Codes => 2 * GROUP,
            _ => GROUP,
        };
        assert!(columns.is_multiple_of(unit), "{columns} columns in groups of {unit}");
        let groups = columns / GROUP;
        let mut lines = vec![Line([0.0; 16]); rows * groups * (GROUP / 16)];
        let mut sums = vec![Line([0.0; SUMS]); if has_minimum { rows * groups } else { 0 }];
        for (tile, tile_values) in values.chunks(TILE * columns).enumerate() {
            let height = tile_values.len() / columns;
            let first = tile * TILE * groups;
            let lines = &mut lines[2 * first..][..2 * height * groups];
            for (row, values) in tile_values.chunks_exact(columns).enumerate() {
                reorder(level, order, values, height, row, lines);
            }
            if has_minimum {
                let sums = &mut sums[first..][..height * groups];
                for (row, values) in tile_values.chunks_exact(columns).enumerate() {
                    for (group, values) in values.as_chunks::<GROUP>().0.iter().enumerate() {
                        sums[group * height + row] = group_sums(order, values);
                    }
                }
            }
        }
        Self { rows, columns, order, plain: Vec::new(), lines, sums }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The order they are in.
    pub fn order(&self) -> Order {
        self.order
    }

    /// The rows as they came, `[rows, columns]`; empty in any other order.
    pub fn plain_rows(&self) -> &[f32] {
        &self.plain
    }

    /// The groups of the tile that begins at row `first`, and the sums beside them (null where there are none).
    pub(crate) fn tile(&self, first: usize) -> (*const f32, *const f32) {
        let groups = self.columns / GROUP;
        let sums = self.sums.get(first * groups..).map_or(std::ptr::null(), <[Line]>::as_ptr);
        (self.lines[2 * first * groups..].as_ptr().cast(), sums.cast())
    }

    /// Whether sums lie beside the groups.
    pub(crate) fn has_sums(&self) -> bool {
        !self.sums.is_empty() || self.rows * self.columns == 0
    }
}

fn reorder(level: Level, order: Order, values: &[f32], height: usize, row: usize, lines: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions.
        return unsafe { reorder_avx2(order, values, height, row, lines) };
    }
    let _ = level;
    reorder_any(order, values, height, row, lines);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn reorder_avx2(order: Order, values: &[f32], height: usize, row: usize, lines: &mut [Line]) {
    reorder_any(order, values, height, row, lines);
}

#[inline(always)]
fn reorder_any(order: Order, values: &[f32], height: usize, row: usize, lines: &mut [Line]) {
    match order {
        Order::Plain => {}
        Order::Avx2Bytes => {
            for (group, values) in values.as_chunks::<GROUP>().0.iter().enumerate() {
                let target = &mut lines[2 * (group * height + row)..][..2];
                for position in 0..GROUP {
                    const SOURCES: [u8; 2 * GROUP] = Order::Avx2Bytes.sources();
                    // 2^-24 undoes what widening a byte from the top of an integer multiplies it by.
                    target[position / 16].0[position % 16] =
                        values[usize::from(SOURCES[position])] * (1.0 / 16_777_216.0);
                }
            }
        }
        Order::Natural => {
            for (group, values) in values.as_chunks::<GROUP>().0.iter().enumerate() {
                let target = &mut lines[2 * (group * height + row)..][..2];
                for position in 0..GROUP {
                    target[position / 16].0[position % 16] = values[position];
                }
            }
        }
        Order::Avx2Codes => reorder_pairs(&const { Order::Avx2Codes.sources() }, values, height, row, lines),
        Order::Avx512Codes => reorder_pairs(&const { Order::Avx512Codes.sources() }, values, height, row, lines),
    }
}

#[inline(always)]
fn reorder_pairs(sources: &[u8; 2 * GROUP], values: &[f32], height: usize, row: usize, lines: &mut [Line]) {
    for (pair, values) in values.as_chunks::<{ 2 * GROUP }>().0.iter().enumerate() {
        for half in 0..2 {
            let target = &mut lines[2 * ((2 * pair + half) * height + row)..][..2];
            for position in 0..GROUP {
                target[position / 16].0[position % 16] = values[usize::from(sources[half * GROUP + position])];
            }
        }
    }
}

/// Sums of a group's activations, spread over lanes so that the first half of the lanes belongs to its first 16 values.
fn group_sums(order: Order, values: &[f32; GROUP]) -> Line {
    let mut sums = [0.0; SUMS];
    let lanes = if order == Order::Natural { 16 } else { 8 };
    let each = GROUP / lanes;
    for (lane, sum) in sums.iter_mut().take(lanes).enumerate() {
        *sum = values[each * lane..][..each].iter().sum();
    }
    Line(sums)
}
