"""Reward functions as TRL has them, for example:

    reward_funcs:
      - accuracy
      - scripts/rewards/functions.py:brevity
      - {kind: scripts/rewards/functions.py:keywords, words: [because, so]}

Each takes lists with one entry per completion, by name: `prompts`, `completions`, the columns of the data set, and more
(docs/config.md). It returns one number per completion, or None where it does not apply.
"""


def text_of(completion):
    """The text of a completion: a list of messages where prompts are conversations, else a text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def brevity(completions, limit=200, **kwargs):
    """1 for an empty completion, falling to 0 at `limit` characters."""
    return [max(0.0, 1.0 - len(text_of(completion)) / limit) for completion in completions]


def keywords(completions, words, log_metric, **kwargs):
    """The share of `words` that a completion has."""
    scores = [sum(word in text_of(completion) for word in words) / len(words) for completion in completions]
    log_metric("keywords/best", max(scores))
    return scores


async def agrees(completions, answer=None, **kwargs):
    """Whether the answer occurs in the completion; does not apply to rows without one. A judge elsewhere would be awaited."""
    if answer is None:
        return [None] * len(completions)
    return [None if right is None else str(right) in text_of(text) for text, right in zip(completions, answer)]
