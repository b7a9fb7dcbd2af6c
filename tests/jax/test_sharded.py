"""Models that lie on several devices, as JAX's sharded arrays: equal numbers, no gathered leaf, few reductions."""

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import WAIT


def test_four_devices_merge_as_one_does_and_gather_nothing(tmp_path: Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "9"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # which would keep XLA from joining the reductions
    command = [sys.executable, "-m", "tests.jax.sharded_devices", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT, check=False)
    assert ended.returncode == 0, ended.stderr
