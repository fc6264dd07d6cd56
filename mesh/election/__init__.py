"""Raft-lite: a coordinator by Raft's rules, and one small record that a majority of a few voters commits.

Read ``election.py`` for what can happen, ``record.py`` for what is agreed on, ``voters.py`` for who votes.
"""
