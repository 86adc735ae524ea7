//! Rules by which a step moves a parameter, and what each keeps between steps.

use super::blocks::Blocks;
use super::{AdamWStep, Error, adamw_step, lion, muon};
use crate::config::settings::OptimizerKind;
use crate::device::bytes_of_mut;

/// A parameter with fewer values keeps its moments in f32 where others have them in 8 bits (bitsandbytes' `min_8bit_size`).
const LEAST_IN_8_BITS: usize = 4096;

/// What a rule needs to know of a parameter, or of a shard's piece of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of values.
    pub count: usize,
    /// Number of values of the whole parameter.
    pub of: usize,
    /// Rows and columns, if all of a matrix is there.
    pub matrix: Option<(usize, usize)>,
}

/// What a rule keeps of one piece between steps.
#[derive(Clone, Debug)]
pub enum State {
    /// AdamW: first and second moment, f32.
    Adam([Vec<f32>; 2]),
    /// AdamW: the same in blocks of 8-bit codes.
    Adam8([Blocks; 2]),
    /// Lion: the average of gradients.
    Lion(Vec<f32>),
    /// Muon: the momentum of a matrix `[rows, cols]`.
    Muon(Vec<f32>, (usize, usize)),
}

impl State {
    /// Nothing learnt yet.
    pub fn new(kind: OptimizerKind, layout: Layout) -> Self {
        let Layout { count, of, matrix } = layout;
        let zeros = || vec![0.0; count];
        match (kind, matrix) {
            (OptimizerKind::AdamW8bit, _) if of >= LEAST_IN_8_BITS => {
                Self::Adam8([Blocks::signed(count), Blocks::unsigned(count)])
            }
            (OptimizerKind::Lion, _) => Self::Lion(zeros()),
            (OptimizerKind::Muon, Some(shape)) => Self::Muon(zeros(), shape),
            (OptimizerKind::AdamW | OptimizerKind::AdamW8bit | OptimizerKind::Muon, _) => {
                Self::Adam([zeros(), zeros()])
            }
        }
    }

