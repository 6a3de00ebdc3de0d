"""Mechanisms between bottom and wire, what they guarantee, and the ledger that keeps count."""
