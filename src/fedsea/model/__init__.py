"""Spans of transformer blocks: loading, cutting, the KV cache and the fast linears."""
