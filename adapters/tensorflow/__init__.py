"""The TensorFlow adapter: networks, a learner, and ``python -m adapters.tensorflow.run``."""
