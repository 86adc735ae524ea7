//! Writes TensorBoard event files (`report_to: [tensorboard]`).
//!
//! An event file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the
//! payload, all little-endian; the payload is an `Event` message. Tags are named as transformers' TensorBoard callback
//! names them: `train/<key>`, and `eval/<key>` for keys that begin with `eval_`.
//! Sources: `tensorflow/core/lib/io/record_writer.cc`, `core/util/event.proto`, `core/framework/summary.proto`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use prost::Message;

use super::{Error, Row};
use crate::fs::io_error;

/// Numbers the files of one process, so that two opened in one second do not share a name.
static FILES_OPENED: AtomicU32 = AtomicU32::new(0);

/// `tensorflow.Event`, the fields used here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`; status 1 is START, at which readers drop the events of this and later steps.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SESSION_START: i32 = 1;

/// One open event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Opens a new event file in `folder`. With `resumed_from` readers are told to drop what older files of the folder
    /// hold after that step.
    ///
    /// # Errors
    /// If the file cannot be created or written.
    pub fn open(folder: &Path, resumed_from: Option<u64>) -> Result<Self, Error> {
        if folder.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
            return Err(crate::fs::Error::Link { path: folder.into(), what: "a symbolic link" }.into());
        }
        std::fs::create_dir_all(folder).map_err(io_error("create the folder", folder))?;
        let name = format!(
            "events.out.tfevents.{}.{}.{}.{}",
            jiff::Timestamp::now().as_second(),
            host_name(),
            std::process::id(),
            FILES_OPENED.fetch_add(1, Ordering::Relaxed),
        );
        let path = folder.join(name);
        let file = OpenOptions::new().create_new(true).append(true).open(&path).map_err(io_error("create", &path))?;
        let mut writer = Self { path, file };
        writer.write(0, What::FileVersion("brain.Event:2".into()))?;
        if let Some(step) = resumed_from {
            writer.write(step as i64 + 1, What::SessionLog(SessionLog { status: SESSION_START }))?;
        }
        Ok(writer)
    }

    /// Writes the numbers of a row under their tags; values that are not numbers are left out.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_row(&mut self, row: &Row) -> Result<(), Error> {
        let step = row.get("step").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let value = row
            .iter()
            .filter(|(key, _)| *key != "step")
            .filter_map(|(key, value)| Some(SummaryValue { tag: tag(key), simple_value: Some(value.as_f64()? as f32) }))
            .collect();
        self.write(step as i64, What::Summary(Summary { value }))
    }

    fn write(&mut self, step: i64, what: What) -> Result<(), Error> {
        let wall_time = jiff::Timestamp::now().as_microsecond() as f64 / 1e6;
        let record = record(&Event { wall_time, step, what: Some(what) }.encode_to_vec());
        self.file.write_all(&record).map_err(io_error("append to", &self.path))?;
        Ok(())
    }
}

/// A payload framed as a TFRecord.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_checksum(payload).to_le_bytes());
    record
}

/// CRC-32C, rotated and offset, as tensorflow/core/lib/hash/crc32c.h masks checksums that are stored beside their data.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn tag(key: &str) -> String {
    match key.strip_prefix("eval_") {
        Some(rest) => format!("eval/{rest}"),
        None => format!("train/{key}"),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let clean: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_".contains(*c)).collect();
    if clean.is_empty() { "localhost".into() } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Reads the records of a file, checking both checksums of each.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (length, after) = rest.split_at(8);
            let (length_check, after) = after.split_at(4);
            assert_eq!(masked_checksum(length).to_le_bytes(), length_check);
            let (payload, after) = after.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
            let (check, after) = after.split_at(4);
            assert_eq!(masked_checksum(payload).to_le_bytes(), check);
            events.push(Event::decode(payload).unwrap());
            rest = after;
        }
        events
    }

    #[test]
    fn checksums_are_those_of_the_published_vectors() {
        // RFC 3720 (iSCSI), appendix B.4: 32 bytes of zeros, and of ones.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        // The checksum of nothing is 0, of which the mask leaves its offset.
        assert_eq!(masked_checksum(&[]), 0xa282_ead8);
    }

    #[test]
    fn the_encoding_is_the_one_of_the_proto_files() {
        let event = Event {
            wall_time: 1.0,
            step: 3,
            what: Some(What::Summary(Summary {
                value: vec![SummaryValue { tag: "a".into(), simple_value: Some(0.0) }],
            })),
        };
        let expected = [
            0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, // 1: double 1.0
            0x10, 3, // 2: varint 3
            0x2a, 10, // 5: message of 10 bytes
            0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0, 0, // 1: { 1: "a", 2: float 0, written although it is zero }
        ];
        assert_eq!(event.encode_to_vec(), expected);
    }

    #[test]
    fn a_file_reads_back_with_its_version_restart_and_rows() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(folder.path(), Some(10)).unwrap();
        let row =
            json!({"step": 11, "loss": 0.5, "rewards/accuracy/mean": 1, "eval_loss": 2.0, "kl": null, "name": "x"});
        writer.write_row(row.as_object().unwrap()).unwrap();
        let events = read(&writer.path);
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, &events[1].what), (11, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let Some(What::Summary(summary)) = &events[2].what else { panic!("no summary: {:?}", events[2]) };
        let values: Vec<_> = summary.value.iter().map(|v| (v.tag.as_str(), v.simple_value.unwrap())).collect();
        assert_eq!(values, [("train/loss", 0.5), ("train/rewards/accuracy/mean", 1.0), ("eval/loss", 2.0)]);
        assert_eq!(events[2].step, 11);
        assert!((events[2].wall_time - jiff::Timestamp::now().as_second() as f64).abs() < 60.0);
    }
}
