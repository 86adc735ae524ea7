"""Calls reward functions that are written in Python, for a trainer that is not.

Started once a run, under any Python from 3.8 on, with nothing but the standard library. Speaks JSON, one message a
line: standard input brings messages, standard output takes answers. User code gets neither: what it prints goes to
standard error, and what it reads is empty.

    -> {"search": [folder, ...], "functions": [{"target": "rewards.py:score", "arguments": {...}}, ...]}
    <- {"python": "3.11.7", "functions": [{"name": "score", "is_async": false}, ...]}
    -> {"batch": {"prompts": [...], "completions": [...], "completion_ids": [...], "columns": {...}, "state": {...}}}
    -> {"id": 1, "call": [0], "seconds": 60}
    <- {"id": 1, "scores": [[...]], "metrics": {name: [value, ...]}, "columns": {name: [value, ...]}, "printed": 0}

An answer may be {"id": ..., "error": {"kind": ..., "function": index, ...}} instead. Functions are called as TRL calls
them (`GRPOTrainer._calculate_rewards` in 1.16): with `prompts`, `completions`, `completion_ids`, every other column of
the data set, `trainer_state`, `log_extra` and `log_metric` as keyword arguments. One that takes no `**kwargs` gets
those that it names.
"""

import asyncio
import difflib
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback

HERE = "<reward helper>"
LARGEST = 3.4028234663852886e38  # of 32 bits: rewards are trained on in them
LONGEST_TRACEBACK = 8000


class Problem(Exception):
    """What is wrong with a function, in the form of an answer's `error`."""

    def __init__(self, kind, **details):
        super().__init__(kind)
        self.details = dict(details, kind=kind)


class TrainerState:
    """What TRL's functions find in `trainer_state`: the counters of transformers' `TrainerState`."""

    def __init__(self, values):
        self.__dict__.update(values)

    def __getattr__(self, name):
        raise AttributeError(f"`trainer_state` has no `{name}` here; it has {', '.join(sorted(self.__dict__))}")


