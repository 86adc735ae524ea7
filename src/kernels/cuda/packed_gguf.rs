//! Products of few rows straight from GGUF blocks: which of the forms of [`super::packed_product`] multiply them.

use super::gguf::{GgufKind, kind_code};
use super::launch::{RawStream, kernels};
use super::packed_product::RawProduct;
use super::product_form::GROUPS;
use super::row_layout::{ProductCard, RowLayout};

/// The first format of GGUF in `packed_product.cuh`.
const FIRST_FORMAT: i32 = 4;
/// Fewest rows of a layout for warp groups whose products are compiled.
const LEAST_GROUP_ROWS: usize = 32;

kernels! {
    // Of `packed_gguf.cu`: blocks of 32 values.
    fn trainer_packed_gguf(
        product: *const RawProduct,
        format: i32,
        form: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_gguf_k.cu`: blocks of 256 values.
    fn trainer_packed_gguf_k(
        product: *const RawProduct,
        format: i32,
        form: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_gguf_sm90.cu`.
    fn trainer_packed_gguf_sm90(
        product: *const RawProduct,
        format: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_gguf_k_sm90.cu`.
    fn trainer_packed_gguf_k_sm90(
        product: *const RawProduct,
        format: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
}

/// The number of a format; `None` for plain floats.
pub(super) fn format(kind: GgufKind) -> Option<i32> {
    kind_code(kind).map(|code| FIRST_FORMAT + code)
}

/// The form for `m` rows of `x`.
pub(super) fn form(m: usize, layout: RowLayout, card: ProductCard) -> usize {
    match (layout, m) {
        (RowLayout::Tiles(_), _) => GROUPS,
        (_, 0..=8) => 1,
        (_, 33..) if card.has_large_blocks => 4,
        _ => 3,
    }
}

/// Whether a form is one of those that are compiled for GGUF blocks.
pub(super) fn has_form(form: usize, layout: RowLayout) -> bool {
    match layout {
        RowLayout::Tiles(rows) => form == GROUPS && rows >= LEAST_GROUP_ROWS,
        _ => matches!(form, 1 | 3 | 4),
    }
}

/// Puts a product on the stream; returns the runtime's code.
///
/// # Safety
/// The addresses in `raw` are of live device memory of the lengths that its shapes ask for.
pub(super) unsafe fn launch(
    raw: &RawProduct,
    kind: GgufKind,
    form: usize,
    is_swiglu: i32,
    tiles: i32,
    stream: RawStream,
) -> i32 {
    let (raw, format, is_k) = (&raw const *raw, format(kind).unwrap_or(-1), kind.block_len() == 256);
    // SAFETY: the caller's promise; the description is copied before the call returns.
    unsafe {
        match (form == GROUPS, is_k) {
            (true, true) => trainer_packed_gguf_k_sm90(raw, format, is_swiglu, tiles, stream),
            (true, false) => trainer_packed_gguf_sm90(raw, format, is_swiglu, tiles, stream),
            (false, true) => trainer_packed_gguf_k(raw, format, form as i32, is_swiglu, tiles, stream),
            (false, false) => trainer_packed_gguf(raw, format, form as i32, is_swiglu, tiles, stream),
        }
    }
}

#[cfg(test)]
mod tests {
    //! `packed_gguf.cuh` once more, step by step, against the CPU's values: which bytes a lane reads, how it cuts its words out of
    //! them, and that the fused operations round as the plain ones.

    use half::f16;

    use super::super::product_form::{ProductForm, ProductKind};
    use super::super::row_layout::{CHUNK, ProductCard, RowLayout, WeightKind};
    use super::{GgufKind, form, format, has_form};
    use crate::kernels::cpu::{Level, blocks};
    use crate::rng::Stream;

    /// Runs of bytes as a lane reads them.
    struct Run {
        units: Vec<u8>,
        shift: usize,
    }

    impl Run {
        /// `bytes` from `at` on, where `align` divides `at`.
        fn read(memory: &[u8], at: usize, bytes: usize, align: usize) -> Self {
            assert!(at.is_multiple_of(align));
            let shift = if align < 8 { at % 8 } else { 0 };
            let spare = if align < 8 { 8 - align } else { 0 };
            let count = (bytes + spare).div_ceil(8);
            let is_last_free = bytes <= 8 * (count - 1) && shift + bytes <= 8 * (count - 1);
            let units = (0..count).flat_map(|i| {
                let unit = if is_last_free && i == count - 1 { i - 1 } else { i };
                // A unit that is not all in the matrix is a read behind it.
                memory[at - shift + 8 * unit..][..8].to_vec()
            });
            Self { units: units.collect(), shift }
        }

        fn word(&self, index: usize) -> u32 {
            let bytes: Vec<u8> =
                (0..4).map(|i| self.units.get(self.shift + 4 * index + i).copied().unwrap_or(0xa5)).collect();
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        }
    }

    fn byte(word: u32, at: usize) -> u32 {
        word >> (8 * at) & 255
    }

    fn half_of(bits: u32) -> f32 {
        f16::from_bits(bits as u16).to_f32()
    }

    fn short_at(memory: &[u8], at: usize) -> u32 {
        assert!(at.is_multiple_of(2));
        u32::from(memory[at]) | u32::from(memory[at + 1]) << 8
    }

    fn word_at(memory: &[u8], at: usize) -> u32 {
        assert!(at.is_multiple_of(4));
        short_at(memory, at) | short_at(memory, at + 2) << 16
    }

    fn fifth_bits(bits: u32) -> u32 {
        (bits & 15).wrapping_mul(0x0204_0810) & 0x1010_1010
    }

    /// (code - bias) scale, by the mantissa of 128.
    fn scaled(codes: [u32; 2], bias: f32, scale: f32) -> [f32; 8] {
        let offset = -(128.0 + bias) * scale;
        std::array::from_fn(|i| f32::from_bits(0x4300_0000 | byte(codes[i / 4], i % 4) << 16).mul_add(scale, offset))
    }

    fn scaled_plus(codes: [u32; 2], scale: f32, offset: f32) -> [f32; 8] {
        std::array::from_fn(|i| {
            (f32::from_bits(0x4300_0000 | byte(codes[i / 4], i % 4) << 16) - 128.0).mul_add(scale, offset)
        })
    }

    fn nibbles(run: &Run, first: usize, part: usize) -> [u32; 2] {
        [0, 1].map(|i| run.word(first + part % 2 * 2 + i) >> (part / 2 * 4) & 0x0f0f_0f0f)
    }

    /// Scale and minimum of a quarter of `Q4_K` and `Q5_K`.
    fn group_scale(memory: &[u8], block: usize, half: usize, quarter: usize) -> (f32, f32) {
        let [a, b, c] = [4, 8, 12].map(|at| word_at(memory, block + at) >> (8 * quarter));
        let (scale, minimum) =
            if half == 1 { (c & 15 | a >> 2 & 48, c >> 4 & 15 | b >> 2 & 48) } else { (a & 63, b & 63) };
        let of_block = word_at(memory, block);
        (half_of(of_block) * scale as f32, half_of(of_block >> 16) * minimum as f32)
    }

    /// Part `part` of the 32 columns that begin at value `flat` of the matrix.
    fn values(kind: GgufKind, memory: &[u8], flat: usize, part: usize) -> [f32; 8] {
        let block = flat / kind.block_len() * kind.block_bytes();
        let (half, quarter) = (flat >> 7 & 1, flat >> 5 & 3);
        let pair = |run: &Run| [0, 1].map(|i| run.word(part * 2 + i));
        match kind {
            GgufKind::Q4_0 => {
                let run = Run::read(memory, block + 2, 16, 2);
                scaled(nibbles(&run, 0, part), 8.0, half_of(short_at(memory, block)))
            }
            GgufKind::Q4_1 => {
                let run = Run::read(memory, block, 20, 4);
                scaled_plus(nibbles(&run, 1, part), half_of(run.word(0)), half_of(run.word(0) >> 16))
            }
            GgufKind::Q5_0 => {
                let run = Run::read(memory, block + 2, 20, 2);
                let codes = nibbles(&run, 1, part);
                let codes = [0, 1].map(|i| codes[i] | fifth_bits(run.word(0) >> (part * 8 + i * 4)));
                scaled(codes, 16.0, half_of(short_at(memory, block)))
            }
            GgufKind::Q5_1 => {
                let run = Run::read(memory, block, 24, 8);
                let codes = nibbles(&run, 2, part);
                let codes = [0, 1].map(|i| codes[i] | fifth_bits(run.word(1) >> (part * 8 + i * 4)));
                scaled_plus(codes, half_of(run.word(0)), half_of(run.word(0) >> 16))
            }
            GgufKind::Q8_0 => {
                let codes = pair(&Run::read(memory, block + 2, 32, 2)).map(|word| word ^ 0x8080_8080);
                let scale = half_of(short_at(memory, block));
                std::array::from_fn(|i| {
                    let above = f32::from_bits(0x4700_0000 | byte(codes[i / 4], i % 4) << 8);
                    above.mul_add(scale, -32896.0 * scale)
                })
            }
            GgufKind::Q2K => {
                let packed = short_at(memory, block + 8 * half + 2 * quarter) >> (part / 2 * 8);
                let of_block = word_at(memory, block + 80);
                let (scale, minimum) = ((packed & 15) as f32, (packed >> 4 & 15) as f32);
                let run = Run::read(memory, block + 16 + 32 * half, 32, 4);
                let codes = pair(&run).map(|word| word >> (2 * quarter) & 0x0303_0303);
                scaled_plus(codes, half_of(of_block) * scale, -(half_of(of_block >> 16) * minimum))
            }
            GgufKind::Q3K => {
                let low = short_at(memory, block + 96 + 2 * quarter) >> (part / 2 * 8 + 4 * half) & 15;
                let high = short_at(memory, block + 104 + 2 * (quarter % 2));
                let high = high >> (part / 2 * 8 + 4 * half + quarter / 2 * 2) & 3;
                let scale = half_of(short_at(memory, block + 108)) * ((low | high << 4) as i32 - 32) as f32;
                let run = pair(&Run::read(memory, block + 32 + 32 * half, 32, 2));
                let mask = pair(&Run::read(memory, block, 32, 2));
                let turn = (2 - 4 * half as i32 - quarter as i32).rem_euclid(32) as u32;
                let codes =
                    [0, 1].map(|i| run[i] >> (2 * quarter) & 0x0303_0303 | mask[i].rotate_left(turn) & 0x0404_0404);
                scaled(codes, 4.0, scale)
            }
            GgufKind::Q4K | GgufKind::Q5K => {
                let (scale, minimum) = group_scale(memory, block, half, quarter);
                let first = if kind == GgufKind::Q4K { 16 } else { 48 };
                let run = pair(&Run::read(memory, block + first + 64 * half + 32 * (quarter / 2), 32, 16));
                let mut codes = run.map(|word| word >> (quarter % 2 * 4) & 0x0f0f_0f0f);
                if kind == GgufKind::Q5K {
                    let high = pair(&Run::read(memory, block + 16, 32, 16));
                    let turn = (4 - 4 * half as i32 - quarter as i32).rem_euclid(32) as u32;
                    codes = [0, 1].map(|i| codes[i] | high[i].rotate_left(turn) & 0x1010_1010);
                }
                scaled_plus(codes, scale, -minimum)
            }
            GgufKind::Q6K => {
                let own = short_at(memory, block + 192 + 8 * half + 2 * quarter) >> (part / 2 * 8);
                let scale = half_of(short_at(memory, block + 208)) * f32::from(own as u8 as i8);
                let run = pair(&Run::read(memory, block + 64 * half + 32 * (quarter % 2), 32, 2));
                let high = pair(&Run::read(memory, block + 128 + 32 * half, 32, 2));
                let turn = (4 - 2 * quarter as i32).rem_euclid(32) as u32;
                let codes =
                    [0, 1].map(|i| run[i] >> (quarter / 2 * 4) & 0x0f0f_0f0f | high[i].rotate_left(turn) & 0x3030_3030);
                scaled(codes, 32.0, scale)
            }
            GgufKind::F32 | GgufKind::F16 | GgufKind::Bf16 => panic!("plain floats have no blocks"),
        }
    }

    fn scales_of(kind: GgufKind) -> &'static [usize] {
        match kind {
            GgufKind::Q4_1 | GgufKind::Q5_1 | GgufKind::Q4K | GgufKind::Q5K => &[0, 2],
            GgufKind::Q2K => &[80, 82],
            GgufKind::Q3K => &[108],
            GgufKind::Q6K => &[208],
            _ => &[0],
        }
    }

    #[test]
    fn what_lanes_make_of_blocks_are_the_cpu_s_values() {
        let packed = GgufKind::ALL.into_iter().filter(|kind| format(*kind).is_some());
        for (kind, (rows, cols)) in packed.flat_map(|kind| [(1, 256), (5, 768), (3, 1280)].map(|size| (kind, size))) {
            let mut stream = Stream::new(7, "packed gguf", rows as u64, 0);
            let count = rows * cols / kind.block_len();
            let mut memory: Vec<u8> = (0..count * kind.block_bytes()).map(|_| stream.bits() as u8).collect();
            for (index, block) in memory.chunks_mut(kind.block_bytes()).enumerate() {
                for &at in scales_of(kind) {
                    let factor = [0.1, 30.0, 0.0, 1e-6][index % 4];
                    let scale = f16::from_f32(factor * stream.normal() as f32);
                    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
            let mut want = vec![0.0; rows * cols];
            blocks::dequantize(Level::best(), kind, &memory, &mut want);
            for flat in (0..rows * cols).step_by(32) {
                for part in 0..4 {
                    let got = values(kind, &memory, flat, part);
                    let want = &want[flat + 8 * part..flat + 8 * part + 8];
                    // Bits, but for the sign of a zero.
                    let is_same =
                        got.iter().zip(want).all(|(got, want)| (got + 0.0).to_bits() == (want + 0.0).to_bits());
                    assert!(is_same, "{kind:?} [{rows}, {cols}], value {flat}, part {part}: {got:?}, {want:?}");
                }
            }
        }
    }

    #[test]
    fn every_number_of_rows_has_a_form_that_is_compiled() {
        for (has_groups, has_large_blocks) in [(true, true), (false, true), (false, false)] {
            let card = ProductCard { multiprocessors: 80, has_groups, has_large_blocks };
            for m in 1..=256 {
                let layout = RowLayout::choose(m, 0, WeightKind::Blocks, card);
                assert!(has_form(form(m, layout, card), layout), "{m} rows in {layout:?}");
            }
        }
        assert!(!has_form(6, RowLayout::Tiles(8)) && !has_form(0, RowLayout::Fragments));
    }

    #[test]
    fn parts_of_every_sum_of_the_family_are_whole_chunks() {
        for (has_groups, has_large_blocks) in [(true, true), (false, true), (false, false)] {
            let card = ProductCard { multiprocessors: 80, has_groups, has_large_blocks };
            for (m, k) in [1, 8, 17, 64, 256].into_iter().flat_map(|m| [896, 4864, 18_944, 29_568].map(|k| (m, k))) {
                let layout = RowLayout::choose(m, 0, WeightKind::Blocks, card);
                for (rows, kind) in [(vec![k, 512], ProductKind::Sum), (vec![k, k], ProductKind::Swiglu)] {
                    let ProductForm { form, splits, .. } =
                        ProductForm::choose(m, &rows, k, (kind, WeightKind::Blocks), layout, card);
                    assert!(has_form(form, layout) && (1..=k / CHUNK).contains(&splits), "{k}, {m} rows: {splits}");
                }
            }
        }
    }
}
