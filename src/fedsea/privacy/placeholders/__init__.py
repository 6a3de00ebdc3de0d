"""Sensitive spans of a text replaced by invented ones before it leaves, and put back afterwards."""
