"""The JAX adapter: networks, a learner, and ``python -m adapters.jax.run``."""
