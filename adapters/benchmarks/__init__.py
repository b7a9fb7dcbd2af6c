"""Data sets, each read into one `became_core.continual.data.Dataset`.

Convention: a loader is a function that returns the whole data set in memory as uint8 [N, C, H, W], training rows first,
and raises `BecameError` with one sentence for anything its user can mend.
"""
