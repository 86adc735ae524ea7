//! Rewards through their public interface: the table of answer pairs, every built-in, reward programs and
//! functions in Python with their failures.

#[path = "reward/arithmetic.rs"]
mod arithmetic;
#[path = "reward/builtins.rs"]
mod builtins;
#[path = "reward/code.rs"]
mod code;
#[path = "reward/math_pairs.rs"]
mod math_pairs;
#[path = "reward/programs.rs"]
mod programs;
#[path = "reward/python.rs"]
mod python;
