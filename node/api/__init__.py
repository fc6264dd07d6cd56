"""The public HTTP API of a node; it knows the node only as ``node.api.service.Service``."""
