//! Parquet files, and Arrow's streams and files, as rows.

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use arrow_ipc::reader::StreamReader;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::LogicalType;
use parquet::schema::types::SchemaDescriptor;

use super::Error;
use super::arrow;
use super::claims;
use super::guard::caught;
use super::rows::ReadRow;

/// Bytes of columns that any file may hold when it is read.
const ALWAYS_ALLOWED: u64 = 256 << 20;

/// How many times its own size a file may hold beyond that; dictionaries make one text of many.
const MOST_RATIO: u64 = 1024;

/// Bytes that the rows of one batch may take where they all hold the largest entry of a dictionary.
const BATCH_BYTES: u64 = 512 << 20;

/// Reads all rows of a Parquet file.
///
/// # Errors
/// If it is not a Parquet file, is cut short, encrypted or damaged, or claims absurd sizes.
pub(super) fn read_parquet(path: &Path) -> Result<Vec<ReadRow>, Error> {
    let file = File::open(path).map_err(crate::fs::io_error("open", path))?;
    let broken = |problem: String| broken(path, "Parquet", &problem);
    caught(|| parquet_rows(file)).and_then(|rows| rows).map_err(broken)
}

fn parquet_rows(file: File) -> Result<Vec<ReadRow>, String> {
    claims::check_footer(&file)?;
    let pages = file.try_clone().map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
    let dictionary = claims::check_pages(&pages, builder.metadata())?;
    let batch = (BATCH_BYTES / dictionary.max(1)).clamp(16, 4096) as usize;
    let features = arrow::features(builder.schema().metadata());
    let json = json_columns(builder.parquet_schema());
    let reader = builder.with_batch_size(batch).build().map_err(|e| e.to_string())?;
    collect(reader, features.as_ref(), &|name| json.iter().any(|column| column == name), length)
}

/// Top-level columns that the file marks as JSON.
fn json_columns(schema: &SchemaDescriptor) -> Vec<String> {
    let is_json = |column: &&parquet::schema::types::ColumnDescPtr| {
        column.path().parts().len() == 1 && matches!(column.logical_type_ref(), Some(LogicalType::Json))
    };
    schema.columns().iter().filter(is_json).map(|column| column.name().to_string()).collect()
}

/// Reads all rows of an Arrow stream or file.
///
/// # Errors
/// If it is none, is cut short or damaged, or claims absurd sizes.
pub(super) fn read_arrow(path: &Path) -> Result<Vec<ReadRow>, Error> {
    let bytes = crate::fs::read(path)?;
    let broken = |problem: String| broken(path, "Arrow", &problem);
    caught(|| arrow_rows(&bytes)).and_then(|rows| rows).map_err(broken)
}

fn arrow_rows(bytes: &[u8]) -> Result<Vec<ReadRow>, String> {
    // A file is a stream between two magic words, with a directory at its end.
    let stream = bytes.strip_prefix(b"ARROW1\0\0").unwrap_or(bytes);
    claims::check_stream(stream)?;
    let reader = StreamReader::try_new(Cursor::new(stream), None).map_err(|e| e.to_string())?;
    let features = arrow::features(reader.schema().metadata());
    collect(reader, features.as_ref(), &|_| false, bytes.len() as u64)
}

fn collect(
    batches: impl Iterator<Item = Result<arrow_array::RecordBatch, arrow_schema::ArrowError>>,
    features: Option<&serde_json::Value>,
    is_json: &(dyn Fn(&str) -> bool + Sync),
    length: u64,
) -> Result<Vec<ReadRow>, String> {
    let limit = ALWAYS_ALLOWED.max(length.saturating_mul(MOST_RATIO));
    let (mut rows, mut held) = (Vec::new(), 0);
    for batch in batches {
        let batch = batch.map_err(|e| e.to_string())?;
        held += claims::held_bytes(&batch);
        if held > limit {
            return Err(format!("its rows take more than {limit} bytes, far more than the file has"));
        }
        rows.extend(arrow::rows(&batch, features, is_json, rows.len() as u32 + 1)?);
    }
    Ok(rows)
}

fn broken(path: &Path, format: &str, problem: &str) -> Error {
    let advice = if problem.contains("ncrypt") {
        "encrypted files are not read; write it without encryption"
    } else {
        "copy or download it again"
    };
    Error::Content { path: path.into(), problem: format!("cannot read as {format}: {problem}; {advice}") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
    use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
    use arrow_schema::{DataType, Field, Fields};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
    use parquet::file::properties::WriterProperties;
    use serde_json::{Value, json};

    use crate::data::Dataset;

    fn messages() -> ArrayRef {
        let fields =
            Fields::from(vec![Field::new("role", DataType::Utf8, true), Field::new("content", DataType::Utf8, true)]);
        let item = StructBuilder::from_fields(fields, 0);
        let mut list = ListBuilder::new(item);
        for turns in [&[("user", Some("é \"q\"\n")), ("assistant", None)][..], &[]] {
            for (role, content) in turns {
                list.values().field_builder::<StringBuilder>(0).unwrap().append_value(role);
                list.values().field_builder::<StringBuilder>(1).unwrap().append_option(*content);
                list.values().append(true);
            }
            list.append(true);
        }
        Arc::new(list.finish())
    }

    #[test]
    fn nested_columns_nulls_and_compressions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let batch = RecordBatch::try_from_iter([
            ("messages", messages()),
            ("answer", Arc::new(Int64Array::from(vec![Some(42), None])) as ArrayRef),
            ("score", Arc::new(Float64Array::from(vec![0.1, 2.0])) as ArrayRef),
        ])
        .unwrap();
        for (name, compression) in [
            ("plain", Compression::UNCOMPRESSED),
            ("snappy", Compression::SNAPPY),
            ("zstd", Compression::ZSTD(ZstdLevel::default())),
            ("gzip", Compression::GZIP(GzipLevel::default())),
            ("brotli", Compression::BROTLI(BrotliLevel::default())),
            ("lz4", Compression::LZ4),
            ("lz4_raw", Compression::LZ4_RAW),
        ] {
            let path = folder.path().join(format!("{name}.parquet"));
            let properties = WriterProperties::builder().set_compression(compression).build();
            let file = std::fs::File::create(&path).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
            let dataset = Dataset::read(&[path]).unwrap();
            let rows: Vec<Value> = dataset.rows().iter().cloned().map(Value::Object).collect();
            let turns = json!([{"role": "user", "content": "é \"q\"\n"}, {"role": "assistant"}]);
            assert_eq!(
                rows,
                [
                    json!({"messages": turns, "answer": 42, "score": 0.1}),
                    json!({"messages": [], "answer": null, "score": 2.0})
                ]
            );
            assert!(dataset.place(1).ends_with("row 2)"), "{}", dataset.place(1));
        }
    }

    #[test]
    fn a_file_that_is_not_parquet_or_cut_short_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.parquet");
        for bytes in [&b"PAR1"[..], b"", b"{\"x\": 1}\n{\"x\": 1}\n", b"PAR1\x00\x00\x00\x00PAR1"] {
            std::fs::write(&path, bytes).unwrap();
            let text = Dataset::read(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(text.contains("bad.parquet`: cannot read as Parquet"), "{text}");
        }
    }
}
