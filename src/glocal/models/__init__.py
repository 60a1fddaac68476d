"""Whole networks, by domain, made by `create(name)`."""

from glocal.models.registry import create, maker, names, parameters, register

__all__ = ["create", "maker", "names", "parameters", "register"]
