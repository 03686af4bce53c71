"""The network: layers, attention, transformer."""
