"""Names of the places in a decoder layer, the same in every model family.

methods §1: k is the key (input of the down-projection), v the value (its output), h^l the residual stream that leaves
layer l. Layer numbers are 0-based.
"""

from __future__ import annotations

from typing import NamedTuple

SITE_KINDS = ("key", "value", "up", "gate", "mlp_in", "attn_out", "hidden")


class Site(NamedTuple):
    """One activation of one layer.

    kind: "key" [M], "value" [D], "up" and "gate" [M] (outputs of those linears, before any activation function; "gate"
    only where the MLP is gated), "mlp_in" [D] (what the MLP reads), "attn_out" [D] (output of the attention's last
    linear), "hidden" [D] (residual stream leaving the layer).
    """

    kind: str
    layer: int
