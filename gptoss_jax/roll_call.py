# SPDX-License-Identifier: Apache-2.0
"""Are all processes there, and are they who they should be? Asked before jax meets them.

jax aborts a process that misses the others, without an exception. So process 0 first listens on the
coordinator's port, the others tell it their number there, and all of them get one verdict. Then the
port is jax's. Knows no jax; distributed.py calls it.
"""

import contextlib
import re
import socket
import time

GREETING = "gptoss-jax process {} of {}"
WELCOME, REFUSED = "welcome", "refused: "
# Seconds for a line from what has connected. Process 0 listens to one at a time, so each stranger
# that says nothing, as a port scanner, delays the start by so much.
PATIENCE = 5.0


def split_address(coordinator: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host stands in brackets."""
    match = re.fullmatch(r"\[([^\[\]]+)\]:(\d+)|([^:\s]+):(\d+)", coordinator)
    host, port = (match[1] or match[3], int(match[2] or match[4])) if match else ("", 0)
    if not 1 <= port <= 65535:
        raise ValueError(
            f"coordinator: expected host:port, as 10.0.0.1:1234, got {coordinator!r}; give the "
            "host of process 0 and a free port there"
        )
    return host, port


def roll_call(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Return when all processes are there. Raises ConnectionError, on each that can be told."""
    host, port = split_address(coordinator)
    if process_id == 0:
        _call(port, num_processes, timeout)
    else:
        _answer(host, port, num_processes, process_id, timeout)


def _call(port: int, num_processes: int, timeout: float) -> None:
    """Process 0: wait for the others, then tell them all how it went."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        with _listen(port) as server:
            problem = _wait_for_all(server, present, num_processes, timeout)
        for connection in present.values():
            opened.enter_context(connection)
            with contextlib.suppress(OSError):
                connection.sendall(f"{REFUSED + problem if problem else WELCOME}\n".encode())
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.recv(1)  # until they hang up: who does so first keeps the port busy
    if problem:
        raise ConnectionError(problem)


def _listen(port: int) -> socket.socket:
    """On all addresses of this machine, as jax will."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ConnectionError(
            f"coordinator: expected port {port} of this machine to be free for process 0, got "
            f"{error.strerror!r}; choose another port, or end what uses it"
        ) from None


def _wait_for_all(
    server: socket.socket, present: dict[int, socket.socket], num_processes: int, timeout: float
) -> str:
    """Fill `present`, by number; returns what is wrong, or nothing."""
    deadline = time.monotonic() + timeout
    while len(present) < num_processes - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection = server.accept()[0]
        except TimeoutError:
            missing = [str(n) for n in range(1, num_processes) if n not in present]
            some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            return (
                f"processes: expected {num_processes} to come within {timeout:g} s, got "
                f"{len(present) + 1}, without {some}; see why they did not start or could not "
                "reach process 0, or allow more time"
            )
        number, total = _greeted(connection)
        if number is None:
            connection.close()  # nobody of ours
            continue
        twice = number in present or not 0 < number < num_processes
        present[-1 if twice else number] = connection
        if total != num_processes:
            return (
                f"num_processes: expected one number on all processes, got {num_processes} on "
                f"process 0 and {total} on process {number}; start all with the same"
            )
        if twice:
            return (
                f"process_id: expected each of 0 to {num_processes - 1} once, got {number} again; "
                "give every process a number of its own"
            )
    return ""


def _greeted(connection: socket.socket) -> tuple[int | None, int]:
    connection.settimeout(PATIENCE)
    found = re.fullmatch(GREETING.format(r"(\d+)", r"(\d+)"), _line(connection))
    return (int(found[1]), int(found[2])) if found else (None, 0)


def _answer(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    """Every other process: say who is there, and hear how it went."""
    with _connected(host, port, timeout) as connection:
        connection.settimeout(timeout + PATIENCE)
        with contextlib.suppress(OSError):
            connection.sendall(f"{GREETING.format(process_id, num_processes)}\n".encode())
        verdict = _line(connection)
    if verdict.startswith(REFUSED):
        raise ConnectionError(verdict.removeprefix(REFUSED))
    if verdict != WELCOME:
        raise ConnectionError(
            f"coordinator: expected process 0 of this run at {host}:{port}, got {verdict[:80]!r} "
            "from something else; check the address, and that process 0 still runs"
        )


def _connected(host: str, port: int, timeout: float) -> socket.socket:
    """A connection, tried until it works or the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((host, port), timeout=max(left, 0.001))
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # it got this very port and met itself
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise ConnectionError(
                    f"coordinator: expected process 0 at {host}:{port} within {timeout:g} s, got "
                    f"{error.strerror or error!r}; check the address, that process 0 runs there, "
                    "and that no firewall is between, or allow more time"
                ) from None
        time.sleep(0.2)


def _line(connection: socket.socket) -> str:
    """One line, or what came of it."""
    try:
        with connection.makefile(encoding="utf-8", errors="replace") as file:
            return file.readline(4096).removesuffix("\n")
    except OSError:
        return ""
