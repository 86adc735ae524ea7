//! The tree of a parsed template.

use std::sync::Arc;

/// A name that the template uses, by its place in the table of names.
pub(super) type Name = u32;

#[derive(Debug)]
pub(super) enum Statement {
    Data(Arc<str>),
    Print(Vec<Expr>),
    /// Conditions with their bodies in order, and the `else`.
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    For(Arc<For>),
    Set(Target, Expr),
    /// The filters read [`Kind::Captured`].
    SetBlock(Target, Expr, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    Macro(Arc<Macro>),
    /// The block given to the called macro as `caller`, and the call.
    CallBlock(Arc<Macro>, Expr),
    /// The filters read [`Kind::Captured`].
    FilterBlock(Expr, Vec<Statement>),
    /// What the assistant writes; a header at its start stays outside.
    Generation(Option<Arc<str>>, Vec<Statement>),
    Scope(Vec<Statement>),
    Break,
    Continue,
    /// A statement that needs other templates, with its line.
    Foreign(&'static str, u32),
}

#[derive(Debug)]
pub(super) struct For {
    pub(super) target: Target,
    pub(super) iterable: Expr,
    pub(super) condition: Option<Expr>,
    pub(super) is_recursive: bool,
    pub(super) body: Vec<Statement>,
    pub(super) otherwise: Vec<Statement>,
}

/// A parameter of a macro, by number and by text, with its default.
pub(super) type Parameter = (Name, Arc<str>, Option<Expr>);

#[derive(Debug)]
pub(super) struct Macro {
    pub(super) name: Arc<str>,
    pub(super) parameters: Vec<Parameter>,
    pub(super) body: Vec<Statement>,
    /// Whether the body speaks of `varargs`, `kwargs` and `caller`, and so takes them.
    pub(super) takes_varargs: bool,
    pub(super) takes_kwargs: bool,
    pub(super) takes_caller: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Target {
    Name(Name),
    /// An attribute of a namespace.
    Attribute(Name, Arc<str>),
    Tuple(Vec<Target>),
}

/// An expression with its line and the depth of its tree.
#[derive(Debug)]
pub(super) struct Expr {
    pub(super) line: u32,
    pub(super) depth: u16,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
}

#[derive(Debug)]
pub(super) enum Kind {
    Literal(Literal),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, CallArguments),
    Filter(Box<Expr>, Arc<str>, CallArguments),
    Test(Box<Expr>, Arc<str>, CallArguments),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Binary(Operator, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// Condition, value, and the value otherwise.
    If(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
    /// The text of the block that is being filtered.
    Captured,
}

#[derive(Debug, Default)]
pub(super) struct CallArguments {
    pub(super) positional: Vec<Expr>,
    pub(super) named: Vec<(Arc<str>, Expr)>,
    pub(super) star: Option<Box<Expr>>,
    pub(super) double_star: Option<Box<Expr>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

impl CallArguments {
    fn children(&self) -> impl Iterator<Item = &Expr> {
        let stars = self.star.iter().chain(&self.double_star).map(AsRef::as_ref);
        self.positional.iter().chain(self.named.iter().map(|(_, value)| value)).chain(stars)
    }
}

impl Kind {
    /// The depth of the deepest part.
    pub(super) fn parts_depth(&self) -> u16 {
        let of = |parts: &mut dyn Iterator<Item = &Expr>| parts.map(|part| part.depth).max().unwrap_or(0);
        match self {
            Self::Literal(_) | Self::Name(_) | Self::Captured => 0,
            Self::List(items) | Self::Tuple(items) | Self::Concat(items) => of(&mut items.iter()),
            Self::Dict(pairs) => of(&mut pairs.iter().flat_map(|(key, value)| [key, value])),
            Self::Attribute(one, _) | Self::Not(one) | Self::Negative(one) | Self::Positive(one) => one.depth,
            Self::Item(a, b) | Self::And(a, b) | Self::Or(a, b) | Self::Binary(_, a, b) => a.depth.max(b.depth),
            Self::Slice(parts) => of(&mut parts.iter().flatten()),
            Self::Call(one, arguments) | Self::Filter(one, _, arguments) | Self::Test(one, _, arguments) => {
                one.depth.max(of(&mut arguments.children()))
            }
            Self::Compare(one, rest) => one.depth.max(of(&mut rest.iter().map(|(_, part)| part))),
            Self::If(condition, value, otherwise) => {
                let otherwise = otherwise.as_ref().map_or(0, |part| part.depth);
                condition.depth.max(value.depth).max(otherwise)
            }
        }
    }
}
