"""Layers for other people's tools; each module needs its extra.

Nothing here is loaded unless asked for.
"""
