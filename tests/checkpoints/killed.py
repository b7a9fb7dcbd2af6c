"""A merge as a process that tests kill: ``python -m tests.checkpoints.killed FOLDER OUT PAUSE [SCHEDULER]``.

It sleeps for PAUSE seconds after each block, so that there is time to kill it, and prints a line when it begins each.
The folder has two models, or two LoRA adapters. Every module of an adapter, and every block that a cluster has written,
is noted at once.
"""

import sys
import time
from pathlib import Path

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, passes


def plan_in(folder: Path) -> MergePlan:
    if (folder / "A").is_dir():
        adapters = [PlannedModel(folder / n, fisher=folder / f"F{n}.safetensors") for n in "AB"]
        return MergePlan(tuple(adapters), per="leaf", rank=4)
    models = [PlannedModel(folder / f"{n}.safetensors", fisher=folder / f"F{n}.safetensors") for n in "AB"]
    return MergePlan(tuple(models), per="leaf", shard_size=400_000)


if __name__ == "__main__":
    folder, out, pause, *scheduler = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]

    def progress(what: str, done: int, whole: int) -> None:
        print(what, done, whole, flush=True)
        time.sleep(pause)

    if (folder / "A").is_dir() or scheduler:
        vars(passes)["SYNC_SECONDS"] = 0.0
    if scheduler:
        from adapters.checkpoints import cluster

        vars(cluster)["PART"] = 100_000
        merge_checkpoints(plan_in(folder), out, scheduler=scheduler[0], progress=progress)
    else:
        merge_checkpoints(plan_in(folder), out, workers=2, progress=progress)
