//! Tokens to statements, by Jinja2's grammar (`jinja2/parser.py`) with the extensions that transformers adds:
//! `{% generation %}`, `{% break %}` and `{% continue %}`.

use std::collections::HashMap;
use std::sync::Arc;

use super::Error;
use super::ast::{CallArguments, Expr, For, Kind, Macro, Name, Parameter, Statement, Target};
use super::budget::StackLimit;
use super::lexer::{Token, tokens};

/// Deepest tree of an expression. Evaluation and release of the tree recurse.
const MOST_DEPTH: u16 = 200;

pub(super) struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    names: Vec<String>,
    numbers: HashMap<String, Name>,
    stack: StackLimit,
    pub(super) has_generation: bool,
}

/// A parsed template: its statements, its names by number, and whether it marks what the assistant writes.
pub(super) struct Parsed {
    pub(super) body: Vec<Statement>,
    pub(super) names: Vec<String>,
    pub(super) has_generation: bool,
}

/// Parses a template.
pub(super) fn parse(source: &str) -> Result<Parsed, Error> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        names: Vec::new(),
        numbers: HashMap::new(),
        stack: StackLimit::here(),
        has_generation: false,
    };
    let body = parser.statements(&[]).map_err(|error| error.at(parser.line()))?;
    Ok(Parsed { body, names: parser.names, has_generation: parser.has_generation })
}

impl Parser {
    pub(super) fn peek(&self) -> &Token {
        self.tokens.get(self.at).map_or(&Token::End, |(token, _)| token)
    }

    pub(super) fn peek_second(&self) -> &Token {
        self.tokens.get(self.at + 1).map_or(&Token::End, |(token, _)| token)
    }