    /// The names under which its arrays are saved: as torch and bitsandbytes call them.
    pub fn names(kind: OptimizerKind, is_matrix: bool) -> &'static [&'static str] {
        match kind {
            OptimizerKind::Lion => &["exp_avg"],
            OptimizerKind::Muon if is_matrix => &["momentum_buffer"],
            OptimizerKind::AdamW | OptimizerKind::AdamW8bit | OptimizerKind::Muon => &["exp_avg", "exp_avg_sq"],
        }
    }

    /// Bytes that it takes.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Adam(moments) => moments.iter().map(|values| size_of_val(values.as_slice())).sum(),
            Self::Adam8(moments) => moments.iter().map(Blocks::size_bytes).sum(),
            Self::Lion(values) | Self::Muon(values, _) => size_of_val(values.as_slice()),
        }
    }

    /// The bytes of all that it keeps, one array after the other, to be read and replaced.
    pub fn bytes_mut(&mut self) -> Vec<&mut [u8]> {
        match self {
            Self::Adam(moments) => moments.iter_mut().map(|values| bytes_of_mut(values.as_mut_slice())).collect(),
            Self::Adam8(moments) => moments.iter_mut().flat_map(Blocks::bytes_mut).collect(),
            Self::Lion(values) | Self::Muon(values, _) => vec![bytes_of_mut(values.as_mut_slice())],
        }
    }

    /// Its arrays as f32, in the order of [`Self::names`].
    pub fn to_vecs(&self) -> Vec<Vec<f32>> {
        match self {
            Self::Adam(moments) => moments.to_vec(),
            Self::Adam8(moments) => moments.iter().map(Blocks::to_vec).collect(),
            Self::Lion(values) | Self::Muon(values, _) => vec![values.clone()],
        }
    }

    /// Takes arrays of [`Self::to_vecs`] back, to the bit.
    ///
    /// # Errors
    /// If there are fewer, or one has another length.
    pub fn load(&mut self, arrays: &[Vec<f32>]) -> Result<(), Error> {
        let array = |index: usize, expected: usize| match arrays.get(index) {
            Some(values) if values.len() == expected => Ok(values.clone()),
            other => Err(Error::Length { what: "saved state", got: other.map_or(0, Vec::len), expected }),
        };
        match self {
            Self::Adam(moments) => {
                for (index, moment) in moments.iter_mut().enumerate() {
                    *moment = array(index, moment.len())?;
                }
            }
            Self::Adam8(moments) => {
                for (index, moment) in moments.iter_mut().enumerate() {
                    moment.write(&array(index, moment.len())?);
                }
            }
            Self::Lion(values) | Self::Muon(values, _) => *values = array(0, values.len())?,
        }
        Ok(())
    }

    /// Moves `params` by one step.
    ///
    /// # Shapes
    /// `params`, `grads`: f32, as many as the state is for.
    ///
    /// # Errors
    /// If lengths differ, `step` is 0, or a hyperparameter is outside its range.
    pub fn step(&mut self, params: &mut [f32], grads: &[f32], hyper: &AdamWStep) -> Result<(), Error> {
        match self {
            Self::Adam([first, second]) => adamw_step(params, grads, first, second, hyper),
            Self::Adam8([first, second]) => super::blocks::adamw_step(params, grads, first, second, hyper),
            Self::Lion(average) => lion::step(params, grads, average, hyper),
            Self::Muon(momentum, shape) => muon::step(params, grads, momentum, *shape, hyper),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, "rule", 0, 0);
        (0..count).map(|_| stream.normal() as f32 * 0.1).collect()
    }

    const HYPER: AdamWStep =
        AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };

    fn run(state: &mut State, params: &mut [f32], steps: std::ops::Range<u64>) {
        for step in steps {
            let grads = numbers(100 + step, params.len());
            state.step(params, &grads, &AdamWStep { step, ..HYPER }).unwrap();
        }
    }

    #[test]
    fn a_state_that_was_saved_goes_on_to_the_same_bits() {
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion, OptimizerKind::Muon] {
            for (count, matrix) in [(64 * 100, Some((64, 100))), (300, None)] {
                let layout = Layout { count, of: count, matrix };
                let (mut straight, mut params) = (State::new(kind, layout), numbers(1, count));
                run(&mut straight, &mut params, 1..7);
                let (mut first, mut resumed) = (State::new(kind, layout), numbers(1, count));
                run(&mut first, &mut resumed, 1..4);
                let saved = first.to_vecs();
                assert_eq!(saved.len(), State::names(kind, matrix.is_some()).len(), "{kind:?}");
                let mut second = State::new(kind, layout);
                second.load(&saved).unwrap();
                run(&mut second, &mut resumed, 4..7);
                assert!(params == resumed, "{kind:?} {count}");
                assert!(params != numbers(1, count) && params.iter().all(|p| p.is_finite()));
                assert!(second.load(&saved[..0]).is_err() && second.load(&vec![vec![0.0; 3]; 2]).is_err());
            }
        }
    }

    #[test]
    fn bytes_are_all_that_a_state_keeps() {
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion, OptimizerKind::Muon] {
            let layout = Layout { count: 64 * 100, of: 64 * 100, matrix: Some((64, 100)) };
            let (mut straight, mut params) = (State::new(kind, layout), numbers(1, 6400));
            run(&mut straight, &mut params, 1..4);
            let kept: Vec<Vec<u8>> = straight.bytes_mut().iter().map(|bytes| bytes.to_vec()).collect();
            assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), straight.size_bytes(), "{kind:?}");
            let mut other = State::new(kind, layout);
            other.bytes_mut().into_iter().zip(&kept).for_each(|(to, from)| to.copy_from_slice(from));
            let mut again = params.clone();
            run(&mut straight, &mut params, 4..6);
            run(&mut other, &mut again, 4..6);
            assert!(params == again, "{kind:?}");
        }
    }

    #[test]
    fn pieces_of_a_parameter_move_as_the_whole() {
        // Shards end between blocks of 256 values.
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion] {
            let count = 256 * 40;
            let mut whole = numbers(2, count);
            run(&mut State::new(kind, Layout { count, of: count, matrix: None }), &mut whole, 1..5);
            let mut pieces = numbers(2, count);
            let (left, right) = pieces.split_at_mut(256 * 12);
            for (piece, start) in [(left, 0), (right, 256 * 12)] {
                let mut state = State::new(kind, Layout { count: piece.len(), of: count, matrix: None });
                for step in 1..5 {
                    let grads = numbers(100 + step, count);
                    let own = &grads[start..start + piece.len()];
                    state.step(piece, own, &AdamWStep { step, ..HYPER }).unwrap();
                }
            }
            assert!(whole == pieces, "{kind:?}");
        }
    }

    #[test]
    fn eight_bits_take_a_quarter_and_stay_near_thirty_two() {
        let count = 256 * 64;
        let layout = Layout { count, of: count, matrix: None };
        let (mut exact, mut coarse) =
            (State::new(OptimizerKind::AdamW, layout), State::new(OptimizerKind::AdamW8bit, layout));
        assert_eq!((exact.size_bytes(), coarse.size_bytes()), (8 * count, 2 * count + 2 * 4 * 64));
        let (mut left, mut right) = (numbers(3, count), numbers(3, count));
        run(&mut exact, &mut left, 1..20);
        run(&mut coarse, &mut right, 1..20);
        let moved: f32 = left.iter().zip(numbers(3, count)).map(|(a, b)| (a - b).abs()).sum();
        let apart: f32 = left.iter().zip(&right).map(|(a, b)| (a - b).abs()).sum();
        assert!(apart < 0.1 * moved && apart > 0.0, "{apart} of {moved}");
        let small = Layout { count: 100, of: 100, matrix: None };
        assert!(matches!(State::new(OptimizerKind::AdamW8bit, small), State::Adam(_)));
    }
}
