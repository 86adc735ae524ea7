//! Expressions to values.

use std::cell::Cell;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::Error;
use super::arguments::{Arguments, integer, required, string};
use super::arithmetic::{binary, compares, negative, positive};
use super::ast::{CallArguments, Expr, Kind, Name, Statement};
use super::attributes::{get_attribute, get_item, get_slice};
use super::budget::Budget;
use super::scope::Scope;
use super::text::display;
use super::value::{Dict, Function, MacroValue, Namespace, Range, Value, View};
use super::{checks, filters, strings};

/// Longest `range`, as in Jinja2's sandbox.
const MOST_RANGE: usize = 100_000;

/// One rendering of a template.
pub(super) struct Interpreter<'t> {
    pub(super) names: &'t [String],
    /// Variables given from outside, by name.
    pub(super) context: Vec<Option<Value>>,
    pub(super) budget: Budget,
    /// Texts of blocks that are being filtered.
    pub(super) captured: RefCell<Vec<Value>>,
    /// What to put around what the assistant writes.
    pub(super) marks: Option<(char, char)>,
    /// Writes the time in a format.
    pub(super) strftime: &'t dyn Fn(&str) -> String,
    /// All namespaces made, which may hold each other in circles.
    pub(super) namespaces: RefCell<Vec<Rc<Namespace>>>,
}

impl Drop for Interpreter<'_> {
    fn drop(&mut self) {
        for namespace in self.namespaces.borrow().iter() {
            // A value that is dropped may own other namespaces, but not the last share of one.
            let attributes = std::mem::take(&mut *namespace.attributes.borrow_mut());
            drop(attributes);
        }
    }
}

