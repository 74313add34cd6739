"""A Ray of our own on this machine: loopback only, its own folder, nothing joined and nothing left behind."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any

import ray
from ray._private import ray_constants

_OBJECT_STORE_BYTES = 80 * 2**20  # objects are not our data plane


@contextmanager
def ray_settings() -> Iterator[None]:
    """Settings of Ray and of OpenMP, for this process and those that Ray starts from here."""
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps every address on loopback
        # Whoever may talk to Ray's processes runs code in them, and all users of this machine reach loopback.
        # Ray turns token authentication on where a token is there and nobody has chosen a mode.
        "RAY_AUTH_TOKEN": _auth_token(),
        "RAY_gcs_server_port_wait_time_s": "60",  # its first process starts slowly on a busy machine
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    before = {key: os.environ.get(key) for key in (*settings, "RAY_AUTH_MODE")}
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ.update(settings)
    # This process has imported Ray, which reads the first of them then: what we set comes too late for it.
    allowed, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = allowed
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Start Ray, and end it with everything it started.

    Args:
        num_cpus: what Ray believes the machine to have; it starts so many idle workers ahead of need.
    """
    for name in ("ray", "ray.serve"):  # what they report of themselves is no news to our users
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = tempfile.TemporaryDirectory(prefix="eightfold-", ignore_cleanup_errors=True)
    with ray_settings(), folder as path:
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=path,
            )
            _check_loopback(own_host())
            yield
        finally:
            ray.shutdown()


def _check_loopback(host: str) -> None:
    if not ip_address(host).is_loopback:
        raise RuntimeError(f"this version of Ray listens at {host}, where others reach it; use 2.60")


@cache  # Ray reads it once in a process
def _auth_token() -> str:
    return secrets.token_hex(32)


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """Join a Ray that runs; what was started on it ends with our connection."""
    ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def own_host() -> str:
    """The address by which other nodes reach this one; asked inside an actor."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Place:
    """Where an actor runs: a short name of its node, and its process there."""

    node: str
    pid: int


def place_of(actor: Any) -> "ray.ObjectRef[Place]":
    """Ask an actor where it runs."""
    return actor.__ray_call__.remote(_own_place)  # type: ignore[no-any-return]


def started(told: "Sequence[ray.ObjectRef[Any]]", what: str, seconds: float) -> list[Any]:
    """What actors that start answer, once all of them do.

    Args:
        told: their first answers.
        what: they are, for people.
        seconds: that they may take.

    Raises:
        TimeoutError: some did not.
        ray.exceptions.RayError: one failed.
    """
    try:
        return list(ray.get(list(told), timeout=seconds))
    except ray.exceptions.GetTimeoutError:
        problem = f"{what} did not come up within {seconds:g} s; ray.start_seconds may allow more"
        raise TimeoutError(problem) from None


def _own_place(_: object) -> Place:
    return Place(ray.get_runtime_context().get_node_id()[:8], os.getpid())
