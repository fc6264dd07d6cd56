"""The generation protocol: routes, checkpointed activations, exact recovery (docs/protocol.md)."""
