"""CIFAR-100, from the Hugging Face hub or from a local folder in the hub's layout.

Convention: labels are the hundred fine ones, in the hub's (alphabetical) order.
"""

from pathlib import Path

from adapters.benchmarks.assembly import assemble
from adapters.benchmarks.huggingface import rows_of_hub
from adapters.benchmarks.parquet import Columns, decode, read_images, split_files
from became_core.continual.data import Dataset
from became_core.errors import BecameError

__all__ = ["load_cifar100"]

_REPOSITORY = "uoft-cs/cifar100"
_FOLDER = "cifar100"  # the configuration's folder within the repository
_COLUMNS = Columns(image="img", label="fine_label", size=32, classes=100)


def load_cifar100(data_dir: Path | None) -> Dataset:
    """Return CIFAR-100: uint8 [N, 3, 32, 32], the training rows (50,000) and then the test rows (10,000).

    Args:
        data_dir: a folder that holds ``uoft-cs/cifar100/cifar100/{train,test}-*.parquet``; None reads the hub.

    Raises:
        BecameError: if the folder lacks the files, one of them is corrupt, or the hub cannot be reached.
    """
    if data_dir is None:
        train, test = (
            decode(rows_of_hub(_REPOSITORY, split), _COLUMNS, f"the {split} split of {_REPOSITORY}")
            for split in ("train", "test")
        )
        return assemble("cifar100", train, test)
    folder = data_dir / _REPOSITORY / _FOLDER
    if not folder.is_dir():
        raise BecameError(
            f"there is no folder {folder}: name by --data-dir the folder that holds {_REPOSITORY}/{_FOLDER}."
        )
    train_files, test_files = split_files(folder, "train"), split_files(folder, "test")
    return assemble("cifar100", read_images(train_files, _COLUMNS), read_images(test_files, _COLUMNS))
