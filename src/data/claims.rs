//! What Parquet and Arrow files claim of their own sizes, checked before a reader believes it.
//!
//! The readers reserve memory for what a header says and recurse as deep as a schema goes; neither a failed reservation
//! nor an overflowing stack can be caught. Formats: parquet-format's `parquet.thrift` in Thrift's compact protocol; the
//! messages of Arrow's IPC format.

use std::fs::File;
use std::os::unix::fs::FileExt;

use arrow_array::RecordBatch;
use arrow_ipc::{MessageHeader, root_as_message};
use parquet::file::metadata::ParquetMetaData;

/// Levels of a schema.
const MOST_LEVELS: usize = 64;
/// Bytes that a page unpacks to; writers aim at 1 MiB.
const MOST_PAGE_BYTES: u64 = 512 << 20;
/// Values of a page; writers stop at 20,000 rows.
const MOST_PAGE_VALUES: u64 = 32 << 20;
/// Bytes of a page's header, which may hold statistics.
const MOST_HEADER_BYTES: usize = 16 << 20;
/// Bytes of a row of a batch, beside those of its columns.
const ROW_BYTES: usize = 64;
/// Bytes of a cell, beside those in its column.
const CELL_BYTES: usize = 64;

/// Checks the footer of a Parquet file: whole, not encrypted, with a schema that is not absurdly deep.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_footer(file: &File) -> Result<(), String> {
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut tail = [0; 8];
    if length < 12 || file.read_exact_at(&mut tail, length - 8).is_err() {
        return Err("it is too short".into());
    }
    let size = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    match &tail[4..] {
        b"PAR1" => {}
        b"PARE" => return Err("it is encrypted".into()),
        _ => return Err("it does not end as Parquet files do; it is none, or cut short".into()),
    }
    if size > length - 12 {
        return Err("its footer is larger than the file".into());
    }
    let mut footer = vec![0; size as usize];
    file.read_exact_at(&mut footer, length - 8 - size).map_err(|e| e.to_string())?;
    let mut compact = Compact { bytes: &footer, at: 0 };
    footer_depth(&mut compact).ok_or("its footer is damaged")?
}

/// The levels of the schema in a footer are few; `None` if the footer is no Thrift.
fn footer_depth(compact: &mut Compact<'_>) -> Option<Result<(), String>> {
    let mut last = 0;
    while let (id, kind @ 1..) = compact.field(&mut last)? {
        match id {
            2 => {
                let (count, element) = compact.list()?;
                let mut open: Vec<u64> = Vec::new();
                for _ in 0..count {
                    while open.last() == Some(&0) {
                        open.pop();
                    }
                    if let Some(left) = open.last_mut() {
                        *left -= 1;
                    }
                    let children = compact.integer_of(element, 5)?;
                    if children > 0 {
                        open.push(children);
                    }
                    if open.len() > MOST_LEVELS {
                        return Some(Err(format!("its schema is more than {MOST_LEVELS} levels deep")));
                    }
                }
            }
            8 => return Some(Err("its columns are encrypted".into())),
            _ => compact.skip(kind, 0)?,
        }
    }
    Some(Ok(()))
}

/// Checks the header of every page; returns the bytes of the largest dictionary.
///
/// # Errors
/// What is wrong with one.
pub(super) fn check_pages(file: &File, metadata: &ParquetMetaData) -> Result<u64, String> {
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut dictionary = 0;
    for column in metadata.row_groups().iter().flat_map(parquet::file::metadata::RowGroupMetaData::columns) {
        let start = column.dictionary_page_offset().filter(|&at| at > 0).unwrap_or(column.data_page_offset());
        let (start, size) = (start as u64, column.compressed_size() as u64);
        let end = start.checked_add(size).filter(|&end| end <= length && column.compressed_size() >= 0);
        let Some(end) = end else {
            return Err(format!("column `{}` lies outside of the file", column.column_path()));
        };
        let mut at = start;
        while at < end {
            let page =
                page(file, at, end).ok_or_else(|| format!("a page of column `{}` is damaged", column.column_path()))?;
            if page.unpacked_bytes > MOST_PAGE_BYTES || page.values > MOST_PAGE_VALUES {
                return Err(format!(
                    "a page of column `{}` claims {} bytes and {} values",
                    column.column_path(),
                    page.unpacked_bytes,
                    page.values
                ));
            }
            if page.is_dictionary {
                dictionary = dictionary.max(page.unpacked_bytes);
            }
            at += page.length;
        }
    }
    Ok(dictionary)
}

