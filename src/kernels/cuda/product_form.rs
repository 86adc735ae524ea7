//! How products of few rows are cut: the forms of their kernels, and which is taken.

use super::packed_gguf;
use super::row_layout::{CHUNK, ProductCard, RowLayout, WeightKind};

/// Parts into which a sum is cut.
const MOST_SPLITS: usize = 16;
/// Chunks of a part of a sum that a block of a warp group has at most.
const MOST_GROUP_CHUNKS: usize = 30;
/// Columns from which a warp has enough of a sum for more rows.
const LONG_SUM: usize = 8192;
/// Chunks that a part of a sum has at least, on warp groups.
const LEAST_CHUNKS: usize = 4;

/// How a product is cut: see `packed_product.cu`, `packed_codes.cu` and those for warp groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductForm {
    /// The kernel's form.
    pub form: usize,
    /// Parts of the sum.
    pub splits: usize,
    /// Tiles from the first whose sum is not cut nevertheless.
    pub whole: usize,
}

/// The kernel for warp groups.
pub(super) const GROUPS: usize = 6;
/// The kernel's forms for 4-bit codes begin with this one; these two are for blocks of one and two warp groups.
pub(super) const CODES: usize = 10;
pub(super) const CODES_GROUPS: [usize; 2] = [17, 18];
/// The kernel for gate and up of a few rows, on Hopper.
pub(super) const CODES_STREAM: usize = 19;
/// Chunks of all tiles for each multiprocessor from which that one is worth its beginning, as measured on an H200 with the shapes
/// of the family: with 51 of a 1.5B model it is, with 16 of the 0.5B not.
const STREAM_CHUNKS: usize = 32;
/// Rows of `x` that it multiplies.
pub(super) const STREAM_ROWS: usize = 8;
/// Low-rank products of a row for which it has room.
const STREAM_RANKS: usize = 1024;

/// What a product makes, as far as its form depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKind {
    /// [`ProductOutput::Sum`]
    Sum,
    /// [`ProductOutput::Swiglu`]
    Swiglu,
}

impl ProductForm {
    /// Outputs of each matrix and rows of `x` that a block has, its rows of `W`, and its warps along the sum.
    fn tile(self, is_swiglu: bool, layout: RowLayout) -> Block {
        let (rows, cols, warps) = match self.form {
            0 => (if is_swiglu { 32 } else { 16 }, 8, 8),
            1 | 15 | CODES_STREAM => (32, 8, 8),
            2 | 12 => (64, 16, 4),
            3 | 13 => (128, 32, 2),
            4 | 14 => (128, 64, 2),
            10 => (16, 8, 8),
            11 => (64, 8, 4),
            18 => (128, layout.rows(64), 1),
            _ => (64, layout.rows(64), 1),
        };
        Block { outputs: if is_swiglu { rows / 2 } else { rows }, rows, cols, warps }
    }

    /// The form for `m` rows of `x` in a layout: enough blocks for all multiprocessors, no more reading than needed.
    pub fn choose(
        m: usize,
        rows: &[usize],
        cols: usize,
        (kind, weights): (ProductKind, WeightKind),
        layout: RowLayout,
        card: ProductCard,
    ) -> Self {
        let (is_swiglu, is_codes) = (kind == ProductKind::Swiglu, weights == WeightKind::Codes);
        let all: usize = rows.iter().sum();
        let blocks_of_32: usize = rows.iter().map(|rows| rows.div_ceil(32)).sum();
        let is_large = is_codes && is_swiglu || all.div_ceil(32) >= 4 * card.multiprocessors;
        let form = match (layout, m) {
            _ if weights == WeightKind::Blocks => packed_gguf::form(m, layout, card),
            (RowLayout::Tiles(_), _) if is_codes => return Self::of_groups(m, rows, cols, is_swiglu, layout, card),
            (RowLayout::Tiles(_), _) => GROUPS,
            (RowLayout::Fragments, 0..=STREAM_ROWS) if is_codes && is_swiglu && Self::is_stream(rows, cols, card) => {
                return Self::stream();
            }
            // As many multiprocessors have work with 32 rows a block as with 16.
            (_, 0..=8) if is_codes && !is_large && (cols >= LONG_SUM || blocks_of_32 >= card.multiprocessors) => 5,
            (_, 0..=8) => usize::from(is_large),
            (_, 9..=16) => 2,
            (_, 17..=32) => 3,
            _ if card.has_large_blocks => 4,
            _ => 3,
        };
        let form = if is_codes { CODES + form } else { form };
        Self::cut(form, (m, rows, cols), kind, layout, card)
    }

