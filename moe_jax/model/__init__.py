"""The network: layers, attention, transformer; with a cache for serving."""
