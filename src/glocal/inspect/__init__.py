"""Reading a layer or a model: what reaches what, and how it can be used."""

from glocal.inspect.heads import head_reach, pwcca
from glocal.inspect.uses import Verdict, layers, reach, uses, verify

__all__ = ["Verdict", "head_reach", "layers", "pwcca", "reach", "uses", "verify"]
