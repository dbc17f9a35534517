"""What the set-up says: one line a step, and one sentence when a step fails."""

import contextlib
import re
import subprocess
import time

REMEDIES = (  # the first whose words are in the output
    ("no space left", "The disk is full: the environment needs about 8 GB beside this checkout."),
    (
        "not match the hash",
        "This is not the file that the project pins, so it was not used. Ask where your index got it.",
    ),
    ("ensurepip", "Python's venv module is incomplete: on Debian `apt install python3-venv`, or install uv."),
    ("permission denied|read-only file", "The user who runs the set-up must be allowed to write here."),
    (
        "name resolution|dns error|timed out|connection|connect error|unreachable|error sending request",
        "The package index could not be reached: check the network and the proxy settings.",
    ),
    (
        "no matching dist|no version of|wheels are required",
        "Your package index lacks a locked version for this system.",
    ),
)


class SetupError(Exception):
    """A step that failed, as a sentence for the user: what, why and what to do."""


def remedy(output):
    """What to do about a command that failed with this output."""
    return next((advice for words, advice in REMEDIES if re.search(words, output.lower())), "It said:")


def run(command, env=None, lines=6):
    """Runs a command without input and returns what it printed; raises SetupError with its last lines and a remedy."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise SetupError(f"{command[0]} cannot be started: {error}.") from error
    if done.returncode:
        tail = "\n".join("    " + line for line in done.stdout.strip().splitlines()[-lines:])
        raise SetupError(f"{remedy(done.stdout)}\n{tail}")
    return done.stdout


@contextlib.contextmanager
def step(name):
    """Prints the step's name at once and its seconds when it is done; names the step in a SetupError."""
    print(f"{name:<44}", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except SetupError as failure:
        print("failed", flush=True)
        raise SetupError(f"Set-up stopped at '{name}'. {failure}") from failure
    except OSError as error:
        print("failed", flush=True)
        raise SetupError(f"Set-up stopped at '{name}'. {remedy(str(error))}\n    {error}") from error
    print(f"{time.perf_counter() - start:7.1f} s", flush=True)
