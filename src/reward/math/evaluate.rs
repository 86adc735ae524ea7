//! The value of an expression at a point: exactly where it is rational, in f64 otherwise, and always within limits.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use super::expression::{Expression, Function};

/// Most bits of a numerator or denominator.
pub(super) const MOST_BITS: u64 = 8192;
/// Bits that one comparison may process.
const WORK: u64 = 1 << 19;
/// Work of an operation besides its bits.
const STEP: u64 = 16;

/// Why there is no exact value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It has no rational value, or not one that is found exactly.
    Irrational,
    /// It is not defined at this point, or no number at all.
    Undefined,
    /// A limit is reached.
    TooLarge,
}

/// Evaluates exactly, with a budget of work.
pub(super) struct Exact {
    work: u64,
}

type Exactly = Result<BigRational, Stop>;

impl Exact {
    pub(super) fn new() -> Self {
        Self { work: WORK }
    }

    /// The value of `expression` where a symbol has the value `symbol` gives it.
    pub(super) fn value(&mut self, expression: &Expression, symbol: &dyn Fn(&str) -> BigRational) -> Exactly {
        let result = match expression {
            Expression::Number(number) => Ok(number.value.clone()),
            Expression::Symbol(name) => Ok(symbol(name)),
            Expression::Sum(terms) => {
                let mut sum = BigRational::zero();
                for term in terms {
                    let term = self.value(term, symbol)?;
                    sum = self.within(sum + term)?;
                }
                Ok(sum)
            }
            Expression::Product(factors) => {
                let mut product = BigRational::one();
                for factor in factors {
                    let factor = self.value(factor, symbol)?;
                    product = self.within(product * factor)?;
                }
                Ok(product)
            }
            Expression::Negative(inner) => Ok(-self.value(inner, symbol)?),
            Expression::Percent(inner) => Ok(self.value(inner, symbol)? / BigInt::from(100)),
            Expression::Quotient(above, below) => {
                let (above, below) = (self.value(above, symbol)?, self.value(below, symbol)?);
                if below.is_zero() { Err(Stop::Undefined) } else { Ok(above / below) }
            }
            Expression::Power(base, exponent) => {
                let (base, exponent) = (self.value(base, symbol)?, self.value(exponent, symbol)?);
                power(base, &exponent)
            }
            Expression::Root(inner, index) => {
                let inner = self.value(inner, symbol)?;
                root(&inner, *index)
            }
            Expression::Call(function, inner) => {
                let inner = self.value(inner, symbol)?;
                self.call(*function, &inner)
            }
            Expression::Logarithm(base, inner) => {
                let (base, inner) = (self.value(base, symbol)?, self.value(inner, symbol)?);
                logarithm(&base, &inner)
            }
            Expression::Binomial(n, k) => {
                let (n, k) = (self.value(n, symbol)?, self.value(k, symbol)?);
                self.binomial(&n, &k)
            }
            _ => Err(Stop::Undefined),
        };
        result.and_then(|value| self.within(value))
    }

    /// Pays for `value` and refuses it if it is too large.
    fn within(&mut self, value: BigRational) -> Exactly {
        let bits = value.numer().bits().max(value.denom().bits());
        if bits > MOST_BITS || self.work < bits + STEP {
            return Err(Stop::TooLarge);
        }
        self.work -= bits + STEP;
        Ok(value)
    }

    fn call(&mut self, function: Function, inner: &BigRational) -> Exactly {
        match function {
            Function::Absolute => Ok(inner.abs()),
            Function::Floor => Ok(inner.floor()),
            Function::Ceiling => Ok(inner.ceil()),
            Function::Factorial => {
                const LARGEST: u32 = 900; // 900! has 7,500 bits
                if !inner.is_integer() || inner.is_negative() {
                    return Err(Stop::Undefined);
                }
                let n = inner.to_integer().to_u32().filter(|n| *n <= LARGEST).ok_or(Stop::TooLarge)?;
                self.pay(u64::from(n) * 32)?;
                Ok(BigRational::from_integer((1..=n).fold(BigInt::one(), |product, i| product * i)))
            }
            Function::Exp | Function::Cos | Function::Cosh | Function::Sec if inner.is_zero() => Ok(BigRational::one()),
            Function::Ln if inner.is_one() => Ok(BigRational::zero()),
            Function::Sin | Function::Tan | Function::Sinh | Function::Tanh | Function::Arcsin | Function::Arctan
                if inner.is_zero() =>
            {
                Ok(BigRational::zero())
            }
            _ => Err(Stop::Irrational),
        }
    }

    fn binomial(&mut self, n: &BigRational, k: &BigRational) -> Exactly {
        const LARGEST: u32 = 2000;
        if !n.is_integer() || !k.is_integer() {
            return Err(Stop::Undefined);
        }
        let whole = |v: &BigRational| v.to_integer().to_u32().filter(|v| *v <= LARGEST);
        let (Some(n), Some(k)) = (whole(n), whole(k)) else { return Err(Stop::TooLarge) };
        if k > n {
            return Ok(BigRational::zero());
        }
        let k = k.min(n - k);
        self.pay(u64::from(k) * 32)?;
        Ok(BigRational::from_integer((0..k).fold(BigInt::one(), |value, i| value * (n - i) / (i + 1))))
    }

