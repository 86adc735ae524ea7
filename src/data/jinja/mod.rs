//! Jinja2 as transformers renders chat templates.
//!
//! [`Template`] parses and renders what `ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)` of Jinja2
//! 3.1 renders, with transformers' `tojson`, `raise_exception`, `strftime_now` and `{% generation %}`. Values behave as
//! Python's: what is printed, compared, sliced and formatted comes out character for character (tests hold it against
//! transformers). [`super::ChatTemplate`] calls it. It is not a crate's engine because models saw Python's text, and
//! because a template is a stranger's program: it has a budget of steps, bytes and stack ([`budget`]) at every
//! operation, so that it ends in a message, not in a hang or an abort.

mod arguments;
mod arithmetic;
mod ast;
mod attributes;
mod budget;
mod checks;
mod evaluate;
mod execute;
mod expressions;
mod filters;
mod format_spec;
mod json;
mod lexer;
mod parser;
mod percent;
mod scope;
mod selection;
mod strings;
mod text;
mod value;

#[cfg(test)]
mod hostile_tests;

use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use ast::Statement;
use budget::Budget;
use evaluate::Interpreter;
use execute::Flow;
use scope::Scope;
use value::Value;

/// What is wrong with a template, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Error {
    message: String,
    line: Option<u32>,
    is_raised: bool,
}

impl Error {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), line: None, is_raised: false }
    }

    /// What `raise_exception` was given.
    fn raised(message: String) -> Self {
        Self { message, line: None, is_raised: true }
    }

    /// Adds the line, unless it is known.
    fn at(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.message)?;
        self.line.map_or(Ok(()), |line| write!(out, " (line {line} of the template)"))
    }
}

/// A parsed template.
#[derive(Clone, Debug)]
pub(super) struct Template {
    body: Arc<Vec<Statement>>,
    names: Arc<Vec<String>>,
    has_generation: bool,
}

/// Longest template, in bytes.
const MOST_SOURCE: usize = 4 << 20;

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// If it is not a Jinja template.
    pub(super) fn parse(source: &str) -> Result<Self, Error> {
        if source.len() > MOST_SOURCE {
            return Err(Error::new(format!("has {} bytes; the limit is {MOST_SOURCE}", source.len())));
        }
        let parsed = parser::parse(source)?;
        Ok(Self { body: Arc::new(parsed.body), names: Arc::new(parsed.names), has_generation: parsed.has_generation })
    }

    /// Whether it has `{% generation %}` blocks.
    pub(super) fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Renders it with the variables `context`, with `marks` around what the assistant writes.
    ///
    /// # Errors
    /// If the template raises an exception, does what Python does not allow, or exceeds its budget.
    pub(super) fn render(
        &self,
        context: &Map<String, Json>,
        marks: Option<(char, char)>,
        strftime: &dyn Fn(&str) -> String,
    ) -> Result<String, Error> {
        let input_bytes = context.values().map(bytes_of).sum();
        let budget = Budget::new(input_bytes);
        let variable = |name: &String| context.get(name).map(|value| Value::from_json(value, &budget)).transpose();
        let variables = self.names.iter().map(variable).collect::<Result<_, _>>()?;
        let interpreter = Interpreter {
            names: &self.names,
            context: variables,
            budget,
            captured: std::cell::RefCell::default(),
            marks,
            strftime,
            namespaces: std::cell::RefCell::default(),
        };
        let mut out = String::new();
        match interpreter.execute(&self.body, &Rc::new(Scope::default()), &mut out)? {
            Flow::Next => Ok(out),
            Flow::Break | Flow::Continue => Err(Error::new("has a `break` or `continue` outside of a loop")),
        }
    }
}

/// About the bytes that a value takes.
fn bytes_of(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 16,
        Json::Array(items) => items.iter().map(bytes_of).sum::<usize>() + 16,
        Json::Object(fields) => fields.iter().map(|(name, field)| name.len() + bytes_of(field)).sum::<usize>() + 16,
        Json::Null | Json::Bool(_) | Json::Number(_) => 16,
    }
}
