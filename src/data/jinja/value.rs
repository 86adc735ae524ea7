//! Values as templates see them: Python's, as far as chat templates can tell.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use serde_json::Value as Json;

use super::Error;
use super::ast::{For, Literal, Macro};
use super::budget::Budget;
use super::scope::Scope;

/// Deepest nesting of lists and maps: they are printed, compared and released by recursion.
const MOST_DEPTH: u16 = 400;

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Nothing is there; using it gives this message.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    List(Rc<Sequence>),
    Tuple(Rc<Sequence>),
    Dict(Rc<Dict>),
    View(View, Rc<Dict>),
    Range(Range),
    Iterator(Rc<Iterator>),
    Namespace(Rc<Namespace>),
    Function(Function),
    /// A method with the value it belongs to.
    Method(Rc<(Value, &'static str)>),
    Macro(Rc<MacroValue>),
    Loop(Rc<Loop>),
    /// `cycler(...)` and its place.
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    /// `joiner(...)` and whether it was used.
    Joiner(Rc<(Value, Cell<bool>)>),
}

/// Items with the depth of the deepest.
#[derive(Debug)]
pub(super) struct Sequence {
    items: Vec<Value>,
    depth: u16,
    /// Names of the items, in what `groupby` gives.
    names: &'static [&'static str],
}

/// What `keys()`, `values()` and `items()` give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: i128,
    pub(super) stop: i128,
    pub(super) step: i128,
}

/// A generator: its items are there, but it can be gone through once.
#[derive(Debug)]
pub(super) struct Iterator {
    items: Rc<Sequence>,
    at: Cell<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Namespace {
    pub(super) attributes: RefCell<Vec<(Arc<str>, Value)>>,
    depth: Cell<u16>,
}

/// Functions that every template has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Range,
    Dict,
    Namespace,
    RaiseException,
    StrftimeNow,
    Cycler,
    Joiner,
}

#[derive(Debug)]
pub(super) struct MacroValue {
    pub(super) definition: Arc<Macro>,
    /// Where it was defined. Weak, because the scope holds the macro.
    pub(super) scope: Weak<Scope>,
}

/// The `loop` variable.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) items: Rc<Sequence>,
    pub(super) index: Cell<usize>,
    pub(super) depth0: usize,
    pub(super) last_changed: RefCell<Option<Vec<Value>>>,
    /// Of a recursive loop: its statement and where it stands.
    pub(super) recursion: Option<(Arc<For>, Weak<Scope>)>,
}

/// A map in the order of its making.
#[derive(Debug, Default)]
pub(super) struct Dict {
    entries: Vec<(Value, Value)>,
    /// Places of string keys, in maps with many.
    places: HashMap<Arc<str>, usize>,
    depth: u16,
}

/// Maps up to this size are searched from end to end.
const SMALL_DICT: usize = 8;

impl Sequence {
    pub(super) fn new(items: Vec<Value>) -> Result<Rc<Self>, Error> {
        Self::named(items, &[])
    }

    pub(super) fn named(items: Vec<Value>, names: &'static [&'static str]) -> Result<Rc<Self>, Error> {
        let depth = deepest(&items)?;
        Ok(Rc::new(Self { items, depth, names }))
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&Value> {
        self.items.get(self.names.iter().position(|known| *known == name)?)
    }

    pub(super) fn items(&self) -> &[Value] {
        &self.items
    }
}

fn deepest<'a>(items: impl IntoIterator<Item = &'a Value>) -> Result<u16, Error> {
    let depth = items.into_iter().map(Value::depth).max().unwrap_or(0) + 1;
    if depth > MOST_DEPTH { Err(Error::new("nests lists too deeply")) } else { Ok(depth) }
}

impl Iterator {
    /// The items that are left; none is left then.
    pub(super) fn take(&self) -> &[Value] {
        let at = self.at.replace(self.items.items.len());
        &self.items.items[at..]
    }

    /// The next item.
    pub(super) fn next(&self) -> Option<Value> {
        let item = self.items.items.get(self.at.get()).cloned();
        self.at.set(self.at.get() + usize::from(item.is_some()));
        item
    }
}

