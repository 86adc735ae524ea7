//! The countdown task: reach a target with given numbers, each used once.
//!
//! The task and its part credit are those of `TinyZero` (github.com/Jiayi-Pan/TinyZero,
//! `verl/utils/reward_score/countdown.py`): columns `nums` (or `numbers`) and `target`, the answer in `<answer>`.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::Zero;
use serde_json::Value;

use super::Sample;
use super::error::{Error, excerpt};
use super::parameters::Parameters;
use super::registry::Scorer;

const NUMBER_COLUMNS: [&str; 2] = ["nums", "numbers"];
const TARGET_COLUMN: &str = "target";

/// `countdown`: 1 if the completion's last `<answer>` (else last box, else last line that holds arithmetic) is an
/// expression with + - * / and brackets that uses each number exactly once and equals the target, in exact arithmetic;
/// `format_score` if there is an expression but it is wrong; else 0.
///
/// Parameters: `format_score` (default 0.1), `use_all` (default true; false lets numbers be left out).
pub(super) fn countdown(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let format_score =
        parameters.number("format_score", 0.1, "a number between 0 and 1", |s| (0.0..=1.0).contains(&s))?;
    let uses_all = parameters.flag("use_all", true)?;
    let reward = parameters.reward().to_owned();
    Ok(Box::new(move |index, sample| {
        let (numbers, target) = task(&reward, index, sample)?;
        let Some(expression) = find_expression(sample.completion) else { return Ok(Some(0.0)) };
        let is_right = expression.value == target && is_allowed(&expression.numbers, &numbers, uses_all);
        Ok(Some(if is_right { 1.0 } else { format_score }))
    }))
}

fn task(reward: &str, index: usize, sample: &Sample<'_>) -> Result<(Vec<BigInt>, BigRational), Error> {
    let missing = |wanted: &[&str]| Error::MissingColumn {
        reward: reward.to_owned(),
        wanted: wanted.iter().map(|w| (*w).to_owned()).collect(),
        present: sample.row.keys().cloned().collect(),
        index,
        hint: "",
    };
    let wrong = |column: &str, value: &Value, expected| Error::ColumnType {
        reward: reward.to_owned(),
        column: column.to_owned(),
        got: excerpt(&value.to_string()),
        expected,
        index,
    };
    let (column, value) = NUMBER_COLUMNS
        .iter()
        .find_map(|c| sample.row.get(*c).map(|v| (*c, v)))
        .ok_or_else(|| missing(&NUMBER_COLUMNS))?;
    let numbers: Option<Vec<BigInt>> = value.as_array().and_then(|items| items.iter().map(as_integer).collect());
    let numbers = numbers.ok_or_else(|| wrong(column, value, "a list of whole numbers"))?;
    let target = sample.row.get(TARGET_COLUMN).ok_or_else(|| missing(&[TARGET_COLUMN]))?;
    let target = as_integer(target).ok_or_else(|| wrong(TARGET_COLUMN, target, "a whole number"))?;
    Ok((numbers, target.into()))
}

