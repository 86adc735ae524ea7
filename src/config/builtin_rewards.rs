//! The built-in rewards as the reference page and `trainer config --explain` list them. What they do is in the `reward`
//! room, whose tests compare its names with these.

use std::fmt::Write as _;

/// A built-in reward for the reader of the page.
struct BuiltinReward {
    name: &'static str,
    /// Other names, separated by commas.
    also: &'static str,
    gives: &'static str,
    parameters: &'static [(&'static str, &'static str)],
}

const COLUMN: (&str, &str) = ("column", "the column of the right answer; default `answer`, else `solution`");
const BOXED: (&str, &str) = ("require_boxed", "take answers from `\\boxed{}` only; default false");
const PROMPT: (&str, &str) =
    ("count_prompt", "a `<think>` at the end of the prompt counts as the completion's; default true");
const NGRAM: (&str, &str) = ("ngram_size", "default 3; also `repetition_n_grams`");
const PENALTY: (&str, &str) = ("max_penalty", "at most 0, default -1; also `repetition_max_penalty`");
const WRONG_END: (&str, &str) = ("max_value_wrong", "a wrong answer at the longest length; default -0.5");
const RIGHT_END: (&str, &str) = ("min_value_correct", "a right answer at the longest length; default 0.5");
const RIGHT_START: (&str, &str) = ("max_value_correct", "a right answer of no length; default 1");

const REWARDS: &[BuiltinReward] = &[
    BuiltinReward {
        name: "accuracy",
        also: "",
        gives: "1 if the final answer equals the right one, else 0; null if the right one cannot be read. The answer is the \
                last `\\boxed{}`, else `<answer>`, else what follows \"the answer is\", else the last number; reasoning in \
                `<think>` does not count (TRL's and open-r1's `accuracy_reward`)",
        parameters: &[COLUMN, BOXED],
    },
    BuiltinReward {
        name: "reasoning_accuracy",
        also: "",
        gives: "as `accuracy`, behind the last delimiter; 0 without one (TRL)",
        parameters: &[COLUMN, BOXED, ("reasoning_delimiters", "default `</think>`")],
    },
    BuiltinReward {
        name: "exact_match",
        also: "",
        gives: "1 if the completion is the column's text, spaces at its ends aside, else 0",
        parameters: &[
            COLUMN,
            ("ignore_case", "default false"),
            ("extract", "compare the final answer instead of the whole completion; default false"),
        ],
    },
    BuiltinReward {
        name: "numeric_match",
        also: "",
        gives: "1 if the final answer is a number within the tolerance, else 0",
        parameters: &[COLUMN, BOXED, ("tolerance", "default 1e-6"), ("relative_tolerance", "default 0")],
    },
    BuiltinReward {
        name: "contains",
        also: "",
        gives: "1 if the completion contains one of the texts, else 0",
        parameters: &[("text", "a text or a list; default: the column"), COLUMN, ("ignore_case", "default false")],
    },
    BuiltinReward {
        name: "regex",
        also: "",
        gives: "1 if the pattern is found in the completion, else 0",
        parameters: &[("pattern", "required"), ("full_match", "default false")],
    },
    BuiltinReward {
        name: "think_format",
        also: "",
        gives: "1 if the completion is `<think>...</think>` and then anything, else 0 (TRL)",
        parameters: &[PROMPT],
    },
    BuiltinReward {
        name: "format",
        also: "",
        gives: "1 if it starts with `<think>`, `</think>`, `<answer>`, `</answer>` on lines of their own, else 0 (open-r1)",
        parameters: &[("newlines", "false is `tag_format`; default true"), PROMPT],
    },
    BuiltinReward {
        name: "tag_format",
        also: "",
        gives: "1 if it is exactly `<think>...</think><answer>...</answer>`, each tag once, else 0",
        parameters: &[("newlines", "tags need lines of their own; default false"), PROMPT],
    },
    BuiltinReward {
        name: "tag_count",
        also: "",
        gives: "a quarter for each of `<think>\\n`, `\\n</think>\\n`, `\\n<answer>\\n`, `\\n</answer>` that is there once (open-r1)",
        parameters: &[("newlines", "false counts the bare tags; default true"), PROMPT],
    },
    BuiltinReward {
        name: "reasoning_steps",
        also: "",
        gives: "a third for each `Step 1:`, `First,`, `Second,`, `Next,`, `Finally,` and line that starts with `-` or `*`, 1 at \
                most (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "length",
        also: "`len_reward`",
        gives: "0.5 - (n - least) / (most - least) for n characters among the completions of a batch; at most 0 for a wrong \
                answer (open-r1; Kimi k1.5)",
        parameters: &[COLUMN, BOXED],
    },
    BuiltinReward {
        name: "cosine",
        also: "",
        gives: "accuracy scaled by a cosine of the characters: a short right answer and a long wrong one are worth more (open-r1; \
                2502.03373)",
        parameters: &[
            COLUMN,
            BOXED,
            (
                "min_value_wrong",
                "a wrong answer of no length; default 0; this and the next four also with `cosine_` in front",
            ),
            WRONG_END,
            RIGHT_END,
            RIGHT_START,
            ("max_len", "characters; default 1000; the curve turns back beyond"),
        ],
    },
    BuiltinReward {
        name: "cosine_scaled",
        also: "`get_cosine_scaled_reward`",
        gives: "as `cosine`, in tokens, and flat beyond the longest length (TRL)",
        parameters: &[
            COLUMN,
            BOXED,
            (
                "min_value_wrong",
                "a wrong answer of no length; default -1; this and the next four also with `cosine_` in front",
            ),
            WRONG_END,
            RIGHT_END,
            RIGHT_START,
            ("max_len", "tokens; default `max_completion_length`"),
        ],
    },
    BuiltinReward {
        name: "length_penalty",
        also: "`soft_overlong_punishment`, `get_soft_overlong_punishment`",
        gives: "0 up to the longest length less the cache, then falling to -1 (TRL, open-r1; DAPO, 2503.14476)",
        parameters: &[
            ("max_completion_len", "tokens; default `max_completion_length`"),
            ("soft_punish_cache", "tokens; default a fifth of it"),
        ],
    },
    BuiltinReward {
        name: "repetition_penalty",
        also: "",
        gives: "the share of repeated n-grams of words, times the penalty (open-r1; 2502.03373)",
        parameters: &[NGRAM, PENALTY],
    },
    BuiltinReward {
        name: "token_repetition_penalty",
        also: "`get_repetition_penalty_reward`",
        gives: "the same over tokens (TRL)",
        parameters: &[NGRAM, PENALTY],
    },
    BuiltinReward {
        name: "code_format",
        also: "`get_code_format_reward`",
        gives: "1 if the completion is laid out as for `format`, with a code block in the answer, else 0 (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "code",
        also: "",
        gives: "the share of the tests in `verification_info` that the completion's code passes, in a sandbox (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "binary_code",
        also: "",
        gives: "1 if the code passes all tests in `verification_info`, else 0 (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "cf_code",
        also: "",
        gives: "Codeforces problems: tests in `official_tests`, checkers in `generated_checker` (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "ioi_code",
        also: "",
        gives: "olympiad problems in C++: 1 if all tests in `test_cases` pass, else 0 (open-r1)",
        parameters: &[],
    },
    BuiltinReward {
        name: "countdown",
        also: "",
        gives: "1 if the answer is arithmetic with each of `nums` once that gives `target`, else `format_score` for arithmetic, \
                else 0 (TinyZero)",
        parameters: &[("format_score", "default 0.1"), ("use_all", "default true")],
    },
];

