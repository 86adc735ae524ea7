//! What has come from the other ranks and was not asked for yet.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::frame::{Frame, Kind};

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Without a word: the process is gone.
    Gone,
    /// The rank said why.
    Failed(String),
}

/// What there is of a rank.
pub(super) enum Taken {
    Frame(Frame),
    /// Some rank has left the work that this one is at, before the collective that is waited for.
    StartOver,
    Nothing,
}

/// What there is of a number that was asked for.
pub(super) enum TakenTurn {
    Number(u64),
    /// As [`Taken::StartOver`].
    StartOver,
    Nothing,
}

pub(super) struct Inboxes {
    state: Mutex<State>,
    arrived: Condvar,
}

struct State {
    /// How often this rank has left work at hand.
    generation: u32,
    of: Vec<Inbox>,
    /// The number that the first rank gave last.
    turn: Option<Turn>,
}

/// A number that one rank gets of those that ranks share between two collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// How often the rank that asked had left work at hand, and its last collective.
    pub(super) after: (u32, u64),
    pub(super) number: u64,
}

/// The numbers, at the first rank.
#[derive(Debug, Default)]
pub(super) struct Turns {
    after: (u32, u64),
    next: u64,
}

impl Turns {
    /// The next number between a collective and the one after it. Who asks for an earlier place is late: there is none for it.
    pub(super) fn next(&mut self, after: (u32, u64)) -> Turn {
        if after < self.after {
            return Turn { after, number: u64::MAX };
        }
        if after > self.after {
            *self = Self { after, next: 0 };
        }
        self.next += 1;
        Turn { after, number: self.next - 1 }
    }
}

#[derive(Default)]
struct Inbox {
    frames: VecDeque<Frame>,
    end: Option<End>,
    /// How often that rank has left work at hand, and the last collective to which it gave its share before.
    generation: u32,
    left_after: u64,
}

impl State {
    /// Whether a rank has left the work at hand before it gave its share of the collective `round`.
    fn has_left(&self, round: u64) -> bool {
        self.of.iter().any(|inbox| inbox.generation > self.generation && inbox.left_after < round)
    }
}

impl Inboxes {
    pub(super) fn new(world_size: usize) -> Self {
        let of = (0..world_size).map(|_| Inbox::default()).collect();
        Self { state: Mutex::new(State { generation: 0, of, turn: None }), arrived: Condvar::new() }
    }

    /// The state is only ever changed by single steps, so a panic elsewhere leaves it whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, peer: usize, frame: Frame) {
        let mut state = self.lock();
        let current = state.generation;
        let inbox = &mut state.of[peer];
        match frame.kind {
            Kind::StartOver => (inbox.generation, inbox.left_after) = (frame.generation, frame.round),
            // What belongs to work that was left is nobody's any more.
            _ if frame.generation < current => {}
            _ => inbox.frames.push_back(frame),
        }
        drop(state);
        self.arrived.notify_all();
    }

    pub(super) fn put_turn(&self, turn: Turn) {
        self.lock().turn = Some(turn);
        self.arrived.notify_all();
    }

    /// The number that was asked for after a collective; waits for it at most for `time`.
    pub(super) fn take_turn(&self, after: (u32, u64), time: Duration) -> TakenTurn {
        let mut state = self.lock();
        for is_last in [false, true] {
            // Who asks is before the next collective.
            if state.has_left(after.1 + 1) {
                return TakenTurn::StartOver;
            }
            if let Some(turn) = state.turn.take_if(|turn| turn.after == after) {
                return TakenTurn::Number(turn.number);
            }
            if !is_last {
                state = self.arrived.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        TakenTurn::Nothing
    }

    pub(super) fn end(&self, peer: usize, end: End) {
        let mut state = self.lock();
        state.of[peer].end.get_or_insert(end);
        drop(state);
        self.arrived.notify_all();
    }

    pub(super) fn ended(&self, peer: usize) -> Option<End> {
        self.lock().of[peer].end.clone()
    }

    pub(super) fn has_frame(&self, peer: usize) -> bool {
        !self.lock().of[peer].frames.is_empty()
    }

    pub(super) fn generation(&self) -> u32 {
        self.lock().generation
    }

    /// Leaves the work at hand: what has come for it is thrown away.
    pub(super) fn next_generation(&self) {
        let mut state = self.lock();
        state.generation += 1;
        let current = state.generation;
        for inbox in &mut state.of {
            inbox.frames.retain(|frame| frame.generation >= current);
        }
    }

    pub(super) fn has_started_over(&self, peer: usize) -> bool {
        let state = self.lock();
        state.of[peer].generation >= state.generation
    }

    /// Waits for anything to come, at most for `time`.
    pub(super) fn wait(&self, time: Duration) {
        let state = self.lock();
        drop(self.arrived.wait_timeout(state, time));
    }

    /// The next frame of a rank, of the collective `round`; waits for it at most for `time`. A rank that left after its share
    /// may have all of that collective, so the others go through with it too.
    pub(super) fn take(&self, peer: usize, round: u64, time: Duration) -> Taken {
        let mut state = self.lock();
        for is_last in [false, true] {
            let current = state.generation;
            let inbox = &mut state.of[peer];
            if inbox.frames.front().is_some_and(|frame| frame.generation == current)
                && let Some(frame) = inbox.frames.pop_front()
            {
                return Taken::Frame(frame);
            }
            if state.has_left(round) {
                return Taken::StartOver;
            }
            if !is_last {
                state = self.arrived.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Taken::Nothing
    }
}