    pub(super) fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    pub(super) fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    pub(super) fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Token::Operator(found) if *found == operator)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if found == name)
    }

    pub(super) fn skip_operator(&mut self, operator: &str) -> bool {
        let is_there = self.is_operator(operator);
        self.at += usize::from(is_there);
        is_there
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let is_there = self.is_name(name);
        self.at += usize::from(is_there);
        is_there
    }

    pub(super) fn expect_operator(&mut self, operator: &str) -> Result<(), Error> {
        if self.skip_operator(operator) { Ok(()) } else { Err(self.unexpected(&format!("`{operator}`"))) }
    }

    pub(super) fn expect_word(&mut self, name: &str) -> Result<(), Error> {
        if self.skip_name(name) { Ok(()) } else { Err(self.unexpected(&format!("`{name}`"))) }
    }

    pub(super) fn expect_name(&mut self) -> Result<String, Error> {
        if let Token::Name(name) = self.next() {
            return Ok(name);
        }
        self.at -= 1;
        Err(self.unexpected("a name"))
    }

    pub(super) fn unexpected(&self, expected: &str) -> Error {
        Error::new(format!("has {} where {expected} is expected", self.peek().describe())).at(self.line())
    }

    pub(super) fn number_of(&mut self, name: &str) -> Name {
        if let Some(&number) = self.numbers.get(name) {
            return number;
        }
        let number = self.names.len() as Name;
        self.names.push(name.into());
        self.numbers.insert(name.into(), number);
        number
    }

    /// Makes a node, unless the tree becomes too deep.
    pub(super) fn make(line: u32, kind: Kind) -> Result<Expr, Error> {
        let depth = kind.parts_depth() + 1;
        if depth > MOST_DEPTH {
            return Err(Error::new("has an expression that is nested too deeply").at(line));
        }
        Ok(Expr { line, depth, kind })
    }

    pub(super) fn check_nesting(&self) -> Result<(), Error> {
        self.stack.check().map_err(|error| error.at(self.line()))
    }

    /// Statements up to the tag `ends` names, whose name has been read then; up to the end of the text if there are none.
    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Statement>, Error> {
        self.check_nesting()?;
        let mut body = Vec::new();
        loop {
            match self.next() {
                Token::Data(text) => body.push(Statement::Data(text.into())),
                Token::VariableBegin => {
                    let line = self.line();
                    let printed = self.tuple(&Ends::default()).map_err(|error| error.at(line))?;
                    body.push(Statement::Print(vec![printed]));
                    self.expect_end(&Token::VariableEnd)?;
                }
                Token::BlockBegin => {
                    if matches!(self.peek(), Token::Name(name) if ends.contains(&name.as_str())) {
                        return Ok(body);
                    }
                    let statement = self.statement()?;
                    body.extend(statement);
                    self.expect_end(&Token::BlockEnd)?;
                }
                Token::End if ends.is_empty() => return Ok(body),
                Token::End => {
                    return Err(Error::new(format!("ends without `{{% {} %}}`", ends.last().unwrap_or(&""))));
                }
                other => return Err(Error::new(format!("has an unexpected {}", other.describe()))),
            }
        }
    }

    fn expect_end(&mut self, end: &Token) -> Result<(), Error> {
        if self.peek() == end {
            self.at += 1;
            return Ok(());
        }
        Err(self.unexpected(&end.describe()))
    }

    /// The body of a statement whose tag has been read up to its end; the end tag's name has been read then.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Statement>, Error> {
        self.skip_operator(":");
        self.expect_end(&Token::BlockEnd)?;
        let body = self.statements(ends)?;
        Ok(body)
    }

    /// As [`Parser::body`], reading the end tag's name too.
    fn whole_body(&mut self, end: &str) -> Result<Vec<Statement>, Error> {
        let body = self.body(&[end])?;
        self.at += 1;
        Ok(body)
    }

    fn statement(&mut self) -> Result<Option<Statement>, Error> {
        let line = self.line();
        let name = self.expect_name()?;
        let statement = match name.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "with" => self.with()?,
            "macro" => self.macro_definition()?,
            "call" => self.call_block()?,
            "filter" => {
                let captured = Self::make(line, Kind::Captured)?;
                let filters = self.filter_chain(captured, true)?;
                Statement::FilterBlock(filters, self.whole_body("endfilter")?)
            }
            "generation" => {
                self.has_generation = true;
                let header = match self.peek() {
                    Token::Str(header) => Some(Arc::from(header.as_str())),
                    _ => None,
                };
                self.at += usize::from(header.is_some());
                Statement::Generation(header, self.whole_body("endgeneration")?)
            }
            "autoescape" => {
                self.expression()?;
                Statement::Scope(self.whole_body("endautoescape")?)
            }
            "block" => {
                let name = self.expect_name()?;
                let _ = self.skip_name("scoped") | self.skip_name("required");
                let body = self.whole_body("endblock")?;
                self.skip_name(&name);
                Statement::Scope(body)
            }
            "print" => {
                let mut printed = Vec::new();
                while self.peek() != &Token::BlockEnd {
                    if !printed.is_empty() {
                        self.expect_operator(",")?;
                    }
                    printed.push(self.expression()?);
                }
                Statement::Print(printed)
            }
            "break" => Statement::Break,
            "continue" => Statement::Continue,
            "include" | "import" | "from" | "extends" => {
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    self.at += 1;
                }
                let name = ["include", "import", "from", "extends"].into_iter().find(|known| *known == name);
                Statement::Foreign(name.unwrap_or("include"), line)
            }
            _ => return Err(Error::new(format!("has an unknown tag `{name}`")).at(line)),
        };
        Ok(Some(statement))
    }

    fn for_loop(&mut self) -> Result<Statement, Error> {
        let target = self.target(&["in"], false)?;
        self.expect_word("in")?;
        let iterable = self.tuple(&Ends { words: &["recursive"], is_plain: true, ..Ends::default() })?;
        let condition = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let is_recursive = self.skip_name("recursive");
        let body = self.body(&["endfor", "else"])?;
        let otherwise = if self.expect_name()? == "else" { self.whole_body("endfor")? } else { Vec::new() };
        Ok(Statement::For(Arc::new(For { target, iterable, condition, is_recursive, body, otherwise })))
    }

    fn condition(&mut self) -> Result<Statement, Error> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(&Ends { is_plain: true, ..Ends::default() })?;
            let body = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match self.expect_name()?.as_str() {
                "elif" => {}
                "else" => return Ok(Statement::If(branches, self.whole_body("endif")?)),
                _ => return Ok(Statement::If(branches, Vec::new())),
            }
        }
    }

    fn set(&mut self) -> Result<Statement, Error> {
        let line = self.line();
        let target = self.target(&[], true)?;
        if self.skip_operator("=") {
            return Ok(Statement::Set(target, self.tuple(&Ends::default())?));
        }
        let captured = Self::make(line, Kind::Captured)?;
        let filters = self.filter_chain(captured, false)?;
        Ok(Statement::SetBlock(target, filters, self.whole_body("endset")?))
    }

    fn with(&mut self) -> Result<Statement, Error> {
        let mut values = Vec::new();
        while !matches!(self.peek(), Token::BlockEnd | Token::End) {
            if !values.is_empty() {
                self.expect_operator(",")?;
            }
            let target = self.target_item(false)?;
            self.expect_operator("=")?;
            values.push((target, self.expression()?));
        }
        Ok(Statement::With(values, self.whole_body("endwith")?))
    }

    /// What may be assigned to: a name, an attribute of a namespace, or several of them.
    fn target(&mut self, ends: &[&str], with_attributes: bool) -> Result<Target, Error> {
        self.check_nesting()?;
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let is_end = matches!(self.peek(), Token::VariableEnd | Token::BlockEnd | Token::End)
                || self.is_operator(")")
                || self.is_operator("=")
                || ends.iter().any(|end| self.is_name(end));
            if is_end {
                break;
            }
            items.push(self.target_item(with_attributes)?);
            if !self.skip_operator(",") {
                break;
            }
            is_tuple = true;
        }
        match (is_tuple, items.pop()) {
            (false, Some(one)) => Ok(one),
            (true, Some(last)) => {
                items.push(last);
                Ok(Target::Tuple(items))
            }
            (_, None) => Err(self.unexpected("a name to assign to")),
        }
    }

    fn target_item(&mut self, with_attributes: bool) -> Result<Target, Error> {
        if self.skip_operator("(") {
            let inner = self.target(&[], with_attributes)?;
            self.expect_operator(")")?;
            return Ok(inner);
        }
        let name = self.expect_name()?;
        if ["true", "false", "none", "True", "False", "None"].contains(&name.as_str()) {
            return Err(Error::new(format!("assigns to `{name}`")).at(self.line()));
        }
        let number = self.number_of(&name);
        if with_attributes && self.skip_operator(".") {
            return Ok(Target::Attribute(number, self.expect_name()?.into()));
        }
        Ok(Target::Name(number))
    }

    fn macro_definition(&mut self) -> Result<Statement, Error> {
        let name = self.expect_name()?;
        self.number_of(&name);
        let parameters = self.signature()?;
        let definition = self.finish_macro(&name, parameters, "endmacro")?;
        Ok(Statement::Macro(definition))
    }

    fn call_block(&mut self) -> Result<Statement, Error> {
        let parameters = if self.is_operator("(") { self.signature()? } else { Vec::new() };
        let call = self.expression()?;
        if !matches!(call.kind, Kind::Call(..)) {
            return Err(self.unexpected("a call"));
        }
        let definition = self.finish_macro("caller", parameters, "endcall")?;
        Ok(Statement::CallBlock(definition, call))
    }

    fn signature(&mut self) -> Result<Vec<Parameter>, Error> {
        self.expect_operator("(")?;
        let mut parameters: Vec<Parameter> = Vec::new();
        while !self.skip_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            let name = self.expect_name()?;
            let default = if self.skip_operator("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, _, default)| default.is_some()) {
                return Err(Error::new("has a parameter without a default behind one with a default").at(self.line()));
            }
            parameters.push((self.number_of(&name), name.into(), default));
        }
        Ok(parameters)
    }

    fn finish_macro(&mut self, name: &str, parameters: Vec<Parameter>, end: &str) -> Result<Arc<Macro>, Error> {
        let start = self.at;
        let body = self.whole_body(end)?;
        let speaks_of = |name: &str| {
            self.tokens[start..self.at].iter().any(|(token, _)| matches!(token, Token::Name(found) if found == name))
        };
        let (takes_varargs, takes_kwargs) = (speaks_of("varargs"), speaks_of("kwargs"));
        let takes_caller = speaks_of("caller");
        Ok(Arc::new(Macro { name: name.into(), parameters, body, takes_varargs, takes_kwargs, takes_caller }))
    }

    /// Filters behind a value; with `starts_inline` the first one has no `|`.
    fn filter_chain(&mut self, mut value: Expr, starts_inline: bool) -> Result<Expr, Error> {
        let mut is_first = starts_inline;
        while is_first || self.is_operator("|") {
            if !is_first {
                self.at += 1;
            }
            is_first = false;
            value = self.filter(value)?;
        }
        Ok(value)
    }

    /// One filter whose `|` has been read.
    pub(super) fn filter(&mut self, value: Expr) -> Result<Expr, Error> {
        let line = self.line();
        let name = self.dotted_name()?;
        let arguments = if self.is_operator("(") { self.call_arguments()? } else { CallArguments::default() };
        Self::make(line, Kind::Filter(Box::new(value), name.into(), arguments))
    }

    pub(super) fn dotted_name(&mut self) -> Result<String, Error> {
        let mut name = self.expect_name()?;
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.expect_name()?);
        }
        Ok(name)
    }
}

/// Where a tuple without parentheses ends.
#[derive(Clone, Copy, Default)]
pub(super) struct Ends<'a> {
    pub(super) words: &'a [&'a str],
    /// No `a if b else c` outside parentheses.
    pub(super) is_plain: bool,
    /// `()` is the empty tuple.
    pub(super) has_parentheses: bool,
}
