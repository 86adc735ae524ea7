//! Decoding token by token without ever showing half a character.
//!
//! A byte-level token may end in the middle of a UTF-8 character. [`StreamDecoder`] keeps such bytes back until the
//! character is complete. The concatenation of everything it returns equals decoding all tokens at once.

use super::Error;
use super::tokenizer::Tokenizer;

/// Incremental decoder of one sequence. The rollout and `generate` own one per sequence.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    skip_special: bool,
    /// Bytes of an incomplete character (byte-level tokenizers).
    pending: Vec<u8>,
    /// Tokens since the last text was returned, and the part of their text already returned (other tokenizers).
    window: Vec<u32>,
    returned: String,
}

impl StreamDecoder {
    /// A decoder at the start of a sequence.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, pending: Vec::new(), window: Vec::new(), returned: String::new() }
    }

    /// Takes the next token and returns the characters that are complete with it, possibly none.
    ///
    /// # Errors
    /// If the tokenizer cannot decode (not for byte-level tokenizers).
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, Error> {
        match tokenizer.bytes_of(id, self.skip_special) {
            Some(bytes) => {
                self.pending.extend_from_slice(bytes);
                Ok(take_complete(&mut self.pending))
            }
            None => self.push_window(tokenizer, id),
        }
    }

    /// Ends the sequence: returns what is still kept back, broken characters as U+FFFD.
    pub fn finish(&mut self) -> String {
        self.window.clear();
        self.returned.clear();
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// Decoders that join tokens with context (word pieces): decode a short window and return what is new in it.
    fn push_window(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, Error> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window, self.skip_special)?;
        let Some(new) = text.strip_prefix(&self.returned) else { return Ok(String::new()) };
        if new.is_empty() || new.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let new = new.to_string();
        // The last token stays as context, so that the next one gets its space.
        self.window.drain(..self.window.len() - 1);
        self.returned = tokenizer.decode(&self.window, self.skip_special)?;
        Ok(new)
    }
}

/// Removes from the front of `bytes` all complete characters, broken ones as U+FFFD, and leaves an incomplete tail.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                match error.error_len() {
                    Some(length) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = &rest[length..];
                    }
                    None => break,
                }
            }
        }
    }
    let kept = rest.len();
    bytes.drain(..bytes.len() - kept);
    text
}

#[cfg(test)]
mod tests {
    use super::take_complete;

    #[test]
    fn characters_come_out_whole_and_broken_bytes_become_replacement_characters_as_in_one_piece() {
        let samples: [&[u8]; 5] = [
            "naïve café 你好 🌍".as_bytes(),
            b"a\xff\xfeb",
            b"\xe4\xbda\xe4\xbd",
            b"\xf0\x9f\x8c",
            b"\xf0\x9f\x8c\x8d\x80\x80ok",
        ];
        for bytes in samples {
            for step in 1..5 {
                let (mut pending, mut text) = (Vec::new(), String::new());
                for chunk in bytes.chunks(step) {
                    pending.extend_from_slice(chunk);
                    let piece = take_complete(&mut pending);
                    text.push_str(&piece);
                }
                text.push_str(&String::from_utf8_lossy(&pending));
                assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?} in steps of {step}");
            }
        }
    }

    #[test]
    fn an_incomplete_character_is_kept_back() {
        let mut pending = "é".as_bytes()[..1].to_vec();
        assert_eq!(take_complete(&mut pending), "");
        pending.extend_from_slice(&"é".as_bytes()[1..]);
        assert_eq!(take_complete(&mut pending), "é");
        assert!(pending.is_empty());
    }
}
