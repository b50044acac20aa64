"""Layers for other people's tools; those that need packages have an extra for them.

Nothing here is loaded unless asked for.
"""