struct Page {
    /// Header and packed bytes.
    length: u64,
    unpacked_bytes: u64,
    values: u64,
    is_dictionary: bool,
}

fn page(file: &File, at: u64, end: u64) -> Option<Page> {
    let mut size = 256;
    loop {
        let available = (end - at).min(size as u64) as usize;
        let mut bytes = vec![0; available];
        file.read_exact_at(&mut bytes, at).ok()?;
        let mut compact = Compact { bytes: &bytes, at: 0 };
        match page_header(&mut compact) {
            Some(header) => return Some(Page { length: header.length + compact.at as u64, ..header }),
            None if (available as u64) < end - at && size < MOST_HEADER_BYTES => size *= 8,
            None => return None,
        }
    }
}

fn page_header(compact: &mut Compact<'_>) -> Option<Page> {
    let mut page = Page { length: 0, unpacked_bytes: 0, values: 0, is_dictionary: false };
    let mut last = 0;
    while let (id, kind @ 1..) = compact.field(&mut last)? {
        match id {
            2 => page.unpacked_bytes = u64::try_from(compact.integer()?).ok()?,
            3 => page.length = u64::try_from(compact.integer()?).ok()?,
            5 | 7 | 8 => {
                page.values = compact.integer_of(kind, 1)?;
                page.is_dictionary |= id == 7;
            }
            _ => compact.skip(kind, 0)?,
        }
    }
    Some(page)
}

/// Thrift's compact protocol.
struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = self.bytes.get(self.at).copied()?;
        self.at += 1;
        Some(byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn advance(&mut self, count: u64) -> Option<()> {
        let end = self.at.checked_add(usize::try_from(count).ok()?).filter(|&end| end <= self.bytes.len())?;
        self.at = end;
        Some(())
    }

    /// The next field of a struct: its id and its kind, which is 0 at the struct's end.
    fn field(&mut self, last: &mut i64) -> Option<(i64, u8)> {
        let head = self.byte()?;
        if head == 0 {
            return Some((0, 0));
        }
        let step = i64::from(head >> 4);
        *last = if step == 0 { self.integer()? } else { last.checked_add(step)? };
        Some((*last, head & 0x0F))
    }

    /// The number of a list's elements, each of which takes a byte at least, and their kind.
    fn list(&mut self) -> Option<(u64, u8)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        (count <= (self.bytes.len() - self.at) as u64).then_some((count, head & 0x0F))
    }

    /// The integer `wanted` of a struct, or 0 where it has none.
    fn integer_of(&mut self, kind: u8, wanted: i64) -> Option<u64> {
        if kind != 12 {
            return None;
        }
        let (mut found, mut last) = (0, 0);
        while let (id, kind @ 1..) = self.field(&mut last)? {
            if id == wanted && matches!(kind, 4..=6) {
                found = u64::try_from(self.integer()?).ok()?;
            } else {
                self.skip(kind, 0)?;
            }
        }
        Some(found)
    }

    fn skip(&mut self, kind: u8, level: usize) -> Option<()> {
        if level > MOST_LEVELS {
            return None;
        }
        match kind {
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let (count, element) = self.list()?;
                (0..count).try_for_each(|_| {
                    if matches!(element, 1 | 2) { self.advance(1) } else { self.skip(element, level + 1) }
                })
            }
            11 => {
                let count = self.varint()?;
                if count == 0 {
                    return Some(());
                }
                let kinds = self.byte()?;
                (0..count).try_for_each(|_| {
                    self.skip(kinds >> 4, level + 1)?;
                    self.skip(kinds & 0x0F, level + 1)
                })
            }
            12 => {
                let mut last = 0;
                while let (_, kind @ 1..) = self.field(&mut last)? {
                    self.skip(kind, level + 1)?;
                }
                Some(())
            }
            13 => self.advance(16),
            _ => None,
        }
    }
}

