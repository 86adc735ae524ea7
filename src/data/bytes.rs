//! The bytes of a data file: read, unpacked where they are compressed, in UTF-8.
//!
//! What is unpacked is bounded by the size of the packed file, so that a small file cannot fill the memory.

use std::io::Read;
use std::path::Path;

use super::Error;
use crate::fs::Bytes;

/// Bytes that any file may unpack to.
const ALWAYS_ALLOWED: u64 = 16 << 20;

/// How many times its own size a file may unpack to beyond that; text shrinks by 3 to 20.
const MOST_RATIO: u64 = 64;

const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";

/// Reads a whole file; gzip and zstd are known by their first bytes, whatever the name says.
///
/// # Errors
/// If it cannot be read, its packing is broken, or it unpacks to absurdly much.
pub(super) fn read(path: &Path) -> Result<Bytes, Error> {
    let bytes = crate::fs::read(path)?;
    let length = bytes.len() as u64;
    let unpacked = if bytes.starts_with(GZIP) {
        unpack(path, "gzip", flate2::read::MultiGzDecoder::new(&*bytes), length)?
    } else if bytes.starts_with(ZSTD) {
        let decoder = zstd::stream::read::Decoder::with_buffer(&*bytes).map_err(|e| broken(path, "zstd", &e))?;
        unpack(path, "zstd", decoder, length)?
    } else {
        return Ok(bytes);
    };
    Ok(Bytes::from(unpacked))
}

fn unpack(path: &Path, packing: &str, mut decoder: impl Read, packed: u64) -> Result<Vec<u8>, Error> {
    let limit = ALWAYS_ALLOWED.max(packed.saturating_mul(MOST_RATIO));
    let mut unpacked = Vec::new();
    (&mut decoder).take(limit + 1).read_to_end(&mut unpacked).map_err(|e| broken(path, packing, &e))?;
    if unpacked.len() as u64 > limit {
        return Err(Error::Content {
            path: path.into(),
            problem: format!(
                "unpacks to more than {limit} bytes, {MOST_RATIO} times its size and more; if it is meant to, unpack it \
                 and name the unpacked file"
            ),
        });
    }
    Ok(unpacked)
}

fn broken(path: &Path, packing: &str, error: &std::io::Error) -> Error {
    Error::Content {
        path: path.into(),
        problem: format!("cannot unpack as {packing}: {error}; copy or download it again"),
    }
}

/// The line, from 1, that a byte stands in.
pub(super) fn line_at(text: &[u8], at: usize) -> usize {
    text[..at].split(|&byte| byte == b'\n').count()
}

/// The text of a file in UTF-8, without a byte order mark; UTF-16 is known by its mark, or by the zero bytes of ASCII.
///
/// # Errors
/// If it is UTF-16 with half a surrogate pair or half a unit.
pub(super) fn as_utf8(path: &Path, bytes: Bytes) -> Result<Bytes, Error> {
    let from: fn([u8; 2]) -> u16 = match *bytes {
        [0xEF, 0xBB, 0xBF, ..] => return Ok(bytes.slice(3..bytes.len()).unwrap_or(bytes)),
        [0xFF, 0xFE, ..] => u16::from_le_bytes,
        [0xFE, 0xFF, ..] => u16::from_be_bytes,
        [first, 0, ..] if first != 0 => u16::from_le_bytes,
        [0, second, ..] if second != 0 => u16::from_be_bytes,
        _ => return Ok(bytes),
    };
    let problem = |what: &str| Error::Content {
        path: path.into(),
        problem: format!("looks like UTF-16, but {what}; save it as UTF-8"),
    };
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(problem("its number of bytes is odd"));
    }
    let text: Result<String, _> = char::decode_utf16(pairs.iter().map(|pair| from(*pair))).collect();
    let text = text.map_err(|_| problem("has half of a surrogate pair"))?;
    Ok(Bytes::from(text.strip_prefix('\u{FEFF}').unwrap_or(&text).as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn packed_files_are_unpacked_in_all_their_members_and_bombs_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let gzip = |text: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        };
        let read_back = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(&path).map(|bytes| bytes.to_vec()).map_err(|e| e.to_string())
        };
        assert_eq!(read_back(&[gzip(b"one"), gzip(b" two")].concat()).unwrap(), b"one two");
        let zstd = |text: &[u8]| zstd::stream::encode_all(text, 19).unwrap();
        assert_eq!(read_back(&[zstd(b"one"), zstd(b" two")].concat()).unwrap(), b"one two");
        assert_eq!(read_back(b"plain").unwrap(), b"plain");
        for bomb in [gzip(&vec![b' '; 20 << 20]), zstd(&vec![b' '; 20 << 20])] {
            let text = read_back(&bomb).unwrap_err();
            assert!(text.contains("unpacks to more than 16777216 bytes"), "{text}");
        }
        for (packing, whole) in [("gzip", gzip(&b"abc".repeat(999))), ("zstd", zstd(&b"abc".repeat(999)))] {
            let text = read_back(&whole[..whole.len() - 4]).unwrap_err();
            assert!(text.contains(&format!("cannot unpack as {packing}")), "{text}");
        }
    }

    #[test]
    fn utf_16_and_marks_are_read() {
        let path = Path::new("x.csv");
        let utf8 = |bytes: Vec<u8>| as_utf8(path, Bytes::from(bytes)).map(|b| b.to_vec()).map_err(|e| e.to_string());
        let text = "a,é 🌍\n";
        let le = |mark: &str| format!("{mark}{text}").encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let be = |mark: &str| format!("{mark}{text}").encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<u8>>();
        for bytes in [le("\u{FEFF}"), be("\u{FEFF}"), le(""), be(""), format!("\u{FEFF}{text}").into(), text.into()] {
            assert_eq!(utf8(bytes.clone()).unwrap(), text.as_bytes(), "{bytes:?}");
        }
        assert!(utf8(le("")[..7].to_vec()).unwrap_err().contains("odd"));
        assert!(utf8(vec![b'a', 0, 0, 0xD8]).unwrap_err().contains("half of a surrogate pair"));
        assert_eq!(utf8(vec![0, 0, 0]).unwrap(), [0, 0, 0]);
    }
}