/// A whole number; JSON lines made by pandas write 24 as `24.0`, and some data sets as `"24"`.
fn as_integer(value: &Value) -> Option<BigInt> {
    match value {
        Value::Number(number) => match number.as_i64() {
            Some(whole) => Some(whole.into()),
            None => number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 1e15).map(|f| BigInt::from(f as i64)),
        },
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

fn is_allowed(used: &[BigInt], given: &[BigInt], uses_all: bool) -> bool {
    let mut left = given.to_vec();
    for number in used {
        match left.iter().position(|n| n == number) {
            Some(at) => left.swap_remove(at),
            None => return false,
        };
    }
    left.is_empty() || !uses_all
}

struct Evaluated {
    value: BigRational,
    numbers: Vec<BigInt>,
}

fn find_expression(completion: &str) -> Option<Evaluated> {
    if let Some(end) = completion.rfind("</answer>") {
        let start = completion[..end].rfind("<answer>")? + "<answer>".len();
        return evaluate(&completion[start..end]);
    }
    if completion.contains("\\boxed") {
        let boxed = super::math::final_answer(completion, super::math::Extraction::Boxed)?;
        return evaluate(&boxed);
    }
    let arithmetic = |line: &str| evaluate(line).filter(|e| e.numbers.len() > 1);
    completion.lines().rev().take(20).find_map(arithmetic)
}

/// Evaluates arithmetic; what follows an equals sign is left out.
fn evaluate(text: &str) -> Option<Evaluated> {
    const LONGEST: usize = 400;
    let left = text.split('=').next()?.trim().trim_matches(['$', '`', '*', '.']);
    if left.len() > LONGEST {
        return None;
    }
    let mut plain = left.replace("\\left", "").replace("\\right", "");
    for (written, sign) in
        [("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("–", "-")]
    {
        plain = plain.replace(written, sign);
    }
    let mut reader = Reader { rest: plain.as_str(), numbers: Vec::new(), depth: 0 };
    let value = reader.sum()?;
    reader.rest.trim().is_empty().then_some(Evaluated { value, numbers: reader.numbers })
}

/// Recursive descent over `sum = product (+|- product)*`, `product = atom (*|/ atom)*`.
struct Reader<'a> {
    rest: &'a str,
    numbers: Vec<BigInt>,
    depth: usize,
}

impl Reader<'_> {
    fn eat(&mut self, sign: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(sign) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn sum(&mut self) -> Option<BigRational> {
        let mut value = self.product()?;
        loop {
            if self.eat('+') {
                value += self.product()?;
            } else if self.eat('-') {
                value -= self.product()?;
            } else {
                return Some(value);
            }
        }
    }

    fn product(&mut self) -> Option<BigRational> {
        let mut value = self.atom()?;
        loop {
            if self.eat('*') {
                value *= self.atom()?;
            } else if self.eat('/') {
                let divisor = self.atom()?;
                if divisor.is_zero() {
                    return None;
                }
                value /= divisor;
            } else {
                return Some(value);
            }
        }
    }

    fn atom(&mut self) -> Option<BigRational> {
        const DEEPEST: usize = 64;
        if self.depth >= DEEPEST {
            return None;
        }
        self.depth += 1;
        let value = self.atom_inside();
        self.depth -= 1;
        value
    }

    fn atom_inside(&mut self) -> Option<BigRational> {
        if self.eat('-') {
            return Some(-self.atom()?);
        }
        if self.eat('(') {
            let value = self.sum()?;
            return self.eat(')').then_some(value);
        }
        self.rest = self.rest.trim_start();
        let length = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: BigInt = self.rest[..length].parse().ok()?;
        self.rest = &self.rest[length..];
        self.numbers.push(number.clone());
        Some(number.into())
    }
}

#[cfg(test)]
mod tests {
    use super::{evaluate, find_expression};

    #[test]
    fn arithmetic_is_exact_and_malformed_text_is_none() {
        for (text, expected) in [
            ("(1 + 2) * 3", "9"),
            ("1/3 + 1/6 = 1/2", "1/2"),
            (r"$8 \div \left(3 - 8 \div 3\right)$", "24"),
            ("-(3-5) × 2", "4"),
        ] {
            assert_eq!(evaluate(text).expect(text).value.to_string(), expected, "{text}");
        }
        for text in ["", "1 +", "(1", "1)", "1 // 2", "2 ** 3", "1/(2-2)", "x + 1", "1.5 + 2", "3 4", &"(".repeat(300)]
        {
            assert!(evaluate(text).is_none(), "{text}");
        }
    }

    #[test]
    fn the_answer_is_found_in_tags_boxes_or_the_last_line_with_arithmetic() {
        let value = |text| find_expression(text).map(|e| e.value.to_string());
        assert_eq!(value("1+1 <answer>2*3</answer> 4+4").as_deref(), Some("6"));
        assert_eq!(value(r"so \boxed{2*3}").as_deref(), Some("6"));
        assert_eq!(value("try 1+1\n2 * 5\ndone").as_deref(), Some("10"));
        assert_eq!(value("it is 7"), None);
        assert_eq!(value("7"), None);
    }
}
