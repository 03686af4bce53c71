"""The names of the three mesh axes. Everything that talks across devices says which axis by these.

`EXPERT` splits the sequences of a micro-batch and the experts, `TENSOR` splits heads, expert hidden
units and (between blocks) token positions, `STAGE` splits layers. All three always exist.
"""

EXPERT = "expert"
TENSOR = "tensor"
STAGE = "stage"

# Outermost first. XLA takes consecutive devices to share a host, so `tensor`, the axis with the
# most traffic, is innermost, and `stage`, with the least, is outermost.
ALL = (STAGE, EXPERT, TENSOR)
