//! The exact value of an expression at a point, where it is rational (with the imaginary unit), within limits.

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

/// A complex number with rational parts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gauss {
    pub(super) re: BigRational,
    pub(super) im: BigRational,
}

impl Gauss {
    pub(super) fn real(re: BigRational) -> Self {
        Self { re, im: BigRational::zero() }
    }

    pub(super) fn is_zero(&self) -> bool {
        self.re.is_zero() && self.im.is_zero()
    }

    pub(super) fn times(&self, other: &Self) -> Self {
        if self.im.is_zero() && other.im.is_zero() {
            return Self::real(&self.re * &other.re);
        }
        Self { re: &self.re * &other.re - &self.im * &other.im, im: &self.re * &other.im + &self.im * &other.re }
    }

    fn plus(&self, other: &Self) -> Self {
        Self { re: &self.re + &other.re, im: &self.im + &other.im }
    }

    pub(super) fn inverse(&self) -> Option<Self> {
        if self.is_zero() {
            return None;
        }
        if self.im.is_zero() {
            return Some(Self::real(self.re.recip()));
        }
        let norm = &self.re * &self.re + &self.im * &self.im;
        Some(Self { re: &self.re / &norm, im: -&self.im / norm })
    }

    /// The real number that it is.
    fn as_real(&self) -> Result<&BigRational, Stop> {
        if self.im.is_zero() { Ok(&self.re) } else { Err(Stop::Irrational) }
    }
}

/// Evaluates exactly, with a budget of work.
pub(super) struct Exact {
    work: u64,
}

type Exactly = Result<Gauss, Stop>;

impl Exact {
    pub(super) fn new() -> Self {
        Self { work: WORK }
    }

    /// The value of `expression` where a symbol has the value `symbol` gives it.
    pub(super) fn value(&mut self, expression: &Expression, symbol: &dyn Fn(&str) -> BigRational) -> Exactly {
        let result = match expression {
            Expression::Number(number) => Ok(Gauss::real(number.value.clone())),
            Expression::Symbol(name) if name == "i" => Ok(Gauss { re: BigRational::zero(), im: BigRational::one() }),
            Expression::Symbol(name) => Ok(Gauss::real(symbol(name))),
            Expression::Sum(terms) => {
                let mut sum = Gauss::real(BigRational::zero());
                for term in terms {
                    let term = self.value(term, symbol)?;
                    sum = self.within(sum.plus(&term))?;
                }
                Ok(sum)
            }
            Expression::Product(factors) => {
                let mut product = Gauss::real(BigRational::one());
                for factor in factors {
                    let factor = self.value(factor, symbol)?;
                    product = self.within(product.times(&factor))?;
                }
                Ok(product)
            }
            Expression::Negative(inner) => {
                let inner = self.value(inner, symbol)?;
                Ok(Gauss { re: -inner.re, im: -inner.im })
            }
            Expression::Percent(inner) => {
                let hundredth = Gauss::real(BigRational::new(BigInt::one(), BigInt::from(100)));
                Ok(self.value(inner, symbol)?.times(&hundredth))
            }
            Expression::Quantity(inner, unit) => {
                Ok(self.value(inner, symbol)?.times(&Gauss::real(unit.factor.clone())))
            }
            Expression::Quotient(above, below) => self.quotient(above, below, symbol),
            Expression::Ratio(terms) if terms.len() == 2 => self.quotient(&terms[0], &terms[1], symbol),
            Expression::Power(base, exponent) => {
                let (base, exponent) = (self.value(base, symbol)?, self.value(exponent, symbol)?);
                self.power(&base, exponent.as_real()?)
            }
            Expression::Root(inner, index) => {
                let inner = self.value(inner, symbol)?;
                root(inner.as_real()?, *index).map(Gauss::real)
            }
            Expression::Call(function, inner) => {
                let inner = self.value(inner, symbol)?;
                self.call(*function, &inner)
            }
            Expression::Logarithm(base, inner) => {
                let (base, inner) = (self.value(base, symbol)?, self.value(inner, symbol)?);
                logarithm(base.as_real()?, inner.as_real()?).map(Gauss::real)
            }
            Expression::Binomial(n, k) => {
                let (n, k) = (self.value(n, symbol)?, self.value(k, symbol)?);
                self.binomial(n.as_real()?, k.as_real()?)
            }
            Expression::Degrees(inner) => {
                let inner = self.value(inner, symbol)?;
                if inner.is_zero() { Ok(inner) } else { Err(Stop::Irrational) }
            }
            _ => Err(Stop::Undefined),
        };
        result.and_then(|value| self.within(value))
    }

    fn quotient(&mut self, above: &Expression, below: &Expression, symbol: &dyn Fn(&str) -> BigRational) -> Exactly {
        let (above, below) = (self.value(above, symbol)?, self.value(below, symbol)?);
        below.inverse().map(|inverse| above.times(&inverse)).ok_or(Stop::Undefined)
    }

    /// Pays for `value` and refuses it if it is too large.
    fn within(&mut self, value: Gauss) -> Exactly {
        let size = |part: &BigRational| part.numer().bits().max(part.denom().bits());
        let bits = size(&value.re).max(size(&value.im));
        if bits > MOST_BITS || self.work < bits + STEP {
            return Err(Stop::TooLarge);
        }
        self.work -= bits + STEP;
        Ok(value)
    }

