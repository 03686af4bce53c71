"""The names of the four mesh axes. Everything that talks across devices says which axis by these.

`EXPERT` splits the sequences of a micro-batch and the experts, `TENSOR` splits heads, expert hidden
units and (between blocks) token positions, `STAGE` splits layers; `DATA` splits sequences among
copies of all that. All four always exist.
"""

DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
STAGE = "stage"

# Outermost first. XLA takes consecutive devices to share a host, so `tensor`, the axis with the
# most traffic, is innermost; `stage`, with little, lies outside `expert`, and `data`, whose copies
# meet but once a step, is outermost.
ALL = (DATA, STAGE, EXPERT, TENSOR)

# Those along which devices hold different sequences of a micro-batch, and different tokens.
SEQUENCES = (DATA, EXPERT)
TOKENS = (*SEQUENCES, TENSOR)
