//! What one rendering may spend: steps, bytes and stack. A template comes with a model and may be hostile.

use std::cell::Cell;

use super::Error;

/// Steps of the evaluator; looking at four bytes is one. A hundred thousand messages of a long conversation take a few
/// million.
const MOST_STEPS: u64 = 40_000_000;
/// Bytes made, besides those that come with the size of the conversation.
const FREE_BYTES: u64 = 32 << 20;
/// Bytes made per byte of the conversation: templates that collect their output in a variable copy it once per message.
const BYTES_PER_BYTE: u64 = 1024;
/// Never more than this.
const MOST_BYTES: u64 = 768 << 20;
/// Stack that rendering may use; threads have two mebibytes.
const MOST_STACK: usize = 768 << 10;

/// Counts down while a template is rendered.
#[derive(Debug)]
pub(super) struct Budget {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    stack: StackLimit,
}

impl Budget {
    /// The budget for rendering `input_bytes` of conversation.
    pub(super) fn new(input_bytes: usize) -> Self {
        let bytes = FREE_BYTES.saturating_add(BYTES_PER_BYTE.saturating_mul(input_bytes as u64)).min(MOST_BYTES);
        Self { steps: Cell::new(MOST_STEPS), bytes: Cell::new(bytes), stack: StackLimit::here() }
    }

    /// Pays for `count` steps.
    pub(super) fn steps(&self, count: usize) -> Result<(), Error> {
        let left = self.steps.get().checked_sub(count as u64).ok_or_else(|| {
            Error::new(format!("gives no result within {MOST_STEPS} steps; it loops without end or far too long"))
        })?;
        self.steps.set(left);
        Ok(())
    }

    /// Pays for looking through `bytes`.
    pub(super) fn look(&self, bytes: usize) -> Result<(), Error> {
        self.steps(bytes / 4)
    }

    /// Pays for a new value of `bytes`. To be called before it is made.
    pub(super) fn make(&self, bytes: usize) -> Result<(), Error> {
        let left = self.bytes.get().checked_sub(bytes as u64).ok_or_else(|| {
            Error::new("makes far more text than the conversation has; the limit is for hostile templates")
        })?;
        self.bytes.set(left);
        self.look(bytes)
    }

    /// Fails where the stack would run out.
    pub(super) fn nest(&self) -> Result<(), Error> {
        self.stack.check()
    }
}

/// How deep a recursion may go, by the stack that it uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackLimit {
    base: usize,
}

impl StackLimit {
    /// Counts from here.
    pub(super) fn here() -> Self {
        Self { base: stack_address() }
    }

    /// Fails if too much is used.
    pub(super) fn check(self) -> Result<(), Error> {
        if self.base.abs_diff(stack_address()) > MOST_STACK {
            return Err(Error::new("is nested or recurses too deeply"));
        }
        Ok(())
    }
}

#[inline(never)]
fn stack_address() -> usize {
    let marker = 0u8;
    std::hint::black_box(&raw const marker) as usize
}
