"""Calls one function of a program on the arguments it reads, and writes what it returns as JSON.

Runs inside the sandbox, in the same Python as the program, and knows nothing of what the result should be.
"""

import json
import os
import sys


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return [plain(inner) for inner in sorted(value)]
    return value.tolist() if hasattr(value, "tolist") else value


def main():
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    request = json.loads(sys.stdin.read())
    with open("solution.py", encoding="utf-8") as file:
        source = file.read()
    # Solutions of the kind `class Solution` often leave out what the site that asks for them imports.
    space = {"__name__": "solution"}
    exec("from typing import *", space)
    exec(compile(source, "solution.py", "exec"), space)
    name = request["name"]
    function = space[name] if name in space else getattr(space["Solution"](), name)
    result = function(*request["arguments"])
    json.dump(plain(result), answer, allow_nan=False)
    answer.flush()


main()
