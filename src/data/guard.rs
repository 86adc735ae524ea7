//! Panics of other people's readers, caught and named.
//!
//! Crates that decode files panic on some damaged ones. [`caught`] turns such a panic into a message and keeps it off
//! the screen, so that a hostile file ends like any other broken one.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is somebody's expected outcome.
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `read`; a panic in it becomes an error with the panic's message.
///
/// # Errors
/// If it panics.
pub(super) fn caught<T>(read: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_QUIET.get() {
                loud(info);
            }
        }));
    });
    let was_quiet = IS_QUIET.replace(true);
    // What `read` leaves half done is its own, and is dropped with it.
    let outcome = catch_unwind(AssertUnwindSafe(read));
    IS_QUIET.set(was_quiet);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        format!("the reader gave up ({})", text.lines().next().unwrap_or("no reason given"))
    })
}

#[cfg(test)]
mod tests {
    use super::caught;

    #[test]
    fn a_panic_is_a_message_and_anything_else_comes_through() {
        assert_eq!(caught(|| 7), Ok(7));
        let nothing: Vec<u8> = Vec::new();
        let text = caught(|| nothing[nothing.len()]).unwrap_err();
        assert!(text.contains("the reader gave up (index out of bounds"), "{text}");
        assert_eq!(caught(|| caught(|| panic!("inner")).is_err()), Ok(true));
    }
}
