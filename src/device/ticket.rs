//! What has been asked of a queue, as something to wait for.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Error;
use super::gpu::Event;

/// First wait between two looks at the device; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_micros(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// A moment in the order of a queue: it has come when everything is done that was asked of the queue before.
///
/// A ticket keeps no memory alive: a [`Buffer`](super::Buffer) knows what is asked of it, and is freed after that.
#[derive(Clone, Debug)]
pub struct Ticket(Moment);

#[derive(Clone, Debug)]
enum Moment {
    Done,
    /// Of the queue with that number.
    Event(Arc<Event>, u64),
    Promised(Arc<Promised>),
}

#[derive(Debug, Default)]
struct Promised {
    state: Mutex<Promise>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Promise {
    #[default]
    Open,
    Kept,
    Broken,
}

/// Work that another thread of the host does; its ticket comes with [`Work::done`]. Dropped before, the work has failed.
#[derive(Debug)]
pub struct Work(Arc<Promised>);

impl Promised {
    fn lock(&self) -> MutexGuard<'_, Promise> {
        // One value is set, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, to: Promise) {
        let mut state = self.lock();
        if *state == Promise::Open {
            *state = to;
            self.changed.notify_all();
        }
    }
}

impl Work {
    /// Says that the work is done.
    pub fn done(self) {
        self.0.set(Promise::Kept);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.set(Promise::Broken);
    }
}

impl Ticket {
    /// A moment that has come.
    pub fn done() -> Self {
        Self(Moment::Done)
    }

    /// Work of a thread of the host, and its ticket.
    pub fn promise() -> (Work, Self) {
        let promised = Arc::new(Promised::default());
        (Work(promised.clone()), Self(Moment::Promised(promised)))
    }

    pub(super) fn event(event: Event, queue: u64) -> Self {
        Self(Moment::Event(Arc::new(event), queue))
    }

    /// The event that a device can wait for, and the queue that it is of.
    pub(super) fn as_event(&self) -> Option<(&Event, u64)> {
        match &self.0 {
            Moment::Event(event, queue) => Some((event, *queue)),
            Moment::Done | Moment::Promised(_) => None,
        }
    }

    /// Whether it has come.
    ///
    /// # Errors
    /// If the device failed, or the work of a thread was given up.
    pub fn is_done(&self) -> Result<bool, Error> {
        match &self.0 {
            Moment::Done => Ok(true),
            Moment::Event(event, _) => event.is_done(),
            Moment::Promised(promised) => match *promised.lock() {
                Promise::Open => Ok(false),
                Promise::Kept => Ok(true),
                Promise::Broken => Err(Error::GivenUp),
            },
        }
    }

    /// Lets the host wait until it has come; `None` waits without an end.
    ///
    /// # Errors
    /// If it has not come at the deadline, the device failed, or the work of a thread was given up.
    pub fn wait(&self, deadline: Option<Instant>) -> Result<(), Error> {
        match (&self.0, deadline) {
            (Moment::Done, _) => Ok(()),
            (Moment::Event(event, _), None) => event.synchronize(),
            (Moment::Event(event, _), Some(deadline)) => {
                let mut pause = FIRST_PAUSE;
                while !event.is_done()? {
                    if Instant::now() >= deadline {
                        return Err(Error::Late);
                    }
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Ok(())
            }
            (Moment::Promised(promised), deadline) => {
                let mut state = promised.lock();
                loop {
                    match (*state, deadline) {
                        (Promise::Kept, _) => return Ok(()),
                        (Promise::Broken, _) => return Err(Error::GivenUp),
                        (Promise::Open, None) => {
                            state = promised.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                        }
                        (Promise::Open, Some(deadline)) => {
                            let left = deadline.saturating_duration_since(Instant::now());
                            if left.is_zero() {
                                return Err(Error::Late);
                            }
                            let waited = promised.changed.wait_timeout(state, left);
                            state = waited.unwrap_or_else(PoisonError::into_inner).0;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Ticket;

    #[test]
    fn a_promise_is_open_until_the_work_is_done() {
        let (work, ticket) = Ticket::promise();
        assert!(!ticket.is_done().unwrap());
        let early = ticket.wait(Some(Instant::now() + Duration::from_millis(1))).unwrap_err();
        assert!(early.to_string().contains("deadline"), "{early}");
        let worker = std::thread::spawn(move || work.done());
        ticket.wait(None).unwrap();
        ticket.clone().wait(Some(Instant::now())).unwrap();
        assert!(ticket.is_done().unwrap());
        worker.join().unwrap();
    }

    #[test]
    fn work_that_is_dropped_is_an_error_and_not_a_wait_for_ever() {
        let (work, ticket) = Ticket::promise();
        drop(work);
        assert!(ticket.is_done().unwrap_err().to_string().contains("given up"));
        assert!(ticket.wait(None).is_err());
    }

    #[test]
    fn what_is_done_is_not_waited_for() {
        Ticket::done().wait(Some(Instant::now())).unwrap();
        assert!(Ticket::done().is_done().unwrap());
    }
}
