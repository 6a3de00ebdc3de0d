"""Utility and leakage of a split model, measured on the traffic that it really sends."""
