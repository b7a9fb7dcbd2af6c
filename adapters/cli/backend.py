"""What stands in ``adapters.backend.entry``, by the name that it had here."""

from adapters.backend.entry import BACKENDS, Backend, BackendName, first_installed, load_backend

__all__ = ["BACKENDS", "Backend", "BackendName", "first_installed", "load_backend"]
