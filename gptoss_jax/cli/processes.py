# SPDX-License-Identifier: Apache-2.0
"""One command run by several processes: the options, and what they compare before they begin.

Every process is given the same command. The first one prints; a mistake on one ends all of them,
with the same exit status, and each says what it was. ../distributed.py does the work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from gptoss_jax.cli import output
from gptoss_jax.cli.values import Count, Flag, Text

T = TypeVar("T")

Seconds = Annotated[float, tyro.conf.arg(metavar="SECONDS")]


@dataclass(kw_only=True)
class Processes:
    """For one of several processes, each given the same command."""

    distributed: Flag = False
    """Slurm, Open MPI, Kubernetes or a TPU pod has started the processes and knows them."""
    coordinator: Text = None
    """Where nothing has: host:port of process 0. Needs --num-processes and --process-id, too."""
    num_processes: Count = None
    """With --coordinator: how many processes there are."""
    process_id: Count = None
    """With --coordinator: which one this is, from 0."""
    connect_timeout: Seconds = 60.0
    """How long to wait for the others."""

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        return self.distributed or by_hand != (None, None, None)

    def begin(self, check: Callable[[], None]) -> None:
        """Check the arguments and meet the other processes, before jax is asked for devices.

        A process that is alone checks before jax is imported, which takes seconds; several meet
        first, so that a mistake of one ends all of them.
        """
        if not self.several:
            self.check_timeout()
            check()
            return
        self.check()
        self.join()
        self.together(check, "arguments")

    def check(self) -> None:
        """Raise ValueError unless all is said of the other processes, or nothing."""
        given = {
            "--coordinator": self.coordinator,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        has = [name for name, value in given.items() if value is not None]
        lacks = [name for name in given if name not in has]
        if has and lacks:
            raise ValueError(
                f"{', '.join(lacks)}: expected beside {' and '.join(has)}, got none; give all "
                "three, or --distributed alone where jax finds the processes"
            )
        self.check_timeout()

    def check_timeout(self) -> None:
        if not 0 < self.connect_timeout < math.inf:
            raise ValueError(
                f"--connect-timeout: expected seconds above 0, got {self.connect_timeout}"
            )

    def join(self) -> None:
        """Meet the other processes; to be called before anything asks jax for devices."""
        if not self.several:
            return
        from gptoss_jax import distributed

        distributed.initialize(
            coordinator=self.coordinator,
            num_processes=self.num_processes,
            process_id=self.process_id,
            timeout=self.connect_timeout,
        )
        output.keep_stdout()
        if not distributed.is_first():
            output.be_silent()

    def together(self, action: Callable[[], T], what: str) -> T:
        """Do it, and fail if any process does."""
        if not self.several:
            return action()
        from gptoss_jax import distributed

        return distributed.together(action, what)

    def agree(self, what: str, facts: Callable[[], dict[str, object]]) -> None:
        """Fail unless the facts, if anyone needs them, are the same on all processes."""
        if not self.several:
            return
        from gptoss_jax import distributed

        lines = (f"{name}: {value}" for name, value in self.together(facts, what).items())
        distributed.agree(what, "\n".join(lines))