def take_over_streams():
    """Keeps the two pipes for the protocol and gives user code others in their place."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = Counted(sys.stderr)
    return requests, answers


class Counted:
    """Standard output of user code: goes to standard error, and is counted so that its reader can be told."""

    def __init__(self, stream):
        self.stream, self.written = stream, 0

    def write(self, text):
        self.written += len(text)
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def trace(error):
    """The traceback without this file's frames."""
    seen, stack = set(), [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        frame = one.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename.startswith((HERE, "<frozen importlib")):
            frame = frame.tb_next
        one.__traceback__ = frame
        stack += [one.__cause__, one.__context__]
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    return text if len(text) <= LONGEST_TRACEBACK else "..." + text[-LONGEST_TRACEBACK:]


# -- loading ----------------------------------------------------------------------------------------------------------


def load_module(place, search, files):
    """Imports a module by its dotted name, or a file by its path."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    candidates = [place] if os.path.isabs(place) else [os.path.join(folder, place) for folder in search]
    path = next((os.path.realpath(path) for path in candidates if os.path.isfile(path)), None)
    if path is None:
        raise Problem("file", looked=candidates)
    if path not in files:
        name = os.path.splitext(os.path.basename(path))[0]
        if name in sys.modules or name in getattr(sys, "stdlib_module_names", ()):
            name = f"rewards_of_{name}"
        folder = os.path.dirname(path)
        if folder not in sys.path:
            # Behind the others: a neighbour of the file must not stand in for a module of the library.
            sys.path.append(folder)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        files[path] = module
    return files[path]


def callable_name(function):
    """The name in the metrics, as TRL's `get_callable_name`."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function):
    """Whether a call gives a coroutine, as TRL's `is_async_callable`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))


def functions_in(module):
    public = [name for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
    return [name for name in public if not inspect.isclass(getattr(module, name))]


class Function:
    """One reward function."""

    def __init__(self, target, arguments, search, files):
        if ":" in target:
            place, attribute = target.rsplit(":", 1)
        else:
            place, attribute = target.rsplit(".", 1)
        try:
            module = load_module(place, search, files)
        except ModuleNotFoundError as error:
            own = error.name is not None and (place == error.name or place.startswith(error.name + "."))
            raise Problem("missing", module=error.name, is_own=own, looked=search, traceback=trace(error)) from None
        except Problem:
            raise
        except BaseException as error:
            raise Problem("import", traceback=trace(error)) from None
        try:
            function = functools.reduce(getattr, attribute.split("."), module)
        except AttributeError:
            names = functions_in(module)
            near = difflib.get_close_matches(attribute, names, 1)
            raise Problem("attribute", attribute=attribute, near=near, names=names[:20]) from None
        if inspect.isclass(function) or not callable(function):
            raise Problem("callable", got=describe(function))
        self.target, self.function, self.arguments = target, function, arguments
        self.name, self.is_async = callable_name(function), is_async(function)
        self.takes, self.needs, self.takes_all = None, [], True
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in named}
        self.needs = [p.name for p in named if p.default is p.empty]
        unknown = sorted(set(arguments) - self.takes)
        if unknown and not self.takes_all:
            raise Problem("argument", argument=unknown[0], names=sorted(self.takes))

    def keywords(self, offered):
        offered = {**offered, **self.arguments}
        missing = [name for name in self.needs if name not in offered]
        if missing:
            raise Problem("column", missing=missing, columns=sorted(offered))
        return offered if self.takes_all else {name: value for name, value in offered.items() if name in self.takes}


# -- calling ----------------------------------------------------------------------------------------------------------


class Batch:
    """What functions are called with, and what they log."""

    def __init__(self, message):
        self.count = len(message["completions"])
        self.metrics, self.columns = {}, {}
        self.offered = {
            **message["columns"],
            "prompts": message["prompts"],
            "completions": message["completions"],
            "completion_ids": message["completion_ids"],
            "trainer_state": TrainerState(message["state"]),
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }

    def log_extra(self, column, values):
        self.columns.setdefault(str(column), []).extend(plain(value) for value in values)

    def log_metric(self, name, value):
        self.metrics.setdefault(str(name), []).append(float(value))


def plain(value):
    """A value as JSON has it; what JSON does not have is its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def describe(value):
    text = repr(value)
    return f"{text[:100]}{'...' if len(text) > 100 else ''} ({type(value).__name__})"


def scores_of(result, count):
    """The scores as floats and None. Arrays and tensors are lists; NaN is None, as for TRL."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if callable(result):
        raise Problem("factory")
    if result is None or isinstance(result, (str, bytes, dict)) or not hasattr(result, "__iter__"):
        raise Problem("result", got=describe(result), expected=count)
    result = list(result)
    if len(result) != count:
        raise Problem("count", got=len(result), expected=count)
    return [score_of(index, score) for index, score in enumerate(result)]


def score_of(index, score):
    try:
        if score is None:
            return None
        if isinstance(score, (str, bytes)):
            raise TypeError
        number = float(score.item() if hasattr(score, "item") else score)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise Problem("score", index=index, got=describe(score)) from None
    if math.isnan(number):
        return None
    if abs(number) > LARGEST:
        raise Problem("score", index=index, got=describe(score))
    return number


def call(function, batch, loop):
    result = function.function(**function.keywords(batch.offered))
    if inspect.isawaitable(result):
        result = loop.run_until_complete(result)
    return scores_of(result, batch.count)


def place_of(coroutine):
    """Where a coroutine waits, from the outermost call to the innermost."""
    lines = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None and frame.f_code.co_filename != HERE:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}')
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return "\n".join(lines)


def call_together(functions, batch, loop, seconds):
    """Awaits async functions side by side; the first failure is that of the first function that has one."""

    async def invoke(function):
        return await function.function(**function.keywords(batch.offered))

    async def all_of_them():
        tasks = [asyncio.ensure_future(invoke(function)) for function in functions]
        _, pending = await asyncio.wait(tasks, timeout=seconds)
        places = {task: place_of(task.get_coro()) for task in pending}
        for task in pending:
            task.cancel()
        return tasks, places

    tasks, places = loop.run_until_complete(all_of_them())
    for index, task in enumerate(tasks):
        if task in places:
            yield index, Problem("timeout", traceback=places[task])
        else:
            error = task.exception()
            yield index, error if error is not None else functools.partial(scores_of, task.result(), batch.count)


def answer_call(request, functions, batch, loop):
    indices, seconds = request["call"], request["seconds"]
    chosen = [functions[index] for index in indices]
    current, scores = indices[0], []
    batch.metrics, batch.columns = {}, {}
    if not chosen[0].is_async:
        # Shows where the function is, just before the trainer loses its patience.
        faulthandler.dump_traceback_later(max(seconds * 0.9, seconds - 0.5), exit=False)
    try:
        if not chosen[0].is_async:
            scores.append(call(chosen[0], batch, loop))
        else:
            for place, outcome in call_together(chosen, batch, loop, max(seconds * 0.85, seconds - 1)):
                current = indices[place]
                if isinstance(outcome, BaseException):
                    raise outcome
                scores.append(outcome())
    except Problem as problem:
        return {"error": dict(problem.details, function=current)}
    except BaseException as error:
        return {"error": {"kind": "raised", "function": current, "traceback": trace(error)}}
    finally:
        faulthandler.cancel_dump_traceback_later()
    return {"scores": scores, "metrics": plain(batch.metrics), "columns": batch.columns}


def main():
    requests, answers = take_over_streams()

    def write(message):
        sys.stderr.flush()
        # Texts of user code may hold halves of surrogate pairs, which are no text outside of Python.
        answers.write(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        answers.flush()

    setup = json.loads(requests.readline())
    sys.path[:] = setup["search"] + [folder for folder in sys.path if folder not in ("", *setup["search"])]
    functions, files = [], {}
    for index, item in enumerate(setup["functions"]):
        try:
            functions.append(Function(item["target"], item["arguments"], setup["search"], files))
        except Problem as problem:
            write({"error": dict(problem.details, function=index)})
            return
    version = ".".join(str(part) for part in sys.version_info[:3])
    loaded = [{"name": function.name, "is_async": function.is_async} for function in functions]
    write({"python": version, "functions": loaded})
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    batch = None
    for line in requests:
        request = json.loads(line)
        if "batch" in request:
            batch = Batch(request["batch"])
        else:
            before = sys.stdout.written if isinstance(sys.stdout, Counted) else 0
            answer = answer_call(request, functions, batch, loop)
            printed = sys.stdout.written - before if isinstance(sys.stdout, Counted) else 0
            write(dict(answer, id=request["id"], printed=printed))


main()
