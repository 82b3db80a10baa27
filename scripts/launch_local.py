"""Start several processes of one command on this machine.

    python scripts/launch_local.py -n 2 toyfeat train job.toml

Each has the variables by which toyfeat joins them (JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID), and devices of the CPU unless JAX_PLATFORMS says
otherwise.  Lines of output begin with the number of their process.  SIGTERM, SIGINT and
SIGUSR1 go to all.  When one fails the others get SIGTERM, and SIGKILL after --grace
seconds; the status is that of the one that failed first.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def main(arguments: list[str] | None = None) -> int:
    """Start the processes, wait for them and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=2, help="processes")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds to SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="and its arguments")
    args = parser.parse_args(arguments)
    if args.n < 1 or not args.command:
        parser.error(f"wanted -n of at least 1 and a command, got {args.n} processes")
    if shutil.which(args.command[0]) is None:
        parser.error(f"there is no command {args.command[0]!r}")
    address = f"127.0.0.1:{free_port()}"
    children = [start(args.command, address, args.n, i) for i in range(args.n)]
    readers = [threading.Thread(target=forward, args=x) for x in enumerate(children)]
    for reader in readers:
        reader.start()
    deadline = [float("inf")]

    def pass_on(number: int, frame: object) -> None:
        del frame
        send(children, number)
        if number != signal.SIGUSR1:
            deadline[0] = min(deadline[0], time.monotonic() + args.grace)

    for number in FORWARDED:
        signal.signal(number, pass_on)
    status = 0
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        ends = [child.poll() for child in children]
        if not status and any(ends):  # others end because of one that was killed
            index = max(range(args.n), key=lambda i: (ends[i] == -9, bool(ends[i])))
            status = ends[index] or 1
            end = f"status {status}" if status > 0 else signal.Signals(-status).name
            said = f"launch_local: process {index} of {args.n} ended with {end}"
            print(f"{said}; the others are stopped", flush=True)
            pass_on(signal.SIGTERM, None)
        if time.monotonic() > deadline[0]:
            send(children, signal.SIGKILL)
            deadline[0] = float("inf")
    for reader in readers:
        reader.join()
    status = status or next((x.returncode for x in children if x.returncode), 0)
    return 128 - status if status < 0 else status


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command: list[str], address: str, num: int, index: int) -> subprocess.Popen:
    """Start a process in a session of its own, so that signals reach it once."""
    own = {"JAX_COORDINATOR_ADDRESS": address}
    own |= {"JAX_NUM_PROCESSES": str(num), "JAX_PROCESS_ID": str(index)}
    usual = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return subprocess.Popen(
        command,
        env=usual | {"PYTHONUNBUFFERED": "1"} | dict(os.environ) | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def forward(index: int, child: subprocess.Popen) -> None:
    """Print the lines of a process behind its number."""
    for line in child.stdout or ():
        sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stdout.flush()


def send(children: list[subprocess.Popen], number: int) -> None:
    """Send a signal to the processes that still run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
