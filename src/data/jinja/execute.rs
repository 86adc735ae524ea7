//! Statements: what they print and bind.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::Error;
use super::ast::{For, Kind, Statement, Target};
use super::evaluate::Interpreter;
use super::scope::Scope;
use super::text::display;
use super::value::{Loop, MacroValue, Sequence, Value};

/// How a list of statements ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

impl Interpreter<'_> {
    /// Runs statements, which print to `out`.
    pub(super) fn execute(&self, body: &[Statement], scope: &Rc<Scope>, out: &mut String) -> Result<Flow, Error> {
        self.budget.nest()?;
        for statement in body {
            self.budget.steps(1)?;
            let flow = self.statement(statement, scope, out)?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, statement: &Statement, scope: &Rc<Scope>, out: &mut String) -> Result<Flow, Error> {
        match statement {
            Statement::Data(text) => {
                self.budget.make(text.len())?;
                out.push_str(text);
            }
            Statement::Print(values) => {
                for value in values {
                    let text = self
                        .evaluate(value, scope)
                        .and_then(|found| display(&found, &self.budget))
                        .map_err(|error| error.at(value.line))?;
                    self.budget.make(text.len())?;
                    out.push_str(&text);
                }
            }
            Statement::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.evaluate(condition, scope)?.is_true() {
                        return self.execute(body, scope, out);
                    }
                }
                return self.execute(otherwise, scope, out);
            }
            Statement::For(statement) => {
                let iterable = self.evaluate(&statement.iterable, scope)?;
                self.run_loop(statement, &iterable, 0, scope, out)
                    .map_err(|error| error.at(statement.iterable.line))?;
            }
            Statement::Set(target, value) => {
                let line = value.line;
                let value = self.evaluate(value, scope)?;
                self.assign(target, value, scope).map_err(|error| error.at(line))?;
            }
            Statement::SetBlock(target, filters, body) => {
                let text = self.captured_text(body, &Scope::inside(scope))?;
                let value = self.filtered(filters, text, scope)?;
                self.assign(target, value, scope)?;
            }
            Statement::FilterBlock(filters, body) => {
                let text = self.captured_text(body, &Scope::inside(scope))?;
                let text = display(&self.filtered(filters, text, scope)?, &self.budget)?;
                out.push_str(&text);
            }
            Statement::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, value) in values {
                    self.assign(target, self.evaluate(value, scope)?, &inner)?;
                }
                return self.execute(body, &inner, out);
            }
            Statement::Scope(body) => return self.execute(body, &Scope::inside(scope), out),
            Statement::Macro(definition) => {
                let value = MacroValue { definition: definition.clone(), scope: Rc::downgrade(scope) };
                self.bind_name(&definition.name, Value::Macro(Rc::new(value)), scope);
            }
            Statement::CallBlock(definition, call) => {
                let caller = MacroValue { definition: definition.clone(), scope: Rc::downgrade(scope) };
                let text = self.call_with_caller(call, Value::Macro(Rc::new(caller)), scope)?;
                out.push_str(&display(&text, &self.budget)?);
            }
            Statement::Generation(header, body) => {
                let before = out.len();
                self.execute(body, &Scope::inside(scope), out)?;
                if let Some((open, close)) = self.marks {
                    let text = out.split_off(before);
                    let header = header.as_deref().filter(|header| text.starts_with(*header)).unwrap_or("");
                    out.push_str(header);
                    out.push(open);
                    out.push_str(&text[header.len()..]);
                    out.push(close);
                }
            }
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
            Statement::Foreign(name, line) => {
                return Err(Error::new(format!("uses `{name}`, but there are no other templates")).at(*line));
            }
        }
        Ok(Flow::Next)
    }

    fn filtered(&self, filters: &super::ast::Expr, text: Value, scope: &Rc<Scope>) -> Result<Value, Error> {
        self.captured.borrow_mut().push(text);
        let value = self.evaluate(filters, scope);
        self.captured.borrow_mut().pop();
        value
    }

    fn call_with_caller(&self, call: &super::ast::Expr, caller: Value, scope: &Rc<Scope>) -> Result<Value, Error> {
        let Kind::Call(function, arguments) = &call.kind else { return Err(Error::new("has no call to make")) };
        let function = self.evaluate(function, scope)?;
        let mut arguments = self.arguments(arguments, scope)?;
        arguments.named.push((Arc::from("caller"), caller));
        self.call(&function, arguments).map_err(|error| error.at(call.line))
    }

    fn bind_name(&self, name: &str, value: Value, scope: &Rc<Scope>) {
        if let Some(number) = self.names.iter().position(|known| known == name) {
            scope.set(number as u32, value);
        }
    }

    fn assign(&self, target: &Target, value: Value, scope: &Rc<Scope>) -> Result<(), Error> {
        match target {
            Target::Name(name) => {
                scope.set(*name, value);
                Ok(())
            }
            Target::Attribute(name, attribute) => match self.lookup(*name, scope) {
                Value::Namespace(namespace) => namespace.set(attribute, value),
                _ => Err(Error::new("cannot assign attribute on non-namespace object")),
            },
            Target::Tuple(targets) => {
                let values = value.items(&self.budget)?;
                if values.len() != targets.len() {
                    return Err(Error::new(format!(
                        "has {} values to unpack where {} are expected",
                        values.len(),
                        targets.len()
                    )));
                }
                targets.iter().zip(values).try_for_each(|(target, value)| self.assign(target, value, scope))
            }
        }
    }

    /// Runs a loop over `iterable`; `depth0` counts the recursive loops around it.
    pub(super) fn run_loop(
        &self,
        statement: &Arc<For>,
        iterable: &Value,
        depth0: usize,
        scope: &Rc<Scope>,
        out: &mut String,
    ) -> Result<(), Error> {
        let mut items = iterable.items(&self.budget)?;
        if let Some(condition) = &statement.condition {
            let mut kept = Vec::new();
            for item in items {
                let inner = Scope::inside(scope);
                self.assign(&statement.target, item.clone(), &inner)?;
                if self.evaluate(condition, &inner)?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.execute(&statement.otherwise, &Scope::inside(scope), out)?;
            return Ok(());
        }
        let recursion = statement.is_recursive.then(|| (statement.clone(), Rc::downgrade(scope)));
        let state = Rc::new(Loop {
            items: Sequence::new(items)?,
            index: Cell::new(0),
            depth0,
            last_changed: RefCell::default(),
            recursion,
        });
        let loop_name = self.names.iter().position(|name| name == "loop");
        for (index, item) in state.items.items().iter().enumerate() {
            state.index.set(index);
            let inner = Scope::inside(scope);
            if let Some(name) = loop_name {
                inner.set(name as u32, Value::Loop(state.clone()));
            }
            self.assign(&statement.target, item.clone(), &inner)?;
            if self.execute(&statement.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }
}
