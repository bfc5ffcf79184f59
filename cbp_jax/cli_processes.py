"""Several processes that run one experiment: how they find each other."""

import argparse
import json
import os
import socket
import subprocess
import sys
from typing import Any, NamedTuple

from cbp_jax.experiments.share import Share

TIMEOUT = 300  # seconds, the default of JAX

# Runs in a subprocess, because JAX ends a process if its partners do not start, or if one of them ends. Lanes do not
# communicate, so the processes disconnect once they have met.
_MEET = """
import json, sys, jax
jax.distributed.initialize(**json.loads(sys.argv[1]))
visible = jax.config.read("jax_cuda_visible_devices")
print(json.dumps({"index": jax.process_index(), "count": jax.process_count(), "visible": visible}), flush=True)
jax.distributed.shutdown()
"""


class Given(NamedTuple):
    """Options of the command line about several processes.

    Attributes:
      share: this process, if given.
      coordinator: address of process 0, if given.
      detect: whether JAX finds the processes by itself.
    """

    share: Share | None = None
    coordinator: str | None = None
    detect: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cbp-jax run` about several processes."""
    group = parser.add_argument_group(
        "several processes", "share the lanes of a run; all need access to its folder (--out)"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="let JAX find the other processes: on SLURM, Open MPI, Kubernetes, Cloud TPU",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, with a port that is free there"
    )
    group.add_argument("--process-id", type=int, metavar="N", help="number of this process, from 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")


def read(given: argparse.Namespace) -> Given:
    """Read the options about several processes.

    Raises:
      ValueError: an option is missing or wrong.
    """
    options = {
        "coordinator": given.coordinator,
        "process-id": given.process_id,
        "processes": given.processes,
    }
    missing = [name for name, value in options.items() if value is None]
    if given.distributed:
        if len(missing) < len(options):
            both = ", ".join(f"--{name}" for name in options if name not in missing)
            raise ValueError(f"--distributed finds the processes by itself; leave out {both}")
        return Given(detect=True)
    if len(missing) == len(options):
        return Given()
    if missing:
        raise ValueError(
            "--coordinator, --process-id and --processes must be given together; missing: "
            + ", ".join(f"--{name}" for name in missing)
        )
    host, _, port = given.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be HOST:PORT, such as 10.0.0.1:12345, got {given.coordinator!r}")
    share = Share(given.process_id, given.processes)
    share.check(max(given.processes, 1))
    return Given(share, given.coordinator)


def meet(given: Given, timeout: int = TIMEOUT) -> Share:
    """Wait until all processes have started, using `jax.distributed`.

    Args:
      given: the options of the command line.
      timeout: seconds to wait.

    Returns:
      this process.

    Raises:
      ValueError: no cluster is found, or the coordinator has no address.
      TimeoutError: a process has not started in time.
      RuntimeError: another error of JAX, such as a port in use.
    """
    how: dict[str, Any] = {"initialization_timeout": timeout}
    if given.share is not None and given.coordinator is not None:
        host = given.coordinator.rpartition(":")[0].strip("[]")
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ValueError(f"coordinator must be the address of a machine; got {host!r} ({error})") from None
        how |= {"coordinator_address": given.coordinator, "cluster_detection_method": "deactivate"}
        how |= {"num_processes": given.share.count, "process_id": given.share.index}
        whose = f"process {given.share.index} of {given.share.count}"
        print(f"{whose}: waiting for the others at {given.coordinator}, at most {timeout} s", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-c", _MEET, json.dumps(how)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if not lines:
        raise _error(given, done.stderr, timeout)
    found = json.loads(lines[-1])
    if given.detect and found["visible"] != "all":
        import jax

        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, found["visible"])
    return Share(found["index"], found["count"])


def _error(given: Given, told: str, timeout: int) -> Exception:
    if given.detect and ("should be defined" in told or "must be defined" in told):
        return ValueError(
            "--distributed found no cluster that JAX supports; give --coordinator, --process-id and --processes"
        )
    where = f" at {given.coordinator}" if given.coordinator else ""
    if "newer incarnation" in told and given.share is not None:
        return ValueError(f"two processes met{where} with process_id {given.share.index}; each needs its own")
    if "DEADLINE_EXCEEDED" in told or "timed out" in told.lower():
        count = f"all {given.share.count} processes" if given.share is not None else "all processes"
        return TimeoutError(
            f"not {count} met{where} within {timeout} s; each must be started with the same coordinator and processes, "
            "and with a process_id of its own"
        )
    last = [line for line in told.splitlines() if line.strip()]
    return RuntimeError(f"the processes did not meet{where}: {last[-1] if last else 'JAX gives no reason'}")
