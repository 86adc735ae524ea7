//! Named, counter-based random streams.
//!
//! Every random draw of a run (data order, dropout, sampling, initialisation) is a pure function of
//! `(seed, stream name, step, item)`: nothing depends on the order of calls, the number of threads or the number of
//! ranks, so a run gives the same result however it is split and a resumed run continues as if never stopped.
//! There is no global generator. The generator is ChaCha8, whose output is fixed by its definition.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// One random stream. Cheap to make; make a new one per item instead of sharing one.
#[derive(Clone, Debug)]
pub struct Stream {
    generator: ChaCha8Rng,
}

impl Stream {
    /// Opens the stream `name` of `seed` for one `step` and one `item` (a sample, a block, a token position).
    pub fn new(seed: u64, name: &str, step: u64, item: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&step.to_le_bytes());
        hasher.update(&item.to_le_bytes());
        hasher.update(name.as_bytes());
        Self { generator: ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()) }
    }

    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.generator.next_u64()
    }

    /// Uniform in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform integer in `[0, bound)`, without modulo bias (Lemire, 1805.10941).
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "below(0) has no value to return");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.bits()) * u128::from(bound);
            if (product as u64) >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A standard normal value (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A standard Gumbel value: `-ln(-ln(u))`.
    pub fn gumbel(&mut self) -> f64 {
        let uniform = self.uniform().max(f64::MIN_POSITIVE);
        -(-uniform.ln()).max(f64::MIN_POSITIVE).ln()
    }

    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

/// Mixes 64 bits so that each input bit changes half of the output bits (`SplitMix64`'s finaliser; Steele et al., 2014).
/// For masks that need one cheap value per element; everything else takes a [`Stream`].
pub fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Whether element `index` of the row `key` survives a dropout of the given probability: a pure function of the two.
pub fn is_kept(key: u64, index: u64, probability: f64) -> bool {
    unit(key, index) >= probability
}

/// A number in [0, 1) for element `index` of the row `key`: a pure function of the two.
pub fn unit(key: u64, index: u64) -> f64 {
    let bits = mix(key.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::{Stream, is_kept, mix};

    #[test]
    fn dropout_keeps_the_right_share_in_every_row() {
        for row in 0..20 {
            let kept = (0..20_000).filter(|&i| is_kept(mix(row), i, 0.3)).count();
            assert!((13_700..14_300).contains(&kept), "row {row} keeps {kept} of 20000");
        }
    }

    #[test]
    fn a_stream_depends_on_every_part_of_its_key_and_on_nothing_else() {
        let draw = |seed, name, step, item| Stream::new(seed, name, step, item).bits();
        let base = draw(1, "data", 2, 3);
        assert_eq!(base, draw(1, "data", 2, 3));
        for other in [draw(2, "data", 2, 3), draw(1, "dropout", 2, 3), draw(1, "data", 3, 3), draw(1, "data", 2, 4)] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn uniform_normal_and_gumbel_have_their_means_and_variances() {
        let mut stream = Stream::new(7, "moments", 0, 0);
        let count = 200_000;
        let mut check = |draw: &mut dyn FnMut(&mut Stream) -> f64, mean: f64, variance: f64| {
            let values: Vec<f64> = (0..count).map(|_| draw(&mut stream)).collect();
            let average = values.iter().sum::<f64>() / f64::from(count);
            let spread = values.iter().map(|v| (v - average).powi(2)).sum::<f64>() / f64::from(count);
            assert!((average - mean).abs() < 0.01, "mean {average}, expected {mean}");
            assert!((spread - variance).abs() < 0.05, "variance {spread}, expected {variance}");
        };
        check(&mut Stream::uniform, 0.5, 1.0 / 12.0);
        check(&mut Stream::normal, 0.0, 1.0);
        check(&mut Stream::gumbel, 0.577_215_664_9, std::f64::consts::PI.powi(2) / 6.0);
    }

    #[test]
    fn below_covers_its_range_evenly_and_shuffle_keeps_every_item() {
        let mut stream = Stream::new(3, "below", 0, 0);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (9_500..10_500).contains(&c)), "{counts:?}");
        let mut items: Vec<u32> = (0..100).collect();
        stream.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
