//! Where names are bound: the template, and within it each turn of a loop, macro, `with` and captured block.

use std::cell::RefCell;
use std::rc::Rc;

use super::ast::Name;
use super::value::Value;

#[derive(Debug, Default)]
pub(super) struct Scope {
    names: RefCell<Vec<(Name, Value)>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    pub(super) fn inside(parent: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self { names: RefCell::default(), parent: Some(parent.clone()) })
    }

    pub(super) fn get(&self, name: Name) -> Option<Value> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            let names = here.names.borrow();
            if let Some((_, value)) = names.iter().find(|(known, _)| *known == name) {
                return Some(value.clone());
            }
            scope = here.parent.as_deref();
        }
        None
    }

    pub(super) fn set(&self, name: Name, value: Value) {
        let mut names = self.names.borrow_mut();
        match names.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => names.push((name, value)),
        }
    }
}
