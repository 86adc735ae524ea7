//! Which algorithm makes a product: a lookup, without a clock.
//!
//! What trials chose holds for products of like sizes, from the end of the step on in which they were made. Where there is no
//! such choice, or the product cannot be made with it, the library's own first choice is taken, and the kind of product is noted
//! for the next trials. So the bits of a run follow from the choices and the steps at which they came, both of which are kept.

use std::collections::{HashMap, HashSet};

use candle_core::DType;

use super::descriptors::Descriptors;
use super::lt::{Algorithm, Library};
use super::product::{Kind, Product};
use crate::device::Error;
use crate::kernels::cuda::products::Side;

/// What an algorithm is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) sizes: [usize; 3],
    pub(super) types: [DType; 2],
    pub(super) sides: [Side; 2],
    pub(super) strides: [usize; 4],
    pub(super) alignments: [u32; 4],
    pub(super) kind: Kind,
    pub(super) has_bias: bool,
}

impl Key {
    /// The same for all products of like sizes: those of ragged batches differ a little each time, and one trial is to do for
    /// them.
    pub(super) fn of_like_sizes(self) -> Self {
        // Two classes for each doubling: the upper two bits.
        let class = |size: usize| {
            let lower = size.max(1).ilog2().saturating_sub(1);
            size >> lower << lower
        };
        Self { sizes: self.sizes.map(class), ..self }
    }

    /// Multiplications.
    fn work(&self) -> u128 {
        self.sizes.iter().map(|&size| size as u128).product()
    }
}

/// Summands that algorithms take at a time, or a multiple of it.
pub(super) const SUMMANDS: usize = 128;

/// What a trial chose for products of like sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) algorithm: Algorithm,
    /// Microseconds of a product in the trial.
    pub(super) micros: f32,
    /// Optimizer steps before the first that is made with it.
    pub(super) since: u64,
}

/// The answer for products of exactly these sizes.
#[derive(Clone, Copy, Debug)]
struct Answer {
    /// `None`: the library has no algorithm for it.
    algorithm: Option<Algorithm>,
    uses: u64,
}

/// A kind of products that waits for its trial.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) kind: Key,
    /// The largest of its products so far.
    pub(super) largest: Key,
    /// Products of the kind that were made so far.
    pub(super) uses: u64,
}

#[derive(Debug, Default)]
pub(super) struct Choices {
    /// Optimizer steps taken.
    step: u64,
    is_noting: bool,
    /// By exact sizes.
    answers: HashMap<Key, Answer>,
    /// By like sizes, as all below.
    chosen: HashMap<Key, Choice>,
    /// In the order of their first use.
    noted: Vec<Key>,
    /// Kinds of which no trial can be made.
    passed_over: HashSet<Key>,
}

impl Choices {
    /// Forgets everything. From here on products without a choice are noted, or not.
    pub(super) fn start(&mut self, is_noting: bool) {
        *self = Self { is_noting, ..Self::default() };
    }

    /// Makes the choices valid that came before so many optimizer steps were taken.
    pub(super) fn begin_step(&mut self, step: u64) {
        let between = self.step.min(step)..self.step.max(step);
        self.step = step;
        let turned: HashSet<Key> = (self.chosen.iter())
            .filter(|(_, choice)| choice.since > between.start && choice.since <= between.end)
            .map(|(kind, _)| *kind)
            .collect();
        if !turned.is_empty() {
            self.answers.retain(|key, _| !turned.contains(&key.of_like_sizes()));
        }
    }

    /// Choices of trials, valid or not yet.
    pub(super) fn chosen(&self) -> impl Iterator<Item = (&Key, &Choice)> {
        self.chosen.iter()
    }

    /// Takes choices in that were kept, in place of what there is of their kinds.
    pub(super) fn take(&mut self, kept: impl IntoIterator<Item = (Key, Choice)>) {
        self.chosen.extend(kept);
        self.answers.retain(|key, _| !self.chosen.contains_key(&key.of_like_sizes()));
        self.noted.retain(|kind| !self.chosen.contains_key(kind));
    }

    /// Number of kinds that wait for a trial.
    pub(super) fn waiting(&self) -> usize {
        self.noted.len()
    }

    /// The kind that has waited longest.
    pub(super) fn first_waiting(&self) -> Option<Waiting> {
        let kind = *self.noted.first()?;
        let same = || self.answers.iter().filter(move |(key, _)| key.of_like_sizes() == kind);
        let largest = same().map(|(key, _)| *key).max_by_key(|key| (key.work(), key.sizes))?;
        Some(Waiting { kind, largest, uses: same().map(|(_, answer)| answer.uses).sum() })
    }

    /// Ends a kind's waiting; `None` if it can have no trial.
    pub(super) fn settle(&mut self, kind: Key, choice: Option<Choice>) {
        self.noted.retain(|noted| *noted != kind);
        match choice {
            Some(choice) => {
                self.chosen.insert(kind, choice);
                self.answers.retain(|key, _| key.of_like_sizes() != kind);
            }
            None => {
                self.passed_over.insert(kind);
            }
        }
    }

    fn note(&mut self, kind: Key) {
        let is_known = self.chosen.contains_key(&kind) || self.passed_over.contains(&kind);
        if self.is_noting && !is_known && !self.noted.contains(&kind) {
            self.noted.push(kind);
        }
    }
}

impl Library {
    /// The algorithm for a product that is about to be made; `None` if there is none.
    pub(super) fn algorithm_of(
        &self,
        product: &Product,
        key: Key,
        descriptors: &Descriptors,
    ) -> Result<Option<Algorithm>, Error> {
        let mut choices = self.choices();
        if let Some(answer) = choices.answers.get_mut(&key) {
            answer.uses += 1;
            return Ok(answer.algorithm);
        }
        let kind = key.of_like_sizes();
        let chosen = choices.chosen.get(&kind).filter(|choice| choice.since <= choices.step);
        let chosen = chosen.map(|choice| choice.algorithm);
        let algorithm = if let Some(chosen) = chosen.filter(|chosen| self.takes(product, descriptors, chosen)) {
            Some(chosen)
        } else {
            let found = self.candidates(product, descriptors).map_err(|error| product.failed(error))?;
            // One without a rival needs no trial.
            if found.len() > 1 {
                choices.note(kind);
            }
            found.first().copied()
        };
        choices.answers.insert(key, Answer { algorithm, uses: 1 });
        Ok(algorithm)
    }

    /// Remembers that the library has no algorithm for a product after all.
    pub(super) fn has_none(&self, key: Key) {
        self.choices().answers.insert(key, Answer { algorithm: None, uses: 0 });
    }
}
