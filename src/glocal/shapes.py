"""Shapes in signatures: jaxtyping where it is installed (tests check them at run time), plain tensors elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
else:
    try:
        from jaxtyping import Bool, Float
    except ImportError:

        class _Shaped:
            """``Float[Tensor, "B N D"]`` is then just ``Tensor``."""

            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = _Shaped

__all__ = ["Bool", "Float"]
