//! Block maxima of 4-bit matrices, plain or themselves quantised to 8 bits (double quantisation, 2305.14314 sec. 3).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use crate::fs::Bytes;

/// Maxima that share one nested maximum.
pub(crate) const NESTED_BLOCK: usize = 256;

/// The maxima of a matrix's blocks.
#[derive(Clone, Debug)]
pub(crate) enum Maxima {
    /// As they are.
    Plain(Arc<[f32]>),
    /// Quantised.
    Nested(Nested),
}

/// 8-bit maxima: `map[codes[i]] * absmax[i / 256] + offset`.
#[derive(Clone, Debug)]
pub(crate) struct Nested {
    pub(crate) codes: Bytes,
    pub(crate) absmax: Arc<[f32]>,
    pub(crate) map: Arc<[f32]>,
    pub(crate) offset: f32,
}

impl Maxima {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Nested(nested) => nested.codes.len(),
        }
    }

    /// Bytes that they take.
    pub(crate) fn size_bytes(&self) -> usize {
        match self {
            Self::Plain(values) => 4 * values.len(),
            Self::Nested(nested) => nested.codes.len() + 4 * (nested.absmax.len() + nested.map.len() + 1),
        }
    }

    /// Calls `work` with the maxima of `blocks` as floats.
    pub(crate) fn with<R>(&self, blocks: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Self::Plain(values) => work(&values[blocks]),
            Self::Nested(nested) => {
                let (codes, map, absmax) = (&nested.codes[blocks.clone()], &nested.map, &nested.absmax);
                let restore = |out: &mut [f32]| {
                    for ((value, &code), block) in out.iter_mut().zip(codes).zip(blocks.clone()) {
                        *value = map[usize::from(code)] * absmax[block / NESTED_BLOCK] + nested.offset;
                    }
                };
                // A piece of a row is restored on the stack.
                if blocks.len() <= 16 {
                    let mut few = [0.0; 16];
                    restore(&mut few[..blocks.len()]);
                    work(&few[..blocks.len()])
                } else {
                    let mut many = vec![0.0; blocks.len()];
                    restore(&mut many);
                    work(&many)
                }
            }
        }
    }
}

impl Nested {
    /// Quantises maxima: subtracts their mean, then blocks of 256 to the nearest value of the signed dynamic map.
    pub(crate) fn quantize(maxima: &[f32]) -> Self {
        let offset = mean(maxima);
        let map = dynamic_map();
        let mut codes = vec![0; maxima.len()];
        let mut absmax = vec![0.0; maxima.len().div_ceil(NESTED_BLOCK)];
        codes
            .par_chunks_mut(NESTED_BLOCK)
            .zip(&mut absmax)
            .zip(maxima.par_chunks(NESTED_BLOCK))
            .with_min_len(64)
            .for_each(|((codes, absmax), block)| {
                let largest = block.iter().fold(0.0f32, |m, v| m.max((v - offset).abs()));
                let divisor = if largest > 0.0 { largest } else { 1.0 };
                *absmax = largest;
                codes.iter_mut().zip(block).for_each(|(code, v)| *code = nearest(&map, (v - offset) / divisor));
            });
        Self { codes: Bytes::from(codes), absmax: absmax.into(), map, offset }
    }
}

/// The mean, of which the sum is [`sum`]'s.
pub(crate) fn mean(maxima: &[f32]) -> f32 {
    sum(maxima) / maxima.len().max(1) as f32
}

/// The f32 sum in the order in which torch's CPU kernel adds on one thread (`aten/src/ATen/native/cpu/SumKernel.cpp`,
/// vectors of 8, 4 rows of them at a time, a cascade of 4 levels), so that the offset has the same bits.
fn sum(values: &[f32]) -> f32 {
    const WIDTH: usize = 8;
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    let add = |into: &mut [f32; WIDTH], from: [f32; WIDTH]| into.iter_mut().zip(from).for_each(|(i, f)| *i += f);
    let (vectors, tail) = values.as_chunks::<WIDTH>();
    let (groups, rest) = vectors.as_chunks::<ROWS>();
    let level_power = 4.max(groups.len().next_power_of_two().trailing_zeros() as usize / LEVELS);
    let mut levels = [[[0f32; WIDTH]; ROWS]; LEVELS];
    let (whole, remainder) = groups.split_at(groups.len() >> level_power << level_power);
    for (index, group) in whole.iter().enumerate() {
        group.iter().zip(&mut levels[0]).for_each(|(&vector, row)| add(row, vector));
        let done = index + 1;
        if !done.is_multiple_of(1 << level_power) {
            continue;
        }
        for level in 1..LEVELS {
            let lower = std::mem::take(&mut levels[level - 1]);
            levels[level].iter_mut().zip(lower).for_each(|(row, vector)| add(row, vector));
            if !(done >> (level * level_power)).is_multiple_of(1 << level_power) {
                break;
            }
        }
    }
    for group in remainder {
        group.iter().zip(&mut levels[0]).for_each(|(&vector, row)| add(row, vector));
    }
    let [mut rows, higher @ ..] = levels;
    for level in higher {
        level.into_iter().zip(&mut rows).for_each(|(vector, row)| add(row, vector));
    }
    let [mut total, others @ ..] = rows;
    for &vector in rest {
        add(&mut total, vector);
    }
    for vector in others {
        add(&mut total, vector);
    }
    tail.iter().chain(&total).fold(0.0, |sum, v| sum + v)
}

/// The code of a value in [-1, 1]: the nearest value of the map, ties to the lower one, after the value was rounded to
/// one of 65,536 even steps, as bitsandbytes' CPU library does (read off its codes).
fn nearest(map: &[f32], value: f32) -> u8 {
    const STEPS: f32 = 65_535.0;
    let value = ((value + 1.0) * 0.5 * STEPS).round() / STEPS * 2.0 - 1.0;
    let above = map.partition_point(|&m| m < value).clamp(1, map.len() - 1);
    if map[above] - value < value - map[above - 1] { above as u8 } else { (above - 1) as u8 }
}

/// bitsandbytes' signed dynamic 8-bit map (2110.02861 sec. 2.3): for each of 7 decades `10^-6 .. 1`, the means of `2^i`
/// equal parts of `[0.1, 1]`, with both signs, and 0 and 1. The arithmetic is f32, as it is there: the parts' borders as `torch.linspace` makes them,
/// from the nearer end and with one rounding.
pub(crate) fn dynamic_map() -> Arc<[f32]> {
    static MAP: OnceLock<Arc<[f32]>> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = vec![0.0f32, 1.0];
        for decade in 0..7 {
            let parts = 1usize << decade;
            let step = (1.0f32 - 0.1) / parts as f32;
            let border = |i: usize| {
                if i < parts.div_ceil(2) {
                    step.mul_add(i as f32, 0.1)
                } else {
                    (-step).mul_add((parts - i) as f32, 1.0)
                }
            };
            let scale = 10f64.powi(decade - 6) as f32;
            for part in 0..parts {
                let mean = f32::midpoint(border(part), border(part + 1));
                map.extend([scale * mean, -(scale * mean)]);
            }
        }
        map.sort_by(f32::total_cmp);
        map.into()
    })
    .clone()
}
