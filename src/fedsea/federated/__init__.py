"""Several data owners, one adapter: averaging on Flower, and what may be said about it.

Only adapters travel here. Training rows keep their own channel to the trunk, and Flower never sees
one. This package alone imports `flwr` (extra `[federated]`).
"""