    fn pay(&mut self, work: u64) -> Result<(), Stop> {
        self.work = self.work.checked_sub(work).ok_or(Stop::TooLarge)?;
        Ok(())
    }
}

/// The power of a base, where it is rational and within the limits.
fn power(base: BigRational, exponent: &BigRational) -> Exactly {
    if !exponent.is_integer() {
        // b^(p/q) is the q-th root of b, to the power p.
        let index = exponent.denom().to_u32().filter(|i| *i <= 64).ok_or(Stop::Irrational)?;
        if base.is_negative() {
            return Err(Stop::Irrational);
        }
        let base = root(&base, index)?;
        return power(base, &BigRational::from_integer(exponent.numer().clone()));
    }
    if base.is_zero() {
        return match exponent.numer().sign() {
            num_bigint::Sign::Plus => Ok(base),
            num_bigint::Sign::NoSign => Ok(BigRational::one()),
            num_bigint::Sign::Minus => Err(Stop::Undefined),
        };
    }
    if base.is_one() {
        return Ok(base);
    }
    if (-&base).is_one() {
        let is_even = (exponent.numer() % BigInt::from(2)).is_zero();
        return Ok(if is_even { BigRational::one() } else { base });
    }
    let exponent = exponent.numer().to_i32().ok_or(Stop::TooLarge)?;
    let bits = base.numer().bits().max(base.denom().bits()) - 1;
    if bits.max(1).saturating_mul(u64::from(exponent.unsigned_abs())) > MOST_BITS {
        return Err(Stop::TooLarge);
    }
    Ok(base.pow(exponent))
}

/// The logarithm where it is a whole number of at most 1024: found by powers of the base.
fn logarithm(base: &BigRational, inner: &BigRational) -> Exactly {
    if !inner.is_positive() || !base.is_positive() || base.is_one() {
        return Err(Stop::Undefined);
    }
    let guess = (approximate(inner).ln() / approximate(base).ln()).round();
    if guess.is_finite() && guess.abs() <= 1024.0 {
        let exponent = BigRational::from_integer(BigInt::from(guess as i64));
        if power(base.clone(), &exponent)? == *inner {
            return Ok(exponent);
        }
    }
    Err(Stop::Irrational)
}

/// The real root of a perfect power.
fn root(value: &BigRational, index: u32) -> Exactly {
    if value.is_negative() && index.is_multiple_of(2) {
        return Err(Stop::Irrational);
    }
    let (above, below) = (value.numer().nth_root(index), value.denom().nth_root(index));
    if above.pow(index) == *value.numer() && below.pow(index) == *value.denom() {
        Ok(BigRational::new(above, below))
    } else {
        Err(Stop::Irrational)
    }
}

/// The nearest f64, infinite if it is beyond them.
pub(super) fn approximate(value: &BigRational) -> f64 {
    value.to_f64().unwrap_or(f64::NAN)
}

/// The value in f64; not finite where it is undefined. `symbol` gives every symbol its value.
pub(super) fn float(expression: &Expression, symbol: &dyn Fn(&str) -> f64) -> f64 {
    let at = |e: &Expression| float(e, symbol);
    match expression {
        Expression::Number(number) => approximate(&number.value),
        Expression::Symbol(name) => symbol(name),
        Expression::Sum(terms) => terms.iter().map(at).sum(),
        Expression::Product(factors) => factors.iter().map(at).product(),
        Expression::Negative(inner) => -at(inner),
        Expression::Percent(inner) => at(inner) / 100.0,
        Expression::Quotient(above, below) => at(above) / at(below),
        Expression::Power(base, exponent) => at(base).powf(at(exponent)),
        Expression::Root(inner, index) => {
            let inner = at(inner);
            match index {
                2 => inner.sqrt(),
                3 => inner.cbrt(),
                odd if odd % 2 == 1 && inner < 0.0 => -(-inner).powf(1.0 / f64::from(*odd)),
                even => inner.powf(1.0 / f64::from(*even)),
            }
        }
        Expression::Call(function, inner) => call(*function, at(inner)),
        Expression::Logarithm(base, inner) => at(inner).ln() / at(base).ln(),
        Expression::Binomial(..) => Exact::new()
            .value(expression, &|_| BigRational::zero())
            .ok()
            .filter(|_| expression.symbols().is_empty())
            .map_or(f64::NAN, |v| approximate(&v)),
        _ => f64::NAN,
    }
}

fn call(function: Function, x: f64) -> f64 {
    match function {
        Function::Absolute => x.abs(),
        Function::Factorial if x >= 0.0 && x.fract() == 0.0 && x <= 170.0 => (1..=x as u32).map(f64::from).product(),
        Function::Factorial => f64::NAN,
        Function::Floor => x.floor(),
        Function::Ceiling => x.ceil(),
        Function::Exp => x.exp(),
        Function::Ln => x.ln(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
        Function::Tan => x.tan(),
        Function::Cot => x.tan().recip(),
        Function::Sec => x.cos().recip(),
        Function::Csc => x.sin().recip(),
        Function::Arcsin => x.asin(),
        Function::Arccos => x.acos(),
        Function::Arctan => x.atan(),
        Function::Sinh => x.sinh(),
        Function::Cosh => x.cosh(),
        Function::Tanh => x.tanh(),
    }
}
