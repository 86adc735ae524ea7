//! The value of an expression in f64, with a bound on its error.
//!
//! Where roots and functions leave the rational numbers, two values are "equal" if they differ by no more than their
//! errors allow: the rounding of each operation is followed through (running error analysis; Higham, "Accuracy and
//! Stability of Numerical Algorithms", section 3.3). What overflows, underflows or loses all its digits has no value.

use num_complex::Complex64;

use super::evaluate::{Exact, nearest};
use super::expression::{Expression, Function};

/// Half a unit in the last place, relative; the library's functions are within two of them.
const ROUNDING: f64 = f64::EPSILON;

/// Whether values beyond the real numbers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// The square root of a negative number has no value.
    Real,
    /// Principal values.
    Complex,
}

/// A value and a bound on its distance from the true one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ball {
    pub(super) value: Complex64,
    error: f64,
}

impl Ball {
    fn real(value: f64, error: f64) -> Self {
        Self { value: Complex64::new(value, 0.0), error }
    }

    /// The real number that it is, if its imaginary part is none but rounding.
    pub(super) fn as_real(&self) -> Option<f64> {
        (self.value.im.abs() <= 8.0 * self.error).then_some(self.value.re)
    }

    /// Whether two values agree within their errors, and the errors are small enough to say so.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        /// Largest error that still tells values apart, relative to them; and to 1 where both are lost in it.
        const COARSEST: f64 = 1e-9;
        let distance = (self.value - other.value).norm();
        let allowed = 4.0 * (self.error + other.error);
        let size = self.value.norm().max(other.value.norm());
        let scale = if size <= allowed { 1.0 } else { size };
        distance <= allowed && allowed <= COARSEST * scale
    }

    fn add(self, other: Self) -> Self {
        let value = self.value + other.value;
        Self { value, error: self.error + other.error + ROUNDING * value.norm() }
    }

    fn negate(self) -> Self {
        Self { value: -self.value, error: self.error }
    }

    fn multiply(self, other: Self) -> Option<Self> {
        let value = self.value * other.value;
        let (a, b) = (self.value.norm(), other.value.norm());
        let error = a * other.error + b * self.error + self.error * other.error + ROUNDING * value.norm();
        // A product of what is not 0 that is 0 has underflowed.
        let is_lost = value.norm() < f64::MIN_POSITIVE && a > 0.0 && b > 0.0;
        (!is_lost).then_some(Self { value, error })
    }

    fn inverse(self) -> Option<Self> {
        let size = self.value.norm();
        if size <= 2.0 * self.error || size < f64::MIN_POSITIVE {
            return None;
        }
        let value = self.value.inv();
        let error = self.error / (size * (size - self.error)) + ROUNDING * value.norm();
        (value.norm() >= f64::MIN_POSITIVE).then_some(Self { value, error })
    }

    /// The quotient, where the divisor is not 0.
    pub(super) fn over(self, other: Self) -> Option<Self> {
        self.multiply(other.inverse()?)
    }

    /// The value of a function with the size of its derivative here.
    fn apply(self, value: Complex64, slope: f64) -> Option<Self> {
        let error = slope * self.error + 2.0 * ROUNDING * value.norm();
        (value.is_finite() && error.is_finite()).then_some(Self { value, error })
    }

    fn exp(self) -> Option<Self> {
        let value = self.value.exp();
        let size = value.norm();
        (size >= f64::MIN_POSITIVE).then_some(())?;
        // The argument's own rounding counts as much as it is large.
        self.apply(value, size)
    }

    fn ln(self) -> Option<Self> {
        let size = self.value.norm();
        (size > 2.0 * self.error && size > 0.0).then_some(())?;
        self.apply(self.value.ln(), 2.0 / size)
    }
}

/// Evaluates in f64, with a budget of operations.
pub(super) struct Approximate {
    operations: u32,
}

/// Operations that one comparison may spend.
const OPERATIONS: u32 = 200_000;

impl Approximate {
    pub(super) fn new() -> Self {
        Self { operations: OPERATIONS }
    }

