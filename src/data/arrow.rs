//! Arrow's columns as rows.
//!
//! Every type becomes what the same rows would be in a JSON file: lists are arrays, structs and maps objects, dictionaries
//! their values, decimals and times text. Columns of `datasets`' feature `Json` (the extension `arrow.json`) are the data
//! in them, not text. A null field of a struct is left out: Arrow gives all structs of a column the same fields and fills
//! with null what a row lacks.

use std::fmt::Write;
use std::sync::LazyLock;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Decimal32Type, Decimal64Type, Decimal128Type, Decimal256Type, Float16Type, Float32Type,
    Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, OffsetSizeTrait, RecordBatch};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field, TimeUnit};
use rayon::prelude::*;
use serde_json::{Map, Number, Value};

use super::lenient_json::{self, Loss};
use super::rows::{Fault, ReadRow, Row};

/// Reads one cell by its index; puts what it cannot hold into the last argument.
type Cell<'a> = Box<dyn Fn(usize, &mut Option<String>) -> Value + Send + Sync + 'a>;

/// How a column is meant, as `datasets` notes it in the schema's metadata (`huggingface`): the feature as JSON.
type Feature<'a> = Option<&'a Value>;

/// Levels of nesting that are read.
const MOST_LEVELS: usize = 64;

static FORMAT: LazyLock<FormatOptions<'static>> = LazyLock::new(|| FormatOptions::default().with_display_error(false));

/// The features that `datasets` wrote into a schema's metadata.
pub(super) fn features(metadata: &arrow_schema::Metadata) -> Option<Value> {
    let info: Value = serde_json::from_str(metadata.get("huggingface")?).ok()?;
    info.get("info")?.get("features").cloned()
}

/// The rows of a batch, numbered from `first`. `is_json` says of a column by name that its text is JSON.
///
/// # Errors
/// If a column has a type that rows cannot hold.
pub(super) fn rows(
    batch: &RecordBatch,
    features: Feature<'_>,
    is_json: &(dyn Fn(&str) -> bool + Sync),
    first: u32,
) -> Result<Vec<ReadRow>, String> {
    let schema = batch.schema_ref();
    let columns: Result<Vec<(&str, Cell<'_>)>, String> = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .map(|(field, array)| {
            let feature = features.and_then(|features| features.get(field.name()));
            let cell = column(array, field, feature, is_json(field.name()), 0);
            Ok((field.name().as_str(), cell.map_err(|e| format!("column `{}`: {e}", field.name()))?))
        })
        .collect();
    let columns = columns?;
    let row = |index: usize| {
        let mut faults = Vec::new();
        let mut row = Row::new();
        for (name, cell) in &columns {
            let mut fault = None;
            row.insert((*name).to_string(), cell(index, &mut fault));
            faults.extend(fault.map(|problem| Fault { column: (*name).to_string(), problem }));
        }
        ReadRow { number: first + index as u32, row, faults, null_fields: None }
    };
    Ok((0..batch.num_rows()).into_par_iter().with_min_len(64).map(row).collect())
}

/// The reader of a column's cells.
fn column<'a>(
    array: &'a dyn Array,
    field: &Field,
    feature: Feature<'_>,
    is_json: bool,
    level: usize,
) -> Result<Cell<'a>, String> {
    let is_extension = field.metadata().get("ARROW:extension:name").is_some_and(|name| name == "arrow.json");
    let is_feature = feature.is_some_and(|feature| feature["_type"] == "Json");
    let cell = plain(array, feature, level)?;
    let cell: Cell<'a> = if is_json || is_extension || is_feature {
        Box::new(move |i, fault| from_text(cell(i, fault), fault))
    } else {
        cell
    };
    let nulls = array.logical_nulls();
    Ok(match nulls.filter(|nulls| nulls.null_count() > 0) {
        Some(nulls) => Box::new(move |i, fault| if nulls.is_null(i) { Value::Null } else { cell(i, fault) }),
        None => cell,
    })
}

/// The data in a JSON text; a text that is none stays one.
fn from_text(value: Value, fault: &mut Option<String>) -> Value {
    let Value::String(text) = &value else { return value };
    let Ok((data, losses)) = lenient_json::parse(text.as_bytes()) else { return value };
    for (_, loss) in losses {
        if let Loss::Fault(problem) = loss {
            fault.get_or_insert(problem);
        }
    }
    lenient_json::without_nulls(data)
}

