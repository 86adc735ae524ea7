//! Ranges of keys.

use super::field::Bounds;

pub(super) const ANY: Bounds = Bounds::ANY;
pub(super) const SHARE: Bounds = Bounds::between(0.0, 1.0);
/// A coefficient or threshold: beyond a million it is a slip of the exponent.
pub(super) const POSITIVE: Bounds = Bounds::between(0.0, 1e6).above_low();
pub(super) const FROM_0: Bounds = Bounds::between(0.0, 1e6);
/// A count of steps, tokens or whatever: nothing that a run counts comes to a billion.
pub(super) const FROM_1: Bounds = Bounds::between(1.0, 1e9);
/// Sequences or micro-steps of one step.
pub(super) const BATCH: Bounds = Bounds::between(1.0, 1_048_576.0);
/// Tokens of one text: four times the longest context that models have.
pub(super) const TOKENS: Bounds = Bounds::between(1.0, 4_194_304.0);
/// Completions of one prompt.
pub(super) const GROUP: Bounds = Bounds::between(1.0, 65_536.0);
pub(super) const GROUP_OF_2: Bounds = Bounds::between(2.0, 65_536.0);
/// Rows of a data set.
pub(super) const ROWS: Bounds = Bounds::between(1.0, 1e12);
