"""The oracle: the method in NumPy and float64, written as its formulas read, slow and plain.

Only tests import it. Nothing here calls a formula of ``became_core``, so that agreement between the two means
something; the learner alone uses the core's types, since it implements the core's protocol.
"""
