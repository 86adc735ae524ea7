//! The same rows give the same data set, whatever file they come in.
//!
//! The fixtures are written by `scripts/fixtures/rows.py` with `datasets` and pyarrow; the property writes its own tables.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use trainer::data::{ChatTemplate, Dataset, SftOptions, SpecialTokens, Tokenizer, prepare_sft};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows").join(name)
}

fn read(path: &Path) -> Dataset {
    Dataset::read(&[path.to_path_buf()]).unwrap_or_else(|e| panic!("{e}"))
}

/// Rows without the columns that they have no value for.
fn rows(dataset: &Dataset) -> Vec<Value> {
    let with_values = |row: &Map<String, Value>| -> Map<String, Value> {
        row.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    dataset.rows().iter().map(|row| Value::Object(with_values(row))).collect()
}

const TABLES: [&str; 5] = ["pyarrow.parquet", "datasets.parquet", "json.parquet", "stream.arrow", "file.arrow"];

#[test]
fn tables_of_pyarrow_and_datasets_hold_the_rows_of_the_jsonl() {
    for case in ["tools", "nulls", "numbers"] {
        let twin = read(&fixture(&format!("{case}.jsonl")));
        for table in TABLES {
            assert_eq!(rows(&read(&fixture(&format!("{case}.{table}")))), rows(&twin), "{case}.{table}");
        }
    }
    for codec in ["none", "snappy", "gzip", "brotli", "lz4", "zstd", "v2"] {
        let twin = read(&fixture("types.jsonl"));
        assert_eq!(rows(&read(&fixture(&format!("types.{codec}.parquet")))), rows(&twin), "{codec}");
    }
    assert_eq!(rows(&read(&fixture("arrow_types.arrow"))), rows(&read(&fixture("arrow_types.jsonl"))));
}

#[test]
fn tables_with_tools_give_the_tokens_of_the_jsonl() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny-qwen");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let text = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
                {% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(text, &SpecialTokens::default()).unwrap();
    let options = SftOptions { text_field: "text".into(), ..SftOptions::default() };
    let tokens = |file: &str| -> Vec<Vec<u32>> {
        let data = prepare_sft(&read(&fixture(file)), &tokenizer, Some(&template), &options, &|_| {}).unwrap();
        data.examples.into_iter().map(|example| example.input_ids).collect()
    };
    let twin = tokens("tools.jsonl");
    let first = tokenizer.decode(&twin[0], false).unwrap();
    assert!(first.contains("\"city\": ") && !first.contains("null"), "{first}");
    for table in TABLES {
        assert_eq!(tokens(&format!("tools.{table}")), twin, "{table}");
    }
}

/// What the values of a column look like.
#[derive(Clone, Debug)]
enum Shape {
    Boolean,
    Integer,
    Float,
    Text,
    List(Box<Shape>),
    Struct(Vec<Shape>),
}

fn shape() -> impl Strategy<Value = Shape> {
    let leaf = prop_oneof![Just(Shape::Boolean), Just(Shape::Integer), Just(Shape::Float), Just(Shape::Text)];
    leaf.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|item| Shape::List(Box::new(item))),
            prop::collection::vec(inner, 1..4).prop_map(Shape::Struct),
        ]
    })
}

fn names(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|index| format!("k{index}"))
}

fn value(shape: &Shape) -> BoxedStrategy<Value> {
    let sound = match shape {
        Shape::Boolean => any::<bool>().prop_map(Value::from).boxed(),
        Shape::Integer => any::<i64>().prop_map(Value::from).boxed(),
        Shape::Float => any::<f64>().prop_filter("finite", |x| x.is_finite()).prop_map(Value::from).boxed(),
        Shape::Text => "\\PC{0,6}".prop_map(Value::from).boxed(),
        Shape::List(item) => prop::collection::vec(value(item), 0..4).prop_map(Value::from).boxed(),
        Shape::Struct(fields) => object(fields).prop_map(Value::Object).boxed(),
    };
    prop_oneof![8 => sound, 1 => Just(Value::Null)].boxed()
}

/// Some of the fields, each of which may be null.
fn object(fields: &[Shape]) -> BoxedStrategy<Map<String, Value>> {
    let values: Vec<BoxedStrategy<Value>> = fields.iter().map(value).collect();
    let present = prop::collection::vec(prop::bool::weighted(0.7), fields.len());
    let chosen = (values, present).prop_map(|(values, present)| {
        let fields = names(values.len()).zip(values).zip(present);
        fields.filter_map(|(field, is_there)| is_there.then_some(field)).collect()
    });
    chosen.boxed()
}

fn data_type(shape: &Shape) -> DataType {
    match shape {
        Shape::Boolean => DataType::Boolean,
        Shape::Integer => DataType::Int64,
        Shape::Float => DataType::Float64,
        Shape::Text => DataType::Utf8,
        Shape::List(item) => DataType::List(Arc::new(Field::new("item", data_type(item), true))),
        Shape::Struct(fields) => DataType::Struct(arrow_fields(fields)),
    }
}

fn arrow_fields(fields: &[Shape]) -> Fields {
    names(fields.len()).zip(fields).map(|(name, shape)| Field::new(name, data_type(shape), true)).collect()
}

fn write_parquet(path: &Path, rows: &[Map<String, Value>], columns: &[Shape]) {
    let schema = Arc::new(Schema::new(arrow_fields(columns)));
    let mut decoder = arrow_json::ReaderBuilder::new(schema.clone()).build_decoder().unwrap();
    decoder.serialize(rows).unwrap();
    let batch = decoder.flush().unwrap().unwrap();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn table() -> impl Strategy<Value = (Vec<Shape>, Vec<Map<String, Value>>)> {
    prop::collection::vec(shape(), 1..4).prop_flat_map(|columns| {
        let rows = prop::collection::vec(object(&columns), 1..6);
        (Just(columns), rows)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn rows_of_any_shape_are_the_same_from_jsonl_and_parquet((columns, values) in table()) {
        let folder = tempfile::tempdir().unwrap();
        let (lines, parquet) = (folder.path().join("a.jsonl"), folder.path().join("a.parquet"));
        let text: Vec<String> = values.iter().map(|row| json!(row).to_string()).collect();
        std::fs::write(&lines, text.join("\n")).unwrap();
        write_parquet(&parquet, &values, &columns);
        prop_assert_eq!(rows(&read(&parquet)), rows(&read(&lines)));
    }
}
