//! Numbers and lists in the body of a record, little-endian.

/// What is left of a body.
pub(super) struct Body<'a>(pub(super) &'a [u8]);

impl<'a> Body<'a> {
    /// The next `count` bytes; `None` if there are fewer.
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next number.
    pub(super) fn number(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    /// The next `count` numbers; nothing is allocated unless they are there.
    pub(super) fn numbers(&mut self, count: usize) -> Option<Vec<u32>> {
        let bytes = self.take(count.checked_mul(4)?)?;
        Some(bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect())
    }

    /// The next text, which stands behind its length.
    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = self.number()? as usize;
        str::from_utf8(self.take(length)?).ok()
    }
}

/// Appends numbers.
pub(super) fn put_numbers(body: &mut Vec<u8>, numbers: &[u32]) {
    body.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
}

/// Appends a text behind its length.
pub(super) fn put_text(body: &mut Vec<u8>, text: &str) {
    put_numbers(body, &[text.len() as u32]);
    body.extend_from_slice(text.as_bytes());
}
