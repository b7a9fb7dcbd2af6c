"""The command ``became``, which ``python -m became`` is too, and the version.

``adapters`` has no ``__init__.py`` of ours, because AdapterHub's package has the same name and may be installed beside
ours. Then ``import adapters`` runs the code of AdapterHub, and Python looks for ``adapters.torch`` in AdapterHub's
folder alone. A wheel of ours puts its files into that very folder, so that they are found. A checkout or an editable
install has them elsewhere: there, this command finds them too, but a program of your own does not.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from became_core import BecameError, __version__

__all__ = ["__version__", "main"]

_OURS = Path(__file__).with_name("adapters")


def main() -> int:
    """Run the command with the arguments of this process.

    Returns:
        the exit status: 2 if another package named ``adapters`` is broken or shadows ours, 130 after Ctrl-C while
        packages are loaded, else the command's own.
    """
    try:
        _find_adapters()
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        from adapters.cli.__main__ import main as run_command

        return run_command()
    except KeyboardInterrupt:  # a command that has begun says itself how to go on
        print("interrupted.", file=sys.stderr)
        return 130


def _find_adapters() -> None:
    """Have the packages below ``adapters`` looked for in our folder first; others' are still found behind them."""
    try:
        import adapters
    except Exception as error:  # whatever the code of others raises
        spec = PathFinder.find_spec("adapters")
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise BecameError(
            f"the package 'adapters' in {(spec and spec.origin) or _OURS}, which is not part of became, fails to load "
            f"({cause}); repair or uninstall it, or if it is a folder of your own, run became in another folder."
        ) from error
    adapters.__path__ = [str(_OURS), *adapters.__path__]
    for package in _OURS.iterdir():  # what the code of others has loaded under these names stays loaded
        file = getattr(sys.modules.get(f"adapters.{package.name}"), "__file__", None)
        if file is not None and Path(file).parent.resolve() != package.resolve():
            raise BecameError(
                f"{file} takes the place of became's own {package}; uninstall the package that it is part of, or if it "
                "is in a folder of your own, run became in another folder."
            )


if __name__ == "__main__":
    sys.exit(main())
