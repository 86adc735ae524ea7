//! Rewards through their public interface: the tables of answer pairs and of formulas, every built-in, reward programs
//! and functions in Python with their failures.

#[path = "reward/arithmetic.rs"]
mod arithmetic;
#[path = "reward/builtins.rs"]
mod builtins;
#[path = "reward/code.rs"]
mod code;
#[path = "reward/formulas.rs"]
mod formulas;
#[path = "reward/math_answers.rs"]
mod math_answers;
#[path = "reward/math_pairs.rs"]
mod math_pairs;
#[path = "reward/programs.rs"]
mod programs;
#[path = "reward/python.rs"]
mod python;