impl Interpreter<'_> {
    /// The value of a name: a variable of the template, of the conversation, or one that every template has.
    pub(super) fn lookup(&self, name: Name, scope: &Scope) -> Value {
        if let Some(found) = scope.get(name) {
            return found;
        }
        if let Some(Some(found)) = self.context.get(name as usize) {
            return found.clone();
        }
        let text = &self.names[name as usize];
        Value::Function(match text.as_str() {
            "range" => Function::Range,
            "dict" => Function::Dict,
            "namespace" => Function::Namespace,
            "raise_exception" => Function::RaiseException,
            "strftime_now" => Function::StrftimeNow,
            "cycler" => Function::Cycler,
            "joiner" => Function::Joiner,
            _ => return Value::undefined(format!("'{text}' is undefined")),
        })
    }

    pub(super) fn evaluate(&self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value, Error> {
        self.budget.steps(1)?;
        self.budget.nest().and_then(|()| self.kind(expr, scope)).map_err(|error| error.at(expr.line))
    }

    fn kind(&self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value, Error> {
        let budget = &self.budget;
        match &expr.kind {
            Kind::Literal(literal) => Ok(literal.into()),
            Kind::Name(name) => Ok(self.lookup(*name, scope)),
            Kind::List(items) => Value::list(self.all(items, scope)?),
            Kind::Tuple(items) => Value::tuple(self.all(items, scope)?),
            Kind::Dict(pairs) => {
                budget.make(pairs.len() * 2 * size_of::<Value>())?;
                let mut entries = Vec::with_capacity(pairs.len());
                for (key, value) in pairs {
                    entries.push((self.evaluate(key, scope)?, self.evaluate(value, scope)?));
                }
                Ok(Value::Dict(Dict::new(entries, budget)?))
            }
            Kind::Attribute(of, name) => get_attribute(&self.evaluate(of, scope)?, name, budget),
            Kind::Item(of, index) => {
                let value = self.evaluate(of, scope)?;
                if let Kind::Slice(bounds) = &index.kind {
                    let [start, stop, step] = &**bounds;
                    let bound = |bound: &Option<Expr>| bound.as_ref().map(|b| self.evaluate(b, scope)).transpose();
                    return get_slice(&value, &[bound(start)?, bound(stop)?, bound(step)?], budget);
                }
                get_item(&value, &self.evaluate(index, scope)?, budget)
            }
            Kind::Slice(_) => Err(Error::new("has a slice inside a tuple of indices")),
            Kind::Call(function, arguments) => {
                let function = self.evaluate(function, scope)?;
                let arguments = self.arguments(arguments, scope)?;
                self.call(&function, arguments)
            }
            Kind::Filter(value, name, arguments) => {
                let value = self.evaluate(value, scope)?;
                filters::apply(name, &value, self.arguments(arguments, scope)?, budget)
            }
            Kind::Test(value, name, arguments) => {
                let value = self.evaluate(value, scope)?;
                Ok(Value::Bool(checks::apply(name, &value, self.arguments(arguments, scope)?, budget)?))
            }
            Kind::Not(value) => Ok(Value::Bool(!self.evaluate(value, scope)?.is_true())),
            Kind::Negative(value) => negative(&self.evaluate(value, scope)?),
            Kind::Positive(value) => positive(&self.evaluate(value, scope)?),
            Kind::And(left, right) => {
                let left = self.evaluate(left, scope)?;
                if left.is_true() { self.evaluate(right, scope) } else { Ok(left) }
            }
            Kind::Or(left, right) => {
                let left = self.evaluate(left, scope)?;
                if left.is_true() { Ok(left) } else { self.evaluate(right, scope) }
            }
            Kind::Binary(operator, left, right) => {
                binary(*operator, &self.evaluate(left, scope)?, &self.evaluate(right, scope)?, budget)
            }
            Kind::Concat(parts) => {
                let mut out = String::new();
                for part in parts {
                    out.push_str(&display(&self.evaluate(part, scope)?, budget)?);
                }
                Ok(Value::str(out))
            }
            Kind::Compare(first, rest) => {
                let mut left = self.evaluate(first, scope)?;
                for (comparison, right) in rest {
                    let right = self.evaluate(right, scope)?;
                    if !compares(*comparison, &left, &right, budget)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Kind::If(condition, value, otherwise) => {
                if self.evaluate(condition, scope)?.is_true() {
                    return self.evaluate(value, scope);
                }
                match otherwise {
                    Some(otherwise) => self.evaluate(otherwise, scope),
                    None => Ok(Value::undefined(format!(
                        "the inline if-expression on line {} evaluated to false and no else section was defined.",
                        expr.line
                    ))),
                }
            }
            Kind::Captured => {
                Ok(self.captured.borrow().last().cloned().unwrap_or_else(|| Value::undefined("no block is filtered")))
            }
        }
    }

    fn all(&self, exprs: &[Expr], scope: &Rc<Scope>) -> Result<Vec<Value>, Error> {
        self.budget.make(exprs.len() * size_of::<Value>())?;
        exprs.iter().map(|expr| self.evaluate(expr, scope)).collect()
    }

    pub(super) fn arguments(&self, arguments: &CallArguments, scope: &Rc<Scope>) -> Result<Arguments, Error> {
        let mut found = Arguments { positional: self.all(&arguments.positional, scope)?, named: Vec::new() };
        for (name, value) in &arguments.named {
            found.named.push((name.clone(), self.evaluate(value, scope)?));
        }
        if let Some(star) = &arguments.star {
            found.positional.extend(self.evaluate(star, scope)?.items(&self.budget)?);
        }
        if let Some(stars) = &arguments.double_star {
            let Value::Dict(dict) = self.evaluate(stars, scope)? else {
                return Err(Error::new("argument after ** must be a mapping"));
            };
            for (name, value) in dict.entries() {
                let Value::Str(name) = name else { return Err(Error::new("keywords must be strings")) };
                found.named.push((name.clone(), value.clone()));
            }
        }
        Ok(found)
    }

    /// `function(arguments)`.
    pub(super) fn call(&self, function: &Value, arguments: Arguments) -> Result<Value, Error> {
        self.budget.nest()?;
        match function.defined()? {
            Value::Function(function) => self.call_function(*function, arguments),
            Value::Macro(of) => self.call_macro(of, arguments),
            Value::Method(method) => self.call_method(&method.0, method.1, arguments),
            Value::Loop(of) => {
                let [iterable] = arguments.bind("loop", ["iterable"])?;
                let iterable = required(iterable, "loop", "iterable")?;
                let Some((statement, scope)) = &of.recursion else {
                    return Err(Error::new("The loop must have the 'recursive' marker to be called recursively."));
                };
                let scope = scope.upgrade().ok_or_else(|| Error::new("calls a loop that has ended"))?;
                let mut out = String::new();
                self.run_loop(statement, &iterable, of.depth0 + 1, &scope, &mut out)?;
                Ok(Value::str(out))
            }
            Value::Joiner(joiner) => {
                arguments.none("joiner")?;
                let separator = if joiner.1.replace(true) { joiner.0.clone() } else { Value::str("") };
                Ok(separator)
            }
            other => Err(Error::new(format!("'{}' object is not callable", other.type_name()))),
        }
    }

    fn call_function(&self, function: Function, arguments: Arguments) -> Result<Value, Error> {
        match function {
            Function::Range => {
                let [first, second, step] = arguments.bind("range", ["start", "stop", "step"])?;
                let first = required(first, "range", "stop")?;
                let (start, stop) = match &second {
                    Some(stop) => (integer(Some(&first), 0)?, integer(Some(stop), 0)?),
                    None => (0, integer(Some(&first), 0)?),
                };
                let step = integer(step.as_ref(), 1)?;
                if step == 0 {
                    return Err(Error::new("range() arg 3 must not be zero"));
                }
                let limit = i128::from(i64::MAX);
                let is_absurd = [start, stop, step].iter().any(|bound| !(-limit..=limit).contains(bound));
                let range = Range { start, stop, step };
                if is_absurd || range.len() > MOST_RANGE {
                    return Err(Error::new(format!("has a range of more than {MOST_RANGE} items")));
                }
                Ok(Value::Range(range))
            }
            Function::Dict | Function::Namespace => {
                let mut entries = Vec::new();
                if arguments.positional.len() > 1 {
                    return Err(Error::new(format!(
                        "dict expected at most 1 argument, got {}",
                        arguments.positional.len()
                    )));
                }
                match arguments.positional.first() {
                    None => {}
                    Some(Value::Dict(dict)) => entries.extend(dict.entries().iter().cloned()),
                    Some(pairs) => {
                        for pair in pairs.defined()?.items(&self.budget)? {
                            match pair.items(&self.budget)?.as_slice() {
                                [key, value] => entries.push((key.clone(), value.clone())),
                                _ => return Err(Error::new("dict needs pairs of a key and a value")),
                            }
                        }
                    }
                }
                entries.extend(arguments.named.into_iter().map(|(name, value)| (Value::Str(name), value)));
                self.budget.make(entries.len() * 2 * size_of::<Value>())?;
                if function == Function::Dict {
                    return Ok(Value::Dict(Dict::new(entries, &self.budget)?));
                }
                let namespace = Rc::new(Namespace::default());
                for (name, value) in entries {
                    let Value::Str(name) = name else { return Err(Error::new("namespace needs names")) };
                    namespace.set(&name, value)?;
                }
                self.budget.make(size_of::<Namespace>())?;
                self.namespaces.borrow_mut().push(namespace.clone());
                Ok(Value::Namespace(namespace))
            }
            Function::RaiseException => {
                let [message] = arguments.bind("raise_exception", ["message"])?;
                let message = required(message, "raise_exception", "message")?;
                Err(Error::raised(display(&message, &self.budget)?))
            }
            Function::StrftimeNow => {
                let [format] = arguments.bind("strftime_now", ["format"])?;
                let format = required(format, "strftime_now", "format")?;
                let format = string(&format, "strftime_now")?;
                // Directives may carry widths.
                if format.len() > 1024 || format.contains(|c: char| c.is_ascii_digit()) {
                    return Err(Error::new("has a format for the time that is too long or has widths"));
                }
                Ok(Value::str((self.strftime)(format)))
            }
            Function::Cycler => {
                if arguments.positional.is_empty() {
                    return Err(Error::new("at least one item has to be provided"));
                }
                Ok(Value::Cycler(Rc::new((arguments.positional, Cell::new(0)))))
            }
            Function::Joiner => {
                let [separator] = arguments.bind("joiner", ["sep"])?;
                let separator = separator.unwrap_or_else(|| Value::str(", "));
                Ok(Value::Joiner(Rc::new((separator, Cell::new(false)))))
            }
        }
    }

    fn call_method(&self, value: &Value, name: &'static str, arguments: Arguments) -> Result<Value, Error> {
        let budget = &self.budget;
        match (value, name) {
            (Value::Str(text), _) => strings::call(text, name, arguments, budget),
            (Value::Dict(dict), "keys" | "values" | "items") => {
                arguments.none(name)?;
                let view = match name {
                    "keys" => View::Keys,
                    "values" => View::Values,
                    _ => View::Items,
                };
                Ok(Value::View(view, dict.clone()))
            }
            (Value::Dict(dict), "get") => {
                let [key, default] = arguments.bind(name, ["key", "default"])?;
                let key = required(key, name, "key")?;
                if matches!(key, Value::List(_) | Value::Dict(_)) {
                    return Err(Error::new(format!("unhashable type: '{}'", key.type_name())));
                }
                Ok(dict.get(&key, budget)?.cloned().unwrap_or_else(|| default.unwrap_or(Value::None)))
            }
            (Value::Dict(_), "fromkeys") => {
                let [keys, default] = arguments.bind(name, ["iterable", "value"])?;
                let keys = required(keys, name, "iterable")?.items(budget)?;
                let default = default.unwrap_or(Value::None);
                Ok(Value::Dict(Dict::new(keys.into_iter().map(|key| (key, default.clone())), budget)?))
            }
            (_, "copy") => {
                arguments.none(name)?;
                Ok(value.clone())
            }
            (Value::List(_) | Value::Tuple(_) | Value::Range(_), _) => {
                let [item, start, stop] = arguments.bind(name, ["value", "start", "stop"])?;
                let item = required(item, name, "value")?;
                let items = value.items(budget)?;
                let (start, stop) = super::attributes::text_bounds(start.as_ref(), stop.as_ref(), items.len())?;
                let mut count = 0;
                for (index, one) in items.iter().enumerate() {
                    if !one.equals(&item, budget)? {
                        continue;
                    }
                    if name == "index" && (start..stop).contains(&index) {
                        return Ok(Value::Int(index as i128));
                    }
                    count += 1;
                }
                if name == "index" { Err(Error::new("the item is not in the list")) } else { Ok(Value::Int(count)) }
            }
            (Value::Loop(of), "cycle") => {
                if arguments.positional.is_empty() {
                    return Err(Error::new("no items for cycling given"));
                }
                Ok(arguments.positional[of.index.get() % arguments.positional.len()].clone())
            }
            (Value::Loop(of), _) => {
                let mut last = of.last_changed.borrow_mut();
                if let Some(last) = &*last
                    && last.len() == arguments.positional.len()
                {
                    let mut is_same = true;
                    for (old, new) in last.iter().zip(&arguments.positional) {
                        is_same &= old.equals(new, budget)?;
                    }
                    if is_same {
                        return Ok(Value::Bool(false));
                    }
                }
                *last = Some(arguments.positional);
                Ok(Value::Bool(true))
            }
            (Value::Cycler(cycler), _) => {
                arguments.none(name)?;
                let at = cycler.1.get();
                if name == "reset" {
                    cycler.1.set(0);
                    return Ok(Value::None);
                }
                cycler.1.set((at + 1) % cycler.0.len());
                Ok(cycler.0[at].clone())
            }
            (Value::Float(number), _) => {
                arguments.none(name)?;
                Ok(Value::Bool(number.is_finite() && number.fract() == 0.0))
            }
            _ => {
                arguments.none(name)?;
                let size = value.as_int().unwrap_or(0).unsigned_abs();
                Ok(if name == "bit_length" {
                    Value::Int((u128::BITS - size.leading_zeros()).into())
                } else {
                    Value::Bool(true)
                })
            }
        }
    }

    fn call_macro(&self, of: &Rc<MacroValue>, arguments: Arguments) -> Result<Value, Error> {
        let definition = &of.definition;
        let parent = of.scope.upgrade().ok_or_else(|| Error::new("calls a macro outside of where it was defined"))?;
        let scope = Scope::inside(&parent);
        let function = &definition.name;
        let mut named = arguments.named;
        let mut positional = arguments.positional.into_iter();
        for (name, text, default) in &definition.parameters {
            let by_name = named.iter().position(|(given, _)| given == text).map(|at| named.remove(at).1);
            let value = match (positional.next(), by_name, default) {
                (Some(_), Some(_), _) => {
                    return Err(Error::new(format!("macro '{function}' got two values for '{text}'")));
                }
                (Some(value), ..) | (_, Some(value), _) => value,
                (None, None, Some(default)) => self.evaluate(default, &scope)?,
                (None, None, None) => Value::undefined(format!("parameter '{text}' was not provided")),
            };
            scope.set(*name, value);
        }
        let name_of = |wanted: &str| self.names.iter().position(|name| name == wanted).map(|at| at as Name);
        let is_parameter = definition.parameters.iter().any(|(_, text, _)| &**text == "caller");
        if definition.takes_caller && !is_parameter {
            let caller = named.iter().position(|(given, _)| &**given == "caller").map(|at| named.remove(at).1);
            let caller = caller.unwrap_or_else(|| Value::undefined("No caller defined"));
            name_of("caller").into_iter().for_each(|name| scope.set(name, caller.clone()));
        }
        if definition.takes_kwargs {
            let entries = std::mem::take(&mut named).into_iter().map(|(name, value)| (Value::Str(name), value));
            let kwargs = Value::Dict(Dict::new(entries, &self.budget)?);
            name_of("kwargs").into_iter().for_each(|name| scope.set(name, kwargs.clone()));
        } else if let Some((name, _)) = named.first() {
            return Err(Error::new(format!("macro '{function}' takes no keyword argument '{name}'")));
        }
        let rest: Vec<Value> = positional.collect();
        if definition.takes_varargs {
            let varargs = Value::tuple(rest)?;
            name_of("varargs").into_iter().for_each(|name| scope.set(name, varargs.clone()));
        } else if !rest.is_empty() {
            return Err(Error::new(format!(
                "macro '{function}' takes not more than {} argument(s)",
                definition.parameters.len()
            )));
        }
        self.captured_text(&definition.body, &scope)
    }

    /// The text that statements print.
    pub(super) fn captured_text(&self, body: &[Statement], scope: &Rc<Scope>) -> Result<Value, Error> {
        let mut out = String::new();
        self.execute(body, scope, &mut out)?;
        Ok(Value::Str(Arc::from(out)))
    }
}