impl Namespace {
    pub(super) fn get(&self, name: &str) -> Option<Value> {
        self.attributes.borrow().iter().find(|(known, _)| &**known == name).map(|(_, value)| value.clone())
    }

    pub(super) fn set(&self, name: &Arc<str>, value: Value) -> Result<(), Error> {
        if name.starts_with('_') {
            return Err(Error::new(format!("sets `{name}` of a namespace; names may not begin with an underscore")));
        }
        self.depth.set(self.depth.get().max(deepest([&value])?));
        let mut attributes = self.attributes.borrow_mut();
        match attributes.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => attributes.push((name.clone(), value)),
        }
        Ok(())
    }
}

impl Range {
    pub(super) fn len(self) -> usize {
        let (low, high, step) =
            if self.step > 0 { (self.start, self.stop, self.step) } else { (self.stop, self.start, -self.step) };
        let count = if high > low { (high - low - 1) / step + 1 } else { 0 };
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    pub(super) fn get(self, index: usize) -> Value {
        Value::Int(self.start + index as i128 * self.step)
    }
}

impl Dict {
    pub(super) fn new(entries: impl IntoIterator<Item = (Value, Value)>, budget: &Budget) -> Result<Rc<Self>, Error> {
        let mut dict = Self::default();
        for (key, value) in entries {
            dict.insert(key, value, budget)?;
        }
        dict.depth = deepest(dict.entries.iter().flat_map(|(key, value)| [key, value]))?;
        Ok(Rc::new(dict))
    }

    fn insert(&mut self, key: Value, value: Value, budget: &Budget) -> Result<(), Error> {
        key.check_hashable()?;
        if let Some(place) = self.place(&key, budget)? {
            self.entries[place].1 = value;
            return Ok(());
        }
        self.entries.push((key, value));
        let from = match self.entries.len() {
            len if len <= SMALL_DICT => return Ok(()),
            len if len == SMALL_DICT + 1 => 0,
            len => len - 1,
        };
        for (place, (key, _)) in self.entries.iter().enumerate().skip(from) {
            if let Value::Str(text) = key {
                self.places.insert(text.clone(), place);
            }
        }
        Ok(())
    }

