"""Peers: the same cases against every library that is installed."""
