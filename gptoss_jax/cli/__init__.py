# SPDX-License-Identifier: Apache-2.0
"""The `gptoss` command: one file a subcommand, each a typed dataclass that tyro reads.

stdout holds what was asked for and nothing else; remarks and errors go to stderr. A user's mistake
is one line and exit status 2, a traceback is shown with --debug only. Nothing heavy is imported
before a subcommand runs: --help and --version know no jax.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence

import tyro

import gptoss_jax
from gptoss_jax.cli.bench import Bench
from gptoss_jax.cli.chat import Chat
from gptoss_jax.cli.data import Data
from gptoss_jax.cli.finetune import Finetune
from gptoss_jax.cli.generate import Generate
from gptoss_jax.cli.info import Info
from gptoss_jax.cli.output import complain
from gptoss_jax.cli.processes import leave

ABOUT = "OpenAI's gpt-oss in JAX. `gptoss --version` says which version this is."
COMMANDS = {
    "chat": Chat,
    "generate": Generate,
    "finetune": Finetune,
    "data": Data,
    "info": Info,
    "bench": Bench,
}


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    debug = False
    try:
        if list(arguments) == ["--version"]:
            print(gptoss_jax.__version__)
            return 0
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="gptoss", description=ABOUT, args=arguments, sort_subcommands=False
        )
        debug = command.debug
        status = command.run()
        sys.stdout.flush()
        return status
    except SystemExit as end:  # help, or arguments whose mistake tyro has explained
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone; Python must not try to flush what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        report(error, debug)
        return status_of(error)


def report(error: Exception, debug: bool) -> None:
    """One line for a user's mistake; for anything else where to look, too."""
    if debug:
        traceback.print_exc()
    elif status_of(error) == 2:
        complain(str(error))
    else:
        complain(f"{type(error).__name__}: {error}; --debug shows where")


def status_of(error: Exception) -> int:
    """2 for what the user can put right, 1 for the rest."""
    return 2 if isinstance(error, ValueError | OSError | ImportError) else 1


def main() -> None:
    """The `gptoss` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without unicode shows `?`
    status = run(sys.argv[1:])
    leave(status)
    sys.exit(status)
