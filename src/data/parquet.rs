//! Parquet files as rows.
//!
//! Columns of any nesting become JSON: lists become arrays, structs objects, nulls stay nulls. The conversion goes
//! through Arrow's own JSON writer.

use std::fs::File;
use std::path::Path;

use arrow_array::RecordBatch;
use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rayon::prelude::*;

use super::Error;
use super::rows::Row;

/// Reads all rows of a Parquet file.
///
/// # Errors
/// If it is not a Parquet file, is cut short, or uses a compression this build does not have.
pub(super) fn read_parquet(path: &Path) -> Result<Vec<Row>, Error> {
    let broken = |problem: String| Error::Content {
        path: path.into(),
        problem: format!("cannot read as Parquet: {problem}; copy or download it again"),
    };
    let file = File::open(path).map_err(crate::fs::io_error("open", path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(|builder| builder.with_batch_size(4096).build())
        .map_err(|e| broken(e.to_string()))?;
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|e| broken(e.to_string()))?;
        rows.extend(to_rows(&batch).map_err(broken)?);
    }
    Ok(rows)
}

fn to_rows(batch: &RecordBatch) -> Result<Vec<Row>, String> {
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(Vec::new());
    writer.write(batch).and_then(|()| writer.finish()).map_err(|e| e.to_string())?;
    let text = writer.into_inner();
    let lines: Vec<&[u8]> = text.split(|&b| b == b'\n').filter(|line| !line.is_empty()).collect();
    lines.par_iter().map(|line| serde_json::from_slice(line).map_err(|e| e.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
    use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
    use arrow_schema::{DataType, Field, Fields};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::{Compression, ZstdLevel};
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
        ] {
            let path = folder.path().join(format!("{name}.parquet"));
            let properties = WriterProperties::builder().set_compression(compression).build();
            let file = std::fs::File::create(&path).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
            let dataset = Dataset::read(&[path]).unwrap();
            let rows: Vec<Value> = dataset.rows().iter().cloned().map(Value::Object).collect();
            let turns = json!([{"role": "user", "content": "é \"q\"\n"}, {"role": "assistant", "content": null}]);
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
