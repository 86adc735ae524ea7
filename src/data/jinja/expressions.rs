//! Expressions, with Jinja2's precedences: `**` binds a sign less tightly than in Python, `~` stands between `+` and `*`.

use super::Error;
use super::ast::{CallArguments, Comparison, Expr, Kind, Literal, Operator};
use super::lexer::Token;
use super::parser::{Ends, Parser};

impl Parser {
    /// Expressions separated by commas make a tuple; one alone is itself.
    pub(super) fn tuple(&mut self, ends: &Ends<'_>) -> Result<Expr, Error> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let is_end = matches!(self.peek(), Token::VariableEnd | Token::BlockEnd | Token::End)
                || self.is_operator(")")
                || ends.words.iter().any(|word| self.is_name(word));
            if is_end {
                break;
            }
            items.push(if ends.is_plain { self.either()? } else { self.expression()? });
            if !self.skip_operator(",") {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple {
            if let Some(one) = items.pop() {
                return Ok(one);
            }
            if !ends.has_parentheses {
                return Err(self.unexpected("an expression"));
            }
        }
        Self::make(line, Kind::Tuple(items))
    }

    pub(super) fn expression(&mut self) -> Result<Expr, Error> {
        self.check_nesting()?;
        let line = self.line();
        let mut value = self.either()?;
        while self.skip_name("if") {
            let condition = self.either()?;
            let otherwise = if self.skip_name("else") { Some(Box::new(self.expression()?)) } else { None };
            value = Self::make(line, Kind::If(Box::new(condition), Box::new(value), otherwise))?;
        }
        Ok(value)
    }

    fn either(&mut self) -> Result<Expr, Error> {
        let mut left = self.both()?;
        while self.skip_name("or") {
            let right = self.both()?;
            left = Self::make(left.line, Kind::Or(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn both(&mut self) -> Result<Expr, Error> {
        let mut left = self.negation()?;
        while self.skip_name("and") {
            let right = self.negation()?;
            left = Self::make(left.line, Kind::And(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Expr, Error> {
        self.check_nesting()?;
        let line = self.line();
        if self.skip_name("not") {
            let value = self.negation()?;
            return Self::make(line, Kind::Not(Box::new(value)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr, Error> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Token::Operator("==") => Comparison::Equal,
                Token::Operator("!=") => Comparison::NotEqual,
                Token::Operator("<") => Comparison::Less,
                Token::Operator("<=") => Comparison::LessOrEqual,
                Token::Operator(">") => Comparison::Greater,
                Token::Operator(">=") => Comparison::GreaterOrEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not" && matches!(self.peek_second(), Token::Name(name) if name == "in") =>
                {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        if rest.is_empty() { Ok(first) } else { Self::make(line, Kind::Compare(Box::new(first), rest)) }
    }

    fn sum(&mut self) -> Result<Expr, Error> {
        let mut left = self.concatenation()?;
        loop {
            let operator = match self.peek() {
                Token::Operator("+") => Operator::Add,
                Token::Operator("-") => Operator::Subtract,
                _ => return Ok(left),
            };
            self.next();
            let right = self.concatenation()?;
            left = Self::make(left.line, Kind::Binary(operator, Box::new(left), Box::new(right)))?;
        }
    }

    fn concatenation(&mut self) -> Result<Expr, Error> {
        let first = self.product()?;
        if !self.is_operator("~") {
            return Ok(first);
        }
        let line = first.line;
        let mut parts = vec![first];
        while self.skip_operator("~") {
            parts.push(self.product()?);
        }
        Self::make(line, Kind::Concat(parts))
    }

    fn product(&mut self) -> Result<Expr, Error> {
        let mut left = self.power()?;
        loop {
            let operator = match self.peek() {
                Token::Operator("*") => Operator::Multiply,
                Token::Operator("/") => Operator::Divide,
                Token::Operator("//") => Operator::FloorDivide,
                Token::Operator("%") => Operator::Modulo,
                _ => return Ok(left),
            };
            self.next();
            let right = self.power()?;
            left = Self::make(left.line, Kind::Binary(operator, Box::new(left), Box::new(right)))?;
        }
    }

    fn power(&mut self) -> Result<Expr, Error> {
        let mut left = self.unary(true)?;
        while self.skip_operator("**") {
            let right = self.unary(true)?;
            left = Self::make(left.line, Kind::Binary(Operator::Power, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr, Error> {
        self.check_nesting()?;
        let line = self.line();
        let value = if self.skip_operator("-") {
            let value = self.unary(false)?;
            Self::make(line, Kind::Negative(Box::new(value)))?
        } else if self.skip_operator("+") {
            let value = self.unary(false)?;
            Self::make(line, Kind::Positive(Box::new(value)))?
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if with_filters { self.filters_and_tests(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Result<Expr, Error> {
        let line = self.line();
        let kind = match self.next() {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Kind::Literal(Literal::Bool(true)),
                "false" | "False" => Kind::Literal(Literal::Bool(false)),
                "none" | "None" => Kind::Literal(Literal::None),
                _ => Kind::Name(self.number_of(&name)),
            },
            Token::Str(mut text) => {
                while let Token::Str(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                Kind::Literal(Literal::Str(text.into()))
            }
            Token::Int(value) => Kind::Literal(Literal::Int(value)),
            Token::Float(value) => Kind::Literal(Literal::Float(value)),
            Token::Operator("(") => {
                let inner = self.tuple(&Ends { has_parentheses: true, ..Ends::default() })?;
                self.expect_operator(")")?;
                return Ok(inner);
            }
            Token::Operator("[") => Kind::List(self.items("]")?),
            Token::Operator("{") => {
                let mut pairs = Vec::new();
                while !self.skip_operator("}") {
                    if !pairs.is_empty() {
                        self.expect_operator(",")?;
                        if self.skip_operator("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.expect_operator(":")?;
                    pairs.push((key, self.expression()?));
                }
                Kind::Dict(pairs)
            }
            other => {
                return Err(Error::new(format!("has {} where an expression is expected", other.describe())).at(line));
            }
        };
        Self::make(line, kind)
    }

    fn items(&mut self, end: &str) -> Result<Vec<Expr>, Error> {
        let mut items = Vec::new();
        while !self.skip_operator(end) {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator(end) {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn postfix(&mut self, mut value: Expr) -> Result<Expr, Error> {
        loop {
            let line = self.line();
            if self.skip_operator(".") {
                value = match self.next() {
                    Token::Name(name) => Self::make(line, Kind::Attribute(Box::new(value), name.into()))?,
                    Token::Int(index) => {
                        let index = Self::make(line, Kind::Literal(Literal::Int(index)))?;
                        Self::make(line, Kind::Item(Box::new(value), Box::new(index)))?
                    }
                    other => {
                        return Err(Error::new(format!("has {} behind a dot", other.describe())).at(line));
                    }
                };
            } else if self.skip_operator("[") {
                let mut arguments = Vec::new();
                while !self.skip_operator("]") {
                    if !arguments.is_empty() {
                        self.expect_operator(",")?;
                    }
                    arguments.push(self.subscript()?);
                }
                let index = match (arguments.len(), arguments.pop()) {
                    (1, Some(one)) => one,
                    (_, last) => {
                        arguments.extend(last);
                        Self::make(line, Kind::Tuple(arguments))?
                    }
                };
                value = Self::make(line, Kind::Item(Box::new(value), Box::new(index)))?;
            } else if self.is_operator("(") {
                let arguments = self.call_arguments()?;
                value = Self::make(line, Kind::Call(Box::new(value), arguments))?;
            } else {
                return Ok(value);
            }
        }
    }

    fn filters_and_tests(&mut self, mut value: Expr) -> Result<Expr, Error> {
        loop {
            let line = self.line();
            if self.skip_operator("|") {
                value = self.filter(value)?;
            } else if self.skip_name("is") {
                value = self.test(value, line)?;
            } else if self.is_operator("(") {
                let arguments = self.call_arguments()?;
                value = Self::make(line, Kind::Call(Box::new(value), arguments))?;
            } else {
                return Ok(value);
            }
        }
    }

    fn test(&mut self, value: Expr, line: u32) -> Result<Expr, Error> {
        let is_negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let mut arguments = CallArguments::default();
        let begins_argument = match self.peek() {
            Token::Name(name) => !["else", "or", "and"].contains(&name.as_str()),
            Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Operator("[" | "{") => true,
            _ => false,
        };
        if self.is_operator("(") {
            arguments = self.call_arguments()?;
        } else if begins_argument {
            if self.is_name("is") {
                return Err(Error::new("chains tests with `is`").at(line));
            }
            let argument = self.primary()?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let test = Self::make(line, Kind::Test(Box::new(value), name.into(), arguments))?;
        if is_negated { Self::make(line, Kind::Not(Box::new(test))) } else { Ok(test) }
    }

    fn subscript(&mut self) -> Result<Expr, Error> {
        let line = self.line();
        let start = if self.is_operator(":") { None } else { Some(self.expression()?) };
        if !self.skip_operator(":") {
            return start.ok_or_else(|| self.unexpected("an index"));
        }
        let is_end = |parser: &Self| parser.is_operator("]") || parser.is_operator(",");
        let stop = if self.is_operator(":") || is_end(self) { None } else { Some(self.expression()?) };
        let step = if self.skip_operator(":") && !is_end(self) { Some(self.expression()?) } else { None };
        Self::make(line, Kind::Slice(Box::new([start, stop, step])))
    }

    pub(super) fn call_arguments(&mut self) -> Result<CallArguments, Error> {
        self.expect_operator("(")?;
        let mut arguments = CallArguments::default();
        let mut is_first = true;
        while !self.skip_operator(")") {
            if !is_first {
                self.expect_operator(",")?;
                if self.skip_operator(")") {
                    break;
                }
            }
            is_first = false;
            let has_stars = arguments.star.is_some() || arguments.double_star.is_some();
            if self.skip_operator("*") {
                if has_stars {
                    return Err(self.unexpected("no second `*`"));
                }
                arguments.star = Some(Box::new(self.expression()?));
            } else if self.skip_operator("**") {
                if arguments.double_star.is_some() {
                    return Err(self.unexpected("no second `**`"));
                }
                arguments.double_star = Some(Box::new(self.expression()?));
            } else if matches!((self.peek(), self.peek_second()), (Token::Name(_), Token::Operator("="))) {
                let name = self.expect_name()?;
                self.next();
                arguments.named.push((name.into(), self.expression()?));
            } else {
                if has_stars || !arguments.named.is_empty() {
                    return Err(self.unexpected("no argument by position behind one by name"));
                }
                arguments.positional.push(self.expression()?);
            }
        }
        Ok(arguments)
    }
}
