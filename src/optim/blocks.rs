//! Moments in 8 bits: blocks of 256 values, each scaled by its largest, coded by a map with many exponents.
//!
//! The map is that of bitsandbytes, which has a code for 1 and none for -1. So a block is divided by its largest value with that
//! value's sign, not by its size: the largest is exact, and the values of codes give the same codes again.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::{AdamWStep, Error};
use crate::kernels::AdamWFactors;

/// Values that share a scale.
const BLOCK: usize = 256;
/// Blocks that one task updates.
const BLOCKS_PER_TASK: usize = 64;

/// Values in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    codes: Vec<u8>,
    /// Of each block, the value that is the largest without its sign.
    scales: Vec<f32>,
    map: &'static Map,
}

/// The values of the codes, ascending, and the middles between neighbours.
#[derive(Debug, PartialEq)]
struct Map {
    values: [f32; 256],
    middles: [f32; 255],
}

impl Map {
    /// # Equation
    /// Dettmers et al. (2110.02861), section 1.3, as bitsandbytes' `create_dynamic_map` makes it: seven decades from 1, of which
    /// each next has twice as many values, in the middles of equal steps from 0.1 to 1; and 0 and 1.
    fn new(is_signed: bool) -> Self {
        let mut all = vec![0.0f64, 1.0];
        for decade in 0..7i32 {
            let count = 1usize << (decade as usize + usize::from(!is_signed));
            let scale = 10f64.powi(decade - 6);
            let step = |index: usize| f64::from((0.1 + 0.9 * index as f64 / count as f64) as f32);
            for index in 0..count {
                let middle = f64::from(f64::midpoint(step(index), step(index + 1)) as f32);
                all.push(scale * middle);
                if is_signed {
                    all.push(-scale * middle);
                }
            }
        }
        all.sort_by(f64::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|code| all[code] as f32);
        Self { values, middles: std::array::from_fn(|code| f32::midpoint(values[code], values[code + 1])) }
    }

    fn of(is_signed: bool) -> &'static Self {
        static MAPS: OnceLock<[Map; 2]> = OnceLock::new();
        &MAPS.get_or_init(|| [Self::new(false), Self::new(true)])[usize::from(is_signed)]
    }

    /// The code of the nearest value.
    fn code(&self, value: f32) -> u8 {
        self.middles.partition_point(|&middle| middle < value) as u8
    }

    fn zero(&self) -> u8 {
        self.code(0.0)
    }
}

impl Blocks {
    /// Zeros of either sign.
    pub fn signed(count: usize) -> Self {
        Self::zeros(count, Map::of(true))
    }

    /// Zeros that grow to positive values only.
    pub fn unsigned(count: usize) -> Self {
        Self::zeros(count, Map::of(false))
    }