    /// The value where `symbol` gives every symbol its own; `None` where it is undefined or out of range.
    pub(super) fn value(
        &mut self,
        expression: &Expression,
        field: Field,
        symbol: &dyn Fn(&str) -> f64,
    ) -> Option<Ball> {
        self.operations = self.operations.checked_sub(1)?;
        let ball = match expression {
            Expression::Number(number) => {
                let value = nearest(&number.value);
                if value == 0.0 && !num_traits::Zero::is_zero(&number.value) {
                    return None;
                }
                let is_exact = number.value.is_integer() && value.abs() < 9e15;
                Ball::real(value, if is_exact { 0.0 } else { ROUNDING * value.abs() })
            }
            Expression::Symbol(name) if name == "i" => Ball { value: Complex64::I, error: 0.0 },
            Expression::Symbol(name) => {
                let value = symbol(name);
                Ball::real(value, ROUNDING * value.abs())
            }
            Expression::Sum(terms) => {
                let mut sum = Ball::real(0.0, 0.0);
                for term in terms {
                    sum = sum.add(self.value(term, field, symbol)?);
                }
                sum
            }
            Expression::Product(factors) => {
                let mut product = Ball::real(1.0, 0.0);
                for factor in factors {
                    product = product.multiply(self.value(factor, field, symbol)?)?;
                }
                product
            }
            Expression::Negative(inner) => self.value(inner, field, symbol)?.negate(),
            Expression::Percent(inner) => {
                self.value(inner, field, symbol)?.multiply(Ball::real(0.01, ROUNDING * 0.01))?
            }
            Expression::Degrees(inner) => {
                let degree = std::f64::consts::PI / 180.0;
                self.value(inner, field, symbol)?.multiply(Ball::real(degree, ROUNDING * degree))?
            }
            Expression::Quantity(inner, unit) => {
                let factor = nearest(&unit.factor);
                self.value(inner, field, symbol)?.multiply(Ball::real(factor, ROUNDING * factor))?
            }
            Expression::Quotient(above, below) => self.quotient(above, below, field, symbol)?,
            Expression::Ratio(terms) if terms.len() == 2 => self.quotient(&terms[0], &terms[1], field, symbol)?,
            Expression::Power(base, exponent) => {
                let (base, exponent) = (self.value(base, field, symbol)?, self.value(exponent, field, symbol)?);
                power(base, exponent)?
            }
            Expression::Root(inner, index) => root(self.value(inner, field, symbol)?, *index)?,
            Expression::Call(function, inner) => call(*function, self.value(inner, field, symbol)?)?,
            Expression::Logarithm(base, inner) => {
                let (base, inner) = (self.value(base, field, symbol)?.ln()?, self.value(inner, field, symbol)?.ln()?);
                inner.multiply(base.inverse()?)?
            }
            Expression::Binomial(..) if expression.symbols().is_empty() => {
                let value = Exact::new().value(expression, &|_| num_traits::Zero::zero()).ok()?;
                let value = nearest(&value.re);
                Ball::real(value, ROUNDING * value.abs())
            }
            _ => return None,
        };
        let is_outside = field == Field::Real && ball.as_real().is_none();
        (ball.value.is_finite() && ball.error.is_finite() && !is_outside).then_some(ball)
    }

    fn quotient(
        &mut self,
        above: &Expression,
        below: &Expression,
        field: Field,
        symbol: &dyn Fn(&str) -> f64,
    ) -> Option<Ball> {
        let (above, below) = (self.value(above, field, symbol)?, self.value(below, field, symbol)?);
        above.over(below)
    }
}

fn power(base: Ball, exponent: Ball) -> Option<Ball> {
    let (b, e) = (base.value, exponent.value);
    if e.im == 0.0 && exponent.error == 0.0 && e.re.fract() == 0.0 && e.re.abs() <= 1024.0 {
        // A whole exponent keeps a negative base real.
        if b.norm() == 0.0 {
            return (e.re > 0.0).then_some(base).or_else(|| (e.re == 0.0).then_some(Ball::real(1.0, 0.0)));
        }
        let value = b.powi(e.re as i32);
        let size = value.norm();
        let relative = e.re.abs() * (base.error / b.norm() + 2.0 * ROUNDING);
        return (size.is_finite() && size >= f64::MIN_POSITIVE)
            .then_some(Ball { value, error: size * (relative + ROUNDING) });
    }
    if b.norm() == 0.0 {
        return None;
    }
    base.ln()?.multiply(exponent)?.exp()
}