/// Checks the messages of an Arrow stream: each lies inside of it, and what it unpacks to is bounded.
///
/// # Errors
/// What is wrong with one.
pub(super) fn check_stream(bytes: &[u8]) -> Result<(), String> {
    let limit = (64 << 20).max(bytes.len().saturating_mul(1024)) as i64;
    let word =
        |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?)) };
    let cut = || "it is cut short".to_string();
    let mut at = 0;
    while at < bytes.len() {
        // Before format 0.15 a message began with its length.
        if word(at) == Some(u32::MAX) {
            at += 4;
        }
        let length = word(at).ok_or_else(cut)? as usize;
        at += 4;
        if length == 0 {
            break;
        }
        let end = at.checked_add(length).ok_or_else(cut)?;
        let message = root_as_message(bytes.get(at..end).ok_or_else(cut)?).map_err(|e| e.to_string())?;
        let body_length = usize::try_from(message.bodyLength()).map_err(|_| cut())?;
        let body_end = end.checked_add(body_length).ok_or_else(cut)?;
        let body = bytes.get(end..body_end).ok_or_else(cut)?;
        let batch = match message.header_type() {
            MessageHeader::RecordBatch => message.header_as_record_batch(),
            MessageHeader::DictionaryBatch => message.header_as_dictionary_batch().and_then(|batch| batch.data()),
            _ => None,
        };
        if let Some(batch) = batch {
            let mut unpacked = 0i64;
            for buffer in batch.buffers().into_iter().flatten() {
                let range = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
                let range =
                    range.and_then(|(start, length)| Some(start..start.checked_add(length)?)).ok_or_else(cut)?;
                let content = body.get(range).ok_or_else(cut)?;
                if let (Some(_), Some(head)) = (batch.compression(), content.first_chunk::<8>()) {
                    unpacked = unpacked.saturating_add(i64::from_le_bytes(*head).max(0));
                }
            }
            if unpacked > limit || batch.length() > limit {
                return Err(format!("a batch claims {unpacked} bytes and {} rows", batch.length()));
            }
        }
        at = body_end;
    }
    Ok(())
}

/// About how many bytes the rows of a batch take in memory.
pub(super) fn held_bytes(batch: &RecordBatch) -> u64 {
    let cells = batch.num_rows() * (ROW_BYTES + batch.num_columns() * CELL_BYTES);
    (batch.get_array_memory_size() + cells) as u64
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(footer: &[u8], magic: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b"PAR1", footer, &(footer.len() as u32).to_le_bytes(), magic].concat()).unwrap();
        file
    }

    /// A schema of `levels` groups, one in the other.
    fn nested(levels: usize) -> Vec<u8> {
        let mut footer = vec![0x15, 2, 0x19, 0xFC];
        footer.extend([(levels & 0x7F) as u8 | 0x80, (levels >> 7 & 0x7F) as u8 | 0x80, (levels >> 14) as u8]);
        footer.extend([0x48, 1, b'x', 0x15, 2, 0].repeat(levels));
        footer.push(0);
        footer
    }

    #[test]
    fn footers_that_are_deep_encrypted_or_damaged_are_refused() {
        let problem = |footer: &[u8], magic: &[u8]| check_footer(&file(footer, magic)).unwrap_err();
        assert!(check_footer(&file(&nested(60), b"PAR1")).is_ok());
        assert!(problem(&nested(100_000), b"PAR1").contains("more than 64 levels"));
        assert!(problem(&[0x8C, 0, 0], b"PAR1").contains("encrypted"));
        assert!(problem(&[0], b"PARE").contains("encrypted"));
        assert!(problem(&[0], b"PAR2").contains("does not end as Parquet"));
        assert!(problem(&[0x29, 0xFC, 0xFF, 0xFF, 0xFF, 0x7F], b"PAR1").contains("damaged"));
    }

    #[test]
    fn a_stream_that_claims_more_than_it_has_is_refused() {
        let batch = RecordBatch::try_from_iter([(
            "x",
            std::sync::Arc::new(arrow_array::Int64Array::from(vec![1, 2, 3])) as arrow_array::ArrayRef,
        )])
        .unwrap();
        let mut bytes = Vec::new();
        let mut writer = arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        assert!(check_stream(&bytes).is_ok());
        assert!(check_stream(&bytes[..bytes.len() - 20]).unwrap_err().contains("cut short"));
        assert!(check_stream(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]).unwrap_err().contains("cut short"));
    }
}