    fn zeros(count: usize, map: &'static Map) -> Self {
        Self { codes: vec![map.zero(); count], scales: vec![0.0; count.div_ceil(BLOCK)], map }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Bytes that they take.
    pub fn size_bytes(&self) -> usize {
        self.codes.len() + size_of_val(self.scales.as_slice())
    }

    /// The bytes of codes and scales, to be read and replaced.
    pub fn bytes_mut(&mut self) -> [&mut [u8]; 2] {
        [self.codes.as_mut_slice(), crate::device::bytes_of_mut(self.scales.as_mut_slice())]
    }

    /// All values.
    pub fn to_vec(&self) -> Vec<f32> {
        let blocks = self.codes.chunks(BLOCK).zip(&self.scales);
        blocks
            .flat_map(|(codes, scale)| codes.iter().map(move |&code| self.map.values[usize::from(code)] * scale))
            .collect()
    }

    /// Replaces all values; those of [`Self::to_vec`] give the same codes again.
    pub fn write(&mut self, values: &[f32]) {
        let map = self.map;
        for ((codes, scale), values) in self.codes.chunks_mut(BLOCK).zip(&mut self.scales).zip(values.chunks(BLOCK)) {
            encode(map, values, codes, scale);
        }
    }
}

fn encode(map: &Map, values: &[f32], codes: &mut [u8], scale: &mut f32) {
    *scale = values.iter().fold(0.0, |most: f32, &value| if value.abs() > most.abs() { value } else { most });
    let divisor = if *scale == 0.0 { 1.0 } else { *scale };
    codes.iter_mut().zip(values).for_each(|(code, value)| *code = map.code(value / divisor));
}

/// [`super::adamw_step`] with moments in 8 bits: they are unpacked, moved in f32, used, and packed again.
///
/// # Errors
/// As [`super::adamw_step`].
pub(super) fn adamw_step(
    params: &mut [f32],
    grads: &[f32],
    first: &mut Blocks,
    second: &mut Blocks,
    hyper: &AdamWStep,
) -> Result<(), Error> {
    const VALUES: usize = BLOCK * BLOCKS_PER_TASK;
    super::adamw::check(params.len(), grads.len(), first.len(), second.len(), hyper)?;
    let factors = AdamWFactors::checked(hyper)?;
    let (signed, unsigned) = (first.map, second.map);
    params
        .par_chunks_mut(VALUES)
        .zip(grads.par_chunks(VALUES))
        .zip(first.codes.par_chunks_mut(VALUES).zip(first.scales.par_chunks_mut(BLOCKS_PER_TASK)))
        .zip(second.codes.par_chunks_mut(VALUES).zip(second.scales.par_chunks_mut(BLOCKS_PER_TASK)))
        .for_each(|(((params, grads), first), second)| {
            let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
            let blocks = params.chunks_mut(BLOCK).zip(grads.chunks(BLOCK));
            let first = first.0.chunks_mut(BLOCK).zip(first.1);
            let second = second.0.chunks_mut(BLOCK).zip(second.1);
            for (((params, grads), (m_codes, m_scale)), (v_codes, v_scale)) in blocks.zip(first).zip(second) {
                let (m, v) = (&mut m[..params.len()], &mut v[..params.len()]);
                let unpack = |values: &mut [f32], codes: &[u8], map: &Map, scale: f32| {
                    values.iter_mut().zip(codes).for_each(|(v, &code)| *v = map.values[usize::from(code)] * scale);
                };
                unpack(m, m_codes, signed, *m_scale);
                unpack(v, v_codes, unsigned, *v_scale);
                super::adamw::update_chunk(params, grads, m, v, &factors);
                encode(signed, m, m_codes, m_scale);
                encode(unsigned, v, v_codes, v_scale);
            }
        });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_are_those_of_bitsandbytes() {
        // `create_dynamic_map(signed)` of bitsandbytes 0.50.2, at these codes.
        let (signed, unsigned) = (Map::of(true), Map::of(false));
        let near =
            |got: f32, expected: f32| assert!((got - expected).abs() <= expected.abs() * 1e-6, "{got} {expected}");
        assert!(signed.values.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(unsigned.values.windows(2).all(|pair| pair[0] < pair[1]));
        near(signed.values[0], -0.992_968_8);
        near(signed.values[255], 1.0);
        near(signed.values[64], -0.098_593_75);
        near(signed.values[128], 5.5e-7);
        near(signed.values[129], 3.25e-6);
        near(signed.values[200], 0.233_593_75);
        near(signed.values[254], 0.992_968_8);
        near(unsigned.values[1], 3.25e-7);
        near(unsigned.values[2], 7.75e-7);
        near(unsigned.values[64], 0.012_109_375_6);
        near(unsigned.values[128], 0.110_546_872);
        near(unsigned.values[254], 0.996_484_4);
        assert_eq!((signed.values[usize::from(signed.zero())], unsigned.values[0]), (0.0, 0.0));
    }

    #[test]
    fn values_of_codes_give_their_codes_again() {
        let mut stream = crate::rng::Stream::new(5, "blocks", 0, 0);
        let values: Vec<f32> = (0..1000).map(|index| stream.normal() as f32 * 10f32.powi(-(index % 7))).collect();
        let mut blocks = Blocks::signed(1000);
        blocks.write(&values);
        let once = blocks.to_vec();
        let mut again = Blocks::signed(1000);
        again.write(&once);
        assert!(blocks == again && again.to_vec() == once);
        let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        assert!(values.iter().zip(&once).all(|(value, coded)| (value - coded).abs() <= 0.011 * largest));
        let mut none = Blocks::unsigned(300);
        none.write(&[0.0; 300]);
        assert_eq!(none.to_vec(), [0.0; 300]);
    }
}