#[expect(clippy::too_many_lines, reason = "one arm for each type of Arrow")]
fn plain<'a>(array: &'a dyn Array, feature: Feature<'_>, level: usize) -> Result<Cell<'a>, String> {
    if level > MOST_LEVELS {
        return Err(format!("is nested more than {MOST_LEVELS} levels deep"));
    }
    Ok(match array.data_type() {
        DataType::Null => Box::new(|_, _| Value::Null),
        DataType::Boolean => {
            let array = array.as_boolean();
            Box::new(|i, _| Value::Bool(array.value(i)))
        }
        DataType::Int8 => integers::<Int8Type>(array),
        DataType::Int16 => integers::<Int16Type>(array),
        DataType::Int32 => integers::<Int32Type>(array),
        DataType::Int64 => integers::<Int64Type>(array),
        DataType::UInt8 => integers::<UInt8Type>(array),
        DataType::UInt16 => integers::<UInt16Type>(array),
        DataType::UInt32 => integers::<UInt32Type>(array),
        DataType::UInt64 => integers::<UInt64Type>(array),
        DataType::Float16 => {
            let array = array.as_primitive::<Float16Type>();
            Box::new(|i, fault| short_float(array.value(i).to_f32(), fault))
        }
        DataType::Float32 => {
            let array = array.as_primitive::<Float32Type>();
            Box::new(|i, fault| short_float(array.value(i), fault))
        }
        DataType::Float64 => {
            let array = array.as_primitive::<Float64Type>();
            Box::new(|i, fault| float(array.value(i), fault))
        }
        DataType::Utf8 => {
            let array = array.as_string::<i32>();
            Box::new(|i, _| Value::String(array.value(i).into()))
        }
        DataType::LargeUtf8 => {
            let array = array.as_string::<i64>();
            Box::new(|i, _| Value::String(array.value(i).into()))
        }
        DataType::Utf8View => {
            let array = array.as_string_view();
            Box::new(|i, _| Value::String(array.value(i).into()))
        }
        DataType::Binary => {
            let array = array.as_binary::<i32>();
            Box::new(|i, fault| bytes(array.value(i), fault))
        }
        DataType::LargeBinary => {
            let array = array.as_binary::<i64>();
            Box::new(|i, fault| bytes(array.value(i), fault))
        }
        DataType::BinaryView => {
            let array = array.as_binary_view();
            Box::new(|i, fault| bytes(array.value(i), fault))
        }
        DataType::FixedSizeBinary(_) => {
            let array = array.as_fixed_size_binary();
            Box::new(|i, fault| bytes(array.value(i), fault))
        }
        DataType::Decimal32(..) => decimals::<Decimal32Type>(array),
        DataType::Decimal64(..) => decimals::<Decimal64Type>(array),
        DataType::Decimal128(..) => decimals::<Decimal128Type>(array),
        DataType::Decimal256(..) => decimals::<Decimal256Type>(array),
        DataType::Timestamp(unit, zone) => timestamps(array, *unit, zone.is_some()),
        DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Duration(_)
        | DataType::Interval(_) => {
            let formatter = ArrayFormatter::try_new(array, &FORMAT).map_err(|e| e.to_string())?;
            let texts: Vec<Option<String>> = (0..array.len()).map(|i| formatted(&formatter, i)).collect();
            Box::new(move |i, fault| texts[i].clone().map_or_else(|| out_of_range(fault), Value::String))
        }
        DataType::List(item) => lists::<i32>(array, item, feature, level)?,
        DataType::LargeList(item) => lists::<i64>(array, item, feature, level)?,
        DataType::ListView(item) => list_views::<i32>(array, item, feature, level)?,
        DataType::LargeListView(item) => list_views::<i64>(array, item, feature, level)?,
        DataType::FixedSizeList(item, size) => {
            let array = array.as_fixed_size_list();
            let (cell, size) = (column(array.values(), item, of_items(feature), false, level + 1)?, *size as usize);
            Box::new(move |i, fault| array_of(&cell, i * size..(i + 1) * size, fault))
        }
        DataType::Struct(fields) => {
            let array = array.as_struct();
            // A legacy `Sequence` of a dict is a struct of lists, with the feature of the items.
            let feature = feature.map(|f| if f["_type"] == "Sequence" { &f["feature"] } else { f });
            let cells: Result<Vec<(String, Cell<'a>)>, String> = fields
                .iter()
                .zip(array.columns())
                .map(|(field, values)| {
                    let own = feature.and_then(|feature| feature.get(field.name()));
                    Ok((field.name().clone(), column(values, field, own, false, level + 1)?))
                })
                .collect();
            let cells = cells?;
            Box::new(move |i, fault| {
                let fields = cells.iter().map(|(name, cell)| (name.clone(), cell(i, fault)));
                Value::Object(fields.filter(|(_, value)| !value.is_null()).collect())
            })
        }
        DataType::Map(entries, _) => maps(array, entries, level)?,
        DataType::Dictionary(..) => {
            let array = array.as_any_dictionary();
            let values = array.values().as_ref();
            if values.is_empty() {
                return Ok(Box::new(|_, _| Value::Null));
            }
            let cell =
                column(values, &Field::new("values", values.data_type().clone(), true), feature, false, level + 1)?;
            let keys = array.normalized_keys();
            Box::new(move |i, fault| cell(keys[i], fault))
        }
        DataType::RunEndEncoded(ends, field) => {
            let (ends, values): (Vec<i64>, &dyn Array) = match ends.data_type() {
                DataType::Int16 => runs(array.as_run::<Int16Type>()),
                DataType::Int32 => runs(array.as_run::<Int32Type>()),
                _ => runs(array.as_run::<Int64Type>()),
            };
            let cell = column(values, field, feature, false, level + 1)?;
            Box::new(move |i, fault| cell(ends.partition_point(|&end| end <= i as i64), fault))
        }
        DataType::Union(fields, _) => {
            let array = array.as_union();
            let cells: Result<Vec<(i8, Cell<'a>)>, String> = fields
                .iter()
                .map(|(id, field)| Ok((id, column(array.child(id), field, None, false, level + 1)?)))
                .collect();
            let cells = cells?;
            Box::new(move |i, fault| {
                let found = cells.iter().find(|(id, _)| *id == array.type_id(i));
                found.map_or(Value::Null, |(_, cell)| cell(array.value_offset(i), fault))
            })
        }
    })
}

fn integers<T>(array: &dyn Array) -> Cell<'_>
where
    T: ArrowPrimitiveType,
    T::Native: Into<Number>,
{
    let array = array.as_primitive::<T>();
    Box::new(|i, _| Value::Number(array.value(i).into()))
}

fn float(value: f64, fault: &mut Option<String>) -> Value {
    Number::from_f64(value).map_or_else(
        || {
            fault.get_or_insert_with(|| format!("is {value}, which JSON has no value for"));
            Value::Null
        },
        Value::Number,
    )
}

/// The shortest digits that mean the same f32: 0.1 is not 0.10000000149011612.
fn short_float(value: f32, fault: &mut Option<String>) -> Value {
    float(value.to_string().parse().unwrap_or(f64::from(value)), fault)
}

fn bytes(value: &[u8], fault: &mut Option<String>) -> Value {
    std::str::from_utf8(value).map_or_else(
        |_| {
            fault.get_or_insert_with(|| "holds bytes that are not text".into());
            Value::Null
        },
        |text| Value::String(text.into()),
    )
}

fn decimals<T: arrow_array::types::DecimalType>(array: &dyn Array) -> Cell<'_> {
    let array = array.as_primitive::<T>();
    Box::new(|i, _| Value::String(array.value_as_string(i)))
}

fn formatted(formatter: &ArrayFormatter<'_>, i: usize) -> Option<String> {
    let mut text = String::new();
    write!(text, "{}", formatter.value(i)).ok().map(|()| text)
}

fn out_of_range(fault: &mut Option<String>) -> Value {
    fault.get_or_insert_with(|| "is a time out of range".into());
    Value::Null
}

/// Times as ISO 8601 writes them. A time with a zone is an instant and is given in UTC: names of zones mean something
/// only with a data base of them, which changes.
fn timestamps(array: &dyn Array, unit: TimeUnit, has_zone: bool) -> Cell<'_> {
    let (values, per_second): (&[i64], i64) = match unit {
        TimeUnit::Second => (array.as_primitive::<TimestampSecondType>().values(), 1),
        TimeUnit::Millisecond => (array.as_primitive::<TimestampMillisecondType>().values(), 1000),
        TimeUnit::Microsecond => (array.as_primitive::<TimestampMicrosecondType>().values(), 1_000_000),
        TimeUnit::Nanosecond => (array.as_primitive::<TimestampNanosecondType>().values(), 1_000_000_000),
    };
    Box::new(move |i, fault| {
        let (seconds, part) = (values[i].div_euclid(per_second), values[i].rem_euclid(per_second));
        let nanoseconds = part * (1_000_000_000 / per_second);
        match jiff::Timestamp::new(seconds, nanoseconds as i32) {
            Ok(time) if has_zone => Value::String(time.to_string()),
            Ok(time) => Value::String(time.to_string().trim_end_matches('Z').to_string()),
            Err(_) => out_of_range(fault),
        }
    })
}

