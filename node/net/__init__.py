"""Bytes between nodes: sealed datagrams, the peer door, links with credit."""