    fn place(&self, key: &Value, budget: &Budget) -> Result<Option<usize>, Error> {
        if let Value::Str(text) = key {
            budget.steps(1)?;
            return Ok(self.place_of(text));
        }
        budget.steps(self.entries.len())?;
        for (place, (known, _)) in self.entries.iter().enumerate() {
            if known.equals(key, budget)? {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    fn place_of(&self, name: &str) -> Option<usize> {
        if self.entries.len() > SMALL_DICT {
            return self.places.get(name).copied();
        }
        self.entries.iter().position(|(key, _)| matches!(key, Value::Str(text) if &**text == name))
    }

    pub(super) fn get(&self, key: &Value, budget: &Budget) -> Result<Option<&Value>, Error> {
        Ok(self.place(key, budget)?.map(|place| &self.entries[place].1))
    }

    pub(super) fn get_str(&self, name: &str) -> Option<&Value> {
        self.place_of(name).map(|place| &self.entries[place].1)
    }

    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

impl From<&Literal> for Value {
    fn from(literal: &Literal) -> Self {
        match literal {
            Literal::None => Self::None,
            Literal::Bool(value) => Self::Bool(*value),
            Literal::Int(value) => Self::Int(*value),
            Literal::Float(value) => Self::Float(*value),
            Literal::Str(text) => Self::Str(text.clone()),
        }
    }
}

impl Value {
    pub(super) fn str(text: impl AsRef<str>) -> Self {
        Self::Str(text.as_ref().into())
    }

    pub(super) fn undefined(message: impl AsRef<str>) -> Self {
        Self::Undefined(message.as_ref().into())
    }

    pub(super) fn list(items: Vec<Self>) -> Result<Self, Error> {
        Ok(Self::List(Sequence::new(items)?))
    }

    pub(super) fn tuple(items: Vec<Self>) -> Result<Self, Error> {
        Ok(Self::Tuple(Sequence::new(items)?))
    }

    pub(super) fn iterator(items: Vec<Self>) -> Result<Self, Error> {
        Ok(Self::Iterator(Rc::new(Iterator { items: Sequence::new(items)?, at: Cell::new(0) })))
    }

    /// A JSON value; objects keep the order of their fields.
    pub(super) fn from_json(json: &Json, budget: &Budget) -> Result<Self, Error> {
        budget.nest()?;
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(flag) => Self::Bool(*flag),
            Json::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => Self::Int(value.into()),
                (_, Some(value)) => Self::Int(value.into()),
                _ => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::str(text),
            Json::Array(items) => {
                Self::list(items.iter().map(|item| Self::from_json(item, budget)).collect::<Result<_, _>>()?)?
            }
            Json::Object(fields) => {
                let mut entries = Vec::with_capacity(fields.len());
                for (name, field) in fields {
                    entries.push((Self::str(name), Self::from_json(field, budget)?));
                }
                Self::Dict(Dict::new(entries, budget)?)
            }
        })
    }

    fn depth(&self) -> u16 {
        match self {
            Self::List(items) | Self::Tuple(items) => items.depth,
            Self::Iterator(iterator) => iterator.items.depth,
            Self::Dict(dict) | Self::View(_, dict) => dict.depth,
            Self::Namespace(namespace) => namespace.depth.get().max(1),
            Self::Method(method) => method.0.depth(),
            Self::Cycler(cycler) => cycler.0.iter().map(Self::depth).max().unwrap_or(0) + 1,
            Self::Joiner(joiner) => joiner.0.depth() + 1,
            Self::Loop(of) => of.items.depth,
            _ => 0,
        }
    }

    /// Python's name of the type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::View(View::Keys, _) => "dict_keys",
            Self::View(View::Values, _) => "dict_values",
            Self::View(View::Items, _) => "dict_items",
            Self::Range(_) => "range",
            Self::Iterator(_) => "generator",
            Self::Namespace(_) => "TemplateNamespace",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(flag) => *flag,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) => !text.is_empty(),
            Self::List(items) | Self::Tuple(items) => !items.items.is_empty(),
            Self::Dict(dict) | Self::View(_, dict) => !dict.entries.is_empty(),
            Self::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// The number as a whole one; booleans are 0 and 1.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Bool(flag) => Some((*flag).into()),
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => self.as_int().map(|value| value as f64),
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// Fails for an undefined value, as Python code that uses it does.
    pub(super) fn defined(&self) -> Result<&Self, Error> {
        match self {
            Self::Undefined(message) => Err(Error::new(&**message)),
            _ => Ok(self),
        }
    }

    fn check_hashable(&self) -> Result<(), Error> {
        match self {
            Self::List(_) | Self::Dict(_) => Err(Error::new(format!("unhashable type: '{}'", self.type_name()))),
            Self::Tuple(items) => items.items.iter().try_for_each(Self::check_hashable),
            _ => Ok(()),
        }
    }

    /// The number of items, where Python's `len` has one.
    pub(super) fn len(&self) -> Result<usize, Error> {
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::Str(text) => text.chars().count(),
            Self::List(items) | Self::Tuple(items) => items.items.len(),
            Self::Dict(dict) | Self::View(_, dict) => dict.entries.len(),
            Self::Range(range) => range.len(),
            Self::Loop(of) => of.items.items.len(),
            _ => return Err(Error::new(format!("object of type '{}' has no len()", self.type_name()))),
        })
    }

    /// Whether Python's `iter` takes it.
    pub(super) fn is_iterable(&self) -> bool {
        matches!(
            self,
            Self::Undefined(_)
                | Self::Str(_)
                | Self::List(_)
                | Self::Tuple(_)
                | Self::Dict(_)
                | Self::View(..)
                | Self::Range(_)
                | Self::Iterator(_)
                | Self::Loop(_)
        )
    }