/// The feature of a list's items.
fn of_items(feature: Feature<'_>) -> Feature<'_> {
    let feature = feature?;
    match feature {
        Value::Array(items) => items.first(),
        Value::Object(fields) if fields.contains_key("_type") && fields.contains_key("feature") => {
            fields.get("feature")
        }
        // Inside a legacy `Sequence` of a dict the lists are not noted.
        other => Some(other),
    }
}

fn array_of(cell: &Cell<'_>, range: std::ops::Range<usize>, fault: &mut Option<String>) -> Value {
    Value::Array(range.map(|i| cell(i, fault)).collect())
}

fn lists<'a, O: OffsetSizeTrait>(
    array: &'a dyn Array,
    item: &Field,
    feature: Feature<'_>,
    level: usize,
) -> Result<Cell<'a>, String> {
    let array = array.as_list::<O>();
    let (cell, offsets) = (column(array.values(), item, of_items(feature), false, level + 1)?, array.value_offsets());
    Ok(Box::new(move |i, fault| array_of(&cell, offsets[i].as_usize()..offsets[i + 1].as_usize(), fault)))
}

fn list_views<'a, O: OffsetSizeTrait>(
    array: &'a dyn Array,
    item: &Field,
    feature: Feature<'_>,
    level: usize,
) -> Result<Cell<'a>, String> {
    let array = array.as_list_view::<O>();
    let cell = column(array.values(), item, of_items(feature), false, level + 1)?;
    Ok(Box::new(move |i, fault| {
        let start = array.value_offsets()[i].as_usize();
        array_of(&cell, start..start + array.value_sizes()[i].as_usize(), fault)
    }))
}