    /// A form with its sum cut into as many parts as take the least time.
    fn cut(
        form: usize,
        (m, rows, cols): (usize, &[usize], usize),
        kind: ProductKind,
        layout: RowLayout,
        card: ProductCard,
    ) -> Self {
        let is_swiglu = kind == ProductKind::Swiglu;
        let chunks = cols / CHUNK;
        let block = Self::whole(form).tile(is_swiglu, layout);
        let blocks = Self::whole(form).tiles(rows, is_swiglu, layout) * m.div_ceil(block.cols);
        // Half steps: those that the busiest multiprocessor makes one after the other, or, where its blocks are too few to hide a
        // step's latency, those of a block alone, for each round of blocks; and what adding the sums of several takes.
        let Pace { resident, latency, end } = Pace::of(form, block.cols);
        let cost = |splits: usize| {
            let of_card = (blocks * splits).div_ceil(card.multiprocessors);
            let steps = chunks.div_ceil(splits).div_ceil(block.warps);
            let busy = (2 * of_card * steps).max(of_card.div_ceil(resident) * steps * latency);
            busy + if splits > 1 { of_card * end } else { 0 }
        };
        let most = (chunks / block.warps).clamp(1, MOST_SPLITS);
        let least = if form == GROUPS { chunks.div_ceil(MOST_GROUP_CHUNKS) } else { 1 };
        let splits = (least..=most.max(least)).min_by_key(|&splits| cost(splits)).unwrap_or(1);
        Self { splits, ..Self::whole(form) }
    }

    /// The form of the kernel for gate and up of up to 8 rows with 4-bit codes on Hopper: `packed_codes_stream_sm90.cu`.
    pub fn stream() -> Self {
        Self::whole(CODES_STREAM)
    }

    fn is_stream(rows: &[usize], cols: usize, card: ProductCard) -> bool {
        let chunks = Self::stream().tiles(rows, true, RowLayout::Fragments) * (cols / CHUNK);
        card.has_groups && chunks >= STREAM_CHUNKS * card.multiprocessors
    }

    /// The form with which so many low-rank products of a row can be added: this one or one that has room for them.
    pub(super) fn with_ranks(self, ranks: usize) -> Self {
        if self.form == CODES_STREAM && ranks > STREAM_RANKS { Self::whole(CODES + 1) } else { self }
    }

    /// A form that cuts no sum.
    fn whole(form: usize) -> Self {
        Self { form, splits: 1, whole: 0 }
    }

    /// The form of the kernel for warp groups and 4-bit codes: whole tiles for as many rounds of all multiprocessors as they fill, and
    /// the rest cut so that one more round, shorter by as much, is full too.
    fn of_groups(m: usize, rows: &[usize], cols: usize, is_swiglu: bool, layout: RowLayout, card: ProductCard) -> Self {
        // Blocks at a time, in halves of a multiprocessor; as measured on an H200 with matrices of a 7B model.
        let places = |groups: usize| {
            let halves = match layout.rows(m) {
                ..=16 => 8 / groups,
                17..=32 => 6 - groups,
                33..=64 => 4,
                _ => 2,
            };
            card.multiprocessors * halves / 2
        };
        let tiles = |form| Self::whole(form).tiles(rows, is_swiglu, layout);
        // Two groups share what is read of `x`; where that leaves multiprocessors without a part of a tile, one has its own. A part is
        // worth its sums' way through memory if it has a few chunks.
        let [one, two] = CODES_GROUPS;
        let most_parts = (cols / CHUNK / LEAST_CHUNKS).clamp(1, MOST_SPLITS);
        let is_small = layout.rows(m) <= 64 && tiles(two) * most_parts < card.multiprocessors;
        let (form, places) = if is_small { (one, places(1)) } else { (two, places(2)) };
        let tiles = tiles(form);
        let whole = tiles / places * places;
        let parts = if tiles == whole { 1 } else { places / (tiles - whole) };
        Self { form, splits: parts.clamp(1, most_parts), whole }
    }

    pub(super) fn tiles(self, rows: &[usize], is_swiglu: bool, layout: RowLayout) -> usize {
        let Block { outputs, .. } = self.tile(is_swiglu, layout);
        if is_swiglu {
            rows.first().map_or(0, |rows| rows.div_ceil(outputs))
        } else {
            rows.iter().map(|rows| rows.div_ceil(outputs)).sum()
        }
    }