fn root(inner: Ball, index: u32) -> Option<Ball> {
    if inner.value.norm() == 0.0 {
        return Some(Ball { value: inner.value, error: inner.error.powf(1.0 / f64::from(index)) });
    }
    let is_real = inner.value.im == 0.0;
    let value = match (is_real, inner.value.re < 0.0, index) {
        (true, false, 2) => Complex64::new(inner.value.re.sqrt(), 0.0),
        (true, _, 3) => Complex64::new(inner.value.re.cbrt(), 0.0),
        (true, true, odd) if odd % 2 == 1 => Complex64::new(-(-inner.value.re).powf(1.0 / f64::from(odd)), 0.0),
        (true, true, 2) => Complex64::new(0.0, (-inner.value.re).sqrt()),
        _ => inner.value.powf(1.0 / f64::from(index)),
    };
    let slope = value.norm() / (f64::from(index) * inner.value.norm());
    // A radicand within its error of 0 may be 0.
    let slope = if inner.value.norm() <= 2.0 * inner.error { f64::INFINITY } else { slope };
    if slope.is_infinite() {
        let error = (4.0 * inner.error).powf(1.0 / f64::from(index));
        return Some(Ball { value: Complex64::new(0.0, 0.0), error });
    }
    inner.apply(value, 2.0 * slope)
}

fn call(function: Function, inner: Ball) -> Option<Ball> {
    let z = inner.value;
    let one = Complex64::new(1.0, 0.0);
    match function {
        Function::Absolute => {
            let size = z.norm();
            Some(Ball::real(size, inner.error + ROUNDING * size))
        }
        Function::Factorial => {
            const LARGEST: f64 = 170.0;
            let n = inner.as_real()?.round();
            let is_whole = (z.re - n).abs() <= 4.0 * inner.error && inner.error < 1e-3;
            if !is_whole || !(0.0..=LARGEST).contains(&n) {
                return None;
            }
            let value: f64 = (1..=n as u32).map(f64::from).product();
            Some(Ball::real(value, n * ROUNDING * value))
        }
        Function::Floor | Function::Ceiling => {
            let x = inner.as_real()?;
            // Beside a jump the rounding decides, which it must not.
            if inner.error > 0.0 && (x - x.round()).abs() <= 8.0 * inner.error {
                return None;
            }
            Some(Ball::real(if function == Function::Floor { x.floor() } else { x.ceil() }, 0.0))
        }
        Function::Exp => inner.exp(),
        Function::Ln => inner.ln(),
        Function::Sin => inner.apply(z.sin(), z.cos().norm() + inner.error),
        Function::Cos => inner.apply(z.cos(), z.sin().norm() + inner.error),
        Function::Tan => call(Function::Sin, inner)?.multiply(call(Function::Cos, inner)?.inverse()?),
        Function::Cot => call(Function::Cos, inner)?.multiply(call(Function::Sin, inner)?.inverse()?),
        Function::Sec => call(Function::Cos, inner)?.inverse(),
        Function::Csc => call(Function::Sin, inner)?.inverse(),
        Function::Arcsin | Function::Arccos => {
            let is_sine = function == Function::Arcsin;
            let value = match inner.as_real() {
                Some(x) if x.abs() <= 1.0 => Complex64::new(if is_sine { x.asin() } else { x.acos() }, 0.0),
                _ if is_sine => z.asin(),
                _ => z.acos(),
            };
            // The slope is infinite at 1 and -1, where the error grows to its root.
            let rest = (one - z * z).norm().sqrt().max(inner.error.sqrt());
            inner.apply(value, if rest > 0.0 { 2.0 / rest } else { 0.0 })
        }
        Function::Arctan => {
            let value = if z.im == 0.0 { Complex64::new(z.re.atan(), 0.0) } else { z.atan() };
            inner.apply(value, 1.0 / (one + z * z).norm().max(f64::MIN_POSITIVE))
        }
        Function::Sinh => inner.apply(z.sinh(), z.cosh().norm()),
        Function::Cosh => inner.apply(z.cosh(), z.sinh().norm() + inner.error),
        Function::Tanh => inner.apply(z.tanh(), 1.0 / z.cosh().norm_sqr().max(f64::MIN_POSITIVE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real(value: f64) -> Ball {
        Ball::real(value, ROUNDING * value.abs())
    }

    #[test]
    fn what_rounding_explains_agrees_and_nothing_else() {
        let pi = real(std::f64::consts::PI);
        let zero = Ball::real(0.0, 0.0);
        assert!(call(Function::Sin, pi).is_some_and(|s| s.agrees(&zero)));
        // e^-30 is small and is not 0; e^-1000 is below every f64.
        assert!(real(-30.0).exp().is_some_and(|e| !e.agrees(&zero)));
        assert!(real(-1000.0).exp().is_none());
        assert!(real(1000.0).exp().is_none());
        assert!(!real(1.0).agrees(&real(1.0 + 1e-12)));
        assert!(call(Function::Sin, real(1e20)).is_some_and(|s| !s.agrees(&s)), "no digit of it is known");
    }
}