    /// The power of a base, where it is rational and within the limits.
    fn power(&mut self, base: &Gauss, exponent: &BigRational) -> Exactly {
        const LARGEST: u64 = 256;
        if base.im.is_zero() {
            return power(base.re.clone(), exponent).map(Gauss::real);
        }
        if !exponent.is_integer() {
            return Err(Stop::Irrational);
        }
        let count = exponent.to_integer().to_i64().ok_or(Stop::TooLarge)?;
        if count.unsigned_abs() > LARGEST {
            return Err(Stop::TooLarge);
        }
        let mut result = Gauss::real(BigRational::one());
        for _ in 0..count.unsigned_abs() {
            result = self.within(result.times(base))?;
        }
        if count < 0 { result.inverse().ok_or(Stop::Undefined) } else { Ok(result) }
    }

    fn call(&mut self, function: Function, inner: &Gauss) -> Exactly {
        if function == Function::Absolute && !inner.im.is_zero() {
            let norm = &inner.re * &inner.re + &inner.im * &inner.im;
            return root(&norm, 2).map(Gauss::real);
        }
        let inner = inner.as_real()?;
        let value = match function {
            Function::Absolute => inner.abs(),
            Function::Floor => inner.floor(),
            Function::Ceiling => inner.ceil(),
            Function::Factorial => {
                const LARGEST: u32 = 900; // 900! has 7,500 bits
                if !inner.is_integer() || inner.is_negative() {
                    return Err(Stop::Undefined);
                }
                let n = inner.to_integer().to_u32().filter(|n| *n <= LARGEST).ok_or(Stop::TooLarge)?;
                self.pay(u64::from(n) * 32)?;
                BigRational::from_integer((1..=n).fold(BigInt::one(), |product, i| product * i))
            }
            Function::Exp | Function::Cos | Function::Cosh | Function::Sec if inner.is_zero() => BigRational::one(),
            Function::Ln if inner.is_one() => BigRational::zero(),
            Function::Sin | Function::Tan | Function::Sinh | Function::Tanh | Function::Arcsin | Function::Arctan
                if inner.is_zero() =>
            {
                BigRational::zero()
            }
            _ => return Err(Stop::Irrational),
        };
        Ok(Gauss::real(value))
    }

    /// n (n - 1) ... (n - k + 1) / k! for a whole k and any n.
    fn binomial(&mut self, n: &BigRational, k: &BigRational) -> Exactly {
        const LARGEST: u32 = 2000;
        const MOST_FACTORS: u32 = 64;
        if !k.is_integer() {
            return Err(Stop::Undefined);
        }
        let mut k = k.clone();
        // Of two whole numbers with 0 <= k <= n the smaller of k and n - k is the shorter way.
        if n.is_integer() && !n.is_negative() {
            if k > *n {
                return Ok(Gauss::real(BigRational::zero()));
            }
            let other = n - &k;
            k = if other < k { other } else { k };
        }
        if k.is_negative() {
            return Err(Stop::Undefined);
        }
        if let (true, Some(n), Some(k)) = (n.is_integer(), n.to_integer().to_u32(), k.to_integer().to_u32())
            && n <= LARGEST
        {
            // Whole all the way, without a common divisor to find.
            self.pay(u64::from(k) * 32)?;
            let value = (0..k).fold(BigInt::one(), |value, i| value * (n - i) / (i + 1));
            return Ok(Gauss::real(BigRational::from_integer(value)));
        }
        let k = k.to_integer().to_u32().filter(|k| *k <= MOST_FACTORS).ok_or(Stop::TooLarge)?;
        let mut value = Gauss::real(BigRational::one());
        for i in 0..k {
            let factor = (n - BigInt::from(i)) / BigInt::from(i + 1);
            value = self.within(value.times(&Gauss::real(factor)))?;
        }
        Ok(value)
    }

    fn pay(&mut self, work: u64) -> Result<(), Stop> {
        self.work = self.work.checked_sub(work).ok_or(Stop::TooLarge)?;
        Ok(())
    }
}

/// The power of a real base, where it is rational and within the limits.
fn power(base: BigRational, exponent: &BigRational) -> Result<BigRational, Stop> {
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
fn logarithm(base: &BigRational, inner: &BigRational) -> Result<BigRational, Stop> {
    if !inner.is_positive() || !base.is_positive() || base.is_one() {
        return Err(Stop::Undefined);
    }
    let guess = (nearest(inner).ln() / nearest(base).ln()).round();
    if guess.is_finite() && guess.abs() <= 1024.0 {
        let exponent = BigRational::from_integer(BigInt::from(guess as i64));
        if power(base.clone(), &exponent)? == *inner {
            return Ok(exponent);
        }
    }
    Err(Stop::Irrational)
}

/// The real root of a perfect power.
fn root(value: &BigRational, index: u32) -> Result<BigRational, Stop> {
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
pub(super) fn nearest(value: &BigRational) -> f64 {
    value.to_f64().unwrap_or(f64::NAN)
}
