"""A Ray of our own on this machine: loopback only, its own folder, nothing joined and nothing left behind."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

_OBJECT_STORE_BYTES = 80 * 2**20  # objects are not our data plane


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Start Ray, and end it with everything it started.

    Args:
        num_cpus: what Ray believes the machine to have; it starts so many idle workers ahead of need.
    """
    # These are settings of Ray and of OpenMP, inherited by the processes that Ray starts from here.
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps every address on loopback
        "RAY_AUTH_MODE": "disabled",  # nothing but loopback can reach it
        "RAY_gcs_server_port_wait_time_s": "60",  # its first process starts slowly on a busy machine
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    with tempfile.TemporaryDirectory(prefix="eightfold-", ignore_cleanup_errors=True) as folder:
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
