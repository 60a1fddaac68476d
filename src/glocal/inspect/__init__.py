"""Reading a layer or a model: what reaches what, and how it can be used."""

from glocal.inspect.uses import Verdict, reach, uses, verify

__all__ = ["Verdict", "reach", "uses", "verify"]
