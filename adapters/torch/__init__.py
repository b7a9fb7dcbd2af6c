"""The PyTorch adapter: networks, a learner, and ``python -m adapters.torch.run``."""
