"""Whole networks, by domain, made by `create(name)`."""

from glocal.models.registry import create, names, register

__all__ = ["create", "names", "register"]