/// The section of the reference page.
pub(super) fn section() -> String {
    let mut page = String::from(
        "\n### Built-in rewards\n\nNames with the suffix `_reward`, as TRL and open-r1 write them, are the same rewards. \
         Columns of the data set that a reward needs must be there; a reward that does not apply to a row leaves it out of \
         the weighted sum.\n\n| reward | also | what it gives | parameters |\n| --- | --- | --- | --- |\n",
    );
    for reward in REWARDS {
        let parameters: Vec<String> =
            reward.parameters.iter().map(|(name, text)| format!("`{name}` ({text})")).collect();
        let _ =
            writeln!(page, "| `{}` | {} | {} | {} |", reward.name, reward.also, reward.gives, parameters.join("; "));
    }
    page
}

/// What one built-in is, in a few lines of plain text.
pub(super) fn explain(name: &str) -> Option<String> {
    let plain = name.strip_suffix("_reward").unwrap_or(name);
    let is_named = |reward: &&BuiltinReward| {
        reward.name == plain || reward.also.split(", ").any(|also| also.trim_matches('`') == name)
    };
    let reward = REWARDS.iter().find(is_named)?;
    let mut text = format!("{}, a built-in of `reward_funcs`\n  {}\n", reward.name, reward.gives);
    for (name, what) in reward.parameters {
        let _ = writeln!(text, "  {name}: {what}");
    }
    Some(text)
}

/// The names of all, for `--explain reward_funcs`.
pub(super) fn names() -> String {
    REWARDS.iter().map(|reward| reward.name).collect::<Vec<_>>().join(", ")
}
