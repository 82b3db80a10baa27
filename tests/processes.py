"""Child processes of tests: programs that end in their own way, and several in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs scripts one after the other, each as ``python SCRIPT ARGUMENTS`` would: with its
# own folder on the path of modules and without what others imported from the
# repository, so that what is imported from elsewhere is imported once.
_IN_TURN = """
import contextlib, io, json, pathlib, runpy, sys
prelude, root, commands = json.loads(sys.argv[1])
path = sys.path[1:]
local = {"examples"}
for folder in ("scripts", "benchmarks"):
    local |= {file.stem for file in pathlib.Path(root, folder).glob("*.py")}
exec(prelude)
ends = []
for script, *arguments in commands:
    sys.path[:] = [str(pathlib.Path(script).parent), *path]
    for name in [name for name in sys.modules if name.split(".")[0] in local]:
        del sys.modules[name]
    sys.argv, code, output = [script, *arguments], None, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    is_message = not isinstance(code, int | None)
    text = output.getvalue() + (f"{code}\\n" if is_message else "")
    ends.append((1 if is_message else int(code or 0), text))
print(json.dumps(ends))
"""


def run_python(*arguments, cwd=ROOT, env=None, timeout=600):
    """Run Python in a child process; returns its end, output and errors.

    ``env`` is added to the environment.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def run_in_turn(commands, *, prelude="", cwd=ROOT, env=None, timeout=600):
    """Run scripts with arguments in one child process.

    Returns, for each, the status it ends with and all it prints.  An error that a
    script does not catch fails the test.
    """
    commands = [
        [str(ROOT / script), *map(str, arguments)] for script, *arguments in commands
    ]
    data = json.dumps([prelude, str(ROOT), commands])
    done = run_python("-c", _IN_TURN, data, cwd=cwd, env=env, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [tuple(end) for end in json.loads(done.stdout)]
