//! Finds stop strings in a completion while its tokens come, also across token boundaries.
//!
//! The engine feeds each new token; only the last few tokens are turned into text, so the cost of a token does not grow
//! with the completion. Bytes of a character that is not complete yet (byte-level tokenizers) wait for the rest.

/// Turns tokens into text; the caller's tokenizer. Any `Fn(&[u32]) -> String` is one.
pub trait Detokenize {
    /// The text of `ids`.
    fn text(&self, ids: &[u32]) -> String;
}

impl<F: Fn(&[u32]) -> String> Detokenize for F {
    fn text(&self, ids: &[u32]) -> String {
        self(ids)
    }
}

/// Most tokens that are decoded together. Reached only by texts in which no token ends with a whole character; cutting
/// such a text garbles one character at most.
const MAX_WINDOW: usize = 64;

/// What an incomplete character decodes to.
const REPLACEMENT: char = '\u{FFFD}';

/// Where one completion's search for stop strings stands.
#[derive(Clone, Debug, Default)]
pub(super) struct StopMatcher {
    /// Tokens from here on are decoded together: the text of a token may depend on the one before.
    window_start: usize,
    /// The last token border that is a character border as well.
    border: usize,
    /// Text of the window that has been searched, whole characters only.
    window_text: String,
    /// End of the searched text, as long as the longest stop string.
    tail: String,
}

impl StopMatcher {
    /// Whether one of `stops` ends in the text of the tokens that came since the last call. `ids` is the whole
    /// completion.
    pub(super) fn push(&mut self, ids: &[u32], stops: &[String], detokenize: &dyn Detokenize) -> bool {
        let text = detokenize.text(&ids[self.window_start..]);
        let complete = text.trim_end_matches(REPLACEMENT);
        let searched = self.tail.len();
        self.tail.push_str(&complete[common_prefix(&self.window_text, complete)..]);
        let is_found = stops.iter().any(|stop| {
            // Only matches that end in the new text are new; they may begin in the old.
            let from = floor_boundary(&self.tail, (searched + 1).saturating_sub(stop.len()));
            self.tail[from..].contains(stop.as_str())
        });
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        self.tail.drain(..floor_boundary(&self.tail, self.tail.len().saturating_sub(longest)));
        if complete.len() == text.len() || ids.len() - self.window_start > MAX_WINDOW {
            self.window_start = self.border;
            self.border = ids.len();
            let kept = detokenize.text(&ids[self.window_start..]);
            self.window_text = kept.trim_end_matches(REPLACEMENT).into();
        } else {
            self.window_text = complete.into();
        }
        is_found
    }
}

/// Bytes that two texts have in common at their start, in whole characters.
fn common_prefix(left: &str, right: &str) -> usize {
    left.chars().zip(right.chars()).take_while(|(l, r)| l == r).map(|(l, _)| l.len_utf8()).sum()
}

/// The last character boundary at or before `index`.
fn floor_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// Feeds `pieces` one token each; the index of the token that completes a stop string.
    fn stopped_at(pieces: &[&[u8]], stops: &[&str]) -> Option<usize> {
        let detokenize = |ids: &[u32]| {
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| pieces[id as usize].iter().copied()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let ids: Vec<u32> = (0..pieces.len() as u32).collect();
        let mut matcher = StopMatcher::default();
        (0..pieces.len()).find(|&last| matcher.push(&ids[..=last], &stops, &detokenize))
    }

    #[test]
    fn a_stop_string_is_found_inside_a_token_and_across_tokens() {
        assert_eq!(stopped_at(&[b"ab", b"x</answer>y", b"z"], &["</answer>"]), Some(1));
        assert_eq!(stopped_at(&[b"ab</", b"ans", b"wer", b">z", b"y"], &["</answer>"]), Some(3));
        assert_eq!(stopped_at(&[b"ab</", b"ans", b"wer", b"z"], &["</answer>"]), None);
        assert_eq!(stopped_at(&[b"a", b"b", b"c", b"d"], &["zz", "cd", "d"]), Some(3));
        assert_eq!(stopped_at(&[b"aab", b"aab", b"ac"], &["aabaac"]), None);
        assert_eq!(stopped_at(&[b"aab", b"aab", b"aac"], &["aabaac"]), Some(2));
    }

    #[test]
    fn characters_split_over_tokens_are_waited_for() {
        // "\u{20ac}" is e2 82 ac.
        assert_eq!(stopped_at(&[b"a\xe2", b"\x82", b"\xac!", b"b"], &["\u{20ac}!"]), Some(2));
        assert_eq!(stopped_at(&[b"stop\xe2", b"\x82\xac"], &["stop"]), Some(0));
        assert_eq!(stopped_at(&[b"st", b"op\xe2", b"\x82\xac"], &["stop"]), Some(1));
        assert_eq!(stopped_at(&[b"\xe2", b"\xe2", b"x", b"stop"], &["stop"]), Some(3));
        // Bytes that never become a character neither hold up the search nor make it decode ever longer texts.
        let mut pieces: Vec<&[u8]> = vec![b"\xff"; 20];
        pieces.extend([&b"st"[..], b"op"]);
        assert_eq!(stopped_at(&pieces, &["stop"]), Some(21));
        assert_eq!(stopped_at(&[b"\xe2", b"\x82", b"\xac", b"\xe2\x82\xac", b"x"], &["\u{20ac}\u{20ac}x"]), Some(4));
    }

    #[test]
    fn finds_what_a_search_of_the_whole_text_finds_at_the_same_token() {
        let mut stream = Stream::new(2, "stop test", 0, 0);
        for _ in 0..2_000 {
            // Two-letter texts, so that stop strings overlap themselves often; a two-byte letter is cut at random.
            let letters: Vec<u8> =
                (0..40).flat_map(|_| if stream.below(2) == 0 { b"a".to_vec() } else { vec![0xc3, 0xa9] }).collect();
            let mut pieces: Vec<&[u8]> = Vec::new();
            let mut rest = &letters[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(1 + stream.below(3.min(rest.len() as u64)) as usize);
                pieces.push(piece);
                rest = after;
            }
            let stop: String =
                (0..1 + stream.below(6)).map(|_| if stream.below(2) == 0 { 'a' } else { '\u{e9}' }).collect();
            let expected = (0..pieces.len())
                .find(|&last| String::from_utf8_lossy(&pieces[..=last].concat()).contains(stop.as_str()));
            assert_eq!(stopped_at(&pieces, &[&stop]), expected, "{stop} in {pieces:?}");
        }
    }
}
