"""What there is to read: the code behind one traced step of TSO-ALRA, and the rooms of the package.

    python benchmarks/reading_cost.py
    python benchmarks/reading_cost.py --package ../before   # another checkout, for a comparison

The step evaluates a small network with ``signals=wants_signals(state)``, updates by
``tso_alra(1e-2, switch_at=3)`` and applies the updates. Construction and ``init`` are not part of
it. The profiler notes each function of optalr that is entered while jax traces the step.

Code lines are lines that are neither blank nor comment nor docstring. A comment line holds a
comment, on its own or behind code; remarks to tools (``noqa``, ``fmt``, ``type``) are none.
"""

import argparse
import ast
import collections
import io
import pathlib
import re
import sys
import tokenize

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
TO_TOOLS = re.compile(r"#\s*(noqa|fmt|type|pyright|ruff|pragma)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> frozenset[int]:
    """Return the numbers of the lines that are neither blank nor comment nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return frozenset(lines)


def comment_lines(source: str) -> int:
    """Return how many lines hold a comment that is meant for a reader."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not TO_TOOLS.match(comment) for comment in comments)


def entered_functions(call, package: pathlib.Path):
    """Return the functions of the package that ``call`` enters, as (file, line, name)."""
    entered = set()

    def note(frame, event, _):
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(f"{package}/"):
                entered.add((code.co_filename, code.co_firstlineno, code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    # Comprehensions and the bodies of classes and modules are no functions of their own.
    return {entry for entry in entered if not entry[2].startswith("<") or entry[2] == "<lambda>"}


def traced_step():
    """Return a function without arguments that traces one step."""
    import jax
    import jax.numpy as jnp
    import optax

    import optalr

    def predict(params, x, y):
        hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None])
        return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]

    def cross_entropy(logits, x, y):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    tx = optalr.tso_alra(1e-2, switch_at=3)
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(predict, cross_entropy))
    params = {
        "in": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)},
        "out": {"kernel": jnp.ones((5, 4)), "bias": jnp.zeros(4)},
    }
    state = tx.init(params)

    def step(params, state, x, y):
        flag = optalr.wants_signals(state)
        loss, grads, extras = evaluate(params, x, y, signals=flag)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, loss

    return lambda: jax.make_jaxpr(step)(params, state, jnp.ones((8, 6)), jnp.zeros(8, jnp.int32))


def print_step(package: pathlib.Path) -> None:
    entered = entered_functions(traced_step(), package)
    files = sorted({file for file, _, _ in entered})
    sources = {file: pathlib.Path(file).read_text() for file in files}
    functions = collections.Counter(file for file, _, _ in entered)
    print(f"One traced step of TSO-ALRA:\n\n{'code':>6} {'functions':>10}  module")
    for file in files:
        name = pathlib.Path(file).relative_to(package)
        print(f"{len(code_lines(sources[file])):6} {functions[file]:10}  {name}")
    code = sum(len(code_lines(source)) for source in sources.values())
    lines = sum(source.count("\n") for source in sources.values())
    print(f"\n{len(files)} modules, {code} code lines ({lines} lines), {len(entered)} functions")


def print_rooms(package: pathlib.Path) -> None:
    rooms, folders = collections.defaultdict(list), collections.Counter()
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        rooms[parts[0].removesuffix(".py")].append(path.read_text())
        if path.name != "__init__.py":
            folders[path.parent.relative_to(package.parent)] += 1
    rooms["all of it"] = [source for sources in rooms.values() for source in sources]
    print(f"\n{'room':14} {'modules':>8} {'code':>6} {'comment lines per thousand lines':>33}")
    for room, sources in rooms.items():
        lines = sum(source.count("\n") for source in sources)
        comments = 1000 * sum(map(comment_lines, sources)) / max(lines, 1)
        code = sum(len(code_lines(source)) for source in sources)
        print(f"{room:14} {len(sources):8} {code:6} {comments:33.0f}")
    kronecker = sorted(package.glob("transforms/kronecker/*.py")) or sorted(
        package.glob("transforms/*kronecker*.py")  # before the method had a folder
    )
    code = sum(len(code_lines(path.read_text())) for path in kronecker)
    print(f"\ntransforms/kronecker: {len(kronecker)} files, {code} code lines")
    (folder, modules), *_ = folders.most_common(1)
    print(f"largest folder: {folder}, {modules} modules besides __init__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=pathlib.Path, help="root of another checkout")
    args = parser.parse_args()
    root = args.package.resolve() if args.package else pathlib.Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    import optalr

    package = pathlib.Path(optalr.__file__).parent
    if package.parent != root:
        raise SystemExit(f"optalr came from {package.parent}, not from {root}.")
    print_step(package)
    print_rooms(package)


if __name__ == "__main__":
    main()
