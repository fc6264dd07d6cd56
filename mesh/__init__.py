"""What the nodes agree on: values, errors, election, placement, routing, the generation protocol.

Pure: nothing here does I/O, reads a clock, draws global randomness, starts a thread or imports torch.
"""
