# SPDX-License-Identifier: Apache-2.0
"""How a tensor becomes the body of a payload."""

from mapl.codecs.base import Codec
from mapl.codecs.numeric import DtypeCodec

__all__ = ["Codec", "DtypeCodec"]
