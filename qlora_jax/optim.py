"""Helpers for optax."""