/// A map is an object; keys that are no text are written as JSON.
fn maps<'a>(array: &'a dyn Array, entries: &Field, level: usize) -> Result<Cell<'a>, String> {
    let array = array.as_map();
    let DataType::Struct(fields) = entries.data_type() else { return Err("is a map without entries".into()) };
    let [key, value] = fields.as_ref() else { return Err("is a map whose entries are not keys and values".into()) };
    let keys = column(array.keys(), key, None, false, level + 1)?;
    let values = column(array.values(), value, None, false, level + 1)?;
    let offsets = array.value_offsets();
    Ok(Box::new(move |i, fault| {
        let mut object = Map::new();
        for entry in offsets[i] as usize..offsets[i + 1] as usize {
            let value = values(entry, fault);
            if value.is_null() {
                continue;
            }
            match keys(entry, fault) {
                Value::String(name) => object.insert(name, value),
                other => object.insert(other.to_string(), value),
            };
        }
        Value::Object(object)
    }))
}

/// Ends of runs, counted from the array's own start, and their values.
fn runs<T: arrow_array::types::RunEndIndexType>(array: &arrow_array::RunArray<T>) -> (Vec<i64>, &dyn Array)
where
    T::Native: Into<i64>,
{
    let offset = array.run_ends().offset() as i64;
    (array.run_ends().values().iter().map(|&end| end.into() - offset).collect(), array.values().as_ref())
}
