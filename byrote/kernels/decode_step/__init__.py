"""One decoding step of a whole model as one call of C: a *tape* of operations that names weights, caches and buffers by address.

A step of a small model reads each weight once and does little with it; taken apart into PyTorch calls it spends more time between
them than in them. A tape is written once (`byrote/model/capture.py`) and walked for every token by a team of threads that meets
some seven times a layer. The reference is the model itself: the same call, taken apart.
"""