    /// Floats and counters of the workspace for `m` rows of `x`.
    pub fn workspace(self, m: usize, rows: &[usize], is_swiglu: bool, layout: RowLayout) -> (usize, usize) {
        if self.splits == 1 {
            return (0, 0);
        }
        let block = self.tile(is_swiglu, layout);
        let places = (self.tiles(rows, is_swiglu, layout) - self.whole) * m.div_ceil(block.cols);
        (self.splits * places * block.rows * block.cols, places)
    }
}

/// How blocks of a form share a multiprocessor, as measured on an H200 with matrices of a 7B model: how many there are at a time,
/// and, in half steps, how long a step takes by itself and what adding the sums of several blocks takes for each.
#[derive(Clone, Copy, Debug)]
struct Pace {
    resident: usize,
    latency: usize,
    end: usize,
}

impl Pace {
    fn of(form: usize, cols: usize) -> Self {
        let (resident, latency, end) = match (form, cols) {
            (0, _) => (8, 6, 2),
            (1 | 10, _) => (3, 6, 2),
            (11 | 15, _) => (2, 6, 2),
            (2..=4 | 12..=14, _) => (2, 6, 6),
            (_, 0..=32) => (4, 7, 4),
            (_, 33..=64) => (4, 5, 8),
            (_, 65..=128) => (3, 4, 16),
            _ => (2, 3, 32),
        };
        Self { resident, latency, end }
    }
}

/// What a block of a form has.
#[derive(Clone, Copy, Debug)]
struct Block {
    outputs: usize,
    rows: usize,
    cols: usize,
    warps: usize,
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, ProductCard, ProductForm, ProductKind, RowLayout, STREAM_RANKS, STREAM_ROWS, WeightKind};

    fn cards() -> [ProductCard; 3] {
        [(132, true, true), (68, false, true), (36, false, false)].map(
            |(multiprocessors, has_groups, has_large_blocks)| ProductCard {
                multiprocessors,
                has_groups,
                has_large_blocks,
            },
        )
    }

    #[test]
    fn gate_and_up_are_a_stream_on_hopper_where_there_is_enough_of_them() {
        let form = |m, (hidden, inner): (usize, usize), card: ProductCard| {
            let layout = RowLayout::choose(m, 2 * inner, WeightKind::Codes, card);
            ProductForm::choose(m, &[inner, inner], hidden, (ProductKind::Swiglu, WeightKind::Codes), layout, card)
        };
        let [hopper, others @ ..] = cards();
        let (small, large) = ((896, 4864), (3584, 18_944));
        for m in 1..=STREAM_ROWS {
            assert_eq!(form(m, large, hopper), ProductForm::stream());
            assert_ne!(form(m, small, hopper), ProductForm::stream());
            assert!(others.iter().all(|&card| form(m, large, card) != ProductForm::stream()));
        }
        assert_ne!(form(STREAM_ROWS + 1, large, hopper), ProductForm::stream());
        assert_eq!(ProductForm::stream().with_ranks(STREAM_RANKS), ProductForm::stream());
        assert_ne!(ProductForm::stream().with_ranks(STREAM_RANKS + 1), ProductForm::stream());
    }

    #[test]
    fn every_shape_of_the_family_has_a_form_whose_parts_cover_the_sum() {
        let shapes = [896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 8192];
        let inner = [3072, 4864, 8960, 9728, 11_008, 12_288, 13_824, 17_408, 18_944, 25_600, 27_648, 29_568];
        for card in cards() {
            for (hidden, m) in shapes.into_iter().chain(inner).flat_map(|k| [1, 8, 17, 64, 256].map(|m| (k, m))) {
                for (rows, kind) in
                    [(vec![hidden, 512, 512], ProductKind::Sum), (vec![hidden, hidden], ProductKind::Swiglu)]
                {
                    for weights in [WeightKind::Dense, WeightKind::Codes] {
                        let layout = RowLayout::choose(m, rows.iter().sum(), weights, card);
                        assert!(layout.rows(m) >= m);
                        let form = ProductForm::choose(m, &rows, hidden, (kind, weights), layout, card);
                        assert!((1..=hidden / CHUNK).contains(&form.splits), "{form:?} for {hidden}, {m} rows");
                        let (floats, places) = form.workspace(m, &rows, kind == ProductKind::Swiglu, layout);
                        assert_eq!(floats == 0, places == 0);
                        let tiles = form.tiles(&rows, kind == ProductKind::Swiglu, layout);
                        assert!(form.whole <= tiles && (form.whole < tiles || form.splits == 1), "{form:?} of {tiles}");
                    }
                }
            }
        }
    }
}