    /// All items in order.
    pub(super) fn items(&self, budget: &Budget) -> Result<Vec<Self>, Error> {
        let items: Vec<Self> = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Str(text) => {
                budget.make(text.len() * size_of::<Self>())?;
                text.chars().map(|character| Self::str(character.encode_utf8(&mut [0; 4]))).collect()
            }
            Self::List(items) | Self::Tuple(items) => items.items.clone(),
            Self::Loop(of) => of.items.items.clone(),
            Self::Dict(dict) | Self::View(View::Keys, dict) => {
                dict.entries.iter().map(|(key, _)| key.clone()).collect()
            }
            Self::View(View::Values, dict) => dict.entries.iter().map(|(_, value)| value.clone()).collect(),
            Self::View(View::Items, dict) => {
                let pair = |(key, value): &(Self, Self)| Self::tuple(vec![key.clone(), value.clone()]);
                dict.entries.iter().map(pair).collect::<Result<_, _>>()?
            }
            Self::Range(range) => (0..range.len()).map(|index| range.get(index)).collect(),
            Self::Iterator(iterator) => iterator.take().to_vec(),
            _ => return Err(Error::new(format!("'{}' object is not iterable", self.type_name()))),
        };
        budget.make(items.len() * size_of::<Self>())?;
        Ok(items)
    }

    /// Python's `==`.
    pub(super) fn equals(&self, other: &Self, budget: &Budget) -> Result<bool, Error> {
        budget.steps(1)?;
        let all = |left: &[Self], right: &[Self]| -> Result<bool, Error> {
            budget.nest()?;
            if left.len() != right.len() {
                return Ok(false);
            }
            for (left, right) in left.iter().zip(right) {
                if !left.equals(right, budget)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(left), Self::Str(right)) => {
                budget.look(left.len().min(right.len()))?;
                left == right
            }
            (Self::List(left), Self::List(right)) | (Self::Tuple(left), Self::Tuple(right)) => {
                all(&left.items, &right.items)?
            }
            (Self::Dict(left), Self::Dict(right)) => {
                budget.nest()?;
                if left.entries.len() != right.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &left.entries {
                    match right.get(key, budget)? {
                        Some(other) if value.equals(other, budget)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Range(left), Self::Range(right)) => {
                left.len() == right.len()
                    && (left.len() == 0 || (left.start == right.start && (left.len() == 1 || left.step == right.step)))
            }
            (Self::Namespace(left), Self::Namespace(right)) => Rc::ptr_eq(left, right),
            (Self::Macro(left), Self::Macro(right)) => Rc::ptr_eq(left, right),
            (Self::Function(left), Self::Function(right)) => left == right,
            _ => match (self.as_int(), other.as_int()) {
                (Some(left), Some(right)) => left == right,
                _ => matches!((self.as_float(), other.as_float()), (Some(left), Some(right)) if left == right),
            },
        })
    }

    /// Python's order; `symbol` is the comparison for the message. `None` where one is not a number.
    pub(super) fn compare(&self, other: &Self, symbol: &str, budget: &Budget) -> Result<Option<Ordering>, Error> {
        budget.steps(1)?;
        self.defined()?;
        other.defined()?;
        Ok(match (self, other) {
            (Self::Str(left), Self::Str(right)) => {
                budget.look(left.len().min(right.len()))?;
                Some(left.cmp(right))
            }
            (Self::List(left), Self::List(right)) | (Self::Tuple(left), Self::Tuple(right)) => {
                budget.nest()?;
                for (left, right) in left.items.iter().zip(&right.items) {
                    if !left.equals(right, budget)? {
                        return left.compare(right, symbol, budget);
                    }
                }
                Some(left.items.len().cmp(&right.items.len()))
            }
            _ => match (self.as_int(), other.as_int(), self.as_float(), other.as_float()) {
                (Some(left), Some(right), ..) => Some(left.cmp(&right)),
                (_, _, Some(left), Some(right)) => left.partial_cmp(&right),
                _ => {
                    return Err(Error::new(format!(
                        "'{symbol}' not supported between instances of '{}' and '{}'",
                        self.type_name(),
                        other.type_name()
                    )));
                }
            },
        })
    }
}
