"""The reference implementation in NumPy and float64: every formula as it is written in its paper, slow and plain.

Only tests import it. Nothing here calls a formula of ``became_core``, so agreement between the two is evidence that
both are right. Only the learner uses types of ``became_core``, because it implements the core's ``Learner``.
"""
